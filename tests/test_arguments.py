"""The command line: the host's flags and overrides, none of them lost."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.torchreid.arguments import (
    Arguments,
    config_from_arguments,
    host_argv,
    parse_arguments,
)


def parse(line: str) -> Arguments:
    return parse_arguments(line.split(), "csalr train")


@pytest.mark.parametrize(
    "line",
    [
        "-s market1501 -t market1501 cuhk03 --root data MODEL.NAME pcb_csalr test.eval_freq -1",
        "--root data -t market1501 cuhk03 -s market1501 MODEL.NAME pcb_csalr test.eval_freq -1",
        "--root data -s market1501 MODEL.NAME pcb_csalr -t market1501 cuhk03 test.eval_freq -1",
        "MODEL.NAME pcb_csalr --root=data -s market1501 test.eval_freq -1 -t market1501 cuhk03",
        "MODEL.NAME pcb_csalr test.eval_freq -1 --targets market1501 cuhk03 --sources market1501 --root data",
    ],
)
def test_overrides_stand_anywhere_and_are_never_swallowed(line: str) -> None:
    assert parse(line) == Arguments(
        sources=["market1501"],
        targets=["market1501", "cuhk03"],
        root="data",
        overrides=["MODEL.NAME", "pcb_csalr", "test.eval_freq", "-1"],
    )


@pytest.mark.parametrize("flag", ["-s", "--sources", "-t", "--targets", "--transforms"])
@pytest.mark.parametrize("key", ["model.name", "MODEL.NAME", "use_gpu", "USE_GPU", "csalr.rpp.pcb_epochs", "modle.nam"])
def test_a_key_ends_a_flag_of_several_words(flag: str, key: str) -> None:
    arguments = parse(f"{flag} one two {key} value")
    assert arguments.overrides == [key, "value"]
    assert [arguments.sources, arguments.targets, arguments.transforms].count(["one", "two"]) == 1


def test_a_path_with_a_dot_is_a_value_and_not_a_key() -> None:
    arguments = parse("--root data.v1 --config-file my.yaml model.load_weights model.pth.tar")
    assert (arguments.root, arguments.config_file) == ("data.v1", "my.yaml")
    assert arguments.overrides == ["model.load_weights", "model.pth.tar"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("-s market1501 train.lr", r"'train\.lr' has no value"),
        ("train.lr --root data", r"'train\.lr' has no value"),
        ("train.lr -s market1501", r"'train\.lr' has no value"),
        ("market1501", r"'market1501' is neither a flag nor a config key"),
        ("csalr.landmarks 12 8", r"'8' is neither a flag nor a config key.*12,8"),
        ("--rot data", r"unknown flag '--rot'.*Did you mean '--root'"),
        ("--root", r"argument --root: expected one argument"),
        ("--root -s market1501", r"argument --root: expected one argument"),
        ("-s model.name pcb", r"argument -s/--sources: expected at least one argument"),
    ],
)
def test_a_mistake_is_one_line(line: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        parse(line)
    assert "\n" not in str(error.value)


def host_parser() -> argparse.ArgumentParser:
    """A parser like the host's, which takes all words after a flag of several words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", default="")
    for names in (("-s", "--sources"), ("-t", "--targets"), ("--transforms",)):
        parser.add_argument(*names, nargs="+")
    parser.add_argument("--root", default="")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    return parser


@pytest.mark.parametrize(
    "line",
    [
        "-s market1501 MODEL.NAME pcb",
        "MODEL.NAME pcb --transforms random_flip random_erase -t a b --config-file c.yaml",
        "MODEL.NAME pcb -s a --root data test.eval_freq -1",
        "",
    ],
)
def test_the_hosts_own_parser_reads_everything_from_the_canonical_order(line: str) -> None:
    arguments = parse(line)
    read = host_parser().parse_args(host_argv(arguments))
    assert (read.sources or [], read.targets or []) == (arguments.sources, arguments.targets)
    assert (read.transforms or [], read.root) == (arguments.transforms, arguments.root)
    assert read.config_file == arguments.config_file
    assert read.opts[0::2] == [key.lower() for key in arguments.overrides[0::2]]
    assert read.opts[1::2] == arguments.overrides[1::2]


def test_the_config_is_defaults_then_file_then_flags_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("model: {name: pcb}\ndata: {root: from_file, height: 64, sources: [cuhk03]}\n")
    config = config_from_arguments(
        parse_arguments(
            ["--config-file", str(file), "-s", "msmt17", "--root", "from_flag", "Data.Root", "from_override"],
            "x",
        )
    )
    assert (config.model.name, config.data.height, config.data.width) == ("pcb", 64, 128)
    assert (config.data.sources, config.data.root) == (["msmt17"], "from_override")


def test_the_config_is_validated() -> None:
    with pytest.raises(UserError, match="pcb_csalr"):
        config_from_arguments(parse("model.name pcb_cslar"))


def test_help_is_complete_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--config-file",
        "--sources",
        "--targets",
        "--transforms",
        "--root",
        "KEY VALUE",
        "example:",
    ):
        assert word in text
