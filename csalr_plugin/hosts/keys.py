"""The plugin's settings in one table, and the checks for the values of settings.

Every host's configuration node is made from this table. Nothing here depends on a host: a host that writes its
keys in capitals converts them on its own side.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.models import STAGE_CHANNELS

# The text of a number, on the command line and in a file alike: Python's literals in ASCII digits. Other spellings
# (1_000, +3, 0x10, 010, non-ASCII digits, inf, nan) are not numbers.
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Check:
    """The allowed values of a setting.

    Attributes:
        allowed: the allowed values in words, for the error message.
        parse: takes a value or its text and returns the value in its proper type; raises ValueError, TypeError or
            OverflowError if the value is not allowed.
        names: names to suggest for a mistyped one.
    """

    allowed: str
    parse: Callable[[Any], Any]
    names: tuple[str, ...] = ()

    def __call__(self, key: str, value: object) -> Any:
        """Return `value` in its proper type.

        Raises:
            UserError: the value is not allowed; the message names `key`.
        """
        try:
            return self.parse(value)
        except (TypeError, ValueError, OverflowError):
            hint = suggest(value, self.names) if isinstance(value, str) else ""
            raise UserError(f"config key {shown(key)} is {shown(value)}; it must be {self.allowed}.{hint}") from None


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def integer(low: int | None = None, high: int | None = None) -> Check:
    """Check for an integer from `low` to `high`, both included; None leaves that end open."""

    def parse(value: Any) -> int:
        if isinstance(value, str):
            _require(_INTEGER.fullmatch(value.strip()) is not None)
            value = int(value)
        _require(isinstance(value, int) and not isinstance(value, bool))
        _require((low is None or value >= low) and (high is None or value <= high))
        return int(value)

    return Check("an integer" + _range(low, high), parse)


def number(
    low: float | None = None, high: float | None = None, *, above: float | None = None, below: float | None = None
) -> Check:
    """Check for a finite number from `low` to `high`, both included, greater than `above` and less than `below`."""

    def parse(value: Any) -> float:
        if isinstance(value, str):
            _require(_NUMBER.fullmatch(value.strip()) is not None)
        _require(isinstance(value, (str, int, float)) and not isinstance(value, bool))
        result = float(value)
        _require(math.isfinite(result))
        _require((low is None or result >= low) and (high is None or result <= high))
        _require((above is None or result > above) and (below is None or result < below))
        return result

    return Check("a number" + _range(low, high, above, below), parse)


def _range(low: float | None, high: float | None, above: float | None = None, below: float | None = None) -> str:
    if low is not None and high is not None:
        return f" from {_plain(low)} to {_plain(high)}"
    bounds = (("greater than", above), ("of at least", low), ("less than", below), ("of at most", high))
    words = [f"{words} {_plain(bound)}" for words, bound in bounds if bound is not None]
    return f" {' and '.join(words)}" if words else ""


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _parse_boolean(value: Any) -> bool:
    if isinstance(value, str):
        _require(value.lower() in ("true", "false"))
        return value.lower() == "true"
    _require(isinstance(value, bool))
    return bool(value)


def _parse_text(value: Any) -> str:
    # Not a float: YAML has lost its spelling, 0.10 is 0.1 by now.
    _require(isinstance(value, (str, int)) and not isinstance(value, bool))
    text = str(value)
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _parse_path(value: Any) -> str:
    path = _parse_text(value)
    _require("\0" not in path)
    return os.path.expanduser(path)


def _parse_folder(value: Any) -> str:
    _require(value != "")
    return _parse_path(value)


BOOLEAN = Check("true or false", _parse_boolean)
TEXT = Check("text", _parse_text)
PATH = Check("a path", _parse_path)
"""A file or folder; ``~`` and ``~user`` at its start become the home folder."""
FOLDER = Check("the path of a folder", _parse_folder)
"""As `PATH`, and not empty, which would be the current folder."""


def one_of(*names: str) -> Check:
    """Check for one of `names`."""

    def parse(value: Any) -> str:
        text = _parse_text(value)
        _require(text in names)
        return text

    return Check("one of " + ", ".join(names), parse, names)


def list_of(item: Check, length: int | None = None, *, least: int = 0) -> Check:
    """Check for a list: a sequence, one bare item, or text such as ``20,40`` or ``[20, 40]``.

    Args:
        item: the check of each item.
        length: the number of items; None allows any number from `least`.
        least: the smallest number of items.
    """

    def parse(value: Any) -> list[Any]:
        if isinstance(value, str):
            inner = value.strip()
            if inner[:1] + inner[-1:] in ("[]", "()"):
                inner = inner[1:-1]
            value = [word.strip() for word in inner.split(",") if word.strip()]
        elif not isinstance(value, (list, tuple)):
            value = [value]
        _require(len(value) >= least if length is None else len(value) == length)
        return [item.parse(one) for one in value]

    kind = "a comma-separated list" + (f" of {length}" if length else f" of at least {least}" if least else "")
    return Check(f"{kind}, each {item.allowed}", parse, item.names)


MANY = 1_000_000
"""The upper bound of counts that have no natural one: epochs, batches, steps."""

_MOST_LANDMARKS = 1000


def _parse_landmarks(value: Any) -> tuple[int, ...]:
    return tuple(list_of(integer(1, _MOST_LANDMARKS), 2).parse(value))


def _parse_stages(value: Any) -> tuple[int, ...]:
    stages = tuple(list_of(integer(1, 4), least=1).parse(value))
    _require(len(set(stages)) == len(stages))
    return stages


def _parse_gate_lr(value: Any) -> str:
    return "auto" if value == "auto" else str(number(0).parse(value))


def _parse_keep(value: Any) -> str:
    return "all" if value == "all" else str(integer(1, MANY).parse(value))


def _parse_layers(value: Any) -> tuple[str, ...]:
    layers = tuple(list_of(TEXT).parse(value))
    _require(all(layers) and len(set(layers)) == len(layers))
    return layers


LANDMARKS = Check(
    f"two positive integers of at most {_MOST_LANDMARKS}, rows and columns, such as 12,8", _parse_landmarks
)
GATE_LR = Check("auto or a number of at least 0", _parse_gate_lr)
KEEP = Check("an integer of at least 1, or all", _parse_keep)
LAYERS = Check("distinct names of layers, such as layer1,layer2", _parse_layers)
STAGES = Check("distinct stages from 1 to 4, at least one, such as 1,2,3", _parse_stages)


@dataclass(frozen=True)
class Key:
    """One setting: its name under the plugin's node, its default, its allowed values, and a description."""

    name: str
    default: Any
    check: Check
    comment: str


KEYS = (
    Key("landmarks", (12, 8), LANDMARKS, "landmark grid of CSALR: rows, columns"),
    Key("groups", 2, integer(1, 2048), "channel groups of CSA and CSALR"),
    Key("stages", (1, 2, 3), STAGES, "PCB: ResNet-50 stages that an attention block follows"),
    Key("after", (), LAYERS, "other networks: layers that a block follows; empty: the default of the family"),
    Key("key_ratio", 0.25, number(high=1, above=0), "channels of queries and keys, as a share of the map's"),
    Key("supervision_weight", 1.0, number(0), "lambda of Eq. 18: weight of the supervision branches' losses"),
    Key(
        "pretrained_weights",
        "",
        PATH,
        "path of ImageNet weights, for PCB of a torchvision ResNet-50; empty: download",
    ),
    Key("attention_lr", 1.0, number(above=0), "learning rate of blocks and branches, relative to that of new layers"),
    Key(
        "gate_lr",
        "auto",
        GATE_LR,
        "learning rate of the gates alpha, relative to that of new layers; auto: 0.1 with SGD, 1 with others",
    ),
    Key("clip_gradient", 1.0, number(0), "largest gradient norm of a block; 0: no clipping"),
    Key("warmup", 100, integer(0, MANY), "optimizer steps of the warm-up of blocks, branches and gates"),
    Key("warmup_all", False, BOOLEAN, "warm up all layers, not blocks, branches and gates alone"),
    Key(
        "plain_supervision",
        False,
        BOOLEAN,
        "pcb and pcb_rpp: supervision branches on the plain stage outputs, a control without attention",
    ),
    Key(
        "accumulate",
        1,
        integer(1, MANY),
        "batches per optimizer step; batch norm and the triplet loss still see one batch at a time",
    ),
    Key(
        "sync_batch_norm",
        False,
        BOOLEAN,
        "batch norm over the batches of all processes (torchrun), not of each process alone",
    ),
    Key(
        "amp",
        "none",
        one_of("none", "bf16", "fp16"),
        "arithmetic of the network: fp32, bf16 autocast, or fp16 autocast with a loss scale",
    ),
    Key("channels_last", False, BOOLEAN, "channels_last memory format of images and feature maps"),
    Key("compile", False, BOOLEAN, "compile the network with torch.compile: minutes at first, then faster"),
    Key("keep", "1", KEEP, "newest checkpoints to keep, or all; the one with the best mAP stays in addition"),
    Key("overwrite", False, BOOLEAN, "let a run write into a folder that holds an earlier run's checkpoints"),
    Key("shared_identities", False, BOOLEAN, "let a dataset folder:PATH have an identity in both train and query"),
    Key("rpp.pcb_epochs", 40, integer(0, MANY), "epochs of plain PCB before refined part pooling"),
    Key(
        "rpp.part_classifier_epochs",
        5,
        integer(0, MANY),
        "first epochs of RPP, in which only the part classifier trains",
    ),
    Key("tensorboard.maps_every", 0, integer(0, MANY), "epochs between pictures of the attention maps; 0: none"),
    Key("tensorboard.projector", False, BOOLEAN, "show the queries' embeddings in TensorBoard's projector"),
)


def defaults() -> dict[str, Any]:
    """Return every setting's default as a nested dictionary, new on each call."""
    tree: dict[str, Any] = {}
    for key in KEYS:
        *path, leaf = key.name.split(".")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = key.default
    return tree


def check_groups(groups: int, key_ratio: float, stages: tuple[int, ...], *, node: str = "csalr") -> None:
    """Check that `groups` divides the block's channels C and its key channels C' = key_ratio * C.

    Args:
        groups, key_ratio, stages: the settings.
        node: the host's spelling of the plugin's node, for the message.

    Raises:
        UserError: `groups` does not divide them at one of the stages.
    """
    in_case = str.upper if node.isupper() else str.lower
    for stage in stages:
        channels = STAGE_CHANNELS[stage]
        for name, count in (("channels", channels), ("key channels", round(channels * key_ratio))):
            if count < 1 or count % groups:
                raise UserError(
                    f"config key '{node}.{in_case('groups')}' is {groups}, which does not divide the {count} {name} of "
                    f"stage {stage} ({node}.{in_case('key_ratio')} {key_ratio:g}); use a power of two such as 2."
                )


def check_phases(key: str, epochs: int, phase_key: str, pcb_epochs: int, model: str) -> None:
    """Check that refined part pooling begins before a training ends.

    Args:
        key, epochs: the host's key of the number of epochs, and its value.
        phase_key, pcb_epochs: the key of the number of epochs before refined part pooling, and its value.
        model: the name of the model.

    Raises:
        UserError: it would never begin.
    """
    if epochs <= pcb_epochs:
        raise UserError(
            f"config key '{key}' is {epochs}, and '{phase_key}' is {pcb_epochs}: the refined part pooling of {model} "
            f"would never begin; set {key} to more than {pcb_epochs}, or {phase_key} to less than {epochs}."
        )
