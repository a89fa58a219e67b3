"""fast-reid in several processes: the same result as one process, errors reported once, resuming with another number.

Each run is a separate command. With FASTREID_REPO, the path of a checkout of JDAI-CV/fast-reid, the runs use that one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastreid_script import MISSING, SCRIPT
from fastreid_script import TINY as TINY_SETTINGS

from csalr_plugin.hosts.distributed import free_port
from csalr_plugin.models import build_model

REPOSITORY = os.environ.get("FASTREID_REPO", "")
if MISSING:
    pytest.skip(f"fast-reid is not installed: there is no {MISSING[0]}", allow_module_level=True)

PROJECT = Path(__file__).parents[1] / "projects" / "fastreid"
CONFIG = ("--config-file", str(PROJECT / "configs" / "pcb_384x128_sgd.yml"))
RPP_CONFIG = ("--config-file", str(PROJECT / "configs" / "pcb_rpp_384x128_sgd.yml"))
TWO = ("--num-gpus", "0", "--num-processes", "2")
TINY = (*TINY_SETTINGS, "INPUT.SIZE_TEST", "[64, 32]", "SOLVER.IMS_PER_BATCH", "16", "OUTPUT_DIR", "out")

# The Trainer with its model, optimizer and wrapper, fed with given batches and the same random state everywhere.
STEPS = """
import torch
from csalr_plugin.hosts.distributed import draw_as_one, rank, world_size
from csalr_plugin.hosts.fastreid import Trainer, add_csalr_config
from fastreid.config import get_cfg
from fastreid.engine import default_argument_parser, launch
from fastreid.utils.events import EventStorage

def main(args):
    cfg = get_cfg()
    add_csalr_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    draw_as_one(trainer.model)
    batches = [[one.chunk(world_size())[rank()] for one in batch] for batch in torch.load("batches.pt")]
    trainer._trainer._data_loader_iter = iter([{"images": each, "targets": names} for each, names in batches])
    with EventStorage(0):
        for trainer.iter in range(len(batches)):
            torch.manual_seed(trainer.iter)
            trainer.run_step()
    trainer.checkpointer.save(f"steps_{world_size()}")

args = default_argument_parser().parse_args()
launch(main, args.num_gpus, args=(args,))
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def start(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python with arguments in an empty folder, and ends the processes that are left after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTREID_DATASETS", str(tiny_data / "market1501"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("script.py").write_text(SCRIPT)
    Path("steps.py").write_text(STEPS)
    started: list[subprocess.Popen[str]] = []

    def start(*words: Any) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, words)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def run(start: Callable[..., subprocess.Popen[str]]) -> Run:
    """Runs Python with arguments to its end."""

    def run(*words: Any) -> subprocess.CompletedProcess[str]:
        process = start(*words)
        out, error = process.communicate(timeout=600)
        return subprocess.CompletedProcess(words, process.returncode, out, error)

    return run


def own_script() -> tuple[Any, ...]:
    path = Path(REPOSITORY) / "tools" / "train_net.py" if REPOSITORY else "script.py"
    return ("-m", "csalr_plugin", "run", path)


def last_epoch() -> int:
    return int(torch.load("out/model_final.pth", weights_only=True)["epoch"])


def test_two_processes_train_refined_part_pooling_and_evaluate_as_one_process_does(run: Run) -> None:
    phases = ("CSALR.RPP.PCB_EPOCHS", "1", "CSALR.RPP.PART_CLASSIFIER_EPOCHS", "1", "SOLVER.MAX_EPOCH", "3")
    sampled = ("DATALOADER.SAMPLER_TRAIN", "NaiveIdentitySampler", "DATALOADER.NUM_INSTANCE", "4")
    ended = run(PROJECT / "train_net.py", *TWO, *RPP_CONFIG, *TINY, *phases, *sampled)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Starting training from epoch 0") == 1  # the first process alone prints
    assert "on 2 devices" in ended.stdout
    assert last_epoch() == 2
    weights = torch.load("out/model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(one).all() for one in weights.values())
    of_two = json.loads(Path("out/results.json").read_text())
    ended = run(PROJECT / "train_net.py", "--eval-only", *RPP_CONFIG, *TINY, "MODEL.WEIGHTS", "out/model_final.pth")
    assert ended.returncode == 0, ended.stderr
    of_one = json.loads(Path("out/evaluation/results.json").read_text())
    scores = {name: value for name, value in of_one.items() if isinstance(value, float)}
    assert "mAP" in scores and scores == pytest.approx({name: of_two[name] for name in scores}, abs=1e-3)


def test_the_hosts_own_script_resumes_with_another_rate_batch_and_number_of_processes_and_machines(
    run: Run, start: Callable[..., subprocess.Popen[str]]
) -> None:
    ended = run(*own_script(), *TWO, *CONFIG, *TINY)
    assert (ended.returncode, last_epoch()) == (0, 0), ended.stderr
    assert ended.stdout.count("Command Line Args:") == 2  # the one that starts the others, and the first of them
    more = ("SOLVER.MAX_EPOCH", "2", "SOLVER.BASE_LR", "0.0005", "SOLVER.IMS_PER_BATCH", "8")
    ended = run(*own_script(), *CONFIG, "--resume", *TINY, *more)
    assert (ended.returncode, last_epoch()) == (0, 1), ended.stderr
    assert "SOLVER.BASE_LR 0.0005: given now; 0.001 in the checkpoint" in ended.stdout
    assert "epoch 2/2: loss " in ended.stdout and "lr 0.005, " in ended.stdout  # of new layers, 10 times BASE_LR
    epoch = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-2])
    assert epoch["batches"] == 5  # all five batches of 8, after an epoch of two batches of 16
    assert "Starting training from epoch 1" in ended.stdout
    address = f"tcp://127.0.0.1:{free_port()}"
    flags = ("--num-gpus", "0", "--num-machines", "2", "--dist-url", address, "--resume")
    machines = [
        start(*own_script(), *CONFIG, *flags, "--machine-rank", number, *TINY, "SOLVER.MAX_EPOCH", "3")
        for number in range(2)
    ]
    said = [machine.communicate(timeout=600) for machine in machines]
    assert ([machine.returncode for machine in machines], last_epoch()) == ([0, 0], 2), said
    assert "Starting training from epoch 2" in said[0][0] and "Starting training" not in said[1][0]


def test_two_processes_with_synchronised_batch_norm_learn_the_same_as_one_from_the_same_images(run: Run) -> None:
    torch.manual_seed(0)
    model = build_model("pcb_csalr", 4, pretrained=False, landmarks=(2, 2), stages=(1, 2, 3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bn3.weight", "alpha")):  # their initial value 0 switches off most of the network
                parameter.fill_(0.3)
    before = model.state_dict()
    torch.save({"model": before}, "start.pth")
    torch.save([(torch.rand(8, 3, 64, 32) * 255, torch.arange(8) % 4) for _ in range(3)], "batches.pt")
    more = ("MODEL.WEIGHTS", "start.pth", "CSALR.STAGES", "1,2,3", "SOLVER.IMS_PER_BATCH", "8", "CSALR.WARMUP", "0")
    # At a higher rate a deep network on few images would amplify rounding errors at each step.
    more += ("SOLVER.BASE_LR", "0.0001", "CSALR.SYNC_BATCH_NORM", "True", "CSALR.OVERWRITE", "True")
    Path("out").mkdir()
    for flags in (TWO, ()):
        ended = run("steps.py", *flags, *CONFIG, *TINY, *more)
        assert ended.returncode == 0, ended.stderr
    two, one = (torch.load(f"out/steps_{number}.pth", weights_only=True)["model"] for number in (2, 1))
    learnt = {name: float((one[name] - before[name]).double().norm()) for name in before}
    apart = {name: float((one[name] - two[name]).double().norm()) for name in before}
    for name, _ in model.named_parameters():
        assert learnt[name] > 0 or name.endswith("key.bias")  # a softmax does not see it
    # The difference of a tensor is at most 4 % of its change, plus fp32's rounding of its values. It reaches 2 % for
    # the biases of batch norms, whose gradients nearly cancel. Without synchronised batch norm it is as large as the
    # change.
    assert all(apart[name] <= 0.04 * learnt[name] + 5e-6 * float(one[name].double().norm()) for name in before)
    weights = [name for name, _ in model.named_parameters()]
    assert sum(apart[name] ** 2 for name in weights) <= 0.01**2 * sum(learnt[name] ** 2 for name in weights)


def test_the_death_of_a_process_ends_the_training_and_names_the_last_checkpoint(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    long = ("SOLVER.MAX_EPOCH", "1000", "TEST.EVAL_PERIOD", "1000")
    process = start(*own_script(), *TWO, *CONFIG, *TINY, *long)
    deadline = time.monotonic() + 300
    while not Path("out/last_checkpoint").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(one for one in children if b"\0RANK=1\0" in Path(f"/proc/{one}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in error
    told = [line for line in error.splitlines() if "error:" in line]
    assert len(told) == 1 and "one of its processes has ended" in told[0]
    assert "the last checkpoint is out/model_" in told[0] and "--resume" in told[0]


def test_an_error_of_every_process_or_of_the_first_alone_is_reported_once(
    run: Run, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*words: Any) -> str:
        ended = run(*words)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
        lines = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
        assert len(lines) == 1, ended.stderr
        return lines[0]

    many = ("SOLVER.IMS_PER_BATCH", "64")
    assert "is 64, more than the 44 training images" in told(*own_script(), *TWO, *CONFIG, *TINY, *many)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    for subset in ("query", "bounding_box_test", "bounding_box_train"):
        source = tiny_data / "market1501" / "Market-1501-v15.09.15" / subset
        place = tmp_path / "Market-1501-v15.09.15" / subset
        place.mkdir(parents=True)
        for image in source.iterdir():
            (place / image.name).symlink_to(image)
    image = next(place.iterdir())
    image.unlink()
    image.write_bytes(b"no image")
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path))
    assert image.name in told(PROJECT / "train_net.py", *TWO, *CONFIG, *TINY)
    ended = run(*torchrun, PROJECT / "train_net.py", *CONFIG, *TINY, "CSALR.GROUP", "2")
    assert ended.returncode != 0
    assert ended.stderr.count("unknown config key 'CSALR.GROUP'") == 1


def test_a_closed_pipe_ends_the_script_without_a_stack_trace(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(PROJECT / "train_net.py", *CONFIG, *TINY)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()  # as head -3 does
    error = process.stderr.read()
    assert process.wait() == 141 and "Traceback" not in error
    process.stdout = None  # for the fixture


def test_ctrl_c_during_the_imports_ends_the_script_without_a_stack_trace(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start(PROJECT / "train_net.py", *CONFIG, *TINY)
    handled = [False]
    while handled[-1] or not any(handled):  # until Python has set its handler, and the script has removed it
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        handled.append(bool(caught >> (signal.SIGINT - 1) & 1))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in out + error
