"""The training recipe: Eq. 18, learning-rate roles, phases of RPP, warm-up, clipping; no host is needed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention import build_attention
from csalr_plugin.models import PCB, build_model
from csalr_plugin.models.pcb import Supervision
from csalr_plugin.models.recipe import (
    LossTerms,
    Phase,
    Role,
    WarmUp,
    assign_role,
    attention_blocks,
    begin_epoch,
    clip_gradients,
    fuse_steps,
    loss_terms,
    parameter_roles,
    split_logits,
    vote,
)

IDENTITIES = torch.tensor([0, 1, 2, 1])


class OtherNetwork(nn.Module):
    """A network that is not a PCB, with two classifiers and two attention blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, 1)
        names = ("early", "late")
        self.attention = nn.ModuleDict({name: build_attention("csalr", 16, landmarks=(2, 2)) for name in names})
        self.supervision = nn.ModuleDict({name: Supervision(16, 3) for name in names})
        self.heads = nn.ModuleList(nn.Linear(16, 3) for _ in range(2))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, branches = self.backbone(images), []
        for name, block in self.attention.items():
            x, pooled = block.supervised(x)
            branches.append(self.supervision[name](pooled))
        return [head(x.mean(dim=(2, 3))) for head in self.heads] + branches


def identity_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, IDENTITIES)


@pytest.fixture(scope="module")
def pcb() -> PCB:
    with torch.device("meta"):
        return build_model("pcb_csalr", 3, pretrained=False)


def random_logits(count: int) -> list[Tensor]:
    generator = torch.Generator(reference.DEVICE).manual_seed(0)
    return [torch.randn(4, 3, generator=generator) for _ in range(count)]


def test_the_loss_of_a_pcb_is_the_sum_of_its_parts_and_the_weighted_sum_of_its_branches(pcb: PCB) -> None:
    logits = random_logits(9)
    losses = loss_terms(pcb, logits, identity_loss, 0.5)
    each = [identity_loss(one) for one in logits]
    torch.testing.assert_close(losses.main, sum(each[:6]))
    assert list(losses.branches) == ["stage1", "stage2", "stage3"]
    torch.testing.assert_close(losses.total(), sum(each[:6]) + 0.5 * sum(each[6:]))
    torch.testing.assert_close(losses.main + sum(losses.weighted_branches().values()), losses.total())


def test_the_loss_of_another_network_is_the_mean_of_its_classifiers_and_the_sum_of_its_branches() -> None:
    torch.manual_seed(0)
    network = OtherNetwork()
    logits = network(torch.randn(4, 3, 8, 4))
    losses = loss_terms(network, logits, identity_loss, 2.0)
    each = [identity_loss(one) for one in logits]
    torch.testing.assert_close(losses.total(), (each[0] + each[1]) / 2 + 2 * (each[2] + each[3]))
    losses.total().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_network_without_attention_has_the_loss_of_its_single_classifier() -> None:
    (logits,) = random_logits(1)
    losses = loss_terms(nn.Linear(2, 3), logits, identity_loss, 1.0)
    assert losses.branches == {}
    torch.testing.assert_close(losses.total(), identity_loss(logits))


def test_the_triplet_loss_is_added_to_l_f_and_not_to_the_branches() -> None:
    losses = LossTerms(torch.tensor(3.0), {"stage1": torch.tensor(5.0)}, 0.1).with_triplet(torch.tensor(2.0), 0.5, 4.0)
    assert float(losses.main) == pytest.approx(0.5 * 3 + 4 * 2)
    assert float(losses.total()) == pytest.approx(0.5 * 3 + 4 * 2 + 0.1 * 5)


def test_logits_are_separated_by_name_and_a_wrong_number_of_them_is_an_error(pcb: PCB) -> None:
    logits = random_logits(9)
    parts, branches = split_logits(pcb, logits)
    assert parts == logits[:6]
    assert branches == dict(zip(("stage1", "stage2", "stage3"), logits[6:], strict=True))
    with pytest.raises(ValueError):
        split_logits(OtherNetwork(), logits[:1])


def test_training_accuracy_is_that_of_the_parts_vote_and_of_another_networks_first_classifier(pcb: PCB) -> None:
    logits = random_logits(9)
    torch.testing.assert_close(vote(pcb, logits), torch.stack(logits[:6]).sum(dim=0))
    assert vote(OtherNetwork(), logits[:4]) is logits[0]
    assert vote(nn.Linear(2, 3), logits[0]) is logits[0]


@pytest.mark.parametrize("make", [lambda: build_model("pcb_csalr", 3, pretrained=False), OtherNetwork])
def test_every_parameter_has_one_role(make: Any) -> None:
    with torch.device("meta"):
        network = make()
    role_of = parameter_roles(network)
    for name, parameter in network.named_parameters():
        child = name.split(".")[0]
        expected = Role.ATTENTION if child in ("attention", "supervision") else Role.HOST
        assert role_of[parameter] is (Role.GATE if name.endswith(".alpha") else expected), name
    assert set(role_of.values()) == set(Role)


def test_a_network_without_attention_is_left_to_its_host() -> None:
    network = nn.Linear(2, 3)
    assert attention_blocks(network) == {}
    assert set(parameter_roles(network).values()) == {Role.HOST}
    assert begin_epoch(network, 0, pcb_epochs=40, part_classifier_epochs=5) is Phase.ALL


def test_gates_learn_without_weight_decay_and_a_hosts_group_stays_as_it_is() -> None:
    groups = {role: {"lr": 0.1, "weight_decay": 0.01} for role in Role}
    for role, group in groups.items():
        assign_role(group, role, attention_lr=0.5, gate_lr=0.2)
    assert groups[Role.HOST] == {"lr": 0.1, "weight_decay": 0.01}
    assert groups[Role.ATTENTION] == {"lr": pytest.approx(0.05), "weight_decay": 0.01, "role": "attention"}
    assert groups[Role.GATE] == {"lr": pytest.approx(0.02), "weight_decay": 0.0, "role": "gate"}
    assert all(type(group["role"]) is str for group in groups.values() if "role" in group)  # saved in checkpoints


@pytest.mark.on_cpu
@pytest.mark.parametrize(
    ("kind", "settings", "fused"),
    [
        (torch.optim.Adam, {"weight_decay": 5e-4, "amsgrad": True}, True),
        (torch.optim.AdamW, {"weight_decay": 0.01}, True),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}, False),
        (torch.optim.RMSprop, {"momentum": 0.9}, False),
    ],
)
def test_a_fused_optimizer_makes_the_steps_of_the_plain_one_also_for_a_layer_that_joins_late(
    kind: Any, settings: dict[str, Any], fused: bool
) -> None:
    torch.manual_seed(0)
    results = []
    plain = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    for network in (copy.deepcopy(plain), plain):
        rates = zip(network, (0.1, 0.01), strict=True)
        optimizer = kind([{"params": layer.parameters(), "lr": rate} for layer, rate in rates], **settings)
        if network is plain:
            fuse_steps(optimizer)
            assert all(bool(group.get("fused")) is fused for group in optimizer.param_groups)
        for step in range(4):
            network[0].bias.requires_grad_(step > 1)
            optimizer.zero_grad()
            network(torch.full((2, 5), 1.0 + step, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_an_optimizer_of_another_device_is_not_fused() -> None:
    optimizer = torch.optim.Adam(nn.Linear(2, 3, device="meta").parameters())
    fuse_steps(optimizer)
    assert not optimizer.param_groups[0]["fused"]


def test_rpp_passes_through_its_three_phases() -> None:
    with torch.device("meta"):
        network = build_model("pcb_rpp", 3, pretrained=False)
    seen = []
    for epoch in range(5):
        phase = begin_epoch(network, epoch, pcb_epochs=2, part_classifier_epochs=1)
        seen.append((phase, network.refining))
    assert seen[:2] == [(Phase.PCB, False)] * 2
    assert seen[2:] == [(Phase.PART_CLASSIFIER, True), (Phase.ALL, True), (Phase.ALL, True)]
    assert begin_epoch(network, 0, pcb_epochs=0, part_classifier_epochs=0) is Phase.ALL


def test_a_plain_pcb_has_one_phase(pcb: PCB) -> None:
    assert begin_epoch(pcb, 0, pcb_epochs=40, part_classifier_epochs=5) is Phase.ALL


def test_warm_up_scales_the_rate_of_blocks_and_restores_it() -> None:
    slow, fast = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [slow], "role": "attention"}, {"params": [fast]}], lr=1.0)
    slow.grad, fast.grad = torch.ones(1), torch.ones(1)
    with WarmUp(optimizer, 4).at(0):
        optimizer.step()
    assert (slow.item(), fast.item()) == (-0.25, -1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_each_block_and_each_gate_is_clipped_separately_in_any_network() -> None:
    network = OtherNetwork()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    early, late = network.attention["early"], network.attention["late"]
    for parameter in early.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    late.alpha.grad = None  # frozen
    norm = clip_gradients(network, 1.0)
    assert float(norm) > 100
    rest = [parameter.grad for name, parameter in early.named_parameters() if name != "alpha"]
    assert float(nn.utils.get_total_norm(rest)) == pytest.approx(1, rel=1e-3)
    assert float(early.alpha.grad) == pytest.approx(0.1)
    torch.testing.assert_close(late.query.weight.grad, torch.full_like(late.query.weight, 1e-4))
    torch.testing.assert_close(network.backbone.weight.grad, torch.full_like(network.backbone.weight, 1e-4))


def test_a_clipping_limit_of_zero_leaves_gradients_as_they_are() -> None:
    network = OtherNetwork()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    clip_gradients(network, 0)
    assert all((parameter.grad == 10).all() for parameter in network.parameters() if parameter.grad is not None)
