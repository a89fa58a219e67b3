"""The patches for the hosts' repositories: the native blocks and models agree with the plugin's, and patches mend."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csalr_plugin.attention import CSALR, set_fast
from csalr_plugin.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
from projects.upstream import check, table
from projects.upstream.cases import CASES

HOSTS = ("torchreid", "fastreid")
NATIVE_BLOCK = {"torchreid": "torchreid/models/pcb_csalr.py", "fastreid": "fastreid/layers/csalr.py"}


def text_of(host: str, name: str) -> str:
    return (check.HERE / host / f"{name}.patch").read_text(encoding="utf-8")


def apply(host: str, name: str, folder: Path, layout: str = "{}", only: str = "") -> None:
    """Apply the part of a patch that changes files of the package of the host.

    Args:
        layout: where the files of the package are: "{}" as in the repository.
        only: apply the changes of this file alone.
    """
    parts = re.split("^(?=diff --git )", text_of(host, name), flags=re.MULTILINE)[1:]
    parts = [part for part in parts if part.startswith(f"diff --git a/{only or host + '/'}")]
    text = re.sub(f"(?<= [ab]/){host}/", layout.format(host) + "/", "".join(parts))
    # One line of context: near some of them, the releases differ from the repositories.
    done = subprocess.run(["git", "apply", "-C1", "-"], cwd=folder, input=text, capture_output=True, text=True)
    assert parts and not done.returncode, done.stderr


# The native blocks


class BatchNorm2d(nn.BatchNorm2d):
    """The layer that fast-reid's `get_norm` returns for "BN"."""

    def __init__(self, channels: int, weight_init: float = 1.0) -> None:
        super().__init__(channels)
        nn.init.constant_(self.weight, weight_init)


@pytest.fixture(scope="module", params=HOSTS)
def native_block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build the native block of a host: a function of channels, groups and landmarks. The host is not imported."""
    host, folder = request.param, tmp_path_factory.mktemp("native")
    apply(host, "pcb_csalr", folder, only=NATIVE_BLOCK[host])
    neighbour = ModuleType("native.neighbour")
    names: dict[str, Any] = {"PCB": nn.Module, "Bottleneck": None, "model_urls": {}, "init_pretrained_weights": None}
    vars(neighbour).update(names, get_norm=lambda norm, channels, **options: BatchNorm2d(channels, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "native", ModuleType("native"))
        for name in ("pcb", "batch_norm"):
            patch.setitem(sys.modules, f"native.{name}", neighbour)
        spec = importlib.util.spec_from_file_location("native.csalr", folder / NATIVE_BLOCK[host])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    leading = ("BN",) if host == "fastreid" else ()
    return lambda channels, groups, landmarks: module.CSALR(channels, *leading, groups, landmarks)


def step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs of a block, its gradients, and its state afterwards."""
    x = x.clone().requires_grad_()
    out, pooled = block.supervised(x) if isinstance(block, CSALR) else block(x)
    pooled = pooled.flatten(1)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + pooled.square().sum()
    names, parameters = zip(*block.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    found = zip(("x", *names), gradients, strict=True)
    results = {f"gradient of {name}": torch.zeros(()) if one is None else one for name, one in found}
    return results | {"out": out, "pooled": pooled} | {f"state {key}": one for key, one in block.state_dict().items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("sharpness", [1.0, 20.0], ids=["smooth", "floor"])
@pytest.mark.parametrize(
    ("groups", "size"), [(1, (12, 8)), (2, (12, 8)), (2, (7, 5)), (4, (3, 2))], ids=["1", "2", "any-size", "small-map"]
)
def test_native_block_equals_the_plain_block_in_float64(
    groups: int, size: tuple[int, int], sharpness: float, training: bool, native_block: Any
) -> None:
    """Outputs, gradients and running statistics, to 1e-9; also with logits so large that some S_ii are raised."""
    torch.manual_seed(0)
    ours = CSALR(32, groups=groups, landmarks=(4, 4))
    for name, value in ours.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            value.uniform_(-0.2, 0.2)
        elif name.startswith("norm") and name.endswith("weight"):
            value.mul_(sharpness if "value" not in name else 1)
    nn.init.constant_(ours.alpha, 0.7)
    theirs = native_block(32, groups, (4, 4))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 32, *size, dtype=torch.float64)
    set_fast(False)
    try:
        results = [step(block.double().train(training), x) for block in (ours, theirs)]
        smallest = ours.diagnose(x)["smallest_S_ii"]
    finally:
        set_fast(True)
    assert results[0].keys() == results[1].keys()
    if sharpness > 1:
        assert smallest < CSALR.self_attention_floor
    # The gradient of the bias of a key is 0 but for rounding, hence one scale for all gradients.
    largest = max(one.abs().max().item() for name, one in results[0].items() if name.startswith("gradient"))
    for name, expected in results[0].items():
        scale = largest if name.startswith("gradient") else max(1.0, expected.abs().max().item())
        assert (results[1][name] - expected).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("native_block", ["fastreid"], indirect=True)
def test_native_block_of_fastreid_is_finite_under_fp16_autocast(native_block: Any) -> None:
    """fast-reid trains with fp16: logits beyond 65504 do not overflow, and the map keeps its type."""
    torch.manual_seed(0)
    block = native_block(32, 2, (4, 4))
    nn.init.constant_(block.norm["query"].weight, 300.0)
    nn.init.constant_(block.norm["key"].weight, 300.0)
    nn.init.constant_(block.alpha, 0.1)
    x = torch.randn(2, 32, 6, 4).half().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        out, pooled = block(x)
    (out.float().sum() + pooled.sum()).backward()
    assert out.dtype is torch.float16 and pooled.dtype is torch.float32
    assert out.isfinite().all() and all(one.grad.isfinite().all() for one in (x, *block.parameters()))


# The patched hosts


# Lines of the releases on PyPI, and those of the repositories, next to lines that a patch changes.
RELEASED = {
    "torchreid/reid/models/__init__.py": ("from torchreid.reid.models.", "from ."),
    "fastreid/data/build.py": ("from torch._six import string_classes\n", "string_classes = str\n\n"),
}


def copy_of_host(host: str, folder: Path) -> str:
    """Copy the installed host into `folder`; return the layout of the copy, for `apply`."""
    spec = importlib.util.find_spec(host)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{host} is not installed")
    source = Path(next(iter(spec.submodule_search_locations)))
    shutil.copytree(source, folder / host, ignore=shutil.ignore_patterns("__pycache__"))
    for file, (released, newest) in RELEASED.items():
        if (path := folder / file).exists():
            path.write_text(path.read_text().replace(released, newest))
    return "{}/reid" if (folder / host / "reid").is_dir() else "{}"  # the package of torchreid on PyPI


def run(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(check.HERE / script), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("host", "model", "tensors"),
    [("torchreid", "pcb_csalr", 429), ("torchreid", "pcb_rpp", 338), ("fastreid", "pcb_csalr", 429)],
)
def test_model_of_the_patched_host_equals_the_plugins(host: str, model: str, tensors: int, tmp_path: Path) -> None:
    """Through the host's registry: weights load strictly both ways; embeddings, loss and gradients agree to 1e-6."""
    apply(host, model, tmp_path, copy_of_host(host, tmp_path))
    done = run(tmp_path, "agreement.py", host, model, "--dtype", "float64")
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tensors"] == tensors and found["width"] == 12288
    assert max(found[name] for name in check.LIMITS) < 1e-6
    if host == "torchreid":  # fast-reid's name of the model is another
        assert found["warning"] == (
            f"torchreid already has models named {model} and keeps them; csalr_plugin's are plugin_{model}."
        )


@pytest.mark.parametrize("host", HOSTS)
def test_small_patches_mend_their_failing_cases_in_the_installed_host(host: str, tmp_path: Path) -> None:
    """Each case fails before and works after, with all patches together. Scripts are not in the packages on PyPI."""
    layout = copy_of_host(host, tmp_path)
    names = sorted(
        (name for name in check.patches(host) if f"{host}/{name}" in CASES and not name.startswith("pcb")),
        key=lambda name: name != "mapping-import",  # the other cases let the host import Mapping
    )
    names = [name for name in names if f"diff --git a/{host}/" in text_of(host, name)]
    assert len(names) == {"torchreid": 2, "fastreid": 3}[host]
    results = []
    for patched in (False, True):
        if patched:
            for name in names:
                apply(host, name, tmp_path, layout)
        done = run(tmp_path, "cases.py", *(f"{host}/{name}" for name in names))
        results.append(dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(f"{host}/")))
    assert all(set(result) == {f"{host}/{name}" for name in names} for result in results), done.stderr
    assert "works" not in results[0].values()
    assert set(results[1].values()) == {"works"}


# The check


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of a host with one test, which passes, and a linter that forbids the word "bad"."""
    repository = tmp_path / "repository"
    (repository / "torchreid").mkdir(parents=True)
    (repository / "torchreid" / "__init__.py").write_text("value = 1\n")
    (repository / "test_value.py").write_text(
        "import torchreid\n\n\ndef test_value():\n    assert torchreid.value < 3\n"
    )
    (repository / "lint.sh").write_text("grep -rn bad torchreid | sed 's/:\\([0-9]*\\):/:\\1:1: /'\n")
    for words in (
        ("init", "-q"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "start"),
    ):
        subprocess.run(["git", *words], cwd=repository, check=True)
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(check, "make_linters", lambda host: None)
    monkeypatch.setattr(check, "HOSTS", {"torchreid": check.Host((), ("bash", "lint.sh"), {})})
    (tmp_path / "torchreid").mkdir()
    return repository


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("value = 1", "value = 2", []),
        ("value = 0", "value = 2", [r"applies +FAIL  error: torchreid/__init__.py: patch does not apply"]),
        ("value = 1", "value = 2  # bad", [r"linter +FAIL .* 1 new findings: torchreid/__init__.py: value = 2  # bad"]),
        ("value = 1", "value = 3", [r"host's tests +FAIL  0 of 1 fail .* 1 of 1 with it; new: test_value.test_value"]),
    ],
    ids=["good", "stale", "lint", "test"],
)
def test_check_tells_a_good_patch_from_others_and_leaves_the_clone_alone(
    before: str, after: str, told: list[str], clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = "torchreid/__init__.py"
    patch = f"diff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-{before}\n+{after}\n"
    (check.HERE / "torchreid" / "change.patch").write_text(patch)
    code = check.main(["torchreid", str(clone)])
    printed = capsys.readouterr().out
    assert "change: +1 -1 in 1 file\n" in printed
    assert code == (1 if told else 0), printed
    assert printed.endswith("a check FAILED\n" if told else "every check passed\n")
    assert len(re.findall("FAIL ", printed)) == len(told) and all(re.search(line, printed) for line in told), printed
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True)
    assert status.stdout == "" and (clone / "torchreid" / "__init__.py").read_text() == "value = 1\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["torchreid", "missing"], "'missing' is not a clone of a git repository"),
        (["fastreid", "."], "has no folder 'fastreid': give a clone of the repository of fastreid."),
        (["torchreid", ".", "--patch", "pcb"], "--patch 'pcb' is unknown: torchreid has pcb_csalr, checkpoint-loading"),
        (["mmtracking", "."], "invalid choice: 'mmtracking'"),
    ],
)
def test_check_reports_a_mistake_in_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    assert check.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and told in captured.err and not captured.out


def test_every_patch_has_a_title_a_reason_and_a_case() -> None:
    for host in HOSTS:
        for name in check.patches(host):
            text = text_of(host, name)
            title, body = text.split("\n---\n")[0].split("\n", 1)
            assert re.fullmatch(r"Subject: \[PATCH\] .{10,60}", title), (host, name)
            assert len(body.strip()) > 40, (host, name)
            assert "csalr_plugin" not in text.split("\ndiff --git", 1)[1] or name == "link", (host, name)
            assert f"{host}/{name}" in CASES or name == "link", (host, name)
            assert check.size(check.HERE / host / f"{name}.patch") in (check.HERE / "README.md").read_text()


# The table of results


def test_texts_of_the_pull_requests_hold_the_table_of_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in HOSTS:
        text = (check.HERE / host / "pcb_csalr.md").read_text(encoding="utf-8")
        assert table.fill(text, table.render([])) == text
        assert table.EMPTY in text


def test_table_is_filled_from_the_report_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "HERE", tmp_path)
    (tmp_path / "torchreid").mkdir()
    text = tmp_path / "torchreid" / "pcb_csalr.md"
    text.write_text(f"Results:\n\n{table.BEGIN}\nold\n{table.END}\n\nEnd.\n")
    cell = {
        "table": "table1",
        "row": "PCB + CSALR",
        "dataset": "market1501",
        "state": "2 seeds",
        "papers_settings": True,
    }
    cells = [
        cell | {"metric": "mAP", "ours": 82.41, "standard_deviation": 0.12},
        cell | {"metric": "rank-1", "ours": 93.9, "standard_deviation": None, "papers_settings": False},
        cell | {"row": "PCB", "metric": "mAP", "ours": None, "standard_deviation": None, "state": "not run"},
    ]
    (tmp_path / "report.json").write_text(json.dumps({"cells": cells}))
    table.main([str(tmp_path)])
    written = text.read_text()
    assert written == f"Results:\n\n{table.BEGIN}\n{capsys.readouterr().out}{table.END}\n\nEnd.\n"
    assert (
        "| PCB + CSALR | 82.4 ± 0.1 | 93.9* | - | - | 2 seeds |\n| the paper | 82.4 | 93.9 | 74.0 | 86.1 | |" in written
    )
    assert table.OTHER_SETTINGS in written and table.EMPTY not in written


def test_table_without_a_report_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"report.json' is no report of a study .*csalr reproduce table1 --report --out"
    ):
        table.main([str(tmp_path)])
