"""Files are complete or absent, whenever the process that writes them is killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from csalr_plugin.errors import UserError, shown
from csalr_plugin.files import check_space, complete_file, make_writable_folder, remove_unfinished, write_json

WRITER = """
import sys
from pathlib import Path
from csalr_plugin.files import complete_file

print("ready", flush=True)
for number in range(10**6):
    with complete_file(Path(sys.argv[1]), 0, "") as unfinished:
        unfinished.write_bytes(bytes([number % 256]) * 5_000_000)
"""


def test_a_process_that_is_killed_leaves_the_whole_file_of_before(tmp_path: Path) -> None:
    path, chance = tmp_path / "model.pth.tar-1", random.Random(0)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not path.exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert len(content) == 5_000_000 and content == content[:1] * 5_000_000
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_file_of_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("whole")
    with (
        pytest.raises(
            UserError, match=r"a\.pth' cannot be written \(No space left on device\): it needs 3 MB, .* Wait"
        ),
        complete_file(path, 3_000_000, "Wait.") as unfinished,
    ):
        unfinished.write_text("ha")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), complete_file(path, 0, "") as unfinished:
        unfinished.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_a_json_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_folder_name_that_the_system_refuses_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out 'it' cannot be written \(.*\): give another folder"):
        make_writable_folder(tmp_path / name, "--out 'it'")


def test_space_is_checked_where_the_system_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path, 1, "a checkpoint")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    check_space(tmp_path, 10**9, "a checkpoint")


def test_values_in_messages_are_one_short_line() -> None:
    nested: list[object] = []
    nested.append(nested)
    values = [
        "x" * 10**6,
        ["y" * 200] * 200,
        {"a": {"b": {"c": {"d": 1}}}},
        10**5000,
        nested,
        "two\nlines",
        b"\n" * 999,
    ]
    for value in values:
        assert len(shown(value)) <= 80 and "\n" not in shown(value)
    assert shown("short") == "'short'" and shown(0.1) == "0.1"


def test_a_long_message_keeps_its_ends_and_a_short_one_every_word() -> None:
    path = "/very/long/" + "folder/" * 40
    assert str(UserError(f"{path} is missing.")) == f"{path} is missing."
    message = str(UserError(f"config file {'x' * 10**6} does not exist; give another."))
    assert len(message) < 200 and message.startswith("config file xxx") and message.endswith("give another.")
