"""Allowed values of fast-reid's own config keys.

fast-reid checks the type of a value alone. It finds a value out of range late, by an error that does not name the key,
or never.
"""

from __future__ import annotations

import math
from typing import Any

from fastreid.layers import any_softmax, pooling

from csalr_plugin.hosts.keys import BOOLEAN, MANY, PATH, TEXT, Check, integer, list_of, number, one_of

IDENTITY_SAMPLERS = ("NaiveIdentitySampler", "BalancedIdentitySampler")

_PROBABILITY = number(0, 1)
_FACTOR = number(0)
_SIZE = list_of(integer(1, 10_000), least=1)
_NORM = one_of("BN", "syncBN", "GhostBN", "FrozenBN", "GN")


def _parse_smoothing(value: Any) -> float:
    smoothing: float = number(below=1).parse(value)
    if smoothing < 0 and smoothing != -1:
        raise ValueError
    return smoothing


def _parse_norm_type(value: Any) -> float:
    if value in ("inf", ".inf", math.inf):
        return math.inf
    norm_type: float = number(above=0).parse(value)
    return norm_type


def _parse_device(value: Any) -> str:
    name: str = TEXT.parse(value)
    index = name.removeprefix("cuda:")
    if name not in ("cpu", "cuda") and (index == name or not (index.isascii() and index.isdigit())):
        raise ValueError
    return name


CHECKS: dict[str, Check] = {
    "MODEL.DEVICE": Check("cpu, cuda, or cuda:N with the number of a GPU", _parse_device),
    "MODEL.FREEZE_LAYERS": list_of(TEXT),
    "MODEL.QUEUE_SIZE": integer(1, MANY),
    "MODEL.BACKBONE.LAST_STRIDE": integer(1, 2),
    "MODEL.BACKBONE.FEAT_DIM": integer(1, MANY),
    "MODEL.BACKBONE.NORM": _NORM,
    "MODEL.BACKBONE.SIE_COE": number(),
    "MODEL.BACKBONE.STRIDE_SIZE": list_of(integer(1, 10_000), 2),
    "MODEL.BACKBONE.DROP_PATH_RATIO": number(0, below=1),
    "MODEL.BACKBONE.DROP_RATIO": number(0, below=1),
    "MODEL.BACKBONE.ATT_DROP_RATE": number(0, below=1),
    "MODEL.BACKBONE.PRETRAIN_PATH": PATH,
    "MODEL.HEADS.NORM": _NORM,
    "MODEL.HEADS.NUM_CLASSES": integer(0, MANY),
    "MODEL.HEADS.EMBEDDING_DIM": integer(0, MANY),
    "MODEL.HEADS.NECK_FEAT": one_of("before", "after"),
    "MODEL.HEADS.POOL_LAYER": one_of(*pooling.__all__),
    "MODEL.HEADS.CLS_LAYER": one_of(*any_softmax.__all__),
    "MODEL.HEADS.MARGIN": _FACTOR,
    "MODEL.HEADS.SCALE": integer(1, MANY),
    "MODEL.LOSSES.NAME": list_of(one_of("CrossEntropyLoss", "TripletLoss", "CircleLoss", "Cosface"), least=1),
    "MODEL.LOSSES.CE.EPSILON": Check("a number from 0 to less than 1, or -1 for adaptive smoothing", _parse_smoothing),
    "MODEL.LOSSES.CE.ALPHA": _PROBABILITY,
    "MODEL.LOSSES.CE.SCALE": _FACTOR,
    "MODEL.LOSSES.FL.ALPHA": _PROBABILITY,
    "MODEL.LOSSES.FL.GAMMA": integer(0, 1000),
    "MODEL.LOSSES.FL.SCALE": _FACTOR,
    "MODEL.LOSSES.TRI.MARGIN": _FACTOR,
    "MODEL.LOSSES.TRI.SCALE": _FACTOR,
    "MODEL.LOSSES.CIRCLE.MARGIN": _PROBABILITY,
    "MODEL.LOSSES.CIRCLE.GAMMA": integer(1, MANY),
    "MODEL.LOSSES.CIRCLE.SCALE": _FACTOR,
    "MODEL.LOSSES.COSFACE.MARGIN": _PROBABILITY,
    "MODEL.LOSSES.COSFACE.GAMMA": integer(1, MANY),
    "MODEL.LOSSES.COSFACE.SCALE": _FACTOR,
    "MODEL.WEIGHTS": PATH,
    "MODEL.PIXEL_MEAN": list_of(number(0, 255), 3),
    "MODEL.PIXEL_STD": list_of(number(above=0), 3),
    "KD.EMA.MOMENTUM": _PROBABILITY,
    "INPUT.SIZE_TRAIN": _SIZE,
    "INPUT.SIZE_TEST": _SIZE,
    "INPUT.CROP.SIZE": _SIZE,
    "INPUT.CROP.SCALE": list_of(number(above=0), 2),
    "INPUT.CROP.RATIO": list_of(number(above=0), 2),
    "INPUT.FLIP.PROB": _PROBABILITY,
    "INPUT.PADDING.MODE": one_of("constant", "edge", "reflect", "symmetric"),
    "INPUT.PADDING.SIZE": integer(0, 1000),
    "INPUT.CJ.PROB": _PROBABILITY,
    "INPUT.CJ.BRIGHTNESS": _FACTOR,
    "INPUT.CJ.CONTRAST": _FACTOR,
    "INPUT.CJ.SATURATION": _FACTOR,
    "INPUT.CJ.HUE": number(0, 0.5),
    "INPUT.AUTOAUG.PROB": _PROBABILITY,
    "INPUT.AUGMIX.PROB": _PROBABILITY,
    "INPUT.REA.PROB": _PROBABILITY,
    "INPUT.REA.VALUE": list_of(number(0, 255), 3),
    "INPUT.RPT.PROB": _PROBABILITY,
    "DATASETS.NAMES": list_of(TEXT, least=1),
    "DATASETS.TESTS": list_of(TEXT, least=1),
    # Not SetReWeightSampler: it asks for batches larger than its sets, and makes only batches as large as these.
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", *IDENTITY_SAMPLERS, "ImbalancedDatasetSampler"),
    "DATALOADER.NUM_INSTANCE": integer(1, MANY),
    "DATALOADER.NUM_WORKERS": integer(0, 1000),
    "DATALOADER.SET_WEIGHT": list_of(integer(0, MANY)),
    "SOLVER.MAX_EPOCH": integer(1, MANY),
    "SOLVER.BASE_LR": number(above=0),
    "SOLVER.HEADS_LR_FACTOR": _FACTOR,
    "SOLVER.MOMENTUM": number(0, below=1),
    "SOLVER.WEIGHT_DECAY": _FACTOR,
    "SOLVER.WEIGHT_DECAY_NORM": _FACTOR,
    "SOLVER.WEIGHT_DECAY_BIAS": _FACTOR,
    "SOLVER.BIAS_LR_FACTOR": _FACTOR,
    "SOLVER.SCHED": one_of("MultiStepLR", "CosineAnnealingLR"),
    "SOLVER.DELAY_EPOCHS": integer(0, MANY),
    "SOLVER.GAMMA": number(high=1, above=0),
    "SOLVER.STEPS": list_of(integer(1, MANY), least=1),
    "SOLVER.ETA_MIN_LR": _FACTOR,
    "SOLVER.WARMUP_FACTOR": _PROBABILITY,
    "SOLVER.WARMUP_ITERS": integer(0, MANY),
    "SOLVER.WARMUP_METHOD": one_of("constant", "linear", "exp"),
    "SOLVER.FREEZE_ITERS": integer(0, MANY),
    "SOLVER.CHECKPOINT_PERIOD": integer(1, MANY),
    "SOLVER.IMS_PER_BATCH": integer(2, MANY),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": number(above=0),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Check("a number greater than 0, or inf", _parse_norm_type),
    "TEST.EVAL_PERIOD": integer(1, MANY),
    "TEST.IMS_PER_BATCH": integer(1, MANY),
    "TEST.METRIC": one_of("cosine", "euclidean"),
    "TEST.AQE.ALPHA": _FACTOR,
    "TEST.AQE.QE_TIME": integer(1, 1000),
    "TEST.AQE.QE_K": integer(1, MANY),
    "TEST.RERANK.K1": integer(1, MANY),
    "TEST.RERANK.K2": integer(1, MANY),
    "TEST.RERANK.LAMBDA": _PROBABILITY,
    "TEST.PRECISE_BN.NUM_ITER": integer(1, MANY),
    "OUTPUT_DIR": PATH,
}

_OF_A_TYPE = {bool: BOOLEAN, int: integer(), float: number(), str: TEXT}


def check_of(key: str, current: Any) -> Check | None:
    """Return the check of a key of fast-reid's.

    Args:
        key: in capitals.
        current: its present value, whose type decides for keys without a range.
    """
    return CHECKS.get(key) or _OF_A_TYPE.get(type(current))
