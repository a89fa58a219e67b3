"""Helpers of the tests of fast-reid: tiny settings, a fixture for its logs, and a train script.

The script has the shape of fast-reid's tools/train_net.py, which its PyPI package does not contain.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

NEEDED = ("fastreid", "faiss", "sklearn", "termcolor")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

TINY = (
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.PRETRAIN", "False", "CSALR.LANDMARKS", "2,2", "CSALR.STAGES", "3"),
    *("INPUT.SIZE_TRAIN", "[64, 32]", "INPUT.SIZE_TEST", "[128, 64]", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_EPOCH", "1"),
    *("SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1"),
)


def settings(*overrides: Any, file: str = "pcb_384x128_sgd.yml") -> Any:
    """fast-reid's settings for a tiny training, with overrides."""
    from csalr_plugin.hosts.fastreid import add_csalr_config
    from csalr_plugin.hosts.fastreid.config import own_config

    # isort: split
    from fastreid.config import get_cfg

    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_from_file(own_config(file))
    cfg.merge_from_list([*TINY, *overrides])
    return cfg


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """Remove the handlers of fast-reid's loggers, which write to the console that pytest closes after each test."""
    yield
    for name in ("fastreid", "fastreid.csalr"):
        logging.getLogger(name).handlers.clear()
    vars(sys.modules["fastreid.utils.logger"])["setup_logger"].cache_clear()


SCRIPT = """
from fastreid.config import get_cfg
from fastreid.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from fastreid.utils.checkpoint import Checkpointer

def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        cfg.defrost()
        cfg.MODEL.BACKBONE.PRETRAIN = False
        model = DefaultTrainer.build_model(cfg)
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
        return DefaultTrainer.test(cfg, model)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    print("Command Line Args:", args)
    launch(main, args.num_gpus, num_machines=args.num_machines, machine_rank=args.machine_rank,
           dist_url=args.dist_url, args=(args,))
"""
