"""The blocks and models on a GPU: mixed precision, memory format, compilation, and NCCL. Skipped without CUDA."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from csalr_plugin.attention import ATTENTION_NAMES, AttentionBlock, build_attention, takes
from csalr_plugin.attention.batch_norm import synchronise
from csalr_plugin.models import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
GPU = torch.device("cuda")
MODELS = ["pcb", *(f"pcb_{name}" for name in ATTENTION_NAMES), "pcb_rpp_csalr"]


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, not TF32, so that differences are those of the order of sums."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def open_model(name: str, gate: float = 0.3) -> nn.Module:
    """A model on the CPU whose gates are open."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = build_model(name, 10, pretrained=False, landmarks=(6, 4))
    for block in model.modules():
        if isinstance(block, AttentionBlock):
            nn.init.constant_(block.alpha, gate)
    return model


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 192, 64, generator=torch.Generator("cpu").manual_seed(1), device="cpu")


def loss(outputs: list[Tensor]) -> Tensor:
    labels = torch.arange(len(outputs[0]), device=outputs[0].device) % 10
    return torch.stack([F.cross_entropy(one.float(), labels) for one in outputs]).sum()


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm().cpu())


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_gradients_on_cuda_equal_those_on_the_cpu(name: str) -> None:
    found = {}
    for device in (torch.device("cpu"), GPU):
        model = open_model(name).double().to(device)
        x = images().double().to(device)
        embedding = model.eval()(x)
        loss(model.train()(x)).backward()
        found[device.type] = embedding, {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    embedding, gradients = found["cuda"]
    assert relative(embedding, found["cpu"][0]) <= 1e-9
    # Dropout differs between devices, and only in front of the classifiers: the blocks get gradients on both.
    assert gradients.keys() == found["cpu"][1].keys()
    assert all(one.isfinite().all() for one in gradients.values())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_gradients_of_a_block_on_cuda_equal_those_on_the_cpu(name: str, mode: str) -> None:
    results = []
    for device in (torch.device("cpu"), GPU):
        torch.manual_seed(0)
        with torch.device("cpu"):
            block = build_attention(name, 64, landmarks=(6, 4)).double()
            x = torch.randn(2, 64, 24, 8, dtype=torch.float64).to(device).requires_grad_()
        nn.init.constant_(block.alpha, 0.3)
        block.to(device).train(mode == "train")
        block(x).square().sum().backward()
        results.append([x.grad, *(one.grad for one in block.parameters() if one.grad is not None)])
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-8, atol=1e-9)


def test_a_block_on_cuda_says_why_it_runs_in_its_plain_form() -> None:
    block = build_attention("csalr", 64).to(GPU)
    assert "on cuda" in str(takes(block, torch.randn(2, 64, 24, 8, device=GPU)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_under_autocast_is_finite_and_its_embedding_is_near_float32(
    name: str, dtype: torch.dtype
) -> None:
    model, x = open_model(name).to(GPU), images().to(GPU)
    wanted = model.eval()(x)
    with torch.autocast("cuda", dtype=dtype):
        embedding = model(x)
        total = loss(model.train()(x))
    torch.amp.GradScaler("cuda", init_scale=64.0).scale(total).backward()
    assert relative(embedding, wanted) <= (3e-2 if dtype is torch.bfloat16 else 5e-3)
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_embeddings_of_contiguous_memory(name: str) -> None:
    model, x = open_model(name).to(GPU).eval(), images().to(GPU)
    wanted = model(x)
    got = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert relative(got, wanted) <= 1e-4


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_a_compiled_block_has_the_gradients_of_the_block(name: str) -> None:
    torch.manual_seed(0)
    block = build_attention(name, 64, landmarks=(6, 4)).to(GPU)
    nn.init.constant_(block.alpha, 0.3)
    x = torch.randn(2, 64, 24, 8, device=GPU)

    def gradients(run: Any) -> list[Tensor]:
        block.zero_grad()
        run(x).square().mean().backward()
        return [one.grad.clone() for one in block.parameters() if one.grad is not None]

    for got, wanted in zip(gradients(torch.compile(block)), gradients(block), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_an_exported_program_runs_on_cuda_with_another_batch(name: str) -> None:
    torch.manual_seed(0)
    block = build_attention(name, 64, landmarks=(6, 4)).to(GPU).eval()
    nn.init.constant_(block.alpha, 0.3)
    x = torch.randn(5, 64, 24, 8, device=GPU)
    program = torch.export.export(block, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_self_attention_with_logits_of_1e9_has_finite_gradients(dtype: torch.dtype) -> None:
    block = build_attention("sa", 64).fold().to(GPU, dtype)
    nn.init.ones_(block.alpha)
    x = (1e4 * torch.randn(2, 64, 24, 8, device=GPU)).to(dtype).requires_grad_()
    (block(x).float().mean() * 2.0**-10).backward()
    assert all(one.grad.isfinite().all() for one in (x, *block.parameters()) if one.grad is not None)


def test_one_nccl_process_gets_the_gradients_of_a_process_without_nccl() -> None:
    def step(network: nn.Module, model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(3)
        loss(network(images().to(GPU))).backward()
        return {key: one.grad for key, one in model.named_parameters() if one.grad is not None}

    alone = open_model("pcb_csalr").to(GPU).train()
    wanted = step(alone, alone)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.cuda.set_device(0)
    distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        model = open_model("pcb_csalr").to(GPU).train()
        synchronise(model)
        got = step(DistributedDataParallel(model, device_ids=[0]), model)
    finally:
        distributed.destroy_process_group()
    assert got.keys() == wanted.keys()
    largest = max(float(one.norm()) for one in wanted.values())
    for key, gradient in got.items():  # the gradient of a bias before a batch norm is rounding alone
        assert float((gradient - wanted[key]).norm()) <= 1e-3 * float(wanted[key].norm()) + 1e-5 * largest, key
