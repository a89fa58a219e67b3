"""Parsing the arguments of the host's train script, without losing overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from csalr_plugin.command_line import Parser
from csalr_plugin.errors import UserError, shown, suggest
from csalr_plugin.hosts.torchreid.config import Config, default_config

_ONE_WORD = ("--config-file", "--root")
_MANY_WORDS = ("-s", "--sources", "-t", "--targets", "--transforms")
FLAGS = _ONE_WORD + _MANY_WORDS
# A dotted key in any case; use_gpu is the one key of the host's that has no dot.
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)+|use_gpu", re.IGNORECASE)


@dataclass
class Arguments:
    """The parsed command line; empty means not given."""

    config_file: str = ""
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    transforms: list[str] = field(default_factory=list)
    root: str = ""
    overrides: list[str] = field(default_factory=list)


def parse_arguments(argv: Sequence[str], prog: str) -> Arguments:
    """Parse the flags and overrides of the host's train script.

    ``-s``, ``-t`` and ``--transforms`` take words up to the next flag or config key, so that overrides may stand
    before, between and after the flags. ``--help`` prints the help and exits, as argparse does.

    Raises:
        UserError: for an unknown flag, a flag or a key without a value, or a word that is neither.
    """
    flags, overrides = _split(argv)
    return Arguments(**vars(_parser(prog).parse_args(flags)), overrides=overrides)


def config_from_arguments(arguments: Arguments) -> Config:
    """Build the config from the defaults, the file, the flags and the overrides, in this order, and validate it.

    Raises:
        UserError: for any setting that is not allowed.
    """
    config = default_config()
    if arguments.config_file:
        config.merge_from_file(arguments.config_file)
    for name in ("root", "sources", "targets", "transforms"):
        if value := getattr(arguments, name):
            config.merge_from_list([f"data.{name}", value])
    config.merge_from_list(arguments.overrides)
    config.validate()
    return config


def host_argv(arguments: Arguments) -> list[str]:
    """Return the arguments in the only order in which the host's own parser reads all of them.

    Its ``-s``, ``-t`` and ``--transforms`` take all words that follow, so ``--root`` must stand between them and the
    overrides; the host ignores an empty root.
    """
    argv = ["--config-file", arguments.config_file]
    for flag in ("sources", "targets", "transforms"):
        if words := getattr(arguments, flag):
            argv += [f"--{flag}", *words]
    argv += ["--root", arguments.root]
    for key, value in zip(arguments.overrides[0::2], arguments.overrides[1::2], strict=True):
        argv += [key.lower(), value]
    return argv


def flag_of(word: str) -> str:
    """Return the flag of ``--flag=value`` or ``-fvalue``."""
    return word.split("=")[0] if word.startswith("--") else word[:2]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate flags with their words from overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    words = list(reversed(argv))
    collecting = False  # the last flag takes more words
    while words:
        word = words.pop()
        if word.startswith("-"):
            if flag_of(word) not in (*FLAGS, "-h", "--help"):
                raise UserError(
                    f"unknown flag {shown(word)}; it must be one of {', '.join(FLAGS)}.{suggest(word, FLAGS)}"
                )
            flags.append(word)
            collecting = word in _MANY_WORDS
            if word in _ONE_WORD and words and not words[-1].startswith("-"):
                flags.append(words.pop())
        elif collecting and not _KEY.fullmatch(word):
            flags.append(word)
        elif not _KEY.fullmatch(word):
            raise UserError(
                f"{shown(word)} is neither a flag nor a config key; overrides are pairs such as 'train.lr 0.1', "
                "and a list is one word such as 12,8."
            )
        elif not words or words[-1] in FLAGS:
            raise UserError(f"config key {shown(word)} has no value; overrides are pairs: KEY VALUE.")
        else:
            collecting = False
            overrides += [word, words.pop()]
    return flags, overrides


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config-file FILE] [-s NAME ...] [-t NAME ...] [--transforms NAME ...]\n"
        f"       {' ' * len(prog)} [--root DIR] [KEY VALUE ...]",
        description="Train or evaluate a model through torchreid, with the flags and keys of its own script.",
        epilog="KEY VALUE: any config key of torchreid or of the plugin's node csalr, in any case, such as\n"
        "  model.name pcb_csalr          the model ('csalr models' lists the plugin's)\n"
        "  test.evaluate True            evaluate only; with model.load_weights FILE\n"
        "  model.resume FILE             resume a run; settings that are not given are its checkpoint's\n"
        "  csalr.landmarks 12,8          a list is one word\n\n"
        f"example:\n  {prog} --config-file configs/torchreid/pcb_384x128_sgd.yaml \\\n"
        "    -s market1501 -t market1501 --root reid-data MODEL.NAME pcb_csalr csalr.groups 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file of config keys")
    for short, name, purpose in (("-s", "sources", "to train on"), ("-t", "targets", "to evaluate on")):
        parser.add_argument(
            short,
            f"--{name}",
            nargs="+",
            default=[],
            metavar="NAME",
            help=f"datasets {purpose}, or folder:PATH (data.{name})",
        )
    parser.add_argument(
        "--transforms", nargs="+", default=[], metavar="NAME", help="data augmentation (data.transforms)"
    )
    parser.add_argument("--root", default="", metavar="DIR", help="folder of the datasets (data.root)")
    return parser
