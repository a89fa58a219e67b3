"""The commands of `csalr`: each parses its arguments, calls the code that does the work, and prints the result."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial

from csalr_plugin.command_line import (
    Parser,
    argument,
    batch_argument,
    ctrl_c_ends_at_once,
    exit_code,
    path_argument,
    seed_argument,
    side_argument,
)
from csalr_plugin.errors import SharedError, UserError, shown, suggest
from csalr_plugin.extras import needs
from csalr_plugin.hosts.keys import integer
from csalr_plugin.version import __version__

_DESCRIPTION = "SA, CSA and CSALR attention for person re-identification, inside torchreid or fast-reid."
_EPILOG = """commands:
  train           train, evaluate or resume a model through torchreid, or with --host fastreid through fast-reid
  run             run an unmodified train script of torchreid or fast-reid with the plugin loaded
  models          list the models with their cost, and the default settings
  demo            make a small data set, train pcb and pcb_csalr on it, show their accuracy
  export          export a trained model to ONNX, OpenVINO, TorchScript or torch.export, with proof of parity
  bench           measure the cost of the models side by side
  reproduce       reproduce the paper's tables and figures, with our numbers beside the paper's
  attention-maps  draw full attention maps beside those of CSALR's factors (Figure 4)

'csalr COMMAND --help' says more.

example:
  csalr train --config-file configs/torchreid/pcb_384x128_sgd.yaml \\
    -s market1501 -t market1501 --root reid-data MODEL.NAME pcb_csalr
  csalr train --host fastreid --config-file pcb_384x128_sgd.yml MODEL.META_ARCHITECTURE pcb_csalr"""

HOSTS = ("torchreid", "fastreid")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (see `exit_code`)."""
    return exit_code("csalr", partial(_main, sys.argv[1:] if argv is None else list(argv)))


def _main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="csalr",
        usage="csalr COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"csalr {__version__}")
    parser.add_argument("command", nargs="?", default="", help=argparse.SUPPRESS)
    # Each command parses its own words: argparse would misread overrides that stand between flags.
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if not given.command:
        parser.error(f"a command is missing, one of {', '.join(_COMMANDS)}")
    if given.command not in _COMMANDS:
        hint = suggest(given.command, _COMMANDS)
        raise UserError(f"unknown command {shown(given.command)}; it must be one of {', '.join(_COMMANDS)}.{hint}")
    _COMMANDS[given.command](given.words)


def _train(argv: Sequence[str]) -> None:
    host, argv = _host_and_rest(argv)
    if host == "fastreid":
        with needs("fastreid", "csalr train --host fastreid"), ctrl_c_ends_at_once():
            train_net = importlib.import_module("csalr_plugin.projects.fastreid.train_net")
        sys.argv = ["csalr train --host fastreid", *argv]
        train_net.run()
        return
    with needs("torchreid", "csalr train"):
        with ctrl_c_ends_at_once():
            from csalr_plugin.hosts.torchreid.arguments import config_from_arguments, parse_arguments

            try:
                config = config_from_arguments(parse_arguments(argv, "csalr train"))
            except UserError as error:
                raise SharedError(str(error)) from None  # torchrun gives every process the same arguments
            from csalr_plugin.hosts.torchreid.train import train
        train(config)


def _host_and_rest(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the value of ``--host``, torchreid by default, and the other words of `csalr train`."""
    host, rest, words = "torchreid", list[str](), list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag != "--host":
            rest.append(word)
            continue
        host = value if equals else words.pop(0) if words else ""
        if host not in HOSTS:
            raise SharedError(f"--host {shown(host)} is not known; it must be one of {', '.join(HOSTS)}.")
    return host, rest


def _run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        parser = Parser(
            prog="csalr run",
            usage="csalr run PATH [ARGUMENT ...]",
            description="Run an unmodified train script of torchreid or fast-reid with the plugin loaded.\n"
            "PATH is the script; the remaining arguments are the script's own.",
            epilog="example:\n  csalr run deep-person-reid/scripts/main.py \\\n"
            "    --config-file configs/torchreid/pcb_384x128_sgd.yaml \\\n"
            "    -s market1501 -t market1501 --root reid-data MODEL.NAME pcb_csalr csalr.groups 2\n"
            "  csalr run fast-reid/tools/train_net.py \\\n"
            "    --config-file pcb_384x128_sgd.yml MODEL.NAME pcb_csalr",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if not argv:
            parser.error("the path of a script is missing")
        parser.print_help()
        return
    from csalr_plugin.hosts.script import find_host, find_script, imports

    try:
        script = find_script(argv[0])
    except UserError as error:
        raise SharedError(str(error)) from None
    host = "fastreid" if imports("fastreid", script) else "torchreid"
    find_host(host, script)
    # Only the import of the host: a module that the script itself does not find is the script's own mistake.
    with needs(host, "csalr run"), ctrl_c_ends_at_once():
        adapter = importlib.import_module(f"csalr_plugin.hosts.{host}")
        adapter.register()
        run_script = importlib.import_module(f"csalr_plugin.hosts.{host}.script").run_script
    run_script(argv[0], argv[1:])


def _models(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="csalr models",
        description="List the models: parameters in training, multiply-accumulate operations of one image at "
        "test time (every matrix product counted) and the width of the embedding; then the settings.",
        epilog="example:\n  csalr models --height 256 --width 128\n  csalr models --zoo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    identities = argument(integer(1, 10_000_000))
    for name, kind, default, meaning in (
        ("height", side_argument, 384, "image height; 256 with --zoo"),
        ("width", side_argument, 128, "image width"),
        ("num-classes", identities, 751, "training identities"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{meaning} ({default})")
    parser.add_argument("--zoo", action="store_true", help="list torchreid's models with attention")
    if "--zoo" in argv:
        parser.set_defaults(height=256)
    given = parser.parse_args(argv)
    if given.zoo:
        _zoo(given)
        return

    with ctrl_c_ends_at_once():
        import torch

        from csalr_plugin.hosts.keys import KEYS
        from csalr_plugin.models import MODEL_NAMES, build_model
        from csalr_plugin.models.cost import count_gmacs, count_parameters

    rows = []
    for name in MODEL_NAMES:
        with torch.device("meta"):  # shapes only: no memory, no arithmetic
            model = build_model(name, given.num_classes, pretrained=False).eval()
            embedding = model(torch.empty(1, 3, given.height, given.width))
        cost = count_gmacs(model, given.height, given.width)
        rows.append((name, f"{count_parameters(model) / 1e6:.2f}", f"{cost:.2f}", str(embedding.shape[1])))
    print(_columns(("model", "parameters (M)", "GMACs", "embedding"), rows, "<>>>"))
    print(f"\nfor images of {given.height}x{given.width} and {given.num_classes} identities; the settings:\n")
    settings = [(f"csalr.{key.name}", _as_typed(key.default), key.comment) for key in KEYS]
    print(_columns(("key", "default", "meaning"), settings, "<<<"))


def _zoo(given: argparse.Namespace) -> None:
    with needs("torchreid", "csalr models --zoo"), ctrl_c_ends_at_once():
        from csalr_plugin.hosts.torchreid import zoo

        rows = list(zoo.costs(given.height, given.width, given.num_classes))
    header = ("model", "blocks after (csalr.after)", "image", "parameters (M)", "GMACs", "embedding")
    print(_columns(header, rows, "<<<>>>"))
    print(f"\nfor {given.num_classes} identities; with _sa or _csa in place of _csalr, another attention.")


def _as_typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Format a table as text; `alignment` has "<" or ">" for each column.

    The package tabulate is no dependency of the models.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, alignment, widths, strict=True)).rstrip()
        for line in lines
    )


def _demo(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="csalr demo",
        description="Make a small data set of pedestrian-like images, train pcb and pcb_csalr on it alike through "
        "torchreid or fast-reid, and show their accuracy, also with the gates of pcb_csalr set to 0.",
        epilog="example:\n  csalr demo --out demo --host fastreid",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of data and runs")
    parser.add_argument("--seed", type=seed_argument, default=0, metavar="N", help="seed of data and training (0)")
    parser.add_argument("--host", choices=HOSTS, default="torchreid", help="the host that trains (torchreid)")
    given = parser.parse_args(argv)
    with needs(given.host, f"csalr demo --host {given.host}" if given.host == "fastreid" else "csalr demo"):
        with ctrl_c_ends_at_once():
            from csalr_plugin.demo import run_demo
        run_demo(given.out, given.seed, given.host)


def _export(argv: Sequence[str]) -> None:
    with ctrl_c_ends_at_once():
        from csalr_plugin.export import DEFAULT_OPSET, FORMATS, OPSETS, PIXELS, Interface, export, import_packages
        from csalr_plugin.hosts.trained import load_trained
    parser = Parser(
        prog="csalr export",
        usage="csalr export --weights FILE --output FILE [--include FORMAT ...] [FLAG ...] [KEY VALUE ...]",
        description="Export a trained model, and compare each written file with it for batches of 1, 3 and 5 images. "
        "The comparison is printed and written to OUTPUT.json; a file that differs is not kept.",
        epilog="KEY VALUE: a config key of the host, as for 'csalr train', for a setting that the checkpoint does not "
        "record.\n\nexample:\n  csalr export --weights log/pcb_csalr/model/model.pth.tar-100 --include onnx pt2 \\\n"
        "    --output pcb_csalr.onnx",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, side, file = parser.add_argument, side_argument, path_argument
    add("--weights", type=file, required=True, metavar="FILE", help="checkpoint of torchreid or fast-reid")
    add("--output", type=file, required=True, metavar="FILE", help="each format has its own suffix")
    add("--include", nargs="+", choices=tuple(FORMATS), default=["onnx"], help="formats (onnx)", metavar="FORMAT")
    add("--imgsz", nargs=2, type=side, metavar=("HEIGHT", "WIDTH"), help="image size (that of the checkpoint)")
    add("--dynamic", action=argparse.BooleanOptionalAction, default=True, help="any number of images in a batch")
    add("--batch-size", type=batch_argument, default=1, metavar="N", help="images in a batch with --no-dynamic (1)")
    add("--half", action="store_true", help="backbone in fp16; input, output and attention blocks stay fp32")
    opset = argument(integer(*OPSETS))
    add("--opset", type=opset, default=DEFAULT_OPSET, metavar="N", help=f"ONNX opset ({DEFAULT_OPSET})")
    add("--simplify", action="store_true", help="simplify the ONNX graph with onnxslim")
    pixels = "input: normalised float32, or uint8 from 0 to 255 (torchreid: normalised; fast-reid: 0-255)"
    add("--pixels", choices=PIXELS, help=pixels)
    add("--model", default="", metavar="NAME", help="name of the model (that of the checkpoint)")
    add("--config-file", default="", metavar="FILE", help="config file of the host")
    add("overrides", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args(_formats_last(argv))

    with needs("export", "csalr export"):
        formats = list(dict.fromkeys(given.include))
        import_packages(formats, given.simplify)
        trained = load_trained(
            given.weights,
            model=given.model,
            config_file=given.config_file,
            overrides=given.overrides,
            user="csalr export",
        )
        size = tuple(given.imgsz) if given.imgsz else trained.size
        if size is None:
            raise UserError(f"Checkpoint '{given.weights}' does not record its image size; give --imgsz HEIGHT WIDTH.")
        print(f"{given.weights}: {trained.model}, {trained.tensors} tensors")
        if trained.size not in (None, size):
            print("trained on images of {}x{}, exported for {}x{}".format(*trained.size, *size))
        interface = Interface(
            trained.model,
            height=size[0],
            width=size[1],
            pixels=given.pixels or ("0-255" if trained.host == "fastreid" else "normalised"),
            mean=trained.mean,
            std=trained.std,
            half=given.half,
            batch=None if given.dynamic else given.batch_size,
            origin={"framework": trained.host, "weights_sha256": trained.sha256},
        )
        result = export(trained.network, interface, given.output, formats, opset=given.opset, simplify=given.simplify)
    print(
        f"input: {interface.input_in_words()}\noutput: output [{interface.batch or 'batch'}, {result['embedding']}]\n"
    )
    columns = ("file", "MB", "runtime", "largest difference", "smallest cosine")
    rows = []
    for one in result["files"].values():
        parity = f"{one['largest_difference']:.1e}", f"{one['smallest_cosine']:.7f}"
        rows.append((one["path"], f"{one['bytes'] / 1e6:.1f}", one["runtime"], *parity))
    print(_columns(columns, rows, "<><>>"))


def _formats_last(argv: Sequence[str]) -> list[str]:
    """Move ``--include`` and its formats to the end; argparse would take a key that follows them for a format."""
    words: list[str] = []
    formats: list[str] = []
    into = False
    for word in argv:
        into = word == "--include" or (into and not word.startswith("-") and "." not in word)
        (formats if into else words).append(word)
    return words + formats


_STUDIES = {
    "cost": "Table 5 of the paper and alternatives: memory, speed, operations",
    "scale": "time and memory of one block against the number of positions",
    "zoo": "the host's models beside the plugin's, with accuracy where weights are given",
}


def _bench(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        studies = "\n".join(f"  {study:7}{meaning}" for study, meaning in _STUDIES.items())
        parser = Parser(
            prog="csalr bench",
            usage="csalr bench STUDY --out DIR ...",
            description="Measure the cost of models in alternating rounds. The same command continues a stopped study.",
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
        hint = suggest(study, _STUDIES)
        raise UserError(f"unknown study {shown(study)}; it must be one of {', '.join(_STUDIES)}.{hint}")
    with needs("bench", f"csalr bench {study}"):
        with ctrl_c_ends_at_once():
            module = importlib.import_module(f"csalr_plugin.projects.benchmark.{study}")
            from csalr_plugin.projects.benchmark.harness import memory_errors_in_one_line
        parser = Parser(
            prog=f"csalr bench {study}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(parser)
        options = parser.parse_args(words)
        with memory_errors_in_one_line():
            module.run(options)


def _paper(module: str, command: str, argv: Sequence[str]) -> None:
    with needs("torchreid", f"csalr {command}"):
        with ctrl_c_ends_at_once():
            study = importlib.import_module(f"csalr_plugin.projects.paper.{module}")
        study.main(argv)


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "run": _run,
    "models": _models,
    "demo": _demo,
    "export": _export,
    "bench": _bench,
    "reproduce": partial(_paper, "study", "reproduce"),
    "attention-maps": partial(_paper, "attention_maps", "attention-maps"),
}
