"""The plugin's own settings: one table, from which every host's configuration node is made.

Nothing here knows a host. A host that writes its keys in capitals does so on its own side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csalr_plugin.errors import UserError, suggest
from csalr_plugin.models import STAGE_CHANNELS


@dataclass(frozen=True)
class Check:
    """What a setting may be; `parse` takes a value or the text of one, and raises ValueError or TypeError."""

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
        except (TypeError, ValueError):
            hint = suggest(str(value), self.names)
            raise UserError(f"config key '{key}' is {value!r}; it must be {self.allowed}.{hint}") from None


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def integer(low: int | None = None, high: int | None = None) -> Check:
    """Check for an integer from `low` to `high`, both included; None leaves that end open."""

    def parse(value: Any) -> int:
        number = int(value) if isinstance(value, str) else value
        _require(isinstance(number, int) and not isinstance(number, bool))
        _require((low is None or number >= low) and (high is None or number <= high))
        return int(number)

    return Check("an integer" + _span(low, high), parse)


def number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Check:
    """Check for a finite number from `low` to `high`, both included, and greater than `above`."""

    def parse(value: Any) -> float:
        _require(isinstance(value, (str, int, float)) and not isinstance(value, bool))
        result = float(value)
        _require(math.isfinite(result))
        _require((low is None or result >= low) and (high is None or result <= high))
        _require(above is None or result > above)
        return result

    more = "" if above is None else f" greater than {above:g}" + (" and" if high is not None else "")
    return Check("a number" + more + _span(low, high), parse)


def _span(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if low is not None:
        return f" of at least {low:g}"
    return "" if high is None else f" of at most {high:g}"


def _parse_boolean(value: Any) -> bool:
    if isinstance(value, str):
        _require(value.lower() in ("true", "false"))
        return value.lower() == "true"
    _require(isinstance(value, bool))
    return bool(value)


def _parse_text(value: Any) -> str:
    _require(isinstance(value, (str, int, float)) and not isinstance(value, bool))
    text = str(value)
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


BOOLEAN = Check("true or false", _parse_boolean)
TEXT = Check("text", _parse_text)


def one_of(*names: str) -> Check:
    """Check for one of `names`."""

    def parse(value: Any) -> str:
        text = _parse_text(value)
        _require(text in names)
        return text

    return Check("one of " + ", ".join(names), parse, names)


def list_of(item: Check) -> Check:
    """Check for a list: a sequence, one bare item, or text such as ``20,40`` or ``[20, 40]``."""

    def parse(value: Any) -> list[Any]:
        if isinstance(value, str):
            inner = value.strip()
            if inner[:1] + inner[-1:] in ("[]", "()"):
                inner = inner[1:-1]
            value = [word.strip() for word in inner.split(",") if word.strip()]
        elif not isinstance(value, (list, tuple)):
            value = [value]
        return [item.parse(one) for one in value]

    return Check(f"a comma-separated list, each {item.allowed}", parse, item.names)


def _parse_landmarks(value: Any) -> tuple[int, ...]:
    grid = tuple(list_of(integer(1)).parse(value))
    _require(len(grid) == 2)
    return grid


def _parse_stages(value: Any) -> tuple[int, ...]:
    stages = tuple(list_of(integer(1, 4)).parse(value))
    _require(len(stages) > 0 and len(set(stages)) == len(stages))
    return stages


LANDMARKS = Check("two positive integers, rows and columns, such as 12,8", _parse_landmarks)
STAGES = Check("distinct stages from 1 to 4, at least one, such as 1,2,3", _parse_stages)


@dataclass(frozen=True)
class Key:
    """One setting: its name under the plugin's node, its default, what is allowed, what it does."""

    name: str
    default: Any
    check: Check
    comment: str


KEYS = (
    Key("landmarks", (12, 8), LANDMARKS, "landmark grid of CSALR: rows, columns"),
    Key("groups", 2, integer(1), "channel groups of CSA and CSALR"),
    Key("stages", (1, 2, 3), STAGES, "ResNet-50 stages that an attention block follows"),
    Key(
        "key_ratio",
        0.25,
        number(high=1, above=0),
        "query and key channels, as a share of the map's",
    ),
    Key("supervision_weight", 1.0, number(0), "lambda of Eq. 18: weight of the supervision branches' losses"),
    Key("pretrained_weights", "", TEXT, "a torchvision ResNet-50 state dict; empty: a download"),
    Key(
        "attention_lr",
        1.0,
        number(above=0),
        "learning rate of blocks and branches, times that of new layers",
    ),
    Key("gate_lr", 0.1, number(0), "learning rate of the gates alpha, times that of new layers"),
    Key("clip_gradient", 1.0, number(0), "largest gradient norm of a block; 0: no clipping"),
    Key("warmup", 100, integer(0), "optimizer steps over which the learning rate of blocks, branches and gates rises"),
    Key(
        "accumulate",
        1,
        integer(1),
        "batches to one optimizer step; batch norm and the triplet loss still see one batch at a time",
    ),
    Key(
        "sync_batch_norm",
        False,
        BOOLEAN,
        "batch norm sees the batches of all processes (torchrun), not its own process's alone",
    ),
    Key(
        "amp",
        "none",
        one_of("none", "bf16", "fp16"),
        "arithmetic of the network: fp32, bf16 autocast, or fp16 autocast with a loss scale",
    ),
    Key("channels_last", False, BOOLEAN, "keep images and feature maps with the channels innermost in memory"),
    Key("compile", False, BOOLEAN, "compile the network with torch.compile: minutes at first, then faster"),
    Key("overwrite", False, BOOLEAN, "let a run write into a folder that holds an earlier run's checkpoints"),
    Key("rpp.pcb_epochs", 40, integer(0), "epochs of plain PCB before refined part pooling"),
    Key(
        "rpp.part_classifier_epochs",
        5,
        integer(0),
        "first RPP epochs, for the part classifier alone",
    ),
    Key("tensorboard.maps_every", 0, integer(0), "epochs between pictures of the blocks' attention maps; 0: none"),
    Key("tensorboard.projector", False, BOOLEAN, "show the queries' embeddings in TensorBoard's projector"),
)


def defaults() -> dict[str, Any]:
    """Return every setting's default as a nested dictionary, fresh on each call."""
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
        node: the host's name of the plugin's node, as its messages shall have it.

    Raises:
        UserError: at the first stage where it does not.
    """
    in_case = str.upper if node.isupper() else str.lower
    for stage in stages:
        channels = STAGE_CHANNELS[stage]
        for what, count in (("channels", channels), ("key channels", round(channels * key_ratio))):
            if count < 1 or count % groups:
                raise UserError(
                    f"config key '{node}.{in_case('groups')}' is {groups}, which does not divide the {count} {what} of "
                    f"stage {stage} ({node}.{in_case('key_ratio')} {key_ratio:g}); use a power of two such as 2."
                )
