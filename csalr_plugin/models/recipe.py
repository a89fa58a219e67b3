"""The training recipe, independent of any host: loss terms, learning rates, RPP phases, warm-up and clipping.

A host adapter calls these functions with its own losses, optimizer and settings. They work on any network that has
the children `attention` (attention blocks by name) and `supervision` (their branches, by the same names), and that
returns in training mode a list of logits which ends with those of the branches. A network without these children
keeps the training of its host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from csalr_plugin.attention import AttentionBlock
from csalr_plugin.models.pcb import PCB, RefinedPCB


def attention_blocks(network: nn.Module) -> dict[str, Any]:
    """Return the attention blocks of `network` by name; empty for a network without attention."""
    return _children(network, "attention")


def applies_to(network: nn.Module) -> bool:
    """Return whether a host trains `network` by this recipe: a PCB, or a network with attention blocks."""
    return isinstance(network, PCB) or bool(attention_blocks(network))


def split_logits(network: nn.Module, logits: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Separate the logits of the network's own classifiers from those of its supervision branches.

    Args:
        network: the network that returned `logits` in training mode.
        logits: (B, num_classes), or a list of them.

    Returns:
        The classifiers' logits, and the branches' logits by the name of their block; each (B, num_classes).
    """
    outputs = [logits] if isinstance(logits, Tensor) else list(logits)
    names = list(_children(network, "supervision"))
    first = len(outputs) - len(names)
    return outputs[:first], dict(zip(names, outputs[first:], strict=True))


def vote(network: nn.Module, logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the logits (B, num_classes) that give the training accuracy: the sum over PCB's parts, else the first."""
    outputs, _ = split_logits(network, logits)
    return sum(outputs[1:], outputs[0]) if isinstance(network, PCB) else outputs[0]


@dataclass(frozen=True)
class LossTerms:
    """The terms of Eq. 18, L = L_F + lambda * sum_i L_DS_i; each is a scalar.

    Attributes:
        main: L_F.
        branches: L_DS_i by the name of its block, without lambda.
        supervision_weight: lambda.
    """

    main: Tensor
    branches: dict[str, Tensor]
    supervision_weight: float

    def with_triplet(self, triplet: Tensor, identity_weight: float, triplet_weight: float) -> LossTerms:
        """Return the terms with L_F = identity_weight * L_F + triplet_weight * triplet.

        A loss of weight 0 is left out: layers that serve it alone get no gradient, and so no weight decay.
        """
        weighted = [(identity_weight, self.main), (triplet_weight, triplet)]
        parts = [weight * loss for weight, loss in weighted if weight]
        return replace(self, main=sum(parts[1:], parts[0]))

    def weighted_branches(self) -> dict[str, Tensor]:
        """Return lambda * L_DS_i by the name of its block."""
        return {name: self.supervision_weight * branch for name, branch in self.branches.items()}

    def total(self) -> Tensor:
        """Return L, the loss to minimise."""
        return self.main + sum(self.weighted_branches().values())


def loss_terms(
    network: nn.Module,
    logits: Tensor | Sequence[Tensor],
    identity_loss: Callable[[Tensor], Tensor],
    supervision_weight: float,
) -> LossTerms:
    """Compute the terms of Eq. 18 with a host's identity loss.

    L_F is the *sum* of the losses of PCB's parts. A network that is not a PCB gets the mean over its classifiers, as
    torchreid computes it. A host that computes L_F by other means can build `LossTerms` itself.

    Args:
        network: the network that returned `logits` in training mode.
        logits: (B, num_classes), or a list of them: the classifiers first, then the supervision branches.
        identity_loss: takes logits (B, num_classes) and returns their loss, a scalar.
        supervision_weight: lambda.
    """
    outputs, branches = split_logits(network, logits)
    losses = [identity_loss(output) for output in outputs]
    main = sum(losses[1:], losses[0])
    if not isinstance(network, PCB):
        main = main / len(losses)
    return LossTerms(main, {name: identity_loss(branch) for name, branch in branches.items()}, supervision_weight)


class Role(str, Enum):
    """The learning-rate role of a parameter.

    HOST: the host decides. ATTENTION: attention blocks and supervision branches. GATE: the scalars alpha.
    """

    HOST = "host"
    ATTENTION = "attention"
    GATE = "gate"


def parameter_roles(network: nn.Module) -> dict[nn.Parameter, Role]:
    """Return the role of each parameter of `network`, in the order of ``network.parameters()``."""
    gates = {id(block.alpha) for block in attention_blocks(network).values()}
    own = {
        id(parameter)
        for child in ("attention", "supervision")
        for module in _children(network, child).values()
        for parameter in module.parameters()
    }

    def role(parameter: nn.Parameter) -> Role:
        if id(parameter) in gates:
            return Role.GATE
        return Role.ATTENTION if id(parameter) in own else Role.HOST

    return {parameter: role(parameter) for parameter in network.parameters()}


def gate_rate(gate_lr: str, optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the gates, relative to that of new layers, for the setting `gate_lr`.

    "auto" is 0.1 with SGD, where the gradient of a gate, a sum over all positions, makes large steps. It is 1 with Adam
    and its relatives, whose steps have the size of the learning rate whatever the gradient: at 0.1 a gate would stay
    within a few hundredths of 0 in a short training, and at 10 it opens within an epoch, at a loss of accuracy.
    """
    if gate_lr != "auto":
        return float(gate_lr)
    return 0.1 if isinstance(optimizer, torch.optim.SGD) else 1.0


def assign_role(group: dict[str, Any], role: Role, *, attention_lr: float, gate_lr: float) -> None:
    """Set the learning rate and weight decay that `role` gives to a group of an optimizer, in place.

    Gates get no weight decay: a gate that is decayed never opens. They get a rate of their own because a gate's
    gradient is a sum over all positions. Groups of blocks and gates are marked with "role", which `WarmUp` reads.

    Args:
        group: a parameter group, whose "lr" is that of new layers.
        role: the role of all parameters in the group; `Role.HOST` leaves it as it is.
        attention_lr, gate_lr: factors on the learning rate of new layers.
    """
    if role is Role.HOST:
        return
    group["lr"] *= attention_lr if role is Role.ATTENTION else gate_lr
    group["role"] = role.value
    if role is Role.GATE:
        group["weight_decay"] = 0.0


def fuse_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam and AdamW on a CPU read and write each parameter once a step, by torch's fused kernel.

    The results agree with those of the unfused optimizer up to rounding. An unfused step of Adam takes three times as
    long, which is a sixth of a training step with a batch of 16 images of 96x48. Optimizers of a GPU stay as they are,
    and so does SGD: its fused kernel refuses a layer that gets its first gradient later than others, as RPP's do.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    on_cpu = all(one.device.type == "cpu" and one.is_floating_point() for one in parameters)
    if on_cpu and isinstance(optimizer, torch.optim.Adam):  # AdamW is an Adam
        for group in optimizer.param_groups:
            group["fused"] = True


class Phase(Enum):
    """A phase of training with refined part pooling (section 4.2)."""

    PCB = "stripes in place of refined parts"
    PART_CLASSIFIER = "refined parts, with the part classifier trained alone"
    ALL = "refined parts, with all layers trained"


def begin_epoch(network: nn.Module, epoch: int, *, pcb_epochs: int, part_classifier_epochs: int) -> Phase:
    """Set a network's `refining` for an epoch, and return the phase of that epoch.

    In `Phase.PART_CLASSIFIER` the host must train the child `part_classifier` alone.

    Args:
        network: a `RefinedPCB`. Any other network has one phase, `Phase.ALL`.
        epoch: counted from 0.
        pcb_epochs: length of the first phase.
        part_classifier_epochs: length of the second phase.
    """
    if not isinstance(network, RefinedPCB):
        return Phase.ALL
    network.refining = epoch >= pcb_epochs
    if not network.refining:
        return Phase.PCB
    return Phase.PART_CLASSIFIER if epoch < pcb_epochs + part_classifier_epochs else Phase.ALL


class WarmUp:
    """Scales the learning rate of blocks and gates linearly from 0 over the first optimizer steps.

    Args:
        optimizer: an optimizer whose groups were given their roles by `assign_role`.
        steps: length of the warm-up; 0 means none.
        everything: scale the rates of all layers, not those of blocks and gates alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, everything: bool = False) -> None:
        self.groups = [group for group in optimizer.param_groups if everything or "role" in group]
        self.steps = steps

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Set the rates of a step, counted from 0 over the whole training, inside a with statement.

        The rates are restored afterwards, so that the host's scheduler and checkpoints never see the scaling.
        """
        rates = [group["lr"] for group in self.groups]
        factor = min(1.0, (step + 1) / self.steps) if self.steps else 1.0
        for group in self.groups:
            group["lr"] *= factor
        try:
            yield
        finally:
            for group, rate in zip(self.groups, rates, strict=True):
                group["lr"] = rate


def clip_gradients(network: nn.Module, limit: float) -> Tensor:
    """Clip the gradient of each block to norm `limit` and of each gate to +-0.1 `limit`; 0 clips nothing.

    Each block is clipped separately, because the inverse may amplify the gradient of one block a hundredfold. Each
    gate is clipped separately, because its gradient, a sum over all positions, would dominate the norm.

    Returns:
        The norm of all gradients of the network before clipping, a scalar on their device. It is not finite when a
        gradient is not finite; the clipped gradients are then useless.
    """
    norm = nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    if limit:
        for block in attention_blocks(network).values():
            if block.alpha.grad is None:  # frozen, as while the part classifier is trained alone
                continue
            rest = [parameter for parameter in block.parameters() if parameter is not block.alpha]
            nn.utils.clip_grad_norm_(rest, limit)
            nn.utils.clip_grad_value_(block.alpha, 0.1 * limit)
    return norm


def _children(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules in the child `name` by name; empty if the attention blocks are not the plugin's.

    A host may have a model of its own with children of these names, and trains it in its own way.
    """
    blocks, child = getattr(network, "attention", None), getattr(network, name, None)
    if not isinstance(blocks, nn.ModuleDict) or not isinstance(child, nn.ModuleDict):
        return {}
    return dict(child.items()) if all(isinstance(block, AttentionBlock) for block in blocks.values()) else {}
