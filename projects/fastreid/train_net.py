#!/usr/bin/env python
"""Train, evaluate or resume a model with CSALR through fast-reid; the flags are those of its tools/train_net.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends the process without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from csalr_plugin.errors import UserError

# Before fast-reid: this makes fast-reid importable on today's Python and torch.
from csalr_plugin.hosts.fastreid import Trainer, add_csalr_config

# isort: split
from fastreid.config import CfgNode, get_cfg
from fastreid.engine import default_argument_parser, default_setup, launch
from fastreid.utils.checkpoint import Checkpointer


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config file and the overrides, and open the log."""
    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate."""
    cfg = setup(args)
    if args.eval_only:
        cfg.defrost()
        cfg.MODEL.BACKBONE.PRETRAIN = False
        model = Trainer.build_model(cfg)
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        args = default_argument_parser().parse_args()
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
        sys.stdout.flush()
    except UserError as error:
        print(f"train_net.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train_net.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has ended, as "| head -3" does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush succeeds
        sys.exit(141)
