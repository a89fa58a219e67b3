#!/usr/bin/env python
"""Train, evaluate or resume a model with CSALR through fast-reid; the flags are those of its tools/train_net.py."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends the process without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from csalr_plugin.command_line import exit_code

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


def run() -> None:
    """Read the flags, and call `main` in every process."""
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(exit_code("train_net.py", run))
