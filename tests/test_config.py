"""The configuration: any case, every mistake in one line, one table of settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csalr_plugin.errors import UserError
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.torchreid import config as configuration
from csalr_plugin.hosts.torchreid.config import (
    ENGINE_RUN,
    IMAGE_DATA,
    LR_SCHEDULER,
    OPTIMIZER,
    VIDEO_DATA,
    active_config,
    default_config,
    find_config,
    set_active_config,
)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_those_of_the_paper_and_of_the_host() -> None:
    config = default_config()
    assert (config.csalr.landmarks, config.csalr.groups, config.csalr.stages) == ((12, 8), 2, (1, 2, 3))
    assert (config.csalr.supervision_weight, config.csalr.key_ratio) == (1.0, 0.25)
    assert (config.model.name, config.train.optim, config.data.height) == ("resnet50", "adam", 256)
    config.validate()


def test_every_setting_of_the_table_has_a_default_that_its_own_check_allows() -> None:
    for key in keys.KEYS:
        assert key.check(key.name, key.default) == key.default
        assert key.comment


@pytest.mark.parametrize("key", ["model.name", "MODEL.NAME", "Model.Name"])
def test_keys_are_taken_in_any_case_from_a_list(key: str) -> None:
    config = default_config()
    config.merge_from_list([key, "pcb_csalr"])
    assert config.model.name == "pcb_csalr"


def test_keys_are_taken_in_any_case_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(
        "MODEL:\n  NAME: pcb\ntrain: {LR: 1e-3, max_epoch: 3}\nCSALR:\n  Groups: 4\n  RPP: {pcb_epochs: 7}\n"
    )
    config = default_config()
    config.merge_from_file(file)
    assert (config.model.name, config.train.lr, config.train.max_epoch) == ("pcb", 1e-3, 3)
    assert (config.csalr.groups, config.csalr.rpp.pcb_epochs) == (4, 7)


@pytest.mark.parametrize("given", ["6,4", "(6, 4)", "[6,4]", "[6, 4]", [6, 4], (6, 4)])
def test_landmarks_are_taken_in_every_usual_spelling(given: object) -> None:
    config = default_config()
    config.merge_from_list(["csalr.landmarks", given])
    assert config.csalr.landmarks == (6, 4)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("csalr.stages", "2", (2,)),
        ("train.stepsize", "20,40", [20, 40]),
        ("train.stepsize", "[40]", [40]),
        ("data.sources", "market1501,cuhk03", ["market1501", "cuhk03"]),
        ("data.transforms", "['random_flip', 'random_erase']", ["random_flip", "random_erase"]),
        ("data.transforms", "[]", []),
        ("train.lr", "1", 1.0),
        ("data.norm_mean", "0,0.5,1", [0.0, 0.5, 1.0]),
        ("test.evaluate", "true", True),
        ("data.save_dir", "2024", "2024"),
        ("test.eval_freq", "-1", -1),
    ],
)
def test_text_becomes_the_type_of_its_key(key: str, text: str, value: object) -> None:
    config = default_config()
    config.merge_from_list([key, text])
    assert config.lookup(key) == value
    assert type(config.lookup(key)) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("csalr.groups", "0", "an integer of at least 1"),
        ("csalr.groups", "2.5", "an integer"),
        ("csalr.groups", True, "an integer"),
        ("csalr.landmarks", "12", "two positive integers"),
        ("csalr.landmarks", "12,0", "two positive integers"),
        ("csalr.landmarks", "12,8,3", "two positive integers"),
        ("csalr.landmarks", "a,b", "two positive integers"),
        ("csalr.stages", "1,1", "distinct stages from 1 to 4"),
        ("csalr.stages", "0,1", "distinct stages from 1 to 4"),
        ("csalr.stages", "5", "distinct stages from 1 to 4"),
        ("csalr.stages", "()", "at least one"),
        ("csalr.supervision_weight", "-1", "a number of at least 0"),
        ("csalr.supervision_weight", "inf", "a number of at least 0"),
        ("csalr.supervision_weight", "nan", "a number of at least 0"),
        ("csalr.key_ratio", "0", "a number greater than 0 and of at most 1"),
        ("csalr.key_ratio", "1.5", "a number greater than 0 and of at most 1"),
        ("csalr.overwrite", "maybe", "true or false"),
        ("csalr.amp", "fp8", "one of none, bf16, fp16"),
        ("csalr.accumulate", "0", "an integer of at least 1"),
        ("csalr.compile", "fast", "true or false"),
        ("csalr.channels_last", "1", "true or false"),
        ("csalr.rpp.pcb_epochs", "-1", "an integer of at least 0"),
        ("CSALR.GROUPS", "none", "an integer"),
        ("loss.name", "softmx", "one of softmax, triplet. Did you mean 'softmax'?"),
        ("data.transforms", "random_flop", "random_flip"),
        ("test.ranks", "1,100", "an integer from 1 to 50"),
        ("train.lr", "fast", "a number greater than 0"),
        ("model.pretrained", "2", "true or false"),
        ("model.name", ["a"], "text"),
    ],
)
def test_a_value_that_is_not_allowed_is_one_line_with_key_value_and_what_is_allowed(
    key: str, value: object, allowed: str
) -> None:
    with pytest.raises(UserError) as error:
        default_config().merge_from_list([key, value])
    line = one_line(error)
    assert f"'{key}'" in line
    assert repr(value) in line
    assert allowed in line


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("csalr.group", "'csalr.groups'"),
        ("MODLE.NAME", "'model.name'"),
        ("train.batchsize", "'train.batch_size'"),
        ("model.name.x", "'model.name'"),
        ("csalr.qqqqqqqqqqqq", "csalr.landmarks"),
        ("zzz", "Known groups: use_gpu, model"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(UserError, match="unknown config key") as error:
        default_config().merge_from_list([key, "1"])
    assert nearest in one_line(error)
    assert f"'{key}'" in one_line(error)


def test_a_group_of_keys_takes_no_value() -> None:
    with pytest.raises(UserError, match=r"group of keys.*csalr\.rpp\.pcb_epochs"):
        default_config().merge_from_list(["csalr.rpp", "3"])


def test_an_odd_number_of_overrides_names_the_key_without_a_value() -> None:
    with pytest.raises(UserError, match=r"'train\.lr' has no value"):
        default_config().merge_from_list(["model.name", "pcb", "train.lr"])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.yaml", "model: [unclosed", "line 1"),
        ("a.yaml", "just text", "mapping"),
        ("a.yaml", "- a\n- list", "mapping"),
        ("a.yaml", "", "mapping"),
        ("a.yaml", "x: !!python/object/apply:os.system [echo]", "cannot be read as YAML"),
        ("a.yaml", "\x00\x01", "cannot be read as YAML"),
        ("a.py", "raise SystemExit('ran')", "must be a .yaml or .yml file"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_one_line_and_runs_no_code(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError) as error:
        default_config().merge_from_file(file)
    assert reason in one_line(error)
    assert str(file) in one_line(error)


def test_a_file_with_a_mistyped_key_is_told_as_an_override_is(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text("csalr:\n  landmark: [12, 8]\n")
    with pytest.raises(UserError, match=r"unknown config key 'csalr\.landmark'.*'csalr\.landmarks'"):
        default_config().merge_from_file(file)


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(UserError, match=r"config file 'configs/torchreid/nothing\.yaml' does not exist") as error:
        find_config("configs/torchreid/nothing.yaml")
    one_line(error)


@pytest.mark.parametrize("layout", ["csalr_plugin/configs", "configs"])
def test_a_relative_path_finds_the_plugins_own_copy_installed_or_in_a_checkout(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / layout / "torchreid" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("model: {name: pcb}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(configuration.csalr_plugin, "__file__", str(tmp_path / "csalr_plugin" / "__init__.py"))
    assert find_config("configs/torchreid/own.yaml").read_text() == "model: {name: pcb}"
    with pytest.raises(UserError, match=r"Did you mean 'configs/torchreid/own\.yaml'"):
        find_config("configs/torchreid/owm.yaml")
    nearer = elsewhere / "configs" / "torchreid" / "own.yaml"
    nearer.parent.mkdir(parents=True)
    nearer.write_text("model: {name: pcb_sa}")
    assert find_config("configs/torchreid/own.yaml").read_text() == "model: {name: pcb_sa}"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["csalr.groups", "3"], r"'csalr\.groups' is 3, which does not divide the 256 channels of stage 1"),
        (
            ["csalr.groups", "2", "csalr.key_ratio", "0.002", "csalr.stages", "1"],
            r"1 key channels of stage 1",
        ),
        (["csalr.groups", "512"], r"256 channels"),
        (["model.name", "pcb_cslar"], r"Did you mean .*'pcb_csalr'"),
        (["data.sources", "market1510"], r"Did you mean 'market1501'"),
        (["data.targets", "nowhere"], r"'data\.targets' is 'nowhere'"),
        (["loss.name", "triplet", "train.batch_size", "4"], r"two identities"),
    ],
)
def test_validate_tells_settings_that_do_not_go_together(overrides: list[str], complaint: str) -> None:
    config = default_config()
    config.merge_from_list(overrides)
    with pytest.raises(UserError, match=complaint) as error:
        config.validate()
    one_line(error)


def test_validate_checks_what_code_has_set_too() -> None:
    config = default_config()
    config.csalr.stages = [1, 7]
    with pytest.raises(UserError, match=r"csalr\.stages"):
        config.validate()
    config.csalr.stages = [3]
    config.validate()
    assert config.csalr.stages == (3,)


def test_tables_name_existing_keys_and_every_keyword_of_the_host() -> None:
    import inspect

    import torchreid

    config = default_config()
    engine = torchreid.engine.Engine.run
    for table, function in (
        (IMAGE_DATA, torchreid.data.ImageDataManager),
        (VIDEO_DATA, torchreid.data.VideoDataManager),
        (OPTIMIZER, torchreid.optim.build_optimizer),
        (LR_SCHEDULER, torchreid.optim.build_lr_scheduler),
        (ENGINE_RUN, engine),
    ):
        wanted = set(inspect.signature(function).parameters) - {"self", "model", "optimizer"}
        if function is torchreid.optim.build_optimizer:
            wanted |= {"optim"}
        assert set(config.keyword_arguments(table)) == wanted, function


def test_the_active_config_is_the_default_until_one_is_set() -> None:
    assert set_active_config(None) is None
    assert active_config() == default_config()
    config = default_config()
    config.csalr.groups = 8
    try:
        set_active_config(config)
        assert active_config() is config
    finally:
        assert set_active_config(None) is config


def test_a_mistake_in_the_settings_is_told_before_torch_is_loaded() -> None:
    program = (
        "import sys\nfrom csalr_plugin.errors import UserError\n"
        "from csalr_plugin.hosts.torchreid.config import default_config\n"
        "config = default_config()\nconfig.merge_from_list(['csalr.groups', '3'])\n"
        "try:\n    config.validate()\nexcept UserError as error:\n    print(error, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "does not divide the 256 channels of stage 1" in done.stdout, done.stderr
    assert done.stdout.endswith(" False\n")
