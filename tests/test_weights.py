"""Checkpoints and pretrained weights: read as data, checked, loaded as a whole or refused in one line."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from csalr_plugin.errors import UserError
from csalr_plugin.models import PCB, build_model
from csalr_plugin.models.weights import (
    check_epoch,
    check_optimizer_state,
    check_values,
    load_backbone,
    load_exactly,
    load_weights,
    read_checkpoint,
    record_network_settings,
    state_dict_of,
)

SMALL = {"groups": 2, "landmarks": (3, 2)}


class Toy(nn.Module):
    """A small model with the names of a PCB's children."""

    def __init__(self, identities: int = 3, width: int = 4, attention: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, identities)
        if attention:
            self.attention = nn.ModuleDict({"stage1": nn.Conv2d(width, width, 1)})
            self.supervision = nn.ModuleDict({"stage1": nn.Linear(width, identities)})


def toy(seed: int = 0, **options: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message and message.strip()
    return message


def refused_and_unchanged(model: nn.Module, path: Path) -> str:
    before = copy_of(model)
    message = refused(load_weights, model, path)
    assert str(path) in message
    assert same(model.state_dict(), before)
    return message


# Reading


@pytest.mark.parametrize("wrapped", [True, False], ids=["checkpoint", "state dict"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_and_a_bare_state_dict_give_every_weight(wrapped: bool, zipped: bool, tmp_path: Path) -> None:
    saved, model = toy(1), toy(2)
    content = {"state_dict": saved.state_dict(), "epoch": 3} if wrapped else saved.state_dict()
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    report = load_weights(model, tmp_path / "model.pth")
    assert same(model.state_dict(), saved.state_dict())
    assert set(report.loaded) == set(saved.state_dict()) and report.left == ()
    assert str(report) == "loaded 9 of 9 tensors"


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_numpy_scalar_as_rank1_is_read(kind: type[np.number[Any]], zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {}, "rank1": kind(1)}, path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path)["rank1"] == 1


def test_a_numpy_scalar_that_an_older_numpy_saved_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"rank1": np.float64(0.5)}, buffer, _use_new_zipfile_serialization=False)
    new_name, old_name = b"numpy._core.multiarray\nscalar", b"numpy.core.multiarray\nscalar"
    assert new_name in buffer.getvalue()
    (tmp_path / "old.pth").write_bytes(buffer.getvalue().replace(new_name, old_name))
    assert read_checkpoint(tmp_path / "old.pth")["rank1"] == 0.5


def test_a_checkpoint_with_optimizer_and_schedule_is_read(tmp_path: Path) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    model.conv1.weight.square().sum().backward()
    optimizer.step()
    scheduler.step()
    saved = {"state_dict": model.state_dict(), "epoch": 1, "rank1": np.float32(0.25)}
    saved |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "model.pth.tar-1")
    checkpoint = read_checkpoint(tmp_path / "model.pth.tar-1")
    assert checkpoint.keys() == saved.keys()
    assert checkpoint["scheduler"]["last_epoch"] == 1
    assert same(state_dict_of(checkpoint), model.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_with_the_prefix_of_dataparallel_or_compile_are_accepted(prefix: str, tmp_path: Path) -> None:
    saved, model = toy(1), toy(2)
    torch.save({"state_dict": {prefix + key: value for key, value in saved.state_dict().items()}}, tmp_path / "m.pth")
    load_weights(model, tmp_path / "m.pth")
    assert same(model.state_dict(), saved.state_dict())


def test_another_number_of_identities_leaves_only_the_classifiers_as_they_were(tmp_path: Path) -> None:
    saved, model = toy(1, identities=5, attention=True), toy(2, identities=3, attention=True)
    before = copy_of(model)
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "m.pth")
    report = load_weights(model, tmp_path / "m.pth")
    of_identities = {name for name in before if name.startswith(("classifier", "supervision"))}
    assert set(report.left) == of_identities and set(report.loaded) == before.keys() - of_identities
    assert "left as initialised: classifier, supervision" in str(report)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in of_identities else saved.state_dict()[name])


def test_a_plain_checkpoint_leaves_attention_and_supervision_as_they_were_and_says_so(tmp_path: Path) -> None:
    saved, model = toy(1), toy(2, attention=True)
    torch.save(saved.state_dict(), tmp_path / "m.pth")
    report = load_weights(model, tmp_path / "m.pth")
    assert {name.split(".")[0] for name in report.left} == {"attention", "supervision"}
    assert set(report.loaded) == set(saved.state_dict())
    assert "attention, supervision" in str(report)


# Refused files, which must not change the model


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "is not a file" in refused_and_unchanged(toy(), tmp_path / "nowhere.pth")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a file" in refused_and_unchanged(toy(), tmp_path)


def truncations(zipped: bool, tmp_path: Path) -> set[str]:
    """Return the names of the errors for a file cut at many lengths; each UserError must be one line."""
    buffer = io.BytesIO()
    saved = {"state_dict": toy(1).state_dict(), "rank1": np.float64(0.5)}
    torch.save(saved, buffer, _use_new_zipfile_serialization=zipped)
    model, path, outcomes = toy(), tmp_path / "model.pth", set()
    before = copy_of(model)
    for length in range(0, len(buffer.getvalue()) - 1, 41):
        path.write_bytes(buffer.getvalue()[:length])
        try:
            load_weights(model, path)
            outcomes.add("loaded")
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            # A legacy file is a bare pickle: cut within a name, it may look like one that names unknown code.
            assert not zipped or ("truncated" in str(error) and f"({length:,} bytes)" in str(error))
            outcomes.add("UserError")
        except Exception as error:
            outcomes.add(type(error).__name__)
    assert same(model.state_dict(), before)
    return outcomes


def test_a_file_truncated_anywhere_is_refused_with_its_size(tmp_path: Path) -> None:
    assert truncations(True, tmp_path) == {"UserError"}


def test_a_legacy_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    assert truncations(False, tmp_path) == {"UserError"}


def test_a_legacy_file_with_a_damaged_byte_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "m.pth").read_bytes()
    key = max(re.findall(rb"\d+", content), key=len)  # the storage's, which is there twice
    (tmp_path / "m.pth").write_bytes(content.replace(key, key[:-1] + b"X", 1))
    assert "truncated" in refused(read_checkpoint, tmp_path / "m.pth")


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b'{"a": 1}', b"\x89PNG\r\n\x1a\n", b"<html></html>", b"PK\x03\x04", b"\x80\x02}q\x00"]
)
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(content)
    assert "truncated or not a checkpoint" in refused_and_unchanged(toy(), tmp_path / "m.pth")


@pytest.mark.parametrize("content", [[1, 2], None, torch.zeros(3), "text"], ids=["list", "None", "tensor", "str"])
def test_a_file_that_holds_no_dictionary_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pth")
    assert f"holds a {type(content).__name__}" in refused_and_unchanged(toy(), tmp_path / "m.pth")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"state_dict": {}},
        {"epoch": 3},
        {"state_dict": None},
        {"state_dict": [torch.zeros(3)]},
        {1: torch.zeros(3)},
    ],
    ids=str,
)
def test_a_dictionary_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pth")
    refused_and_unchanged(toy(), tmp_path / "m.pth")


class RunsCode:
    """An object whose pickle calls os.system."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch '{marker}'"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["whole", "beside the weights"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(form: str, place: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    evil: Any = RunsCode(marker)
    content = evil if place == "whole" else {"state_dict": toy(1).state_dict(), "extra": evil}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refused_and_unchanged(toy(), path)
    assert not marker.exists()
    if not form.startswith("pickle"):  # a bare pickle is not a checkpoint
        assert "is refused" in message and "code" in message
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # the pickle does run code with an unrestricted loader


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(toy(1), tmp_path / "m.pth")
    assert "Save it again as a state dict" in refused_and_unchanged(toy(), tmp_path / "m.pth")


def test_half_of_an_attention_is_refused(tmp_path: Path) -> None:
    saved = toy(1, attention=True).state_dict()
    del saved["attention.stage1.bias"]
    torch.save(saved, tmp_path / "m.pth")
    message = refused_and_unchanged(toy(attention=True), tmp_path / "m.pth")
    assert "1 of the model's 13 tensors" in message and "attention.stage1.bias" in message


def test_another_width_is_refused_with_the_names_that_do_not_match(tmp_path: Path) -> None:
    torch.save(toy(1, width=8).state_dict(), tmp_path / "m.pth")
    message = refused_and_unchanged(toy(), tmp_path / "m.pth")
    assert "7 of the model's 9 tensors" in message and "conv1.weight, conv1.bias" in message


@pytest.fixture(scope="module")
def pcb() -> PCB:
    torch.manual_seed(0)
    return build_model("pcb", 3, pretrained=False)


def test_a_resnet18_is_refused_by_pcb_with_how_many_and_which_layers(pcb: PCB, tmp_path: Path) -> None:
    given, wanted = torchvision.models.resnet18(weights=None).state_dict(), pcb.state_dict()
    torch.save(given, tmp_path / "m.pth")
    message = refused_and_unchanged(pcb, tmp_path / "m.pth")
    bad = [
        name
        for name, value in wanted.items()
        if not name.endswith("num_batches_tracked") and (name not in given or given[name].shape != value.shape)
    ]
    unknown = [name for name in given if name not in wanted and not name.startswith("fc")]
    assert f"{len(bad)} of the model's {len(wanted)} tensors" in message
    assert f"{len(unknown)} of the checkpoint's {len(given)} are unknown" in message
    assert bad[0] in message


def test_a_pcb_csalr_is_refused_by_pcb_with_how_many_and_which_layers(pcb: PCB, tmp_path: Path) -> None:
    given = build_model("pcb_csalr", 3, pretrained=False, **SMALL).state_dict()
    torch.save({"state_dict": given}, tmp_path / "m.pth")
    message = refused_and_unchanged(pcb, tmp_path / "m.pth")
    attention = [name for name in given if name.startswith("attention.")]
    assert f"0 of the model's {len(pcb.state_dict())} tensors" in message
    assert f"{len(attention)} of the checkpoint's {len(given)} are unknown" in message
    assert "attention.stage1." in message


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("pcb_csa", "pcb_csalr"), ("pcb_sa", "pcb_csalr"), ("pcb_rpp", "pcb"), ("pcb_csalr", "pcb_sa")],
)
def test_one_attention_or_head_is_refused_by_another(saved: str, loaded: str, tmp_path: Path) -> None:
    def only_new(name: str) -> nn.Module:
        """The model without its backbone: quicker, and the backbones are the same."""
        with torch.device("meta"):
            model = build_model(name, 3, pretrained=False, **SMALL)
        for child in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "conv5"):
            delattr(model, child)
        return model

    state = {key: torch.zeros(value.shape) for key, value in only_new(saved).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    assert "of another architecture" in refused(load_weights, only_new(loaded), tmp_path / "m.pth")


# Network settings

FOUR_GROUPS = {"head": "pcb", "attention": "csalr", "stages": (3,), "key_ratio": 0.25, "groups": 4, "landmarks": (6, 4)}


def attended(seed: int = 0, **settings: Any) -> Toy:
    """A toy model with attention and the network settings `FOUR_GROUPS`, updated by `settings`."""
    model = toy(seed, attention=True)
    record_network_settings(model, {**FOUR_GROUPS, **settings})
    return model


def saved_by(way: str, model: nn.Module, path: Path) -> None:
    state = nn.DataParallel(model).state_dict() if way == "DataParallel" else model.state_dict()
    key = {"torchreid": "state_dict", "DataParallel": "state_dict", "fast-reid": "model"}.get(way)
    torch.save({key: state} if key else state, path)


WAYS = ["torchreid", "DataParallel", "fast-reid", "bare"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"groups": 2}, "trained with groups 4, and this network has groups 2"),
        ({"landmarks": (12, 8)}, "trained with landmarks 6,4, and this network has landmarks 12,8"),
        ({"key_ratio": 0.5}, "key_ratio 0.25"),
        ({"stages": (2,)}, "stages 3"),
        ({"attention": "sa"}, "trained with attention csalr, and this network has attention sa"),
    ],
)
def test_a_checkpoint_of_other_network_settings_is_refused_however_it_was_saved(
    way: str, settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    saved_by(way, attended(1), tmp_path / "m.pth")
    model = attended(2, **settings)
    assert complaint in refused_and_unchanged(model, tmp_path / "m.pth")
    assert complaint in refused(load_exactly, model, state_dict_of(read_checkpoint(tmp_path / "m.pth")), "m.pth")


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_the_same_network_settings_loads(way: str, tmp_path: Path) -> None:
    saved, model = attended(1), attended(2)
    saved_by(way, saved, tmp_path / "m.pth")
    assert str(load_weights(model, tmp_path / "m.pth")) == "loaded 13 of 13 tensors"
    assert same(model.state_dict(), saved.state_dict())


def test_torchs_own_load_state_dict_refuses_other_network_settings() -> None:
    assert "groups 4" in refused(attended(groups=2).load_state_dict, attended().state_dict())


def test_a_checkpoint_without_network_settings_loads_and_says_so(tmp_path: Path) -> None:
    torch.save(dict(attended(1).state_dict()), tmp_path / "m.pth")
    assert "does not record its groups and landmarks" in str(load_weights(attended(2), tmp_path / "m.pth"))


def test_network_settings_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    state = attended(1).state_dict()
    state._metadata[""]["network_settings"] = "groups"
    torch.save(state, tmp_path / "m.pth")
    assert "its network settings are 'groups'" in refused_and_unchanged(attended(), tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("pcb", {"head": "pcb", "attention": "none"}),
        ("pcb_sa", {"head": "pcb", "attention": "sa", "stages": (1, 2), "key_ratio": 0.5}),
        (
            "pcb_rpp_csalr",
            {
                "head": "pcb_rpp",
                "attention": "csalr",
                "stages": (1, 2),
                "key_ratio": 0.5,
                "groups": 4,
                "landmarks": (6, 4),
            },
        ),
    ],
)
def test_a_state_dict_records_the_settings_that_its_network_depends_on(name: str, recorded: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model(name, 3, pretrained=False, groups=4, landmarks=(6, 4), stages=(2, 1), key_ratio=0.5)
    assert model.state_dict()._metadata[""]["network_settings"] == recorded
    assert copy.deepcopy(model).state_dict()._metadata[""]["network_settings"] == recorded


def test_sa_and_csalr_with_one_group_have_the_same_tensors_and_do_not_load_as_each_other() -> None:
    with torch.device("meta"):
        csalr, sa = (build_model(name, 3, pretrained=False, groups=1) for name in ("pcb_csalr", "pcb_sa"))
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (csalr, sa)]
    assert shapes[0] == shapes[1]
    assert "attention sa" in refused(csalr.load_state_dict, sa.state_dict())
    assert "attention csalr" in refused(sa.load_state_dict, csalr.state_dict())


# Entries that no model can have


def not_finite(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[-1] = float("nan")
    return value


@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        ("conv1.weight", lambda one: one.to(torch.complex64), "'conv1.weight' is of dtype torch.complex64"),
        ("conv1.weight", lambda one: one.to(torch.int64), "is of dtype torch.int64"),
        ("conv1.weight", lambda one: one > 0, "is of dtype torch.bool"),
        ("conv1.weight", lambda one: one.to(torch.float8_e4m3fn), "is of dtype torch.float8_e4m3fn"),
        ("conv1.weight", not_finite, "is not finite"),
        ("conv1.weight", lambda one: one / 0, "is not finite"),
        ("bn1.running_var", lambda one: -one, "'bn1.running_var' holds negative numbers"),
        ("conv1.weight", lambda one: one.to_sparse(), "is a sparse tensor"),
        ("conv1.weight", lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8), "is a quantised tensor"),
        ("conv1.weight", lambda one: one.to("meta"), "is a meta tensor"),
        (
            "conv1.weight",
            lambda _: torch.zeros(1).expand(10**12),
            "has shape (1000000000000,), and the file holds fewer",
        ),
        ("bn1.num_batches_tracked", lambda one: one.to(torch.complex64), "'bn1.num_batches_tracked' is of dtype"),
    ],
)
def test_a_tensor_that_no_model_can_have_is_refused_by_name(
    name: str, spoil: Callable[[Tensor], Tensor], complaint: str, tmp_path: Path
) -> None:
    state = toy(1).state_dict()
    state[name] = spoil(state[name])
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    assert complaint in refused_and_unchanged(toy(), tmp_path / "m.pth")
    assert complaint in refused(load_exactly, toy(), state_dict_of(read_checkpoint(tmp_path / "m.pth")), "m.pth")


def test_a_nested_tensor_is_refused() -> None:
    state = {**toy(1).state_dict(), "conv1.weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}
    assert "'conv1.weight' is a nested tensor" in refused(load_exactly, toy(), state, "m.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_floating_point_type_load(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({name: value.to(dtype) for name, value in toy(1).state_dict().items()}, tmp_path / "m.pth")
    model = toy(2)
    load_weights(model, tmp_path / "m.pth")
    assert torch.equal(model.conv1.weight, toy(1).conv1.weight.to(dtype).float())


def test_a_layer_name_of_a_million_letters_is_cut(tmp_path: Path) -> None:
    torch.save({**toy(1).state_dict(), "x" * 1_000_000: torch.zeros(1)}, tmp_path / "m.pth")
    assert len(refused_and_unchanged(toy(), tmp_path / "m.pth")) < 1000


@pytest.mark.parametrize("epoch", [None, "3", -1, 2.5, True, float("nan"), 10**30, torch.ones(1)])
def test_an_epoch_that_is_no_count_is_refused(epoch: Any) -> None:
    assert "'epoch' is " in refused(check_epoch, {"epoch": epoch}, "m.pth")


def test_a_checkpoint_without_an_epoch_is_refused() -> None:
    assert "says no epoch" in refused(check_epoch, {}, "m.pth")
    assert check_epoch({"epoch": np.int64(3)}, "m.pth") == 3


def stepped(optimizer: str = "Adam") -> torch.optim.Optimizer:
    """An optimizer of a toy model after one step."""
    model = toy()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    one: torch.optim.Optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **options)
    sum(value.sum() for value in model.parameters()).backward()  # type: ignore[union-attr]
    one.step()
    return one


def set_in(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested dictionaries and lists with another value at `path`."""
    if not path:
        return value
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    changed[path[0]] = set_in(tree[path[0]], path[1:], value)
    return changed


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ((), [1], "'optimizer' is [1], not the state of an optimizer"),
        ((), "adam", "not the state of an optimizer"),
        (("param_groups",), [], "groups of [] tensors"),
        (("param_groups", 0), "adam", "'optimizer.param_groups[0]' is 'adam'"),
        (("param_groups", 0, "params"), [0], "groups of [1] tensors"),
        (("param_groups", 0, "lr"), "0.1", "'optimizer.param_groups[0].lr' is '0.1', not a number"),
        (("param_groups", 0, "lr"), float("nan"), "not a number"),
        (("param_groups", 0, "lr"), -1.0, "less than 0"),
        (("param_groups", 0, "betas"), (0.9,), "not a list of 2"),
        (("state", 0), {"step": torch.tensor(1.0)}, "not the state of Adam"),
        (("state", 0, "exp_avg"), torch.ones(7), "'optimizer.state[0].exp_avg' has shape (7,)"),
        (("state", 0, "exp_avg"), torch.zeros(1).expand(10**12), "and the file holds fewer numbers"),
        (("state", 0, "exp_avg"), torch.ones(4, 3, 1, 1) / 0, "is not finite"),
        (("state", 0, "exp_avg_sq"), -torch.ones(4, 3, 1, 1), "holds negative numbers"),
        (("state", 0, "exp_avg"), "much", "not a tensor or a number"),
        (("state", 0, "step"), -1, "not a tensor or a number"),
    ],
)
def test_an_optimizer_state_that_would_fail_in_the_next_step_is_refused(
    path: tuple[Any, ...], value: Any, complaint: str
) -> None:
    optimizer = stepped()
    assert complaint in refused(check_optimizer_state, optimizer, set_in(optimizer.state_dict(), path, value), "m.pth")


def test_an_optimizer_state_of_an_unknown_parameter_is_refused() -> None:
    saved = stepped().state_dict()
    saved["state"][99] = saved["state"][0]
    assert "belongs to no parameter" in refused(check_optimizer_state, stepped(), saved, "m.pth")


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "AdamW"])
def test_the_state_of_the_same_optimizer_passes_and_that_of_another_does_not(name: str) -> None:
    check_optimizer_state(stepped(name), stepped(name).state_dict(), "m.pth")
    other = stepped("SGD" if name != "SGD" else "Adam").state_dict()
    assert f"not the state of {name}" in refused(check_optimizer_state, stepped(name), other, "m.pth")


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ((), "state", "'scheduler' is 'state', not a dictionary"),
        (("base_lrs",), [0.1, 0.1], "'scheduler.base_lrs' is [0.1, 0.1], not a list of 1"),
        (("base_lrs", 0), None, "not a number"),
        (("last_epoch",), 1.5, "not an integer"),
        (("gamma",), float("inf"), "not a number"),
        (("milestones",), [2], "not a dictionary"),
    ],
)
def test_a_scheduler_state_of_other_types_is_refused(path: tuple[Any, ...], value: Any, complaint: str) -> None:
    fresh = torch.optim.lr_scheduler.MultiStepLR(stepped(), [2]).state_dict()
    check_values(fresh, fresh, "m.pth", "scheduler")
    assert complaint in refused(check_values, set_in(fresh, path, value), fresh, "m.pth", "scheduler")


# Backbones


@pytest.fixture(scope="module")
def resnet50() -> dict[str, Tensor]:
    torch.manual_seed(1)
    state: dict[str, Tensor] = torchvision.models.resnet50(weights=None).state_dict()
    return state


@pytest.mark.parametrize("head", [True, False], ids=["with fc", "without fc"])
def test_a_backbone_is_loaded_from_a_resnet50_of_torchvision(
    head: bool, pcb: PCB, resnet50: dict[str, Tensor], tmp_path: Path
) -> None:
    before = copy_of(pcb)
    given = {name: value + 1 for name, value in resnet50.items() if head or not name.startswith("fc")}
    torch.save(given, tmp_path / "resnet50.pth")
    load_backbone(pcb, str(tmp_path / "resnet50.pth"))
    for name, value in pcb.state_dict().items():
        if name.startswith(("conv5", "classifier")):
            assert torch.equal(value, before[name])
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(value, given[name])


def test_a_backbone_of_another_resnet_is_refused_with_the_key_and_changes_nothing(pcb: PCB, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    before = copy_of(pcb)
    message = refused(load_backbone, pcb, str(path))
    assert "csalr.pretrained_weights" in message and str(path) in message and "not a ResNet-50" in message
    assert same(pcb.state_dict(), before)


def test_a_backbone_file_that_is_missing_is_refused_with_its_path(pcb: PCB, tmp_path: Path) -> None:
    assert str(tmp_path / "none.pth") in refused(load_backbone, pcb, str(tmp_path / "none.pth"))


def downloads_fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route\nto host"),
        URLError(TimeoutError("timed out")),
        HTTPError("https://example.org", 503, "Service Unavailable", None, None),  # type: ignore[arg-type]
        OSError("disk full"),
        RuntimeError("invalid hash value"),
        TimeoutError(),
    ],
    ids=repr,
)
def test_a_download_that_fails_says_where_to_put_the_file_and_which_key_takes_a_path(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    downloads_fail(monkeypatch, error)
    message = refused(load_backbone, Toy())
    assert str(tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth") in message
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in message
    assert "csalr.pretrained_weights" in message


def test_a_model_that_asks_for_pretrained_weights_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads_fail(monkeypatch, URLError("no network"))
    with torch.device("meta"):
        assert "csalr.pretrained_weights" in refused(build_model, "pcb_csalr", 3)
