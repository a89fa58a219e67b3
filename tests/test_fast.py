"""The compiled passes: the numbers of the plain form, the operators of torch.library, and missing compilers."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csalr_plugin.attention import ATTENTION_NAMES, AttentionBlock, build_attention, set_fast, takes
from csalr_plugin.attention.fast import build, ops, passes
from csalr_plugin.attention.fast.build import compile_for, library
from csalr_plugin.errors import UserError

SHAPES = [(64, 24, 8, (6, 4)), (64, 33, 7, (5, 3)), (16, 5, 3, (12, 8)), (256, 48, 32, (12, 8))]


@pytest.fixture(autouse=True)
def fast_again() -> Iterator[None]:
    yield
    set_fast(True)


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


def plain(built: AttentionBlock, x: Tensor, **options: bool) -> dict[str, Tensor]:
    """:func:`results` of the plain form."""
    set_fast(False)
    try:
        return results(built, x, **options)
    finally:
        set_fast(True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_compiled_passes_give_outputs_gradients_and_statistics_of_the_plain_form(
    name: str,
    shape: tuple[int, int, int, tuple[int, int]],
    groups: int,
    dtype: torch.dtype,
    tolerance: float,
    training: bool,
) -> None:
    channels, height, width, landmarks = shape
    if channels * height > 10_000 and (groups in (1, 8) or dtype is torch.float64 or not training):
        pytest.skip("the large shape is there for tiles and plans; two of each suffice")
    groups = min(groups, channels // 4)
    x = images(channels, height, width).to(dtype)
    built = block(name, channels, groups, landmarks).to(dtype).train(training)
    assert takes(built, x) is None
    got = results(built, x)
    wanted = plain(block(name, channels, groups, landmarks).to(dtype).train(training), x)
    assert got.keys() == wanted.keys()
    if training:  # normalisation cancels these biases: their gradients are rounding errors
        for unseen in ("query.bias", "key.bias", "value.bias", "norm.key.bias"):
            got.pop(unseen, None), wanted.pop(unseen, None)
    assert_near(got, wanted, tolerance)


@pytest.mark.parametrize("keeps", itertools.product([True, False], repeat=4), ids=str)
@pytest.mark.parametrize("at_landmarks", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_plan_gives_the_numbers_of_the_plain_form(
    groups: int, at_landmarks: bool, keeps: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    projections, gathered, values, fused = keeps
    way = passes.Plan(at_landmarks, projections, gathered or not at_landmarks, values or not at_landmarks, fused)
    if way.keeps_fused and (not at_landmarks or groups == 1):
        pytest.skip("nothing is fused at landmarks")
    monkeypatch.setattr(passes, "plan", lambda *_: way)
    x = images(64, 12, 5).double()
    wanted = plain(block("csalr", 64, groups, (6, 4)).double(), x)
    assert_near(results(block("csalr", 64, groups, (6, 4)).double(), x), wanted, 1e-11)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, -0.02, 0.1, 3.0])
@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_no_value_of_the_gate_costs_digits(name: str, alpha: float) -> None:
    x = 3 + images(64, 24, 8)  # large beside the attention, as after a ReLU
    got, operations = results(block(name, 64, 2, (6, 4), alpha), x), plain(block(name, 64, 2, (6, 4), alpha), x)
    exact = plain(block(name, 64, 2, (6, 4), alpha).double(), x.double())
    for of in ("x", "alpha"):
        errors = [(one[of] - exact[of]).abs().max() / exact[of].abs().max().clamp(min=1) for one in (got, operations)]
        assert errors[0] <= 4 * errors[1] + 1e-6, f"{of}: {errors}"


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_fp32_has_as_many_digits_as_in_the_plain_form_with_channels_of_different_scale(groups: int) -> None:
    x = images(256, 48, 32)
    x[:, ::37] *= 100  # as in trained networks
    got, operations = results(block("csalr", 256, groups, (12, 8)), x), plain(block("csalr", 256, groups, (12, 8)), x)
    exact = plain(block("csalr", 256, groups, (12, 8)).double(), x.double())
    for of, value in exact.items():
        if value.is_floating_point():
            errors = [(one[of] - value).norm() / value.norm().clamp(min=1) for one in (got, operations)]
            assert errors[0] <= 4 * errors[1] + (4e-6 if of == "alpha" else 1e-6), f"{of}: {errors}"


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
def test_a_layer_that_writes_into_the_output_changes_no_gradient(name: str) -> None:
    x = images(64, 24, 8).double()
    got = results(block(name, 64, 2, (6, 4)).double(), x, rectified=True)
    assert_near(got, plain(block(name, 64, 2, (6, 4)).double(), x, rectified=True), 1e-11)


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


def test_autocast_takes_the_plain_form() -> None:
    built, x = block("csalr", 64, 2, (6, 4)).eval(), images(64, 24, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "another type" in str(takes(built, x))


# The operators


def csalr_arguments(groups: int, eps: float | None, gated: bool) -> tuple[Any, ...]:
    """Inputs of `csalr::csalr`, float64, that require gradients."""
    torch.manual_seed(0)
    C, D = 16, 8

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    fuse = (tensor(C, C), tensor(C)) if groups > 1 else (None, None)
    projections = (tensor(D, C), tensor(D), tensor(D), tensor(D, C), tensor(D), tensor(C, C), tensor(C), tensor(C))
    alpha = tensor() if gated else None
    return (tensor(2, C, 6, 4), *projections, *fuse, alpha, [tensor(D)], groups, [3, 2], 1e-3, eps, False, True, True)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_operator_of_csalr_passes_opcheck(groups: int, eps: float | None, gated: bool) -> None:
    torch.library.opcheck(ops.csalr, csalr_arguments(groups, eps, gated), test_utils=CHECKS)


@pytest.mark.parametrize("at_landmarks", [True, False])
def test_the_operators_of_csa_pass_opcheck(at_landmarks: bool) -> None:
    torch.manual_seed(0)
    x, Q, keys = torch.randn(2, 16, 6, 4), torch.randn(2, 8, 24), torch.randn(2, 2, 8, 6)
    W_v, source = torch.randn(16, 16), torch.randn((2, 16, 2, 6) if at_landmarks else (2, 2, 8, 6))
    for one in (x, Q, keys, W_v, source):
        one.requires_grad_()
    torch.library.opcheck(ops.gather, (x, Q, keys, W_v, at_landmarks, True), test_utils=CHECKS)
    fuse = (None, None) if at_landmarks else (W_v, torch.randn(16, requires_grad=True))
    torch.library.opcheck(ops.spread, (x, Q, keys, source, *fuse, torch.tensor(0.3), True), test_utils=CHECKS)


def test_the_backward_operators_pass_opcheck() -> None:
    given = [one.detach() if isinstance(one, Tensor) else one for one in csalr_arguments(2, 1e-5, True)]
    given[12] = []
    out, mean, _, kept = ops.csalr(*given)
    gradient = (torch.randn_like(out), torch.randn_like(mean), *given[:12], kept, *given[13:18])
    torch.library.opcheck(ops.csalr_gradient, gradient, test_utils=CHECKS)
    x, Q, keys, W_v = torch.randn(2, 16, 6, 4), torch.randn(2, 8, 24), torch.randn(2, 2, 8, 6), torch.randn(16, 16)
    rows, log_sum, V = ops.gather(x, Q, keys, W_v, False, True)
    torch.library.opcheck(ops.gather_gradient, (rows, x, Q, keys, W_v, rows, log_sum, V, False), test_utils=CHECKS)
    spread = (x, None, x, Q, keys, rows, W_v, torch.randn(16), torch.tensor(0.3))
    torch.library.opcheck(ops.spread_gradient, spread, test_utils=CHECKS)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("index", [0, 1, 2, 3, 5, 6, 9, 10, 11])
@pytest.mark.parametrize("change", ["shape", "type"])
def test_an_operator_refuses_a_tensor_of_another_shape_or_type_before_c_reads_it(index: int, change: str) -> None:
    given = list(csalr_arguments(2, 1e-5, True))
    wrong = given[index].detach()
    given[index] = wrong.float() if change == "type" else wrong.new_zeros([size + 1 for size in wrong.shape] or [2])
    with pytest.raises((ValueError, RuntimeError)):
        ops.csalr(*given)


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
    changed = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, changed)
    with (changed / "vector.h").open("a") as file:
        file.write("// another\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert compile_for("float") != first


@pytest.mark.usefixtures("no_library_yet")
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "No such file or directory: 'no-such-compiler'"),
        ({"CXX": "false"}, "returned non-zero exit status 1"),
        ({"PATH": ""}, "no C++ compiler is installed"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "No such file or directory"),
    ],
    ids=["misspelt", "failing", "none", "no cache"],
)
def test_without_a_compiler_one_warning_says_what_to_do_and_the_numbers_are_the_same(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(64, 24, 8).double()
    wanted = results(block("csalr", 64, 2, (6, 4)).double(), x)
    library.cache_clear()
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
    assert "cannot be compiled" in str(takes(block("csalr", 64, 2, (6, 4)).double(), x))
    assert_near(got, wanted, 1e-11)
