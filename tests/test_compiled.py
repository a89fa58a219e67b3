"""The compiled passes over positions: the same numbers as torch's operations, and what happens without a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from csalr_plugin.attention import ATTENTION_NAMES, AttentionBlock, build_attention
from csalr_plugin.attention import compiled as compiled_module
from csalr_plugin.attention.compiled import CompiledPositions, compile_for, library
from csalr_plugin.errors import UserError

SHAPES = [(64, 24, 8, (6, 4)), (64, 33, 7, (5, 3)), (16, 5, 3, (12, 8)), (256, 48, 32, (12, 8))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled passes that ran."""
    made: list[str] = []
    original = CompiledPositions._call

    def call(self: CompiledPositions, name: str, *arguments: object) -> None:
        made.append(name)
        original(self, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CompiledPositions, "_call", call)
    return made


@pytest.fixture
def no_library_yet() -> Iterator[None]:
    """Nothing is compiled or loaded before the test, and nothing of it stays."""
    library.cache_clear()
    yield
    library.cache_clear()


def block(name: str, channels: int, groups: int, landmarks: tuple[int, int], alpha: float = 0.4) -> AttentionBlock:
    torch.manual_seed(0)
    built = build_attention(name, channels, groups=groups, landmarks=landmarks)
    nn.init.constant_(built.alpha, alpha)
    return built


def results(built: AttentionBlock, x: Tensor, rectified: bool = False) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of a training step."""
    given = x.clone().requires_grad_()
    output, pooled = built.supervised(given)
    if rectified:
        output = output.relu_()
    generator = torch.Generator().manual_seed(3)
    probes = [torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one) for one in (output, pooled)]
    ((output * probes[0]).sum() + 50 * (pooled * probes[1]).sum()).backward()
    assert given.grad is not None
    gradients = {name: parameter.grad for name, parameter in built.named_parameters() if parameter.grad is not None}
    return {"output": output, "pooled": pooled, "x": given.grad, **gradients, **dict(built.named_buffers())}


def images(channels: int, height: int, width: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest entry of each tensor, or of 1: some gradients are 0 but for rounding."""
    for name, value in wanted.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_compiled_passes_give_the_numbers_of_torchs_operations(
    name: str,
    shape: tuple[int, int, int, tuple[int, int]],
    groups: int,
    dtype: torch.dtype,
    tolerance: float,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channels, height, width, landmarks = shape
    if channels * height > 10_000 and (groups in (1, 8) or dtype is torch.float64):
        pytest.skip("the large shape is there for tiles and plans; two of each suffice")
    groups = min(groups, channels // 4)
    x = images(channels, height, width).to(dtype)
    got = results(block(name, channels, groups, landmarks).to(dtype), x)
    assert {"gather", "spread", "gather_backward", "spread_backward"} <= set(calls)
    calls.clear()
    monkeypatch.setattr(CompiledPositions, "can", staticmethod(lambda *_: False))
    wanted = results(block(name, channels, groups, landmarks).to(dtype), x)
    assert not calls
    assert_near(got, wanted, tolerance)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, -0.02, 0.1, 3.0])
@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_no_gate_costs_digits_though_the_attention_is_taken_from_the_output(
    name: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = 3 + images(64, 24, 8)  # large beside O, as after a ReLU
    got = results(block(name, 64, 2, (6, 4), alpha), x)
    monkeypatch.setattr(CompiledPositions, "can", staticmethod(lambda *_: False))
    operations = results(block(name, 64, 2, (6, 4), alpha), x)
    exact = results(block(name, 64, 2, (6, 4), alpha).double(), x.double())
    for of in ("x", "alpha"):
        errors = [(one[of] - exact[of]).abs().max() / exact[of].abs().max().clamp(min=1) for one in (got, operations)]
        assert errors[0] <= 4 * errors[1] + 1e-5, f"{of}: {errors}"


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_products_by_quarters_lose_no_digits_to_speak_of(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(256, 48, 32)
    x[:, ::37] *= 100  # some channels far larger than others, as in trained networks
    got = results(block("csalr", 256, groups, (12, 8)), x)
    monkeypatch.setattr(CompiledPositions, "can", staticmethod(lambda *_: False))
    operations = results(block("csalr", 256, groups, (12, 8)), x)
    exact = results(block("csalr", 256, groups, (12, 8)).double(), x.double())
    for of, value in exact.items():
        if not value.is_floating_point():
            continue
        errors = [(one[of] - value).norm() / value.norm().clamp(min=1) for one in (got, operations)]
        own = 4e-5 if of == "alpha" else 1e-6  # its gradient takes O from the output, beside an x far larger
        assert errors[0] <= 4 * errors[1] + own, f"{of}: {errors}"


# Neither 56 channels a group nor 88 landmarks fill whole registers.
@pytest.mark.parametrize(("channels", "groups", "landmarks"), [(112, 2, (8, 4)), (64, 1, (11, 8)), (64, 8, (11, 8))])
def test_nothing_that_was_computed_before_changes_a_digit(
    channels: int, groups: int, landmarks: tuple[int, int]
) -> None:
    x = images(channels, 33, 8)
    first = results(block("csalr", channels, groups, landmarks), x)
    results(block("csalr", channels, groups, landmarks), x * float("nan"))  # all that stays in scratch memory
    again = results(block("csalr", channels, groups, landmarks), x)
    for of, value in first.items():
        assert torch.equal(again[of], value), of


@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_a_layer_that_writes_into_the_output_changes_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(64, 24, 8).double()
    got = results(block(name, 64, 2, (6, 4)).double(), x, rectified=True)
    monkeypatch.setattr(CompiledPositions, "can", staticmethod(lambda *_: False))
    assert_near(got, results(block(name, 64, 2, (6, 4)).double(), x, rectified=True), 1e-12)


@pytest.mark.parametrize("groups", [1, 4])
def test_any_number_of_threads_gives_the_same_numbers_and_the_same_call_the_same_digits(groups: int) -> None:
    x = images(64, 33, 8, batch=2).double()
    found = []
    try:
        for threads in (1, 1, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(block("csalr", 64, groups, (6, 4)).double(), x))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    for other in found[2:]:
        assert_near(other, found[0], 1e-12)


def test_a_nan_in_the_input_shows_in_the_output() -> None:
    x = images(64, 24, 8)
    x[0, 5, 3, 3] = float("nan")
    with torch.no_grad():
        output = block("csalr", 64, 2, (6, 4)).eval()(x)
    assert output[0].isnan().any()


def test_half_precision_autocast_and_maps_of_another_kind_take_torchs_operations(calls: list[str]) -> None:
    built, x = block("csalr", 64, 2, (6, 4)).eval(), images(64, 24, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        built(x)
    with torch.no_grad():
        build_attention("csalr", 64, groups=2, landmarks=(6, 4)).to("meta")(x.to("meta"))
    assert not calls


@pytest.mark.parametrize("name", ATTENTION_NAMES)
@pytest.mark.parametrize("shape", [(2, 32, 8, 4), (2, 64, 32), (64, 8, 4)], ids=str)
def test_a_map_that_is_not_the_blocks_is_refused_in_one_line(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^x has the shape .*; this block takes \(B, 64, H, W\)\.$"):
        block(name, 64, 1, (6, 4))(torch.randn(shape))


@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_weights_of_another_type_than_the_map_are_refused_in_one_line(name: str) -> None:
    with pytest.raises((UserError, RuntimeError)) as error:
        block(name, 64, 2, (6, 4)).double()(images(64, 8, 4))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_library_yet")
def test_the_library_is_compiled_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compile_for("float")
    written = first.stat().st_mtime_ns
    assert first.parent == tmp_path / "csalr_plugin" and [one.name for one in first.parent.iterdir()] == [first.name]
    assert compile_for("float") == first and first.stat().st_mtime_ns == written
    changed = tmp_path / "changed.cpp"
    changed.write_text(compiled_module.SOURCE.read_text() + "// another\n")
    monkeypatch.setattr(compiled_module, "SOURCE", changed)
    assert compile_for("float") != first


@pytest.mark.usefixtures("no_library_yet")
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "No such file or directory: 'no-such-compiler'"),
        ({"CXX": "false"}, "returned non-zero exit status 1"),
        ({"PATH": ""}, "no C++ compiler is there"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "No such file or directory"),
    ],
    ids=["misspelt", "failing", "none", "no cache"],
)
def test_without_a_compiler_one_warning_says_what_to_do_and_the_numbers_are_the_same(
    variables: dict[str, str], reason: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(64, 24, 8).double()
    wanted = results(block("csalr", 64, 2, (6, 4)).double(), x)
    library.cache_clear()
    calls.clear()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "CXX" not in variables:
        monkeypatch.delenv("CXX", raising=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = results(block("csalr", 64, 2, (6, 4)).double(), x)
    assert len(told) == 1
    message = str(told[0].message)
    assert "\n" not in message and reason in message and "Install g++" in message
    assert not calls
    assert_near(got, wanted, 1e-12)
