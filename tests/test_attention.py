"""The blocks: their equations, gradients, numerical safety, and refused settings."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention import ATTENTION_NAMES, AttentionBlock, LandmarkGrid, build_attention
from csalr_plugin.attention.numerics import inverse_by_products, raise_diagonal
from csalr_plugin.errors import UserError

CHANNELS = 64
GRID = (6, 4)
SIZES = [(24, 8), (12, 4), (13, 7), (5, 3), (1, 1)]  # the last two are smaller than the grid
NAMES_AND_GROUPS = [("sa", 1), *((name, groups) for name in ("csa", "csalr") for groups in (1, 2, 4, 8))]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
HALF = [torch.bfloat16, torch.float16]


def fresh(
    name: str, groups: int = 2, landmarks: tuple[int, int] = GRID, channels: int = CHANNELS, seed: int = 0
) -> AttentionBlock:
    """A block as it is built, in training mode."""
    torch.manual_seed(seed)
    return build_attention(name, channels, groups=groups, landmarks=landmarks)


def trained(name: str, groups: int = 2, landmarks: tuple[int, int] = GRID, **options: Any) -> AttentionBlock:
    """A block as after some training, float64, in eval mode: open gate, statistics and scales of its own."""
    block = fresh(name, groups, landmarks, **options).double().eval()
    with torch.no_grad():
        block.alpha.fill_(0.7)
        for module in block.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.mul_(torch.empty_like(module.weight).uniform_(0.5, 1.5))
                module.bias.normal_(std=0.1)
    return block


def feature_map(height: int, width: int, batch: int = 2, channels: int = CHANNELS, seed: int = 1) -> Tensor:
    """Random features in float64."""
    generator = torch.Generator(reference.DEVICE).manual_seed(seed)
    return torch.randn(batch, channels, height, width, dtype=torch.float64, generator=generator)


def relative_error(got: Tensor, wanted: reference.Array) -> float:
    return float(np.abs(reference.array(got) - wanted).max() / np.abs(wanted).max())


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(reference.DEVICE.type, dtype=dtype) if dtype else contextlib.nullcontext()


def backward(output: Tensor, dtype: torch.dtype | None) -> None:
    """Gradients of a random projection of the output; under fp16 with the scale that a gradient scaler finds."""
    generator = torch.Generator(reference.DEVICE).manual_seed(2)
    probe = torch.randn(output.shape, generator=generator)
    (output.float() * probe).sum().mul(2.0**-16 if dtype is torch.float16 else 1.0).backward()


def assert_finite(block: nn.Module, x: Tensor, output: Tensor) -> None:
    """Output and every gradient are finite."""
    assert output.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()
    grads = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    assert {"query.weight", "value.weight"} <= grads.keys()
    assert [name for name, grad in grads.items() if not grad.isfinite().all()] == []


# The equations


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("name", "groups"), NAMES_AND_GROUPS)
def test_each_block_equals_its_equations_to_1e_5_in_float32_and_1e_10_in_float64(
    name: str, groups: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    block = trained(name, groups).fold().to(dtype)
    x = feature_map(*size).to(dtype)
    if name == "csalr":
        assert reference.smallest_self_attention(block, x, groups, GRID) >= 1e-3
    attended = reference.attend(name, block, x, groups=groups, landmarks=GRID)
    with torch.no_grad():
        got = block.attend(x)
        output = block(x)
    assert got.dtype is dtype and got.shape == x.shape
    assert relative_error(got, attended) <= TOLERANCE[dtype]
    assert relative_error(output, reference.gated(block, x, attended)) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("landmarks", [(6, 4), (12, 4), (12, 8), (24, 8)], ids=str)
def test_csalr_equals_eq_17_with_24_48_96_and_192_landmarks(landmarks: tuple[int, int]) -> None:
    block = trained("csalr", landmarks=landmarks).fold()
    x = feature_map(24, 8)
    assert reference.smallest_self_attention(block, x, 2, landmarks) >= 1e-3
    with torch.no_grad():
        assert relative_error(block.attend(x), reference.csalr(block, x, 2, landmarks)) <= 1e-10


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("groups", [1, 2])
def test_csalr_equals_eq_17_up_to_the_edge_of_self_attention_1e_3(groups: int) -> None:
    block = trained("csalr", groups).fold()
    x = feature_map(13, 7)
    weight, bias = block.query.weight.clone(), block.query.bias.clone()
    for scale in torch.linspace(40, 1, 79).tolist():  # sharper attention until a landmark nearly ignores itself
        with torch.no_grad():
            block.query.weight.copy_(weight * scale)
            block.query.bias.copy_(bias * scale)
        least = reference.smallest_self_attention(block, x, groups, GRID)
        if least >= 1e-3:
            break
    assert 1e-3 <= least <= 2e-3
    with torch.no_grad():
        assert relative_error(block.attend(x), reference.csalr(block, x, groups, GRID)) <= 1e-10


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize(("name", "groups"), [("sa", 1), ("csa", 2), ("csalr", 1), ("csalr", 2)])
def test_training_mode_equals_the_equations_with_the_statistics_of_the_batch_folded_in(name: str, groups: int) -> None:
    block = trained(name, groups).train()
    x = feature_map(12, 5, batch=3)
    for norm in block.norm.values():
        norm.momentum = 1.0  # running statistics become those of this batch
    with torch.no_grad():
        got = block.attend(x)
        for part, norm in block.norm.items():
            # CSA and CSALR normalise values after they are gathered: six by four rows an image.
            rows = 24 if part == "value" and name != "sa" else 60
            norm.running_var *= (3 * rows - 1) / (3 * rows)  # kept unbiased, applied biased
    block.eval().fold()
    assert relative_error(got, reference.attend(name, block, x, groups=groups, landmarks=GRID)) <= 1e-10


@pytest.mark.parametrize(("name", "groups"), NAMES_AND_GROUPS)
def test_fold_keeps_the_eval_output_and_leaves_plain_convolutions(name: str, groups: int) -> None:
    block = trained(name, groups)
    x = feature_map(13, 7)
    with torch.no_grad():
        before = block(x)
        assert block.fold() is block
        after = block(x)
    assert relative_error(after, reference.array(before)) <= 1e-12
    projections = [part for part in ("query", "key", "value", "fuse") if hasattr(block, part)]
    wanted = ["query", "value"] if name == "csa" else ["query", "key", "value"]
    assert projections == (wanted if groups == 1 else [*wanted, "fuse"])
    for part in projections:
        convolution = getattr(block, part)
        assert type(convolution) is nn.Conv2d and convolution.kernel_size == (1, 1)
        assert type(convolution.weight) is nn.Parameter
    assert {type(module) for module in block.modules()} <= {type(block), nn.Conv2d, nn.ModuleDict}
    widths = {"query": 16, "key": 16, "value": 64, "fuse": 64}
    assert [getattr(block, part).out_channels for part in projections] == [widths[part] for part in projections]


def test_fold_of_a_folded_block_changes_nothing() -> None:
    block = trained("csalr").fold()
    x = feature_map(5, 3)
    with torch.no_grad():
        assert torch.equal(block(x), block.fold()(x))


@pytest.mark.parametrize(("name", "groups"), NAMES_AND_GROUPS)
def test_rows_of_the_attention_map_sum_to_1_so_constant_values_stay_as_they_are(name: str, groups: int) -> None:
    block = trained(name, groups).fold()
    with torch.no_grad():
        block.value.weight.zero_()
        attended = block.attend(feature_map(13, 7))
        constant = block.value.bias[None, :, None, None]
        wanted = block.fuse(constant) if groups > 1 else constant
    assert relative_error(attended, reference.array(wanted.expand_as(attended))) <= 1e-12


def test_csa_has_orthonormal_bases_of_the_query_width_in_each_group() -> None:
    block = fresh("csa", groups=2, landmarks=(2, 4))
    assert block.bases.shape == (2 * 8, 16)
    for bases in block.bases.detach().chunk(2):
        torch.testing.assert_close(bases @ bases.T, torch.eye(8))


# Gradients


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize(("name", "groups"), [("sa", 1), ("csa", 1), ("csa", 2), ("csalr", 1), ("csalr", 2)])
def test_gradients_of_input_and_all_parameters_pass_gradcheck(name: str, groups: int) -> None:
    block = trained(name, groups, landmarks=(2, 2), channels=16).fold()
    parameters = dict(block.named_parameters())

    def output(x: Tensor, *values: Tensor) -> Tensor:
        # The residual output holds attend and the gate, so the gradient of alpha is checked as well.
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    x = feature_map(4, 3, batch=1, channels=16).requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *parameters.values()))


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_gradients_pass_gradcheck_with_the_normalisation_of_training(name: str) -> None:
    block = trained(name, landmarks=(2, 2), channels=16).train()
    x = feature_map(4, 3, channels=16).requires_grad_()
    assert torch.autograd.gradcheck(block.attend, (x,), fast_mode=True)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize(("name", "groups"), [("sa", 1), ("csa", 2), ("csalr", 1), ("csalr", 2), ("csalr", 4)])
def test_output_and_pooled_mean_of_a_supervised_block_pass_gradcheck(name: str, groups: int) -> None:
    block = trained(name, groups, landmarks=(2, 2), channels=16).train()
    parameters = dict(block.named_parameters())

    def outputs(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(_Supervised(block), dict(zip(names, values, strict=True)), (x,))

    names = [f"block.{name}" for name in parameters]
    x = feature_map(4, 3, channels=16).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, *parameters.values()), fast_mode=True)


class _Supervised(nn.Module):
    """`functional_call` calls a module's forward."""

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.block.supervised(x)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize(("name", "groups"), NAMES_AND_GROUPS)
@pytest.mark.parametrize("training", [True, False])
def test_supervised_is_the_block_and_the_mean_of_stage_output_times_attention(
    name: str, groups: int, training: bool
) -> None:
    block = trained(name, groups).train(training)
    x = feature_map(13, 7)
    with torch.no_grad():
        output, pooled = block.supervised(x)
        torch.testing.assert_close(output, block(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pooled, (x * block.attend(x)).mean((2, 3)), rtol=1e-10, atol=1e-12)


@pytest.mark.on_cpu
@pytest.mark.usefixtures("either_form")
def test_gradients_of_csalr_pass_gradcheck_where_self_attention_is_raised_to_its_floor() -> None:
    block = trained("csalr", groups=1, landmarks=(2, 2), channels=16).fold()
    x = feature_map(4, 3, batch=1, channels=16)
    with torch.no_grad():
        block.query.weight.mul_(60)
    assert reference.smallest_self_attention(block, x, 1, (2, 2)) < 1e-3
    assert torch.autograd.gradcheck(block.attend, (x.requires_grad_(),))


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_shut_gate_has_a_gradient_so_it_can_open(name: str) -> None:
    block = fresh(name)
    x = feature_map(5, 3).float()
    block(x).square().sum().backward()
    assert block.alpha.grad is not None and block.alpha.grad.abs() > 0


# Modes of use


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "groups"), NAMES_AND_GROUPS)
def test_a_freshly_built_block_is_exactly_the_identity(name: str, groups: int, training: bool) -> None:
    block = fresh(name, groups).train(training)
    assert isinstance(block.alpha, nn.Parameter) and block.alpha.shape == () and block.alpha.item() == 0
    x = feature_map(13, 7).float()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["trained", "folded"])
@pytest.mark.parametrize(("name", "groups"), [("sa", 1), ("csa", 1), ("csa", 2), ("csalr", 1), ("csalr", 2)])
def test_autocast_is_finite_and_near_float32(name: str, groups: int, folded: bool, dtype: torch.dtype) -> None:
    block = trained(name, groups).float()
    if folded:
        block.fold()
    x = feature_map(13, 7).float().requires_grad_()
    with torch.no_grad():
        wanted = block(x)
    with autocast(dtype):
        got = block(x)
    backward(got, dtype)
    assert_finite(block, x, got)
    assert relative_error(got, reference.array(wanted)) <= {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_double_gives_float64_throughout(name: str) -> None:
    block = fresh(name).double()
    x = feature_map(5, 3).requires_grad_()
    output = block(x)
    output.sum().backward()
    assert output.dtype is torch.float64
    assert x.grad is not None and x.grad.dtype is torch.float64


@pytest.mark.on_cpu
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_torch_compile_takes_the_whole_block_without_graph_breaks(name: str, backend: str) -> None:
    torch._dynamo.reset()
    block = trained(name).float()
    x = feature_map(5, 3).float().requires_grad_()
    wanted = block(x)
    got = torch.compile(block, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_two_runs_are_bit_identical_forward_and_backward(name: str) -> None:
    runs = []
    for _ in range(2):
        block = fresh(name)
        nn.init.ones_(block.alpha)
        x = feature_map(13, 7).float().requires_grad_()
        output = block(x)
        output.square().sum().backward()
        runs.append([output, x.grad, *(parameter.grad for parameter in block.parameters())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_csalr_with_192_landmarks_is_the_same_with_two_threads(dtype: torch.dtype) -> None:
    block = trained("csalr", landmarks=(24, 8)).to(dtype)
    x = feature_map(24, 8).to(dtype)
    threads = torch.get_num_threads()
    with torch.no_grad():
        wanted = block(x)
        try:
            torch.set_num_threads(2)
            got = block(x)
        finally:
            torch.set_num_threads(threads)
    assert relative_error(got, reference.array(wanted)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_equal_seeds_give_equal_weights_and_others_do_not(name: str) -> None:
    first, again, other = (fresh(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["query.weight"], other["query.weight"])


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_an_image_gets_the_same_output_alone_and_in_a_batch(name: str) -> None:
    block = trained(name)
    x = feature_map(13, 7, batch=3)
    with torch.no_grad():
        together = block(x)
        alone = torch.cat([block(image[None]) for image in x])
    assert relative_error(alone, reference.array(together)) <= 1e-12


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_batch_of_one_image_trains(name: str) -> None:
    block = fresh(name)
    x = feature_map(13, 7, batch=1).float().requires_grad_()
    output = block.attend(x)
    backward(output, None)
    assert_finite(block, x, output)


# Diagnosis


@pytest.mark.parametrize("groups", [1, 2])
def test_diagnose_gives_the_largest_logit_and_the_least_self_attention(groups: int) -> None:
    block = trained("csalr", groups).fold()
    x = feature_map(13, 7)
    found = block.diagnose(x)
    least = reference.smallest_self_attention(block, x, groups, GRID)
    assert found["smallest_S_ii"] == pytest.approx(least, rel=1e-10)
    sharper = trained("csalr", groups).fold()
    with torch.no_grad():
        sharper.query.weight.mul_(3)
        sharper.query.bias.mul_(3)
    assert sharper.diagnose(x)["largest_logit"] == pytest.approx(3 * found["largest_logit"], rel=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_diagnose_leaves_the_running_statistics_alone(name: str, training: bool) -> None:
    block = trained(name).train(training)
    before = {key: value.clone() for key, value in block.state_dict().items() if "running" in key}
    block.diagnose(feature_map(5, 3))
    after = block.state_dict()
    assert before and all(torch.equal(value, after[key]) for key, value in before.items())
    assert block.training is training


@pytest.mark.parametrize("kind", ["finite", "infinite"])
def test_diagnose_leaves_every_buffer_alone_whatever_the_features(kind: str) -> None:
    block = trained("csalr").train()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    x = feature_map(5, 3)
    x[0, 0, 0, 0] = torch.inf if kind == "infinite" else 0.0
    block.diagnose(x)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


# Numerical safety

FEATURES = {"as they come": 1.0, "times 1e2": 1e2, "times 1e4": 1e4, "constant": None, "zero": 0.0}


def hostile(kind: str) -> Tensor:
    factor = FEATURES[kind]
    x = feature_map(13, 7).float()
    return (torch.full_like(x, 3.0) if factor is None else x * factor).requires_grad_()


@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize(
    ("name", "groups"), [("sa", 1), ("csa", 1), ("csa", 2), ("csalr", 1), ("csalr", 2), ("csalr", 8)]
)
def test_a_folded_block_is_finite_forward_and_backward_on_hostile_features(
    name: str, groups: int, kind: str, dtype: torch.dtype | None
) -> None:
    block = fresh(name, groups).fold()
    x = hostile(kind)
    with autocast(dtype):
        output = block.attend(x)
    backward(output, dtype)
    assert_finite(block, x, output)


@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_training_block_is_finite_forward_and_backward_on_hostile_features(
    name: str, kind: str, dtype: torch.dtype | None
) -> None:
    block = fresh(name)
    x = hostile(kind)
    with autocast(dtype):
        output = block.attend(x)
    backward(output, dtype)
    assert_finite(block, x, output)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(("name", "groups"), [("sa", 1), ("csa", 2), ("csalr", 1), ("csalr", 2)])
def test_features_of_1e25_give_a_finite_output(name: str, groups: int, folded: bool) -> None:
    block = fresh(name, groups).eval()
    if folded:
        block.fold()
    with torch.no_grad():
        assert block.attend(feature_map(13, 7).float() * 1e25).isfinite().all()


@pytest.mark.parametrize("factor", [30.0, 100.0, 1e4])
@pytest.mark.parametrize("groups", [1, 2])
def test_csalr_without_fuse_stays_within_1000_times_the_largest_value(groups: int, factor: float) -> None:
    block = fresh("csalr", groups).fold().double()
    if groups > 1:
        nn.init.dirac_(block.fuse.weight)
        nn.init.zeros_(block.fuse.bias)
    x = feature_map(13, 7) * factor
    with torch.no_grad():
        assert block.attend(x).abs().max() <= 1000 * block.value(x).abs().max()


def mutual_landmarks(strength: float) -> tuple[AttentionBlock, Tensor]:
    """Two landmarks that attend to each other `strength` stronger than to themselves.

    Channels 0 and 1 are the queries, swapped they are the keys; the upper patch has its mean on channel 0, the
    lower on channel 1. A patch's second row asks for nothing, so its output is no even mixture of landmarks.
    """
    block = fresh("csalr", groups=1, landmarks=(2, 1), channels=8).double().fold()
    x = feature_map(4, 1, batch=1, channels=8)
    x[0, :2] = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]).view(2, 4, 1)
    with torch.no_grad():
        for projection in (block.query, block.key):
            projection.weight.zero_()
            projection.bias.zero_()
        block.query.weight[0, 0] = block.query.weight[1, 1] = strength
        block.key.weight[0, 1] = block.key.weight[1, 0] = 1.0
    return block, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("strength", [20.0, 1000.0])
def test_landmarks_that_attend_only_to_each_other_break_the_formula_and_not_the_block(
    strength: float, dtype: torch.dtype
) -> None:
    block, x = mutual_landmarks(strength)
    (_, S_mm, _, _, _) = next(reference.csalr_maps(block, reference.images(x)[0], (4, 1), 1, (2, 1)))
    np.testing.assert_allclose(S_mm + np.eye(2), [[1, 1], [1, 1]], atol=1e-8)
    largest = float(block.value(x).abs().max().detach())
    if strength == 20:
        assert np.abs(reference.csalr(block, x, 1, (2, 1))).max() > 1e6 * largest
    else:
        with pytest.raises(np.linalg.LinAlgError):
            reference.csalr(block, x, 1, (2, 1))

    half = dtype if dtype in HALF else None
    block.to(torch.float32 if half else dtype)
    x = x.to(torch.float32 if half else dtype).requires_grad_()
    with autocast(half):
        output = block.attend(x)
    backward(output, half)
    assert_finite(block, x, output)
    assert output.abs().max() <= 1000 * largest * (1.01 if half else 1)


# The grid of landmarks


@pytest.mark.parametrize(
    ("size", "landmarks"), [((24, 8), (12, 8)), ((24, 8), (6, 4)), ((6, 4), (3, 1)), ((5, 3), (5, 3))]
)
def test_landmarks_are_average_pooling_where_the_grid_divides_the_map(
    size: tuple[int, int], landmarks: tuple[int, int]
) -> None:
    x = feature_map(*size, channels=5)
    pooled = LandmarkGrid(*size, landmarks, reference.DEVICE).pool(x.flatten(2))
    kernel = (size[0] // landmarks[0], size[1] // landmarks[1])
    torch.testing.assert_close(pooled, F.avg_pool2d(x, kernel).flatten(2), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("landmarks", [(6, 4), (5, 3), (1, 1), (100, 100)], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (7, 11)], ids=str)
def test_membership_follows_the_floor_rule_and_each_position_has_one_landmark(
    size: tuple[int, int], landmarks: tuple[int, int]
) -> None:
    grid = LandmarkGrid(*size, landmarks, reference.DEVICE)
    P = reference.membership(*size, landmarks)
    got = grid.membership(torch.float64)
    assert grid.m == P.shape[1] == min(size[0], landmarks[0]) * min(size[1], landmarks[1])
    assert np.array_equal(got.cpu().numpy(), P)
    assert (got.sum(1) == 1).all() and (got.sum(0) >= 1).all()
    x = feature_map(*size, channels=5)
    means = reference.array(x.flatten(2)) @ (P / P.sum(axis=0))
    np.testing.assert_allclose(grid.pool(x.flatten(2)).cpu().numpy(), means, rtol=1e-12, atol=1e-13)


# Refused settings


def refusal(name: str = "csalr", **options: Any) -> str:
    with pytest.raises(UserError) as error:
        build_attention(name, CHANNELS, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("groups", [3, 0, -2, 128])
@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_groups_that_do_not_divide_the_channels_are_refused(name: str, groups: int) -> None:
    message = refusal(name, groups=groups)
    assert f"groups {groups}" in message and "64" in message and "16" in message


def test_groups_that_divide_the_channels_but_not_the_queries_are_refused() -> None:
    assert "groups 32" in refusal(groups=32)


@pytest.mark.parametrize("name", ATTENTION_NAMES)
@pytest.mark.parametrize("landmarks", [(0, 8), (12, -1), (12,), (1, 2, 3), (2.0, 8), ("12", "8"), "68", ()], ids=repr)
def test_landmarks_that_are_not_two_positive_integers_are_refused(name: str, landmarks: Any) -> None:
    message = refusal(name, landmarks=landmarks)
    assert message.startswith(f"landmarks {landmarks!r}") and "two positive integers" in message


@pytest.mark.parametrize("landmarks", [12, None])
def test_landmarks_that_are_no_pair_at_all_are_refused(landmarks: Any) -> None:
    assert refusal(landmarks=landmarks).startswith(f"landmarks {landmarks!r}")


@pytest.mark.parametrize("groups", [2.0, "2", None])
def test_groups_that_are_no_integer_are_refused(groups: Any) -> None:
    assert f"groups {groups!r}" in refusal(groups=groups)


@pytest.mark.parametrize("key_ratio", ["a quarter", None])
def test_a_key_ratio_that_is_no_number_is_refused(key_ratio: Any) -> None:
    assert f"key_ratio {key_ratio!r}" in refusal(key_ratio=key_ratio)


@pytest.mark.parametrize("key_ratio", [0, -0.25, 1.5, float("nan"), 1e-4])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_key_ratio_out_of_range_is_refused(name: str, key_ratio: float) -> None:
    assert f"key_ratio {key_ratio!r}" in refusal(name, key_ratio=key_ratio)


def test_an_unknown_attention_is_refused_with_the_nearest_name() -> None:
    message = refusal("cslar")
    assert "'cslar'" in message and "Did you mean 'csalr'" in message
    assert all(name in message for name in ATTENTION_NAMES)


# Properties


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(ATTENTION_NAMES),
    groups=st.sampled_from([1, 2, 4, 8]),
    height=st.integers(1, 12),
    width=st.integers(1, 9),
    landmarks=st.tuples(st.integers(1, 7), st.integers(1, 5)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_size_groups_grid_and_batch_keep_shape_and_equations(
    name: str, groups: int, height: int, width: int, landmarks: tuple[int, int], batch: int, seed: int
) -> None:
    groups = 1 if name == "sa" else groups
    block = trained(name, groups, landmarks, seed=seed).fold()
    x = feature_map(height, width, batch, seed=seed)
    with torch.no_grad():
        attended = block.attend(x)
    assert attended.shape == x.shape and attended.isfinite().all()
    if name == "csalr":
        assert reference.smallest_self_attention(block, x, groups, landmarks) >= 1e-3
    assert relative_error(attended, reference.attend(name, block, x, groups=groups, landmarks=landmarks)) <= 1e-10


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(ATTENTION_NAMES),
    groups=st.sampled_from([1, 2, 4, 8]),
    height=st.integers(1, 12),
    width=st.integers(1, 9),
    landmarks=st.tuples(st.integers(1, 7), st.integers(1, 5)),
    sharpness=st.floats(0.0, 1e3),
    seed=st.integers(0, 2**16),
)
def test_rows_of_any_attention_map_sum_to_1_however_sharp(
    name: str, groups: int, height: int, width: int, landmarks: tuple[int, int], sharpness: float, seed: int
) -> None:
    groups = 1 if name == "sa" else groups
    block = trained(name, groups, landmarks, seed=seed).fold()
    with torch.no_grad():
        block.value.weight.zero_()
        attended = block.attend(feature_map(height, width, 1, seed=seed) * sharpness)
        constant = block.value.bias[None, :, None, None]
        wanted = block.fuse(constant) if groups > 1 else constant
    # The solve of CSALR has a condition number of up to 1000.
    assert relative_error(attended, reference.array(wanted.expand_as(attended))) <= 1e-10


# The inverse as products


def dominant(m: int, scale: float) -> Tensor:
    """A = S + I in float64, for random S with a diagonal of at least 1e-3."""
    logits = scale * torch.randn(
        2, m, m, dtype=torch.float64, generator=torch.Generator(reference.DEVICE).manual_seed(0)
    )
    return raise_diagonal(logits.softmax(-1), 1e-3)


@pytest.mark.parametrize("scale", [0.1, 1, 10, 100])
def test_the_inverse_by_products_is_the_inverse_and_has_its_gradients(scale: float) -> None:
    A = dominant(24, scale)
    weight = torch.randn(A.shape, dtype=A.dtype, generator=torch.Generator(reference.DEVICE).manual_seed(1))
    results = []
    for inverse in (lambda A: inverse_by_products(A, 1e-3), torch.linalg.inv):
        given = A.clone().requires_grad_()
        X = inverse(given)
        (gradient,) = torch.autograd.grad((X * weight).sum(), given, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), given)
        results.append((X.detach(), gradient.detach(), second))
    for got, wanted in zip(*results, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) <= 1e-8
