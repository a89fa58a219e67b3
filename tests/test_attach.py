"""attach and detach: any network takes SA, CSA or CSALR, keeps its weights and embeddings, and gives them back."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import csalr_plugin
from csalr_plugin import UserError, attach, detach
from csalr_plugin.attention import ATTENTION_NAMES, LandmarkGrid, SelfAttention, build_attention
from csalr_plugin.models import ATTENTIONS, PCB, recipe
from csalr_plugin.models.attach import is_attended, take_branch_logits
from csalr_plugin.models.inspect import block_inputs

IDENTITIES = 5


class Small(nn.Module):
    """Three stages of 16, 24 and 32 channels, the last called member by member, and a classifier."""

    def __init__(self, output: str = "logits") -> None:
        super().__init__()
        self.output = output
        self.stage1, self.stage2 = self.stage(3, 16), self.stage(16, 24)
        self.stage3 = nn.Sequential(self.stage(24, 32), nn.Conv2d(32, 32, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(32, IDENTITIES)
        self.unused = nn.Linear(32, 1)

    @staticmethod
    def stage(channels: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Any:
        x = self.stage2(self.stage1(x))
        for layer in self.stage3:
            x = layer(x)
        features = self.pool(x).flatten(1)
        if not self.training:
            return features
        logits = self.classifier(features)
        return {"logits": logits, "list": [logits, logits], "pair": (logits, features), "losses": {}}[self.output]


STAGES = ("stage1", "stage2", "stage3")
EXAMPLE = torch.zeros(1, 3, 48, 24)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 48, 24)


def attended(attention: str = "csalr", gate: float = 0.3, output: str = "logits", **options: Any) -> Small:
    torch.manual_seed(1)
    settings = {"num_classes": IDENTITIES, "landmarks": (3, 2), "example": EXAMPLE, **options}
    network = attach(Small(output), attention, STAGES, **settings)
    set_gates(network, gate)
    return network


def set_gates(network: nn.Module, gate: float) -> None:
    for block in recipe.attention_blocks(network).values():
        nn.init.constant_(block.alpha, gate)


def gates_opened(network: nn.Module, images: Tensor) -> bool:
    """Whether the gates change the embedding."""
    before = network.eval()(images)
    set_gates(network, 0.5)
    after = network(images)
    set_gates(network, 0.0)
    return not torch.equal(before, after)


# Any network


@pytest.mark.parametrize(
    ("build", "after"),
    [
        (torchvision.models.resnet18, ("layer1", "layer2", "layer3")),
        (torchvision.models.convnext_tiny, ("features.1", "features.3", "features.5")),
        (torchvision.models.mobilenet_v3_large, ("features.3", "features.6", "features.12")),
        (torchvision.models.efficientnet_b0, ("features.2", "features.3", "features.5")),
        (lambda: timm.create_model("resnet50.a1_in1k", pretrained=False), ("layer1", "layer2", "layer3")),
    ],
    ids=["resnet18", "convnext_tiny", "mobilenet_v3_large", "efficientnet_b0", "timm-resnet50"],
)
def test_networks_of_torchvision_and_timm_keep_their_weights_and_embeddings(
    build: Callable[[], nn.Module], after: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    plain, images = build().eval(), torch.randn(2, 3, 64, 32)
    network = attach(copy.deepcopy(plain), "csalr", after=after, groups=2, landmarks=(12, 8))
    names = set(network.state_dict())
    assert names > set(plain.state_dict())
    assert {name.split(".")[0] for name in names - set(plain.state_dict())} == {"attention"}
    assert list(network.attention) == [name.replace(".", "_") for name in after]
    with torch.inference_mode():
        assert torch.equal(network(images), plain(images))
        assert gates_opened(network, images)
        network.train()
        assert isinstance(network(images), Tensor)  # no branches: the output keeps its form
        assert detach(network) is network
        assert set(network.state_dict()) == set(plain.state_dict())
        network.load_state_dict(plain.state_dict())
        assert torch.equal(network.eval()(images), plain(images))


@pytest.mark.parametrize("attention", ATTENTION_NAMES)
def test_each_attention_gives_the_plain_embeddings_with_gates_at_0(attention: str, images: Tensor) -> None:
    network = attended(attention, gate=0.0).eval()
    plain = Small().eval()
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if name in plain.state_dict()})
    assert torch.equal(network(images), plain(images))
    assert gates_opened(network, images)
    missing = network.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[0] for name in missing.missing_keys} == {"attention", "supervision"}


def test_the_names_of_the_attentions_without_torch_are_those_of_the_blocks() -> None:
    assert ATTENTIONS == ATTENTION_NAMES


def test_a_block_follows_the_last_member_of_a_sequence_that_is_called_member_by_member(images: Tensor) -> None:
    network = attended().eval()
    inputs = block_inputs(network, images)
    assert [tuple(x.shape[1:]) for x in inputs.values()] == [(16, 24, 12), (24, 12, 6), (32, 6, 3)]
    assert torch.equal(inputs["stage3"], plain_map(network, images))


def plain_map(network: nn.Module, images: Tensor) -> Tensor:
    """The output of the last member of stage3 before its block."""
    seen: list[Tensor] = []
    handle = network.get_submodule("stage3.1").register_forward_hook(
        lambda _, __, output: seen.append(output), prepend=True
    )
    network(images)
    handle.remove()
    return seen[0]


def test_a_dotted_path_reaches_inside_and_names_that_modules_reserve_are_possible(images: Tensor) -> None:
    network = nn.Sequential()
    network.add_module("values", Small.stage(3, 16))
    network.add_module("inner", nn.Sequential(Small.stage(16, 24), nn.Flatten(), nn.Linear(24 * 12 * 6, 4)))
    plain = copy.deepcopy(network).eval()
    attach(network, "csa", ("values", "inner.0"), landmarks=(3, 2), num_classes=IDENTITIES, example=EXAMPLE)
    assert list(network.attention) == ["values_", "inner_0"]  # type: ignore[arg-type]
    # A network that calls all of its children passes through the new ones unchanged.
    assert torch.equal(network.eval()(images), plain(images))
    assert [one.shape for one in network.train()(images)] == [(4, 4), (4, IDENTITIES), (4, IDENTITIES)]


def test_the_first_item_of_a_tuple_is_attended(images: Tensor) -> None:
    class WithMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Pair()

        def forward(self, x: Tensor) -> Tensor:
            features, factor = self.layer(x)
            return features * factor  # type: ignore[no-any-return]

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, float]:
            return self.convolution(x), 2.0

    network = attach(WithMask(), "sa", "layer", example=EXAMPLE)
    assert network(images).shape == (4, 8, 24, 12)
    assert gates_opened(network, images)


# Training


def test_the_training_output_ends_with_the_branches_and_the_recipe_splits_it(images: Tensor) -> None:
    network = attended().train()
    outputs = network(images)
    own, branches = recipe.split_logits(network, outputs)
    assert len(own) == 1 and list(branches) == list(STAGES)
    assert all(logits.shape == (4, IDENTITIES) for logits in outputs)
    loss = nn.CrossEntropyLoss()
    identities = torch.arange(4)
    terms = recipe.loss_terms(network, outputs, lambda logits: loss(logits, identities), 0.5)
    expected = loss(own[0], identities) + 0.5 * sum(loss(one, identities) for one in branches.values())
    torch.testing.assert_close(terms.total(), expected)
    terms.total().backward()
    assert all(value.grad is not None for name, value in network.named_parameters() if not name.startswith("unused"))


def test_lists_and_pairs_of_outputs_gain_the_branches_as_the_hosts_losses_expect(images: Tensor) -> None:
    assert len(attended(output="list").train()(images)) == 2 + 3
    logits, features = attended(output="pair").train()(images)
    assert len(logits) == 1 + 3 and features.shape == (4, 32)
    network = attended(output="pair").train()
    network.loss = "softmax"  # type: ignore[assignment]  # torchreid's HACNN returns a tuple of logits
    assert len(network(images)) == 2 + 3


def test_a_network_with_losses_of_its_own_takes_the_branch_logits_or_is_refused(images: Tensor) -> None:
    class Losses(Small):
        def forward(self, x: Tensor) -> Any:
            features = super().forward(x)
            if not self.training:
                return features
            return {name: logits.sum() for name, logits in take_branch_logits(self).items()}

    network = attach(Losses("logits"), "csalr", STAGES, num_classes=IDENTITIES, example=EXAMPLE)
    assert list(network(images)) == list(STAGES)
    assert take_branch_logits(network) == {}
    with pytest.raises(UserError, match="returns a dict in training mode") as error:
        attended(output="losses").train()(images)
    assert "\n" not in str(error.value)


def test_without_identities_there_are_no_branches(images: Tensor) -> None:
    network = attended(num_classes=None).train()
    assert not hasattr(network, "supervision")
    assert network(images).shape == (4, IDENTITIES)
    assert recipe.split_logits(network, network(images))[1] == {}


def test_blocks_and_gates_have_the_learning_rate_roles_and_the_clipping_of_pcb(images: Tensor) -> None:
    network = attended().train()
    roles = recipe.parameter_roles(network)
    named = {name: roles[value] for name, value in network.named_parameters()}
    assert {role for name, role in named.items() if name.endswith("alpha")} == {recipe.Role.GATE}
    assert named["supervision.stage1.classifier.weight"] is recipe.Role.ATTENTION
    assert named["attention.stage2.query.weight"] is recipe.Role.ATTENTION
    assert named["stage1.0.weight"] is recipe.Role.HOST
    (1e4 * sum(one.sum() for one in network(images))).backward()
    recipe.clip_gradients(network, 1.0)
    assert network.attention["stage1"].alpha.grad.abs() <= 0.1 + 1e-6
    assert recipe.applies_to(network) and not recipe.applies_to(Small())


def test_a_layer_that_runs_in_eval_mode_alone_is_an_error_in_training(images: Tensor) -> None:
    network = timm.create_model("resnet18", pretrained=False, num_classes=3)
    attach(network, "sa", ("layer1", "layer2.1"), example=EXAMPLE)
    assert network.train()(images).shape == (4, 3)
    network.set_grad_checkpointing()  # then the network calls the members of layer1
    with pytest.raises(UserError, match="block after layer 'layer1' did not run in training mode") as error:
        network(images)
    assert "\n" not in str(error.value)
    attach(detach(network), "sa", ("layer1.1", "layer2.1"), num_classes=3, example=EXAMPLE)
    set_gates(network, 0.3)
    sum(logits.sum() for logits in network(images)).backward()
    assert network.attention["layer1_1"].query.weight.grad.abs().sum() > 0


def test_a_frozen_network_in_training_mode_still_returns_the_branches(images: Tensor) -> None:
    network = attended().train()
    network.attention.eval()
    assert len(network(images)) == 4


# Copies, wrappers and compilers


def test_a_copy_and_a_pickle_have_blocks_of_their_own(images: Tensor) -> None:
    network = attended().eval()
    expected = network(images)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(images), expected)
        set_gates(other, 0.0)
        assert not torch.equal(other(images), expected)
        assert torch.equal(network(images), expected)
        names = set(detach(other).state_dict())
        assert names == set(Small().state_dict()) and not is_attended(other)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_a_compiled_network_is_one_graph_in_both_modes(images: Tensor) -> None:
    network = attended("sa")  # the quickest to trace
    for mode in (False, True):
        network.train(mode)
        state = copy.deepcopy(network.state_dict())
        expected = network(images)
        network.load_state_dict(state)
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_has_the_same_embeddings_for_any_batch(strict: bool, images: Tensor) -> None:
    network = attended().eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        program = torch.export.export(
            network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
        ).module()
    assert not [one for one in told if "side effects" in str(one.message)]
    torch.testing.assert_close(program(images), network(images))
    torch.testing.assert_close(program(images[:2]), network(images[:2]))


def replicas_of(network: nn.Module, count: int) -> list[nn.Module]:
    """Replicas as DataParallel makes them, on the CPU."""
    modules = list(network.modules())
    copies = [[module._replicate_for_data_parallel() for _ in range(count)] for module in modules]
    index = {module: number for number, module in enumerate(modules)}
    for module, replicas in zip(modules, copies, strict=True):
        for replica_number, replica in enumerate(replicas):
            for name, child in module._modules.items():
                setattr(replica, name, None if child is None else copies[index[child]][replica_number])
            for name, value in module._parameters.items():
                setattr(replica, name, None if value is None else value * 1)
            for name, value in module._buffers.items():
                replica._buffers[name] = None if value is None else value.clone()
    return copies[0]


def test_replicas_of_dataparallel_use_their_own_blocks(images: Tensor) -> None:
    network = attended().eval()
    expected = network(images)
    first, second = replicas_of(network, 2)
    for name in STAGES:
        second.attention[name].alpha = torch.zeros(())  # type: ignore[index]
    assert torch.equal(first(images), expected)
    assert not torch.equal(second(images), expected)
    assert torch.equal(network(images), expected)
    assert torch.equal(nn.DataParallel(network)(images), expected)
    assert len(nn.DataParallel(network.train())(images)) == 4


def test_a_replaced_block_takes_effect_and_a_replaced_layer_is_an_error(images: Tensor) -> None:
    network = attended().eval()
    before = network(images)
    network.attention["stage1"] = build_attention("sa", 16).eval()
    assert not torch.equal(network(images), before)
    network.stage2 = Small.stage(16, 24)
    with pytest.raises(UserError, match="layer 'stage2' was replaced"):
        network(images)


def test_the_state_dict_records_the_attention_and_refuses_another(images: Tensor) -> None:
    state = attended(groups=2).state_dict()
    attended(groups=2).load_state_dict(state)
    with pytest.raises(UserError, match="was trained with groups 2, and this network has groups 4"):
        attended(groups=4).load_state_dict(state)


# The landmark grid


@pytest.mark.parametrize(("height", "patches"), [(384, [(8, 4), (4, 2), (2, 1)]), (256, [(6, 4), (3, 2), (2, 1)])])
def test_the_grid_follows_the_maps_of_both_image_sizes(height: int, patches: list[tuple[int, int]]) -> None:
    """The largest patch of each stage of a ResNet; patches of one grid differ by one row at most."""
    for stride, largest in zip((4, 8, 16), patches, strict=True):
        grid = LandmarkGrid(height // stride, 128 // stride, (12, 8), torch.device("cpu"))
        rows, columns = grid.row_of.bincount(), grid.column_of.bincount()
        assert grid.m == 96
        assert (rows.max(), columns.max()) == largest
        assert rows.max() - rows.min() <= 1 and columns.max() == columns.min()


def test_csalr_on_a_map_smaller_than_the_grid_is_self_attention() -> None:
    torch.manual_seed(0)
    block = build_attention("csalr", 16, groups=1, landmarks=(12, 8)).double().eval()
    full = SelfAttention(16).double().eval()
    full.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(block.attend(x), full.attend(x))


# Mistakes


def unchanged(network: nn.Module, names: list[str]) -> bool:
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    return list(network.state_dict()) == names and not hooks and not is_attended(network)


@pytest.mark.parametrize(
    ("after", "options", "message"),
    [
        ((), {}, "after is empty: give layers of Small: stage1, stage2, stage3, pool"),
        ("stage4", {}, "Small has no layer 'stage4'; its layers are stage1, .*Did you mean 'stage"),
        ("stage1.7", {}, "'stage1' of Small has no layer '7'; its layers are 0, 1, 2"),
        (("stage1", 3), {}, "Small has no layer '3'"),
        (3, {}, "after 3 must be names of layers"),
        (("stage1", "stage1"), {}, "names the layer 'stage1' twice"),
        (("stage3", "stage3.1"), {}, "names the layer 'stage3.1' twice"),
        ("pool", {}, r"the output of layer 'pool' has the shape \(1, 32, 1, 1\), and attention needs a feature map"),
        ("unused", {}, "layer 'unused' does not run in a forward pass in eval mode"),
        ("stage1", {"groups": 3}, "attention after layer 'stage1': groups 3 must be .* divides the 16 channels"),
        (STAGES, {"groups": 16}, "attention after layer 'stage2': groups 16 must be"),
        ("stage1", {"groups": 0}, "groups 0 must be a positive integer"),
        ("stage1", {"landmarks": (0, 1)}, r"landmarks \(0, 1\) must be two positive integers"),
        ("stage1", {"key_ratio": 2.0}, "key_ratio 2.0 must be above 0 and at most 1"),
        ("stage1", {"num_classes": 0}, "num_classes 0 must be a positive integer"),
        ("stage1", {"attention": "csalt"}, "Unknown attention 'csalt'.* Did you mean 'csalr'"),
        ("stage1", {"example": torch.zeros(1, 4, 8, 8)}, r"Small cannot take an input of \(1, 4, 8, 8\)"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_the_network_unchanged(
    after: Any, options: dict[str, Any], message: str
) -> None:
    network = Small().train()
    network.stage2.eval()
    names = list(network.state_dict())
    with pytest.raises(UserError, match=message) as error:
        attach(network, **{"attention": "csalr", "after": after, "example": EXAMPLE, **options})
    assert "\n" not in str(error.value)
    assert unchanged(network, names)
    assert network.training and not network.stage2.training and network.stage3.training


def test_a_layer_that_runs_twice_and_a_type_that_is_no_map_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pair = nn.Conv2d(3, 3, 1), Pairs()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)) + self.pair(x)["x"]  # type: ignore[no-any-return]

    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    with pytest.raises(UserError, match="layer 'layer' runs 2 times"):
        attach(Twice(), "sa", "layer", example=EXAMPLE)
    with pytest.raises(UserError, match="output of layer 'pair' has the type dict"):
        attach(Twice(), "sa", "pair", example=EXAMPLE)


def test_a_layer_has_one_block_also_if_it_is_part_of_two_networks(images: Tensor) -> None:
    inner = attended(num_classes=None)
    outer = nn.Sequential(inner)
    with pytest.raises(UserError, match=r"layer '0.stage1' has a block already"):
        attach(outer, "sa", "0.stage1", example=EXAMPLE)
    attach(outer, "sa", "0.stage1.1", example=EXAMPLE)
    detach(outer)
    assert list(inner.attention) == list(STAGES)


def test_detach_works_after_a_layer_was_removed() -> None:
    network = attended()
    del network.stage2
    assert not is_attended(detach(network))


def test_a_transformer_s_outputs_are_no_feature_maps() -> None:
    image = torch.zeros(1, 3, 64, 32)
    with pytest.raises(UserError, match=r"layer 'features.1' has the shape \(1, 16, 8, 96\), and attention needs"):
        attach(torchvision.models.swin_t(), "csalr", "features.1", example=image)  # (B, H, W, C)
    with pytest.raises(UserError, match=r"layer 'blocks.0' has the shape \(1, 197, 192\)"):
        attach(timm.create_model("vit_tiny_patch16_224"), "sa", "blocks.0", example=torch.zeros(1, 3, 224, 224))


def test_a_module_that_cannot_be_attended_or_detached_is_one_line() -> None:
    network = attended()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: attach(network, "sa", "stage1"), "Small has attention already: detach it first"),
        (lambda: detach(Small()), "Small has no attention that csalr_plugin.attach has added"),
        (lambda: attach(nn.DataParallel(Small()), "sa", "module.stage1"), "DataParallel wraps a network"),
        (lambda: attach(torch.compile(Small()), "sa", "stage1"), "OptimizedModule wraps a network"),  # type: ignore[type-var]
        (lambda: attach("resnet18", "sa", "layer1"), "attach takes a torch.nn.Module, not 'resnet18'"),  # type: ignore[type-var]
        (lambda: attach(PCB(2), "csalr", "layer1"), "PCB has an attribute 'attention' of its own"),
        (lambda: attach(nn.Sequential(nn.ReLU()), "sa", "0"), "Sequential has no weights"),
    ]
    for action, message in cases:
        with pytest.raises(UserError, match=message) as error:
            action()
        assert "\n" not in str(error.value)


def test_attach_and_detach_are_public() -> None:
    assert csalr_plugin.attach is attach and {"attach", "detach"} <= set(csalr_plugin.__all__)
