"""The blocks wherever torch works: layouts, dispatch modes, transforms, export, half precision, hooks and adapters."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import csalr_plugin
from csalr_plugin.attention import ATTENTION_NAMES, AttentionBlock, build_attention, set_fast, takes
from csalr_plugin.models import build_model

CASES = [("sa", 1), ("csa", 1), ("csa", 2), ("csalr", 1), ("csalr", 2)]


@pytest.fixture(autouse=True)
def fast_again() -> Iterator[None]:
    yield
    set_fast(True)


def make(name: str, groups: int = 2, channels: int = 16, dtype: torch.dtype = torch.float64) -> AttentionBlock:
    """A block in eval mode with an open gate, landmarks (4, 3) and statistics unlike those of its start."""
    torch.manual_seed(0)
    block = build_attention(name, channels, groups=groups, landmarks=(4, 3)).double().eval()
    with torch.no_grad():
        block.alpha.fill_(0.3)
        for norm in block.norm.values():
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)
    return block.to(dtype)


def features(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator(reference.DEVICE).manual_seed(1))


def gradients(block: AttentionBlock, x: Tensor, probe: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of one supervised step."""
    block.zero_grad()
    given = x.detach().requires_grad_()
    output, pooled = block.supervised(given)
    probe = features(*output.shape, dtype=output.dtype) if probe is None else probe
    ((output * probe).sum() + pooled.square().sum()).backward()
    assert given.grad is not None
    found = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), "pooled": pooled.detach(), "x": given.grad, **found}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.1e}"


# Layouts


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": sliced,
    "transposed": lambda x: x.mT.contiguous().mT,
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "groups"), CASES)
def test_outputs_and_gradients_do_not_depend_on_the_memory_layout(
    name: str, groups: int, layout: str, training: bool
) -> None:
    x = features(2, 16, 8, 6)
    wanted = gradients(make(name, groups).train(training), x)
    laid = LAYOUTS[layout](x)
    assert torch.equal(laid, x)
    assert_equal(gradients(make(name, groups).train(training), laid, LAYOUTS[layout](features(*x.shape))), wanted)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_an_expanded_input_and_an_expanded_gradient_are_read_by_their_strides(name: str) -> None:
    x = features(1, 16, 1, 1).expand(2, 16, 8, 6)
    block = make(name)
    wanted = gradients(block, x.contiguous(), torch.ones(2, 16, 8, 6, dtype=x.dtype))
    assert_equal(gradients(block, x, torch.ones((), dtype=x.dtype).expand(2, 16, 8, 6)), wanted)


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_channels_last_map_stays_channels_last(name: str) -> None:
    x = features(2, 16, 8, 6).to(memory_format=torch.channels_last)
    assert make(name)(x).is_contiguous(memory_format=torch.channels_last)


# Dispatch modes and checkpoints


class Nothing(TorchDispatchMode):
    """Observes every operation and changes none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Nothing, lambda: FlopCounterMode(display=False)], ids=["observer", "flop counter"])
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_the_backward_pass_takes_the_path_of_its_forward_pass(name: str, where: str, mode: Any) -> None:
    x, block = features(2, 16, 8, 6), make(name).train()
    wanted = gradients(copy.deepcopy(block), x)
    given = x.clone().requires_grad_()
    if where == "backward":
        output, pooled = block.supervised(given)
    else:
        with mode():
            output, pooled = block.supervised(given)
    loss = (output * features(*x.shape)).sum() + pooled.square().sum()
    if where == "forward":
        loss.backward()
    else:
        with mode():
            loss.backward()
    assert given.grad is not None
    assert_equal({"x": given.grad}, {"x": wanted["x"]})


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_selective_checkpointing_gives_the_same_gradients(name: str) -> None:
    x, block = features(2, 16, 8, 6), make(name)
    wanted = gradients(block, x)["x"]
    given = x.clone().requires_grad_()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.bmm.default])

    output, pooled = checkpoint(block.supervised, given, use_reentrant=False, context_fn=contexts)
    ((output * features(*x.shape)).sum() + pooled.square().sum()).backward()
    assert given.grad is not None
    assert_equal({"x": given.grad}, {"x": wanted})


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_checkpointing_a_whole_block_in_training_gives_the_same_gradients_and_statistics(name: str) -> None:
    x = features(2, 16, 8, 6)
    wanted, block = make(name).train(), make(name).train()
    expected = gradients(wanted, x)
    given = x.clone().requires_grad_()
    output, pooled = checkpoint(block.supervised, given, use_reentrant=False)
    ((output * features(*x.shape)).sum() + pooled.square().sum()).backward()
    assert given.grad is not None
    assert_equal({"x": given.grad}, {"x": expected["x"]})


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_recomputing_updates_running_statistics_once_and_keeping_gives_the_same(name: str) -> None:
    set_fast(False)
    x = features(2, 16, 8, 6)
    recomputing, keeping = make(name).train(), make(name).train().set_recompute(False)
    assert_equal(gradients(recomputing, x), gradients(keeping, x), 1e-12)
    for one, other in zip(recomputing.buffers(), keeping.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(norm.num_batches_tracked == 1 for norm in recomputing.norm.values())


# Unusual blocks


def test_a_floor_of_zero_is_the_published_formula() -> None:
    block = make("csalr").fold()
    block.self_attention_floor = 0
    x = features(2, 16, 8, 6)
    wanted = reference.csalr(block, x, 2, (4, 3))
    for enabled in (True, False):
        set_fast(enabled)
        assert abs(reference.array(block.attend(x)) - wanted).max() <= 1e-12


@pytest.mark.on_cpu
@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_a_query_of_another_width_is_an_error_and_no_crash(name: str) -> None:
    block = make(name, 1)
    block.query = nn.Conv2d(16, 8, 1).double()
    block.norm["query"] = nn.BatchNorm1d(8).double()
    x = features(2, 16, 8, 6)
    assert takes(block, x) == "query is replaced, parametrised or hooked"
    with pytest.raises((RuntimeError, ValueError)):
        block(x)


@pytest.mark.on_cpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projection", ["query", "key", "value", "fuse"])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_forward_hook_on_each_projection_fires_and_its_result_counts(
    name: str, projection: str, training: bool
) -> None:
    block = make(name).train(training)
    if not hasattr(block, projection):
        pytest.skip(f"{name} has no {projection}")
    x = features(2, 16, 8, 6)
    wanted = make(name).train(training)
    with torch.no_grad():
        getattr(wanted, projection).weight.mul_(2)
        getattr(wanted, projection).bias.mul_(2)
    calls: list[str] = []

    def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(projection)
        return 2 * output

    handle = getattr(block, projection).register_forward_hook(double)
    assert takes(block, x) is not None
    with torch.no_grad():
        got = block.attend(x)
        assert calls == [projection]
        torch.testing.assert_close(got, wanted.attend(x))
    handle.remove()
    assert name == "sa" or takes(block, x) is None


class Adapter(nn.Module):
    """A low-rank adapter around a projection, with a nonlinearity."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Conv2d(inner.in_channels, 2, 1), nn.Conv2d(2, inner.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x).relu())


@pytest.mark.parametrize("projection", ["query", "key", "value", "fuse"])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_an_adapter_around_each_projection_counts_and_gets_gradients(name: str, projection: str) -> None:
    block = make(name).fold()
    if not hasattr(block, projection):
        pytest.skip(f"{name} has no {projection}")
    x = features(2, 16, 8, 6)
    before = block.attend(x).detach()
    setattr(block, projection, Adapter(getattr(block, projection)).double())
    after = block.attend(x)
    assert (after - before).abs().max() > 1e-6
    after.square().sum().backward()
    assert all(parameter.grad is not None for parameter in getattr(block, projection).parameters())


@pytest.mark.on_cpu
def test_deepcopy_and_two_threads_give_the_same_numbers() -> None:
    x = features(2, 16, 24, 8)
    blocks = [make("csalr").train()]
    blocks += [copy.deepcopy(blocks[0]) for _ in range(2)]
    found: list[dict[str, Tensor]] = [{}, {}]

    def work(index: int) -> None:
        found[index] = gradients(blocks[index], x)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = gradients(blocks[2], x)
    for one in found:
        assert_equal(one, wanted, 0)


# The gate and the output


@pytest.mark.parametrize("scale", [1e4, 1e6])
@pytest.mark.parametrize("alpha", [0.1, 1 / 64])
@pytest.mark.parametrize(("name", "groups"), [("csa", 2), ("csalr", 1), ("csalr", 2)])
def test_the_gradient_of_the_gate_keeps_its_digits_where_x_is_large_beside_the_attention(
    name: str, groups: int, alpha: float, scale: float
) -> None:
    x = 1 + features(2, 16, 8, 6).abs()
    found = {}
    for dtype in (torch.float32, torch.float64):
        block = make(name, groups, dtype=dtype).train()
        nn.init.constant_(block.alpha, alpha)
        with torch.no_grad():
            block.norm["value"].weight.fill_(1 / scale)
        block((x * scale).to(dtype)).mul(features(2, 16, 8, 6).to(dtype)).sum().backward()
        found[dtype] = float(block.alpha.grad)  # type: ignore[arg-type]
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=2e-4)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_writing_into_the_output_changes_no_gradient(name: str) -> None:
    x = features(2, 16, 8, 6)
    wanted = gradients(make(name), x)["alpha"]
    block = make(name)
    output, pooled = block.supervised(x.clone().requires_grad_())
    loss = (output * features(*x.shape)).sum() + pooled.square().sum()
    output.data.zero_()
    loss.backward()
    assert_equal({"alpha": block.alpha.grad}, {"alpha": wanted})


# Half precision and empty batches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "groups"), CASES)
def test_a_model_in_half_precision_keeps_its_type_and_is_near_float32(
    name: str, groups: int, dtype: torch.dtype
) -> None:
    x = features(2, 16, 8, 6)
    wanted = make(name, groups)(x)
    for training in (False, True):
        block = make(name, groups, dtype=dtype).train(training)
        output, pooled = block.supervised(x.to(dtype))
        assert output.dtype is dtype and pooled.dtype is dtype and output.isfinite().all()
        if not training:
            error = float((output - wanted).abs().max() / wanted.abs().max())
            assert error <= {torch.float16: 4e-3}.get(dtype, 3e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["pcb", "pcb_sa", "pcb_csa", "pcb_csalr", "pcb_rpp_csalr"])
def test_every_kind_of_model_runs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = build_model(name, 3, pretrained=False).to(dtype).eval()
    with torch.no_grad():
        embedding = model(torch.randn(2, 3, 64, 32).to(dtype))
    assert embedding.dtype is dtype and embedding.isfinite().all()


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize(("name", "groups"), CASES)
def test_an_empty_batch_passes_through_in_eval_mode(name: str, groups: int) -> None:
    block = make(name, groups)
    x = features(0, 16, 8, 6).requires_grad_()
    output, pooled = block.supervised(x)
    assert output.shape == x.shape and pooled.shape == (0, 16)
    output.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("name", ["pcb", "pcb_sa", "pcb_csa", "pcb_csalr", "pcb_rpp_csalr"])
def test_a_frame_without_detections_gives_no_embeddings(name: str) -> None:
    model = build_model(name, 3, pretrained=False).eval()
    with torch.no_grad():
        assert model(torch.empty(0, 3, 64, 32)).shape == (0, 12288)


@pytest.mark.parametrize("shape", [(2, 16, 0, 6), (2, 16, 8, 0)], ids=str)
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_map_without_positions_is_refused_in_one_line(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(csalr_plugin.errors.UserError, match=r"^x has the shape .*H and W must be at least 1\.$"):
        make(name)(features(*shape))


# Transforms and higher derivatives


@pytest.mark.parametrize(("name", "groups"), CASES)
def test_vmap_equals_a_loop(name: str, groups: int) -> None:
    block, x = make(name, groups), features(3, 2, 16, 6, 4)
    got = torch.vmap(block)(x)
    torch.testing.assert_close(got, torch.stack([block(one) for one in x]))


@pytest.mark.parametrize(("name", "groups"), CASES)
def test_per_sample_gradients_equal_a_loop(name: str, groups: int) -> None:
    block, x = make(name, groups), features(3, 16, 6, 4)
    parameters = {key: value.detach() for key, value in block.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(block, values, (image[None],)).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, image in enumerate(x):
        block.zero_grad()
        block(image[None]).square().sum().backward()
        for key, parameter in block.named_parameters():
            torch.testing.assert_close(got[key][index], parameter.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "groups"), CASES)
def test_jvp_is_the_derivative_in_a_direction(name: str, groups: int, training: bool) -> None:
    block, x, direction = make(name, groups).train(training), features(2, 16, 6, 4), features(2, 16, 6, 4).flip(0)
    for norm in block.norm.values():
        norm.track_running_stats = False
    _, got = torch.func.jvp(block, (x,), (direction,))
    step = 1e-6
    with torch.no_grad():
        wanted = (block(x + step * direction) - block(x - step * direction)) / (2 * step)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("name", "groups"), CASES)
def test_the_plain_form_passes_gradgradcheck(name: str, groups: int, recompute: bool) -> None:
    set_fast(False)
    block = make(name, groups, channels=8).train().set_recompute(recompute)
    x = features(2, 8, 4, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(block.attend, (x,), fast_mode=True)


@pytest.mark.on_cpu
@pytest.mark.parametrize("name", ["csa", "csalr"])
def test_a_second_derivative_of_the_fast_form_is_an_error_that_names_the_switch(name: str) -> None:
    x = features(2, 16, 8, 6).requires_grad_()
    (first,) = torch.autograd.grad(make(name)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*set_fast\(False\)"):
        first.sum().backward()


# Export, tracing and compilation


@pytest.mark.on_cpu
@pytest.mark.parametrize("dynamic", ["nothing", "batch", "batch and size"])
@pytest.mark.parametrize(("name", "groups"), CASES)
def test_an_exported_program_runs_and_equals_the_block(name: str, groups: int, dynamic: str) -> None:
    block = make(name, groups, dtype=torch.float32)
    shapes: Any = None
    if dynamic != "nothing":
        sizes = {2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=3)} if "size" in dynamic else {}
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64), **sizes}}
    program = torch.export.export(block, (features(2, 16, 8, 6).float(),), dynamic_shapes=shapes).module()
    others = {"nothing": [], "batch": [(5, 8, 6), (1, 8, 6)], "batch and size": [(3, 24, 8), (1, 5, 7), (4, 4, 3)]}
    for batch, height, width in [(2, 8, 6), *others[dynamic]]:
        x = features(batch, 16, height, width).float()
        torch.testing.assert_close(program(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "groups"), CASES)
def test_a_traced_block_equals_the_block_for_any_batch(name: str, groups: int) -> None:
    block = make(name, groups, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the size of the map becomes a constant
        traced = torch.jit.trace(block, (features(2, 16, 8, 6).float(),))  # type: ignore[no-untyped-call]
    x = features(5, 16, 8, 6).float()
    torch.testing.assert_close(traced(x), block(x), rtol=1e-4, atol=1e-5)


def onnx_outputs(network: nn.Module, example: Tensor, inputs: list[Tensor], file: Path) -> list[Tensor]:
    """The outputs of a network for `inputs` in onnxruntime, exported with a dynamic batch and torch's optimiser."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (example,), file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(file)
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: one.numpy()})[0]) for one in inputs]


@pytest.mark.on_cpu
@pytest.mark.parametrize(("name", "groups"), CASES)
def test_an_onnx_block_equals_the_block_for_any_batch(name: str, groups: int, tmp_path: Path) -> None:
    block = make(name, groups, dtype=torch.float32)
    inputs = [features(batch, 16, 8, 6).float() for batch in (1, 3)]
    outputs = onnx_outputs(block, features(2, 16, 8, 6).float(), inputs, tmp_path / "block.onnx")
    for x, got in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(got, block(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.on_cpu
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in ATTENTION_NAMES), ("csalr", "inductor")]
)
def test_a_compiled_block_trains_with_the_gradients_of_the_block(name: str, backend: str) -> None:
    torch._dynamo.reset()
    x = features(2, 16, 8, 6).float()
    wanted, block = make(name, dtype=torch.float32).train(), make(name, dtype=torch.float32).train()
    expected = gradients(wanted, x)
    block.compile(fullgraph=True, backend=backend)

    given = x.clone().requires_grad_()
    (block(given) * features(*x.shape).float()).sum().backward()
    assert given.grad is not None
    plain = x.clone().requires_grad_()
    (make(name, dtype=torch.float32).train()(plain) * features(*x.shape).float()).sum().backward()
    torch.testing.assert_close(given.grad, plain.grad, rtol=1e-3, atol=1e-4)
    assert expected
    for one, other in zip(block.buffers(), wanted.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# The switch and the copy


@pytest.mark.on_cpu
def test_the_switch_and_the_variable_turn_the_compiled_passes_off() -> None:
    block, x = make("csalr"), features(2, 16, 8, 6)
    assert takes(block, x) is None
    set_fast(False)
    assert takes(block, x) == "the compiled passes are switched off"
    code = (
        "import torch; from csalr_plugin.attention import build_attention, takes;"
        "print(takes(build_attention('csalr', 16), torch.zeros(1, 16, 8, 6)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"CSALR_FAST": "0"}, capture_output=True, text=True)
    assert done.stdout.strip() == "the compiled passes are switched off", done.stderr


REASONS: dict[str, tuple[Callable[[AttentionBlock, Tensor], Any], str]] = {
    "meta": (lambda block, x: takes(block.to("meta"), x.to("meta")), "on meta"),
    "bf16": (lambda block, x: takes(block.bfloat16(), x.bfloat16()), "another type"),
    "empty": (lambda block, x: takes(block, x[:0]), "empty"),
    "mixed modes": (
        lambda block, x: (block.train(), block.norm["key"].eval(), takes(block, x))[-1],
        "some batch norms",
    ),
    "types": (lambda block, x: takes(block.float(), x), "different types"),
}


@pytest.mark.on_cpu
@pytest.mark.parametrize("reason", REASONS)
def test_a_block_says_why_it_does_not_take_the_compiled_passes(reason: str) -> None:
    ask, words = REASONS[reason]
    assert words in ask(make("csalr"), features(2, 16, 8, 6))


def test_the_attention_folder_works_in_another_package(tmp_path: Path) -> None:
    source = Path(csalr_plugin.__file__).parent
    target = tmp_path / "elsewhere"
    shutil.copytree(source / "attention", target / "attention", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "errors.py", target)
    (target / "__init__.py").touch()
    code = (
        "import sys; sys.modules['csalr_plugin'] = None\n"
        "import torch; from elsewhere.attention import build_attention, takes\n"
        "x = torch.randn(2, 16, 8, 6, requires_grad=True)\n"
        "for name in ('sa', 'csa', 'csalr'):\n"
        "    block = build_attention(name, 16)\n"
        "    block(x).sum().backward()\n"
        "print(takes(block, x))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "None", done.stderr
