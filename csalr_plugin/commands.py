"""The console command `csalr`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from csalr_plugin.command_line import Parser, positive
from csalr_plugin.errors import SharedError, UserError, suggest
from csalr_plugin.version import __version__

_DESCRIPTION = "SA, CSA and CSALR attention for person re-identification, inside torchreid or fast-reid."
_EPILOG = """commands:
  train           train, evaluate or resume a model through torchreid
  run             train, evaluate or resume through a script of the host's own, unmodified
  models          the models with their cost, and the default settings
  demo            make a small data set, train pcb_csalr on it, show what training brought
  bench           measure what every model costs, side by side
  reproduce       the paper's tables and figures, our numbers beside the paper's
  attention-maps  the full attention maps beside those of CSALR's factors (Figure 4)

'csalr COMMAND --help' says more.

example:
  csalr train --config-file configs/torchreid/pcb_384x128_sgd.yaml \\
    -s market1501 -t market1501 --root reid-data MODEL.NAME pcb_csalr"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        process = os.environ.get("RANK", "0")  # of torchrun's
        if process == "0":
            print(f"csalr: error: {_one_line(error)}", file=sys.stderr)
        elif isinstance(error, SharedError):
            time.sleep(1)  # torchrun ends the first as soon as one of us ends, and it shall have told it by then
        else:
            print(f"csalr: error: in process {process}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("csalr: interrupted", file=sys.stderr)
        return 130


def _main(argv: Sequence[str]) -> int:
    commands = {"train": _train, "run": _run, "models": _models, "demo": _demo, "bench": _bench}
    commands |= {"reproduce": _reproduce, "attention-maps": _attention_maps}  # of projects/paper
    parser = Parser(
        prog="csalr",
        usage="csalr COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"csalr {__version__}")
    parser.add_argument("command", nargs="?", default="", help=argparse.SUPPRESS)
    # A command reads its own words: argparse would take overrides that stand among flags apart.
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if not given.command:
        parser.error(f"a command is missing, one of {', '.join(commands)}")
    if given.command not in commands:
        hint = suggest(given.command, commands)
        raise UserError(f"unknown command '{given.command}'; it must be one of {', '.join(commands)}.{hint}")
    commands[given.command](given.words)
    return 0


def _one_line(error: UserError) -> str:
    """The message alone, also when a data loader's worker wrapped it in its stack trace."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")


def _train(argv: Sequence[str]) -> None:
    from csalr_plugin.hosts.torchreid.arguments import config_from_arguments, parse_arguments

    try:
        config = config_from_arguments(parse_arguments(argv, "csalr train"))
    except UserError as error:
        raise SharedError(str(error)) from None  # torchrun gives every process the same words
    from csalr_plugin.hosts.torchreid.train import train

    train(config)


def _run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        parser = Parser(
            prog="csalr run",
            usage="csalr run PATH [ARGUMENT ...]",
            description="Run a train script of torchreid's or fast-reid's, unmodified, with the plugin loaded.\n"
            "PATH is the script; what follows are the script's own arguments.",
            epilog="example:\n  csalr run deep-person-reid/scripts/main.py \\\n"
            "    --config-file configs/torchreid/pcb_384x128_sgd.yaml \\\n"
            "    -s market1501 -t market1501 --root reid-data MODEL.NAME pcb_csalr csalr.groups 2\n"
            "  csalr run fast-reid/tools/train_net.py \\\n"
            "    --config-file projects/fastreid/configs/pcb_384x128_sgd.yml MODEL.NAME pcb_csalr",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if not argv:
            parser.error("the path of a script is missing")
        parser.print_help()
        return
    from csalr_plugin.hosts.script import find_host, imports

    host, script = "torchreid", Path(argv[0]).resolve()
    if imports("fastreid", script):
        host = "fastreid"
        find_host(host, script)  # the adapter itself cannot be imported without it
    importlib.import_module(f"csalr_plugin.hosts.{host}.script").run_script(argv[0], argv[1:])


def _models(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="csalr models",
        description="List the models: parameters in training, multiply-accumulate operations of one image at "
        "test time (every matrix product counted) and the embedding's width; then the settings.",
        epilog="example:\n  csalr models --height 256 --width 128",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, what in (
        ("height", 384, "image height"),
        ("width", 128, "image width"),
        ("num-classes", 751, "training identities"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"{what} ({default})")
    given = parser.parse_args(argv)

    import torch
    from tabulate import tabulate

    from csalr_plugin.hosts.keys import KEYS
    from csalr_plugin.models import MODEL_NAMES, build_model
    from csalr_plugin.models.cost import count_gmacs, count_parameters

    rows = []
    for name in MODEL_NAMES:
        with torch.device("meta"):  # shapes only: no memory, no arithmetic
            model = build_model(name, given.num_classes, pretrained=False).eval()
            embedding = model(torch.empty(1, 3, given.height, given.width))
        cost = count_gmacs(model, given.height, given.width)
        rows.append((name, count_parameters(model) / 1e6, cost, embedding.shape[1]))
    print(tabulate(rows, ("model", "parameters (M)", "GMACs", "embedding"), floatfmt=".2f"))
    print(f"\nfor images of {given.height}x{given.width} and {given.num_classes} identities; the settings:\n")
    settings = [(f"csalr.{key.name}", _as_typed(key.default), key.comment) for key in KEYS]
    print(tabulate(settings, ("key", "default", "what it is"), disable_numparse=True))


def _as_typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _demo(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="csalr demo",
        description="Make a small data set of pedestrian-like images, train pcb_csalr on it through "
        "torchreid or fast-reid, and show the accuracy before and after.",
        epilog="example:\n  csalr demo --out demo --host fastreid",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of data and run")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data and training (default 0)")
    hosts = ("torchreid", "fastreid")
    parser.add_argument("--host", choices=hosts, default="torchreid", help="what trains (default torchreid)")
    given = parser.parse_args(argv)
    from csalr_plugin.demo import run_demo

    run_demo(given.out, given.seed, given.host)


_STUDIES = {
    "cost": "Table 5 of the paper and its alternatives: memory, speed, operations",
    "scale": "one block's time and memory against the number of positions",
    "zoo": "the host's models beside the plugin's, with accuracy where weights are given",
}


def _bench(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        studies = "\n".join(f"  {study:7}{what}" for study, what in _STUDIES.items())
        parser = Parser(
            prog="csalr bench",
            usage="csalr bench STUDY --out DIR ...",
            description="Measure what models cost, in alternating rounds; a study that was stopped goes on.",
            epilog=f"studies:\n{studies}\n\n'csalr bench STUDY --help' says more.\n\n"
            "example:\n  csalr bench cost --out bench --quick",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if not argv:
            parser.error(f"a study is missing, one of {', '.join(_STUDIES)}")
        parser.print_help()
        return
    study, *words = argv
    if study not in _STUDIES:
        raise UserError(f"unknown study '{study}'; it must be one of {', '.join(_STUDIES)}.{suggest(study, _STUDIES)}")
    module = importlib.import_module(f"csalr_plugin.projects.benchmark.{study}")
    parser = Parser(
        prog=f"csalr bench {study}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    module.run(parser.parse_args(words))


def _reproduce(argv: Sequence[str]) -> None:
    from csalr_plugin.projects.paper.study import main

    main(argv)


def _attention_maps(argv: Sequence[str]) -> None:
    from csalr_plugin.projects.paper.attention_maps import main

    main(argv)
