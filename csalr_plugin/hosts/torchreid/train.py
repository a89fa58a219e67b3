"""Training, evaluating and resuming through torchreid: what `csalr train` does."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import gdown
import torch
import torchreid
from filelock import FileLock, Timeout
from torch import nn

from csalr_plugin.attention.batch_norm import synchronise
from csalr_plugin.errors import UserError, first_line
from csalr_plugin.files import make_writable_folder
from csalr_plugin.hosts import distributed
from csalr_plugin.hosts.folder import is_own
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.config import (
    ENGINE_RUN,
    LR_SCHEDULER,
    OPTIMIZER,
    Config,
    active_config,
    set_active_config,
)
from csalr_plugin.hosts.torchreid.datasets import build_datamanager
from csalr_plugin.hosts.torchreid.engine import plugin_engine
from csalr_plugin.hosts.torchreid.optimizer import build_optimizer
from csalr_plugin.hosts.training import unwrapped
from csalr_plugin.models import PCB, RefinedPCB
from csalr_plugin.models.cost import count_gmacs, count_parameters
from csalr_plugin.models.weights import load_weights, mismatches, read_checkpoint, state_dict_of

_build_host_model = torchreid.models.build_model


def train(config: Config) -> dict[str, dict[str, float]]:
    """Train, or with `test.evaluate` only evaluate, the model that `config` names.

    Args:
        config: torchreid's settings with the plugin's node; see `config_from_arguments`.

    Returns:
        The last results a target dataset: mAP and "rank-1", "rank-5", ..., from 0 to 1.

    Raises:
        UserError: for anything that the user gave and that cannot be used, before training starts.
    """
    register()
    previous = set_active_config(config)
    try:
        with distributed.process_group(config.use_gpu):
            with distributed.together():
                prepare(config)
            folder = Path(config.data.save_dir)
            with _alone(config, folder), _logged(folder, "test" if config.test.evaluate else "train"):
                return _train(config)
    finally:
        set_active_config(previous)


def _train(config: Config) -> dict[str, dict[str, float]]:
    print(f"Configuration\n{config}\n")
    print(torchreid.utils.collect_env_info())
    torchreid.utils.set_random_seed(config.train.seed)
    datamanager = distributed.one_first(lambda: build_datamanager(config))
    model = distributed.one_first(lambda: build_network(config, datamanager.num_train_pids))
    if config.use_gpu:
        torch.backends.cudnn.benchmark = True
        model.cuda()
    optimizer = build_optimizer(model, **config.keyword_arguments(OPTIMIZER))
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, **config.keyword_arguments(LR_SCHEDULER))
    if config.model.resume:
        with distributed.together():
            config.train.start_epoch = resume_from_checkpoint(config.model.resume, model, optimizer, scheduler)
    engine = build_engine(config, datamanager, in_parallel(config, model), optimizer, scheduler)
    engine.run(**config.keyword_arguments(ENGINE_RUN))
    results: dict[str, dict[str, float]] = engine.results
    return results


def in_parallel(config: Config, network: nn.Module) -> nn.Module:
    """The network in torchrun's processes, or else over all GPUs that this process sees."""
    if distributed.world_size() == 1:
        return nn.DataParallel(network) if config.use_gpu else network
    if config.csalr.sync_batch_norm:
        synchronise(network)
    distributed.draw_as_one(network)
    # Frozen layers have no gradient; of the host's own models some have layers that they never use.
    whole = isinstance(network, PCB) and not isinstance(network, RefinedPCB) and not config.train.fixbase_epoch
    return nn.parallel.DistributedDataParallel(
        network,
        device_ids=[distributed.local_rank()] if config.use_gpu else None,
        find_unused_parameters=not whole,
    )


def build_network(config: Config, num_classes: int) -> nn.Module:
    """The model that `config` names, from torchreid's registry, with the weights that it names.

    Raises:
        UserError: for weights that cannot be had, or that are of another architecture.
    """
    name = config.model.name
    print(f"Building model: {name}")
    model = build_model(name, num_classes, config.loss.name, config.model.pretrained, config.use_gpu)
    gmacs = count_gmacs(model, config.data.height, config.data.width)
    print(f"{count_parameters(model) / 1e6:.2f} million parameters, {gmacs:.2f} GMACs an image at test time")
    if config.model.load_weights:
        load_pretrained_weights(model, config.model.load_weights)
    return model


def build_model(
    name: str, num_classes: int, loss: str = "softmax", pretrained: bool = True, use_gpu: bool = True
) -> nn.Module:
    """The host's function of that name; where the active config loads a checkpoint anyway, nothing is downloaded.

    Raises:
        UserError: for ImageNet weights that cannot be downloaded.
    """
    settings = active_config().model
    pretrained = pretrained and not (settings.get("load_weights") or settings.get("resume"))
    try:
        model: nn.Module = _build_host_model(name, num_classes, loss, pretrained, use_gpu)
    except (OSError, gdown.exceptions.FileURLRetrievalError) as error:  # OSError: urllib's and requests' errors are
        reason = first_line(getattr(error, "reason", error))
        raise UserError(
            f"ImageNet weights of {name!r} cannot be downloaded ({reason}): start from random weights with "
            "model.pretrained False, or from a checkpoint with model.load_weights."
        ) from error
    return model


def build_engine(config: Config, datamanager: Any, model: nn.Module, optimizer: Any, scheduler: Any) -> Any:
    """torchreid's engine for `config`, with the plugin's training."""
    kind, loss = config.data.type.capitalize(), config.loss.name.capitalize()
    engine = plugin_engine(getattr(torchreid.engine, f"{kind}{loss}Engine"))
    options = {"label_smooth": config.loss.softmax.label_smooth, "use_gpu": config.use_gpu}
    if config.loss.name == "triplet":
        options |= dict(config.loss.triplet)
    if config.data.type == "video":
        options["pooling_method"] = config.video.pooling_method
    return engine(datamanager, model, optimizer=optimizer, scheduler=scheduler, **options)


def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
    """The host's function of that name, which never loads a part of a network in silence.

    Raises:
        UserError: when the checkpoint cannot be read, or is of another architecture.
    """
    print(f"{weight_path}: {load_weights(unwrapped(model), weight_path)}")


def resume_from_checkpoint(fpath: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> int:
    """The host's function of that name: all of a training's state, or an error that changes nothing.

    Returns:
        The number of epochs that are done; within the next one the engine goes on at the batch it stopped at.

    Raises:
        UserError: when the checkpoint cannot be read, or is no checkpoint of this training.
    """
    checkpoint, network = read_checkpoint(fpath), unwrapped(model)
    state = state_dict_of(checkpoint)
    wrong = mismatches(network, state)
    if wrong or "epoch" not in checkpoint:
        reason = f"{len(wrong)} tensors do not match ({', '.join(wrong[:3])}, ...)" if wrong else "it names no epoch"
        raise UserError(
            f"model.resume {str(fpath)!r} is no checkpoint of this training: {reason}. Give the model.name and the "
            "csalr settings that it was trained with, or start anew from its weights with model.load_weights."
        )
    network.load_state_dict(state)
    for name, part in (("optimizer", optimizer), ("scheduler", scheduler)):
        if part is None or name not in checkpoint:
            continue
        try:
            part.load_state_dict(checkpoint[name])
        except (ValueError, KeyError) as error:
            raise UserError(
                f"model.resume {str(fpath)!r}: its {name} state is of other train settings ({error}); resume with "
                "the settings that it was trained with."
            ) from error
    epoch = int(checkpoint["epoch"])
    print(f"Resumed from {fpath!r}: {epoch} epochs are done")
    return epoch


def check_isfile(fpath: str) -> bool:
    """The host's function of that name: True. The host only warns, and trains on without the checkpoint.

    Raises:
        UserError: there is no such file.
    """
    if not Path(fpath).expanduser().is_file():
        raise UserError(f"model.load_weights or model.resume {fpath!r} is not a file: give the path of a checkpoint.")
    return True


def prepare(config: Config) -> None:
    """Check, before anything is read or written, that a run can go through; `use_gpu` becomes what is possible.

    Raises:
        UserError: for settings that are not allowed, a data root that is missing, a save folder that cannot be
            written, or one with an earlier run's checkpoints that this run would replace.
    """
    config.validate()
    config.use_gpu = config.use_gpu and torch.cuda.is_available()
    root, folder = Path(config.data.root).expanduser(), Path(config.data.save_dir).expanduser()
    of_host = next((name for name in (*config.data.sources, *config.data.targets) if not is_own(name)), None)
    if of_host is not None and not root.is_dir():
        raise UserError(
            f"data.root {config.data.root!r} is not a folder: give the folder that holds {of_host} with --root, or "
            "other data with -s and -t."
        )
    for checkpoint in filter(None, (config.model.load_weights, config.model.resume)):
        check_isfile(checkpoint)
    processes = distributed.world_size()
    if config.csalr.compile and config.use_gpu and processes == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"csalr.compile True is for one GPU a process, and there are {torch.cuda.device_count()}: start a process "
            "a GPU with torchrun, let torch see one with CUDA_VISIBLE_DEVICES=0, or set csalr.compile False."
        )
    if config.train.batch_size % processes:
        raise UserError(
            f"config key 'train.batch_size' is {config.train.batch_size}, the images of all {processes} processes "
            f"together; it must be a multiple of {processes}."
        )
    share, instances = config.train.batch_size // processes, config.sampler.num_instances
    if processes > 1 and config.sampler.train_sampler == "RandomIdentitySampler" and share % instances:
        raise UserError(
            f"config key 'train.batch_size' is {config.train.batch_size}, {share} images a process, which is no "
            f"multiple of 'sampler.num_instances', {instances}: an identity's images stay in one process. Give a "
            f"multiple of {processes * instances}."
        )
    if config.test.visrank and not config.test.evaluate:
        raise UserError("test.visrank True is only for evaluation: add test.evaluate True.")
    if not distributed.is_main():  # which alone writes
        return
    make_writable_folder(folder, f"data.save_dir {config.data.save_dir!r}")
    if not config.test.evaluate and not config.csalr.overwrite:
        _refuse_to_overwrite(config, folder)


def _refuse_to_overwrite(config: Config, folder: Path) -> None:
    done = int(read_checkpoint(config.model.resume).get("epoch", 0)) if config.model.resume else 0
    for path in sorted((folder / "model").glob("model.pth.tar-*")):
        match = re.match(r"model\.pth\.tar-(\d+)", path.name)
        if match and int(match[1]) > done:
            raise UserError(
                f"data.save_dir {config.data.save_dir!r} holds an earlier run's checkpoint, {path.name}: give another "
                "folder, go on from it with model.resume, or replace it with csalr.overwrite True."
            )


@contextlib.contextmanager
def _alone(config: Config, folder: Path) -> Iterator[None]:
    """Keep a second training out of `folder`; the system lets go of the lock however the process ends."""
    if config.test.evaluate:
        yield
        return
    lock = FileLock(folder / ".lock")
    with distributed.together():
        try:
            if distributed.is_main():
                lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"data.save_dir {config.data.save_dir!r} is being written by another training: wait for it, stop it, "
                "or give another folder."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _logged(folder: Path, name: str) -> Iterator[None]:
    """Write what is printed to a log file in `folder` too, as the host's train script does."""
    if not distributed.is_main():
        yield
        return
    path = folder / f"{name}.log-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
    with path.open("w", encoding="utf-8", buffering=1) as log:

        class Tee:
            def __init__(self, console: TextIO) -> None:
                self.console = console

            def write(self, text: str) -> int:
                log.write(text)
                return self.console.write(text)

            def flush(self) -> None:
                log.flush()
                self.console.flush()

        with contextlib.redirect_stdout(Tee(sys.stdout)):  # type: ignore[type-var]
            yield
