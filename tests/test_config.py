"""The configuration: keys in any case, every mistake in one line, one table of settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csalr_plugin.errors import UserError
from csalr_plugin.hosts import keys
from csalr_plugin.hosts.config import recordable, recorded_settings
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
    training_keys,
)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_defaults_are_those_of_the_paper_and_of_the_host() -> None:
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
def test_keys_in_a_list_may_be_in_any_case(key: str) -> None:
    config = default_config()
    config.merge_from_list([key, "pcb_csalr"])
    assert config.model.name == "pcb_csalr"


def test_keys_in_a_file_may_be_in_any_case(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(
        "MODEL:\n  NAME: pcb\ntrain: {LR: 1e-3, max_epoch: 3}\nCSALR:\n  Groups: 4\n  RPP: {pcb_epochs: 7}\n"
    )
    config = default_config()
    config.merge_from_file(file)
    assert (config.model.name, config.train.lr, config.train.max_epoch) == ("pcb", 1e-3, 3)
    assert (config.csalr.groups, config.csalr.rpp.pcb_epochs) == (4, 7)


@pytest.mark.parametrize("given", ["6,4", "(6, 4)", "[6,4]", "[6, 4]", [6, 4], (6, 4)])
def test_landmarks_may_be_spelled_in_every_usual_way(given: object) -> None:
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
        ("csalr.groups", "0", "an integer from 1 to 2048"),
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
        ("csalr.accumulate", "0", "an integer from 1 to 1000000"),
        ("csalr.compile", "fast", "true or false"),
        ("csalr.channels_last", "1", "true or false"),
        ("csalr.rpp.pcb_epochs", "-1", "an integer from 0 to 1000000"),
        ("CSALR.GROUPS", "none", "an integer"),
        ("loss.name", "softmx", "one of softmax, triplet. Did you mean 'softmax'?"),
        ("data.transforms", "random_flop", "random_flip"),
        ("test.ranks", "1,100", "an integer from 1 to 50"),
        ("train.lr", "fast", "a number greater than 0"),
        ("model.pretrained", "2", "true or false"),
        ("model.name", ["a"], "text"),
        ("data.save_dir", 0.1, "the path of a folder"),
        ("data.save_dir", "", "the path of a folder"),
        ("data.root", "", "the path of a folder"),
        ("model.load_weights", 0.1, "a path"),
        ("data.root", "a\0b", "the path of a folder"),
        ("data.targets", "[]", "a comma-separated list of at least 1"),
        ("data.sources", "[]", "a comma-separated list of at least 1"),
        ("data.workers", "-1", "an integer from 0 to 1000"),
        ("data.split_id", "-1", "an integer from 0"),
        ("data.height", "0", "an integer from 1 to 10000"),
        ("data.width", "99999", "an integer from 1 to 10000"),
        ("data.k_tfm", "2", "1: torchreid's engines train on one view"),
        ("data.norm_mean", "0.5,0.5", "a comma-separated list of 3, each a number"),
        ("data.norm_std", "0,0,0", "a comma-separated list of 3, each a number greater than 0"),
        ("sampler.num_instances", "0", "an integer from 1"),
        ("sampler.num_cams", "0", "an integer from 1"),
        ("sampler.num_datasets", "0", "an integer from 1"),
        ("video.seq_len", "-1", "an integer from 1"),
        ("train.max_epoch", "9999999999999999999999", "an integer from 1 to 1000000"),
        ("train.max_epoch", "0", "an integer from 1 to 1000000"),
        ("train.batch_size", "0", "an integer from 1"),
        ("train.open_layers", "[]", "of at least 1"),
        ("train.stepsize", "[]", "a comma-separated list of at least 1"),
        ("train.gamma", "1.5", "a number greater than 0 and of at most 1"),
        ("train.seed", "4294967296", "an integer from 0 to 4294967295"),
        ("sgd.momentum", "1.5", "a number of at least 0 and less than 1"),
        ("sgd.dampening", "2", "a number from 0 to 1"),
        ("rmsprop.alpha", "0", "a number greater than 0 and less than 1"),
        ("adam.beta1", "1", "less than 1"),
        ("adam.beta2", "1", "less than 1"),
        ("loss.triplet.margin", "-1", "a number of at least 0"),
        ("loss.triplet.weight_t", "-1", "a number of at least 0"),
        ("loss.triplet.weight_x", "-1", "a number of at least 0"),
        ("test.ranks", "[]", "of at least 1"),
        ("test.eval_freq", "0", "-1, which evaluates after the last epoch alone, or an integer of at least 1"),
        ("test.start_eval", "-1", "an integer from 0"),
        ("csalr.groups", "4096", "an integer from 1 to 2048"),
        ("csalr.landmarks", "9999,1", "two positive integers of at most 1000"),
    ],
)
def test_a_value_that_is_not_allowed_is_one_line_with_the_key_the_value_and_the_allowed_values(
    key: str, value: object, allowed: str
) -> None:
    with pytest.raises(UserError) as error:
        default_config().merge_from_list([key, value])
    line = one_line(error)
    assert f"'{key}'" in line
    assert repr(value) in line
    assert allowed in line


NO_NUMBERS = ["1_000", "+3", "２", "٣", "0x10", "010", "1e", "inf", "nan", "1,5", "--1", "1" * 5000]


@pytest.mark.parametrize("text", NO_NUMBERS)
@pytest.mark.parametrize("key", ["train.print_freq", "train.lr"])
def test_only_ascii_literals_are_numbers_on_the_command_line_and_in_a_file(text: str, key: str, tmp_path: Path) -> None:
    if (text, key) in (("010", "train.lr"), ("1" * 5000, "train.lr")):
        return  # as a number with a fraction 010 is 10, and 5000 digits are infinite
    file = tmp_path / "a.yaml"
    group, leaf = key.split(".")
    file.write_text(f"{group}:\n  {leaf}: {text}\n")
    for merge in (
        lambda: default_config().merge_from_list([key, text]),
        lambda: default_config().merge_from_file(file),
    ):
        with pytest.raises(UserError, match=f"'{key}' is .*it must be") as error:
            merge()
        assert len(one_line(error)) < 300


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("2", 2.0), ("1E2", 100.0)])
def test_a_number_is_the_same_on_the_command_line_and_in_a_file(text: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"train: {{lr: {text}}}\n")
    configs = [default_config(), default_config()]
    configs[0].merge_from_list(["train.lr", text])
    configs[1].merge_from_file(tmp_path / "a.yaml")
    assert [config.train.lr for config in configs] == [value, value]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", "x" * 100_000),
        ("train.lr", ["x"] * 100_000),
        ("x" * 100_000, "1"),
        ("train.stepsize", "1 " * 9999),
    ],
)
def test_a_value_of_thousands_of_letters_is_cut_in_the_message(key: str, value: object) -> None:
    config = default_config()
    with pytest.raises(UserError) as error:
        config.merge_from_list([key, value])
        config.validate()
    assert len(one_line(error)) < 2000


@pytest.mark.parametrize(
    "key", ["data.root", "data.save_dir", "model.load_weights", "model.resume", "csalr.pretrained_weights"]
)
def test_a_tilde_in_a_path_is_the_home_folder(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text(f"{key}: ~/d\n")
    configs = [default_config() for _ in range(3)]
    configs[0].merge_from_list([key, "~/d"])
    configs[1].merge_from_file("~/a.yaml")
    group, leaf = key.split(".")
    configs[2][group][leaf] = "~/d"  # as the host's own script does
    configs[2].validate()
    assert [config.lookup(key) for config in configs] == [str(tmp_path / "d")] * 3


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
def test_an_unknown_key_is_reported_with_the_nearest_name(key: str, nearest: str) -> None:
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
        ("a.yaml", "train:\n  lr: &a [*a]\n", "line 2 cannot be read as YAML"),
        ("a.yaml", "train: &a\n  lr: *a\n", "line 1 cannot be read as YAML"),
        ("a.yaml", "a: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("a.yaml", "train:\n  lr: 1\n  lr: 2\n", "line 3 cannot be read as YAML: key 'lr' is given twice"),
        (
            "a.yaml",
            "train: {lr: 1}\nsgd: {momentum: 0}\ntrain: {gamma: 1}\n",
            "line 3 cannot be read as YAML: key 'train'",
        ),
        ("a.yaml", "train: {lr: 1}\n---\ntrain: {lr: 2}\n", "but found another document"),
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


@pytest.mark.parametrize("content", ["train: {lr: 1}\nTRAIN: {LR: 2}\n", "train: {lr: 1}\ntrain.lr: 2\n"])
def test_a_key_that_a_file_gives_twice_in_two_spellings_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=r"'train\.lr' and '.*' are the same key"):
        default_config().merge_from_file(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["2024-13-45", "2024-02-30", "2024-02-03"])
def test_a_date_in_a_file_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"data: {{save_dir: {text}}}\n")
    config = default_config()
    config.merge_from_file(tmp_path / "a.yaml")
    assert config.data.save_dir == text


def test_a_file_name_that_is_too_long_is_missing() -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_config("x" * 300 + ".yaml")


def test_a_mistyped_key_in_a_file_is_reported_as_on_the_command_line(tmp_path: Path) -> None:
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
        (["train.batch_size", "1"], r"'train\.batch_size' is 1; it must be at least 2: batch norm"),
        (
            ["train.batch_size", "3", "sampler.train_sampler", "RandomIdentitySampler"],
            r"at least 4, the value of 'sampler\.num_instances'",
        ),
        (
            ["train.batch_size", "9", "sampler.train_sampler", "RandomDomainSampler", "sampler.num_cams", "2"],
            r"a multiple of 2, the value of 'sampler\.num_cams'",
        ),
        (["loss.name", "triplet", "loss.triplet.weight_t", "0"], r"'loss\.triplet\.weight_t' is 0\.0"),
        (["loss.name", "triplet", "train.fixbase_epoch", "1"], r"'train\.fixbase_epoch' is 1; it must be 0"),
        (["train.optim", "sgd", "sgd.nesterov", "True", "sgd.momentum", "0"], r"'sgd\.momentum' is 0\.0"),
        (["train.optim", "sgd", "sgd.nesterov", "True", "sgd.dampening", "0.5"], r"'sgd\.dampening' is 0\.5"),
        (["train.start_epoch", "3", "train.max_epoch", "1"], r"'train\.start_epoch' is 3; it must be less than .* 1"),
        (["train.start_epoch", "3", "model.resume", "a.pth"], r"'train\.start_epoch' is 3; it must be 0 together with"),
    ],
)
def test_validate_reports_settings_that_cannot_be_combined(overrides: list[str], complaint: str) -> None:
    config = default_config()
    config.merge_from_list(overrides)
    with pytest.raises(UserError, match=complaint) as error:
        config.validate()
    one_line(error)


def test_validate_also_checks_values_that_code_has_set() -> None:
    config = default_config()
    config.csalr.stages = [1, 7]
    with pytest.raises(UserError, match=r"csalr\.stages"):
        config.validate()
    config.csalr.stages = [3]
    config.validate()
    assert config.csalr.stages == (3,)


def test_a_resumed_training_takes_the_settings_that_the_user_gives_and_the_rest_from_the_checkpoint() -> None:
    saved = default_config()
    saved.merge_from_list(["train.lr", 0.5, "train.gamma", 0.2, "csalr.landmarks", (6, 4), "data.root", "theirs"])
    now, defaults = default_config(), default_config().leaves()
    now.merge_from_list(["train.lr", 0.01, "csalr.landmarks", (12, 8)])
    now.train.batch_size = 64  # set by a program
    lines = now.take_over(recordable(saved.leaves()), training_keys(now), defaults, "Checkpoint 'x'")
    assert lines == [
        "train.lr 0.01: given now; 0.5 in the checkpoint",
        "train.batch_size 64: given now; 32 in the checkpoint",
        "train.gamma 0.2: from the checkpoint",
        "csalr.landmarks (12, 8): given now; (6, 4) in the checkpoint",
    ]
    assert (now.train.lr, now.train.gamma, now.train.batch_size) == (0.01, 0.2, 64)
    assert now.csalr.landmarks == (12, 8) and now.data.root == "reid-data"


def test_a_recorded_setting_that_is_not_allowed_is_one_line_that_names_the_checkpoint() -> None:
    config, defaults = default_config(), default_config().leaves()
    with pytest.raises(UserError, match=r"Checkpoint 'x' records settings that are not allowed: .*'train\.lr'"):
        config.take_over({"train.lr": -1.0}, training_keys(config), defaults, "Checkpoint 'x'")


def test_only_data_counts_as_the_settings_of_a_checkpoint() -> None:
    assert recorded_settings({"settings": [1]}) == recorded_settings({}) == {}
    assert recorded_settings({"settings": {"train.lr": 0.1, "a": object(), 3: 4}}) == {"train.lr": 0.1}


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


def test_a_mistake_in_the_settings_is_reported_before_torch_is_loaded() -> None:
    program = (
        "import sys\nfrom csalr_plugin.errors import UserError\n"
        "from csalr_plugin.hosts.torchreid.config import default_config\n"
        "config = default_config()\nconfig.merge_from_list(['csalr.groups', '3'])\n"
        "try:\n    config.validate()\nexcept UserError as error:\n    print(error, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "does not divide the 256 channels of stage 1" in done.stdout, done.stderr
    assert done.stdout.endswith(" False\n")
