"""The command line of every command: a mistake is one line, Ctrl-C and a closed pipe leave no stack trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csalr_plugin.command_line import exit_code
from csalr_plugin.commands import main
from csalr_plugin.errors import SharedError, UserError
from csalr_plugin.projects.benchmark import scale

LONG = "x" * 3000
SHORTENED = "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that are neither scripts, images nor checkpoints."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x +")
    Path("tiny.yaml").write_text("model:\n  name: pcb\n")
    Path("binary.py").write_bytes(b"\x00\x01\xff")
    Path("folder.py").mkdir()
    return tmp_path


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command refuses `words` with."""
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("csalr: error: ") and len(line) < 1000
    return line


NUMBERS = [
    (["models"], "--num-classes", "from 1 to 10000000"),
    (["models"], "--height", "from 16 to 4096"),
    (["models"], "--width", "from 16 to 4096"),
    (["bench", "cost", "--out", "out"], "--repeats", "from 1 to 1000000"),
    (["bench", "cost", "--out", "out"], "--threads", "from 1 to 1024"),
    (["bench", "cost", "--out", "out"], "--width", "from 16 to 4096"),
    (["bench", "cost", "--out", "out"], "--batch-size", "from 1 to 65536"),
    (["bench", "scale", "--out", "out"], "--positions", "from 1 to 1000000"),
    (["bench", "scale", "--out", "out"], "--channels", "from 32 to 8192"),
    (["bench", "scale", "--out", "out"], "--batch-size", "from 1 to 65536"),
    (["bench", "scale", "--out", "out"], "--limit", "from 1 to 1000000"),
    (["bench", "zoo", "--out", "out"], "--height", "from 16 to 4096"),
    (["reproduce", "table1", "--out", "out"], "--seeds", "from 1 to 1000"),
    (["attention-maps", "--out", "out", "--image", "file"], "--queries", "from 1 to 1000000"),
]


@pytest.mark.parametrize(("words", "option", "allowed"), NUMBERS)
@pytest.mark.parametrize("value", ["0", "-1", "99999999999999999999999999", "nan", "1.5", "1_000", "+3", "٣", "", LONG])
def test_a_number_is_ascii_digits_within_its_range(
    words: list[str], option: str, allowed: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([*words, f"{option}={value}"], capsys)
    given = SHORTENED if value == LONG else f"'{value}'"
    assert f"argument {option}: {given} must be an integer {allowed}; see csalr {words[0]}" in line
    assert not Path("out").exists()


@pytest.mark.parametrize("value", ["-1", "4294967296", "٣", ""])
def test_a_seed_is_an_integer_of_32_bits(value: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "from 0 to 4294967295" in refusal(["demo", "--out", "out", f"--seed={value}"], capsys)


PATHS = [
    (["demo"], "--out"),
    (["bench", "cost"], "--out"),
    (["bench", "zoo", "--out", "out"], "--root"),
    (["reproduce", "table1"], "--out"),
    (["reproduce", "table1", "--out", "out"], "--root"),
    (["reproduce", "table1", "--out", "out"], "--weights"),
    (["attention-maps"], "--out"),
    (["attention-maps", "--out", "out"], "--image"),
    (["attention-maps", "--out", "out"], "--root"),
    (["attention-maps", "--out", "out"], "--checkpoint"),
]


@pytest.mark.parametrize(("words", "option"), PATHS)
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "the path is empty"),
        (" ", "the path is empty"),
        (LONG, f"{SHORTENED} is too long for a path"),
        ("\0", "is not a path"),
    ],
)
def test_a_path_is_neither_empty_nor_too_long(
    words: list[str], option: str, value: str, complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([*words, option, value], capsys)
    assert f"argument {option}: " in line and complaint in line
    assert sorted(path.name for path in folder.iterdir()) == ["binary.py", "file", "folder.py", "tiny.yaml"]


def test_a_path_may_begin_with_the_home_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    line = refusal(["demo", "--out", "~/file/demo"], capsys)
    assert f"{folder}/file/demo' cannot be written (Not a directory)" in line


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--out", "file"],
        ["bench", "scale", "--out", "file"],
        ["bench", "scale", "--out", "file/below"],
        ["reproduce", "table1", "--preset", "smoke", "--out", "file"],
        ["attention-maps", "--image", "file", "--out", "file"],
    ],
)
def test_a_file_in_place_of_the_output_folder_is_refused(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--out '{words[-1]}' cannot be written" in refusal(words, capsys)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([""], "a command is missing"),
        ([LONG], f"unknown command {SHORTENED}"),
        (["models", "--unknown", LONG], "unrecognized arguments: --unknown xxxxx"),
        (["run", "tiny.yaml"], "script 'tiny.yaml', line 1, is not Python (invalid syntax)"),
        (["run", "file"], "script 'file', line 1, is not Python"),
        (["run", "binary.py"], "script 'binary.py' is not Python"),
        (["run", "folder.py"], "script 'folder.py' cannot be read (Is a directory)"),
        (["run", "missing.py"], "script 'missing.py' does not exist"),
        (["run", LONG], f"script {SHORTENED} cannot be read (File name too long)"),
        (["demo", "--out", "out", "--host", LONG], "invalid choice: 'xxxxx"),
        (["bench", LONG], f"unknown study {SHORTENED}"),
        (["bench", "scale", "--out", "out", "--device", LONG], f"--device {SHORTENED}"),
        (["bench", "zoo", "--out", "out", "--only", LONG], f"unknown model {SHORTENED}"),
        (["bench", "zoo", "--out", "out", "--weights", f"pcb={LONG}"], f"{SHORTENED} is too long for a path"),
        (["bench", "zoo", "--out", "out", "--weights", "pcb=."], "'.' is not a file"),
        (["reproduce", LONG, "--out", "out"], f"target {SHORTENED} must be one of table1"),
        (["reproduce", "table1", "--out", "out", "--preset", LONG], f"--preset {SHORTENED}"),
        (["reproduce", "table1", "--out", "out", "--dataset", LONG], f"--dataset {SHORTENED}"),
        (["attention-maps", "--out", "out", "--image", "missing.png"], "'missing.png' cannot be read"),
        (["attention-maps", "--out", "out", "--image", "."], "'.' cannot be read (Is a directory)"),
        (["attention-maps", "--out", "out", "--root", "file"], "dataset market1501 is not in --root 'file'"),
        (["attention-maps", "--out", "out", "--root", ".", "--dataset", LONG], f"--dataset {SHORTENED}"),
        *(
            (["attention-maps", "--out", "out", "--image", "file", "--points", points], "--points ")
            for points in ("nan,0.5", "0.5", "0.1,0.2,0.3", "", "٠.5,0.1", "1_0,0.1", "1,0", LONG)
        ),
    ],
)
def test_a_mistake_is_one_short_line(
    words: list[str], complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refusal(words, capsys)


def test_a_lack_of_memory_in_a_study_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "run", lambda _: torch.empty(2**62, dtype=torch.uint8))
    assert "there is not enough memory" in refusal(["bench", "scale", "--out", "out"], capsys)


def test_of_several_processes_the_first_alone_reports_a_shared_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: UserError) -> None:
        raise error

    monkeypatch.setattr("csalr_plugin.command_line.time.sleep", lambda _: None)
    for rank, error, line in (
        ("0", SharedError("a"), "x: error: a\n"),
        ("1", SharedError("a"), ""),
        ("1", UserError("b"), "x: error: in process 1: b\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        assert exit_code("x", lambda error=error: fail(error)) == 2  # type: ignore[misc]
        assert capsys.readouterr().err == line


def test_a_broken_pipe_that_is_not_the_output_is_not_hidden() -> None:
    def fail() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        exit_code("x", fail)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_leaves_one_line_and_the_exit_code_of_a_closed_pipe(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-m", "csalr_plugin", "train", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=120,
    )
    os.close(write)
    # argparse ignores an error of an unbuffered write.
    line = "" if unbuffered else "csalr: stopped, because the reader of its output has ended\n"
    assert (done.returncode, done.stderr) == (0 if unbuffered else 141, line)


INTERRUPTED = """
import os, signal, sys

class InterruptsTheImportOfTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, InterruptsTheImportOfTorch())
sys.argv = ["csalr", *WORDS]
from csalr_plugin.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("words", [["train", "model.name", "pcb"], ["models"], ["bench", "cost", "--out", "out"]])
def test_ctrl_c_during_an_import_ends_the_process_without_a_stack_trace(words: list[str], folder: Path) -> None:
    code = f"WORDS = {words}\n{INTERRUPTED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
