"""The documentation: the site builds, its code runs, its commands are valid, its links and messages are complete."""

from __future__ import annotations

import ast
import configparser
import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import csalr_plugin
from csalr_plugin.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *ROOT.glob("projects/**/README.md")])
RUN_ELSEWHERE = {"docs/export.md": "tests/test_export.py"}
"""Pages whose Python blocks another test runs."""

pytestmark = pytest.mark.on_cpu


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    line: int  # of its first line of code, from 1
    code: str


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2]))
    return found


def pages_with(*languages: str) -> list[Any]:
    """Return the pages that have a block in one of these languages, as parameters."""
    has = [page for page in PAGES if any(block.language in languages for block in blocks(page))]
    return [pytest.param(page, id=name_of(page)) for page in has]


def test_every_block_of_code_has_a_language_that_the_tests_know() -> None:
    known = {"bash", "python", "text", "bibtex"}
    unknown = {f"{name_of(page)}:{block.line}: {block.language}" for page in PAGES for block in blocks(page)}
    assert not {one for one in unknown if one.split(": ")[1] not in known}


# Python


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "projects"):
        (folder / name).symlink_to(ROOT / name)
    noise = np.random.default_rng(0)
    for name in ("person.jpg", "other.jpg", "photos/ANNA/cam2_0001.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (128, 64, 3), dtype=np.uint8)).save(folder / name)
    model = csalr_plugin.build_model("pcb_csalr", 2, pretrained=False)
    torch.save({"state_dict": model.state_dict(), "epoch": 100}, folder / "model.pth.tar-100")
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "log/demo").mkdir(parents=True)
    (folder / "log/demo/metrics.jsonl").write_text(json.dumps({"epoch": 1, "loss": 2.0}) + "\n")
    return folder


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run_and_print_the_results_that_the_page_shows(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("csalr_plugin.models.weights.load_backbone", lambda *_: None)  # no download
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in (one for one in blocks(page) if one.language == "python"):
        tree = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if name_of(page) in RUN_ELSEWHERE:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(tree, namespace)
        shown = re.findall(r"^print\(.*\)  # (.+)$", block.code, re.MULTILINE)
        if shown:
            assert printed.getvalue().splitlines()[-len(shown) :] == shown


# Commands


class ReachedError(Exception):
    """The arguments of a command were accepted, and its work would begin."""


def stop(*_: Any, **__: Any) -> None:
    raise ReachedError


def in_csalr(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `csalr` up to the point where its arguments are checked."""
    from csalr_plugin.commands import _main

    command = words[0]
    words = list(words)
    if command == "run":
        in_train_script(words[1], words[2:])
        return
    if words[:3] == ["train", "--host", "fastreid"]:
        in_train_script("train_net.py", words[3:])
        return
    begin = {
        "train": "csalr_plugin.hosts.torchreid.train.train",
        "models": "csalr_plugin.models.cost.count_gmacs",
        "demo": "csalr_plugin.demo.run_demo",
        "export": "csalr_plugin.hosts.trained.load_trained",
        "bench": f"csalr_plugin.projects.benchmark.{words[1] if len(words) > 1 else 'cost'}.run",
        "attention-maps": "csalr_plugin.projects.paper.attention_maps.make_writable_folder",
        "reproduce": "csalr_plugin.projects.paper.study.study",
    }
    assert command in begin, f"csalr {command}: tell this test where its work begins"
    module, function = begin[command].rsplit(".", 1)
    monkeypatch.setattr(import_module(module), function, stop)
    with pytest.raises(ReachedError):
        _main(words)


def in_train_script(script: str, words: Sequence[str]) -> None:
    """Parse the arguments of a train script of a host, with the plugin loaded."""
    if script.endswith("main.py"):
        from csalr_plugin.hosts.torchreid.arguments import config_from_arguments, parse_arguments

        config_from_arguments(parse_arguments(words, script))
        return
    assert script.endswith("train_net.py"), script
    from csalr_plugin.hosts.fastreid import add_csalr_config

    # isort: split
    from fastreid.config import get_cfg
    from fastreid.engine import default_argument_parser

    given = default_argument_parser().parse_args(words)
    cfg = get_cfg()
    add_csalr_config(cfg)
    if not given.config_file.startswith("configs/"):  # there it lies in a clone of fast-reid
        cfg.merge_from_file(given.config_file)
    cfg.merge_from_list(given.opts)


def in_pip(words: Sequence[str], _: pytest.MonkeyPatch) -> None:
    """Check that the extras of this package exist."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"^(?:\.|csalr-plugin)\[(.*)\]", "\n".join(words), re.MULTILINE):
        assert set(extras.split(",")) <= set(setup["options.extras_require"])


def in_make(words: Sequence[str], _: pytest.MonkeyPatch) -> None:
    """Check that the targets exist."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def in_python(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the arguments of a script of this repository, or of ``python -m``."""
    if words[0] == "-m":
        if words[1] == "csalr_plugin":
            in_csalr(words[2:], monkeypatch)
        return
    if words[0].endswith("train_net.py"):
        in_train_script(words[0], words[1:])
        return
    script = ROOT / words[0]
    flags = [word for word in words if word.startswith("--")]
    assert script.is_file() and all(f'"{flag}"' in script.read_text() for flag in flags)


def in_torchrun(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = list(words)
    if "--no-python" in words:
        assert words[words.index("--no-python") + 1] == "csalr"
        in_csalr(words[words.index("csalr") + 1 :], monkeypatch)
    elif "-m" in words:
        in_python(words[words.index("-m") :], monkeypatch)
    else:
        place = next(number for number, word in enumerate(words) if word.endswith(".py"))
        in_train_script(words[place], words[place + 1 :])


def accepted(_: Sequence[str], __: pytest.MonkeyPatch) -> None:
    """The command belongs to no part of this project."""


CHECKS: dict[str, Callable[[Sequence[str], pytest.MonkeyPatch], None]] = {
    "csalr": in_csalr,
    "pip": in_pip,
    "make": in_make,
    "python": in_python,
    "torchrun": in_torchrun,
    **dict.fromkeys(("cd", "export", "git", "sed", "tensorboard", ".venv/bin/pytest"), accepted),
}


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell script."""
    lexer = shlex.shlex(code.replace("\\\n", " "), posix=True, punctuation_chars="&|;\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if word.strip("&|;\n"):
            words.append(word)
        elif words:
            while re.match(r"[A-Z_]+=", words[0]):  # a variable of this command alone
                words.pop(0)
            yield words
            words = []


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_have_valid_arguments(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    inline = re.findall(r"`((?:csalr|torchrun) [^`]* -[^`]*)`", text)
    for code in [*(one.code for one in blocks(page) if one.language == "bash"), *inline]:
        code = re.sub(r"(^|\s)#.*", "", code)  # a quote in a comment would confuse the lexer
        if "..." in code:  # only a part of a command
            continue
        for name, *words in commands(code):
            where = f"{name_of(page)}: {shlex.join([name, *words])}"
            assert name in CHECKS, f"{where}: unknown command"
            try:
                with monkeypatch.context() as patch:
                    CHECKS[name](words, patch)
            except UserError as error:
                pytest.fail(f"{where}: {error}")


def test_a_wrong_command_on_a_page_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("train MODEL.NAME pcb_csalrr", "bench cost --outt bench", "attention-maps --out maps"):
        with pytest.raises((UserError, SystemExit)):
            in_csalr(shlex.split(wrong), monkeypatch)


# Links, length, and the files beside the pages


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST form them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in [*PAGES, ROOT / "CHANGELOG.md"]])
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    targets = set(re.findall(r"\[(?:[^\]]|\n)*\]\(([^)\s]+)\)", text)) | set(re.findall(r"^\[.+\]: (\S+)", text, re.M))
    for target in targets:
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        named = set(re.findall(r"^\((.+)\)=$", file.read_text(), re.M)) if anchor else set()
        assert not anchor or anchor in anchors(file) | named, f"{name_of(page)}: {target}"


def test_the_readme_fits_one_screen_and_a_half() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert "Status" in "\n".join(lines[:10])


def test_public_ci_and_citation_agree_with_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == listed
    assert jobs["test"]["steps"][-1]["run"] == ".ci/run"
    for file in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(file.read_text()).keys()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == csalr_plugin.__version__
    assert f"## {csalr_plugin.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "cache")]
    done = subprocess.run([*command, str(DOCS), str(out / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def text_of(page: Path) -> str:
    """Return the text of an HTML page, with single spaces."""
    return " ".join(unescape(re.sub(r"<[^>]+>", "", page.read_text())).split())


def test_the_site_builds_without_warnings_and_has_every_page(site: Path) -> None:
    for page in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]:
        assert (site / f"{page.stem}.html").is_file()


def test_the_reference_describes_everything_that_the_package_exports(site: Path) -> None:
    reference = (site / "api.html").read_text()
    for name in set(csalr_plugin.__all__) - {"MODEL_NAMES", "__version__"}:
        assert f'id="csalr_plugin.{name}"' in reference, name


def test_every_setting_is_on_the_site(site: Path) -> None:
    from csalr_plugin.hosts.keys import KEYS

    text = text_of(site / "settings.html")
    assert all(f"csalr.{key.name}" in text and " ".join(key.comment.split()) in text for key in KEYS)


def test_every_literal_error_message_of_the_code_is_listed(site: Path) -> None:
    text = text_of(site / "troubleshooting.html")
    count = 0
    for path in [*(ROOT / "csalr_plugin").rglob("*.py"), *(ROOT / "projects").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                literals = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
                longest = max((one for one in literals if isinstance(one, str)), key=len, default="")
                if isinstance(node.args[0], ast.JoinedStr) and len(longest) > 20:
                    count += 1
                    assert " ".join(longest.split()) in text, f"{name_of(path)}:{node.lineno}"
    assert count > 100


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run in parallel

    notebook = nbformat.read(DOCS / "tour.ipynb", as_version=4)
    shutil.copy(DOCS / "tour.ipynb", tmp_path)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [one for one in outputs if "image/" in " ".join(one.get("data", {}))]
    assert len(pictures) == 4
    assert not [one for one in outputs if one.output_type == "error"]
