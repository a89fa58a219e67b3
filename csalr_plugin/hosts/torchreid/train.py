"""The command `csalr train`: training, evaluating and resuming through torchreid."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gdown
import torch
import torchreid
from filelock import FileLock, Timeout
from torch import nn

from csalr_plugin.attention.batch_norm import synchronise
from csalr_plugin.errors import UserError, first_line, shown
from csalr_plugin.files import make_writable_folder, remove_unfinished
from csalr_plugin.hosts import distributed
from csalr_plugin.hosts.config import recorded_settings
from csalr_plugin.hosts.folder import file_stem, is_folder_name
from csalr_plugin.hosts.records import METRICS, differing, evaluation_folder, loader_workers
from csalr_plugin.hosts.resume import load_optimizer_state, replay_schedule
from csalr_plugin.hosts.torchreid import register
from csalr_plugin.hosts.torchreid.config import (
    ENGINE_RUN,
    LR_SCHEDULER,
    OPTIMIZER,
    Config,
    active_config,
    set_active_config,
    training_keys,
)
from csalr_plugin.hosts.torchreid.datasets import build_datamanager
from csalr_plugin.hosts.torchreid.engine import PROGRESS, plugin_engine
from csalr_plugin.hosts.torchreid.monitor import Logger
from csalr_plugin.hosts.torchreid.optimizer import build_optimizer
from csalr_plugin.hosts.training import unwrapped
from csalr_plugin.models import PCB, RefinedPCB
from csalr_plugin.models.cost import count_gmacs, count_parameters
from csalr_plugin.models.weights import (
    check_epoch,
    check_values,
    load_exactly,
    load_weights,
    read_checkpoint,
    state_dict_of,
)
from csalr_plugin.version import __version__

_build_host_model = torchreid.models.build_model


def train(config: Config) -> dict[str, dict[str, float]]:
    """Train the model that `config` names, or with `test.evaluate` only evaluate it.

    Args:
        config: torchreid's settings with the plugin's node; see `config_from_arguments`. With `model.resume` it takes
            the settings that are not given from the checkpoint.

    Returns:
        The last results of each target dataset: mAP and "rank-1", "rank-5", ..., from 0 to 1.

    Raises:
        UserError: something that the user gave cannot be used (before training starts), or training stopped.
    """
    register()
    previous = set_active_config(config)
    try:
        with distributed.process_group(config.use_gpu):
            with distributed.together():
                prepare(config)
            folder = Path(config.data.save_dir)
            with _alone(config, folder), _logged(folder, "test" if config.test.evaluate else "train") as log:
                describe(config, log)
                return _train(config)
    finally:
        set_active_config(previous)


def describe(config: Config, log: Logger) -> None:
    """Print the versions and the settings that differ from the defaults; write everything to the log file."""
    log.to_file(f"Configuration\n{config}\n\n{torchreid.utils.collect_env_info()}")
    print(
        f"csalr_plugin {__version__}, torchreid {torchreid.__version__}, torch {torch.__version__}, "
        f"{'GPU' if config.use_gpu else f'CPU, {torch.get_num_threads()} threads'}"
    )
    where = f" (all settings and the machine: {log.file.name})" if log.file is not None else ""
    print(f"Settings that differ from torchreid's defaults{where}:\n{differing(config.leaves(), config.defaults)}")


def _train(config: Config) -> dict[str, dict[str, float]]:
    torchreid.utils.set_random_seed(config.train.seed)
    datamanager = distributed.one_first(lambda: build_datamanager(config))
    model = distributed.one_first(lambda: build_network(config, datamanager.num_train_pids))
    if config.use_gpu:
        torch.backends.cudnn.benchmark = True
        model.cuda()
    optimizer = build_optimizer(model, **config.keyword_arguments(OPTIMIZER))
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, **config.keyword_arguments(LR_SCHEDULER))
    options = config.keyword_arguments(ENGINE_RUN)
    if config.model.resume:
        with distributed.together():
            options["start_epoch"] = resume_from_checkpoint(config.model.resume, model, optimizer, scheduler)
    engine = build_engine(config, datamanager, in_parallel(config, model), optimizer, scheduler)
    engine.run(**options)
    results: dict[str, dict[str, float]] = engine.results
    return results


def in_parallel(config: Config, network: nn.Module) -> nn.Module:
    """Wrap the network for torchrun's processes, or else for all GPUs that this process sees."""
    if distributed.world_size() == 1:
        return nn.DataParallel(network) if config.use_gpu else network
    if config.csalr.sync_batch_norm:
        synchronise(network)
    distributed.draw_as_one(network)
    # Frozen layers have no gradient, nor have classifiers without an identity loss. Some of the host's models have
    # layers that they never use.
    identity_loss = config.loss.name == "softmax" or config.loss.triplet.weight_x > 0
    whole = isinstance(network, PCB) and not isinstance(network, RefinedPCB) and not config.train.fixbase_epoch
    return nn.parallel.DistributedDataParallel(
        network,
        device_ids=[distributed.local_rank()] if config.use_gpu else None,
        find_unused_parameters=not (whole and identity_loss),
    )


def build_network(config: Config, num_classes: int) -> nn.Module:
    """Build the model that `config` names, from torchreid's registry, with the weights that it names.

    Raises:
        UserError: the weights cannot be loaded, or the model cannot take images of the given size.
    """
    name = config.model.name
    print(f"Building model: {name}")
    model = build_model(name, num_classes, config.loss.name, config.model.pretrained, config.use_gpu)
    with _image_size(config):
        gmacs = count_gmacs(model, config.data.height, config.data.width)
    print(f"{count_parameters(model) / 1e6:.2f} million parameters, {gmacs:.2f} GMACs an image at test time")
    if config.model.load_weights and not config.model.resume:  # the resumed checkpoint would replace them
        load_pretrained_weights(model, config.model.load_weights)
    return model


@contextlib.contextmanager
def _image_size(config: Config) -> Iterator[None]:
    """Turn an error of the model's forward pass into one line about the size of the images."""
    try:
        yield
    except (RuntimeError, ValueError, ZeroDivisionError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        size = f"{config.data.height}x{config.data.width}"
        raise UserError(
            f"{config.model.name} cannot take images of {size} ({first_line(error)}): give the size that it was made "
            "for as data.height and data.width, for most models 256 and 128, for hacnn 160 and 64."
        ) from error


def compute_model_complexity(
    model: nn.Module, input_size: Sequence[int], verbose: bool = False, only_conv_linear: bool = True
) -> tuple[int, int]:
    """Replace the host's function in its train script: a size that the model cannot take is one line.

    Args:
        model, input_size, verbose, only_conv_linear: those of ``torchreid.utils.compute_model_complexity``.

    Returns:
        The numbers of parameters and of multiply-accumulate operations.

    Raises:
        UserError: the model cannot take images of the given size.
    """
    with _image_size(active_config()):
        result: tuple[int, int] = torchreid.utils.model_complexity.compute_model_complexity(
            model, input_size, verbose, only_conv_linear
        )
    return result


def build_model(
    name: str, num_classes: int, loss: str = "softmax", pretrained: bool = True, use_gpu: bool = True
) -> nn.Module:
    """Replace the host's function; nothing is downloaded if the active config loads a checkpoint.

    Raises:
        UserError: ImageNet weights cannot be downloaded.
    """
    settings = active_config().leaves()  # a script's own schema may lack these keys
    loads = bool(settings.get("model.load_weights") or settings.get("model.resume"))
    if settings.get("test.evaluate") and not loads:
        weights = "ImageNet" if pretrained else "random"
        print(f"Neither model.load_weights nor model.resume is given: the {weights} weights of {name} are evaluated.")
    try:
        model: nn.Module = _build_host_model(name, num_classes, loss, pretrained and not loads, use_gpu)
    except (OSError, gdown.exceptions.FileURLRetrievalError) as error:  # OSError: urllib's and requests' errors are
        reason = first_line(getattr(error, "reason", error))
        raise UserError(
            f"ImageNet weights of {name!r} cannot be downloaded ({reason}): start from random weights with "
            "model.pretrained False, or from a checkpoint with model.load_weights."
        ) from error
    return model


def build_engine(config: Config, datamanager: Any, model: nn.Module, optimizer: Any, scheduler: Any) -> Any:
    """Build torchreid's engine for `config`, with the plugin's training."""
    kind, loss = config.data.type.capitalize(), config.loss.name.capitalize()
    engine = plugin_engine(getattr(torchreid.engine, f"{kind}{loss}Engine"))
    options = {"label_smooth": config.loss.softmax.label_smooth, "use_gpu": config.use_gpu}
    if config.loss.name == "triplet":
        options |= dict(config.loss.triplet)
    if config.data.type == "video":
        options["pooling_method"] = config.video.pooling_method
    return engine(datamanager, model, optimizer=optimizer, scheduler=scheduler, **options)


def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
    """Replace the host's function, which silently loads a part of a network.

    Raises:
        UserError: the checkpoint cannot be read, or is of another architecture or other settings.
    """
    print(f"{weight_path}: {load_weights(unwrapped(model), weight_path)}")


# Settings on which the order of an epoch's batches depends. Progress within an epoch counts only if they are equal.
_OF_THE_ORDER = (
    "train.batch_size",
    "train.seed",
    "csalr.accumulate",
    "sampler.train_sampler",
    "sampler.num_instances",
    "sampler.num_cams",
    "sampler.num_datasets",
    "data.sources",
    "data.split_id",
    "data.combineall",
)


def resume_from_checkpoint(fpath: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> int:
    """Replace the host's function: load the whole state of a training, or raise an error.

    Learning rates and other hyperparameters are those of the settings now, see `take_settings`.

    Args:
        fpath: the checkpoint.
        model: the model, loaded in place.
        optimizer, scheduler: new ones for `model`, built with the settings now.

    Returns:
        The number of epochs that are done. If the checkpoint is of the middle of an epoch, the engine goes on from
        its batch.

    Raises:
        UserError: the checkpoint cannot be read, or is no checkpoint of this training.
    """
    checkpoint, network, config = read_checkpoint(fpath), unwrapped(model), active_config()
    epoch = check_epoch(checkpoint, fpath)
    load_exactly(network, state_dict_of(checkpoint), fpath)
    print(f"Resumed from {fpath!r}: {epoch} epochs are done")
    settings = recorded_settings(checkpoint)
    if settings:
        for line in config.origins:
            print(f"  {line}")
    else:
        print("The checkpoint records no settings: those given now and the defaults count.")
    if optimizer is not None and "optimizer" in checkpoint:
        _load_optimizer(optimizer, checkpoint["optimizer"], fpath, settings.get("train.optim"))
        changed = [key for key in _OF_THE_ORDER if key in settings and settings[key] != _now(config, key)]
        if changed and optimizer.param_groups[0].get("batches_done"):
            print(f"{', '.join(changed)} changed within an epoch: epoch {epoch + 1} begins again.")
            for group in optimizer.param_groups:
                group["batches_done"] = 0
    if scheduler is not None:
        replay_schedule(scheduler, epoch)
    return epoch


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, path: str, recorded: str | None) -> None:
    """Load the state of an optimizer of the same kind; one of another kind starts without state."""
    kind = active_config().leaves().get("train.optim")
    if recorded is not None and recorded != kind:
        print(f"The checkpoint's optimizer is {recorded}: {kind} starts without its state.")
        return
    load_optimizer_state(optimizer, saved, path, PROGRESS)
    scaler = optimizer.param_groups[0].get("scaler")
    if scaler:
        fresh = torch.amp.GradScaler("cpu").state_dict()
        check_values(scaler, {**fresh, "_growth_tracker": 0}, path, "optimizer.scaler", complete=True)
    done = optimizer.param_groups[0].get("batches_done", 0)
    if not isinstance(done, int) or isinstance(done, bool) or done < 0:
        raise UserError(f"Checkpoint {path!r} cannot be used: 'batches_done' is {shown(done)}, not a count of batches.")


def _now(config: Config, key: str) -> Any:
    value = config.leaves().get(key)
    return list(value) if isinstance(value, tuple) else value


def take_settings(config: Config) -> None:
    """Take the training settings that the user has not given from the checkpoint `model.resume`.

    Raises:
        UserError: the checkpoint cannot be read, or records settings that are not allowed.
    """
    path = config.model.resume
    settings = recorded_settings(read_checkpoint(path))
    config.origins[:] = config.take_over(settings, training_keys(config), config.defaults, f"Checkpoint {path!r}")


def check_isfile(fpath: str) -> bool:
    """Replace the host's function, which only warns and trains without the checkpoint; return True.

    Raises:
        UserError: there is no such file.
    """
    if not os.path.isfile(os.path.expanduser(fpath)):
        raise UserError(f"model.load_weights or model.resume {fpath!r} is not a file: give the path of a checkpoint.")
    return True


def prepare(config: Config) -> None:
    """Check before the run that it can succeed; turn `use_gpu` off without CUDA, and take resumed settings.

    Raises:
        UserError: settings that are not allowed, a missing data root, a save folder that cannot be written, or one
            with an earlier run's checkpoints that this run would replace.
    """
    config.validate()
    config.use_gpu = config.use_gpu and torch.cuda.is_available()
    if checkpoint := config.model.resume or config.model.load_weights:
        check_isfile(checkpoint)
    if config.model.resume:
        take_settings(config)
        config.validate()
    root, folder = Path(config.data.root).expanduser(), _choose_folder(config)
    of_host = next((name for name in (*config.data.sources, *config.data.targets) if not is_folder_name(name)), None)
    if of_host is not None and not root.is_dir():
        raise UserError(
            f"data.root {config.data.root!r} is not a folder: give the folder that holds {of_host} with --root, or "
            "other data with -s and -t."
        )
    processes = distributed.world_size()
    if config.csalr.compile and config.use_gpu and processes == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"csalr.compile True is for one GPU a process, and there are {torch.cuda.device_count()}: start a process "
            "a GPU with torchrun, let torch see one with CUDA_VISIBLE_DEVICES=0, or set csalr.compile False."
        )
    if not config.test.evaluate:
        _check_shares(config, processes)
    config.data.workers = loader_workers(
        config.data.workers,
        "data.workers",
        "data.workers" in config.given,
        distributed.local_world_size(),
        print if distributed.is_main() else lambda _: None,
    )
    if not distributed.is_main():  # the first process alone writes
        return
    make_writable_folder(folder, f"data.save_dir {config.data.save_dir!r}")
    if not config.test.evaluate and not config.csalr.overwrite:
        _refuse_to_overwrite(config, folder)


def _choose_folder(config: Config) -> Path:
    """Set and return `data.save_dir`: by default it names model, data set and seed.

    An evaluation gets a subfolder of a training's folder.
    """
    name = config.data.save_dir
    if "data.save_dir" not in config.given and name == config.defaults["data.save_dir"]:
        sources = "+".join(map(file_stem, config.data.sources))
        name = os.path.join(name, f"{config.model.name}_{sources}_seed{config.train.seed}")
    folder = Path(name).expanduser()
    if config.test.evaluate:
        folder = evaluation_folder(folder, METRICS, "model")
    config.data.save_dir = str(folder)
    return folder


def _check_shares(config: Config, processes: int) -> None:
    """Check the images of a batch that each process, and each GPU of DataParallel, gets."""
    batch, instances = config.train.batch_size, config.sampler.num_instances
    if batch % processes:
        raise UserError(
            f"config key 'train.batch_size' is {batch}, the images of all {processes} processes "
            f"together; it must be a multiple of {processes}."
        )
    share = batch // processes
    if processes > 1 and config.sampler.train_sampler == "RandomIdentitySampler" and share % instances:
        raise UserError(
            f"config key 'train.batch_size' is {batch}, {share} images a process, which is no "
            f"multiple of 'sampler.num_instances', {instances}: an identity's images stay in one process. Give a "
            f"multiple of {processes * instances}."
        )
    gpus = max(1, torch.cuda.device_count()) if config.use_gpu and processes == 1 else 1
    each = -(-share // gpus)
    smallest = share - each * ((share - 1) // each)  # DataParallel's last chunk
    if config.data.type == "image" and smallest < 2:
        parts = f"{processes} processes" if processes > 1 else f"{gpus} GPUs"
        raise UserError(
            f"config key 'train.batch_size' is {batch}, so that one of {parts} gets a single image, which batch norm "
            f"cannot normalise; give {2 * processes * gpus} or more, a multiple of {processes * gpus}."
        )


def _refuse_to_overwrite(config: Config, folder: Path) -> None:
    path = config.model.resume
    done = check_epoch(read_checkpoint(path), path) if path else 0
    for file in sorted((folder / "model").glob("model.pth.tar-*")):
        match = re.match(r"model\.pth\.tar-(\d+)", file.name)
        if match and int(match[1]) > done:
            raise UserError(
                f"data.save_dir {config.data.save_dir!r} holds an earlier run's checkpoint, {file.name}: give another "
                "folder, go on from it with model.resume, or replace it with csalr.overwrite True."
            )


@contextlib.contextmanager
def _alone(config: Config, folder: Path) -> Iterator[None]:
    """Keep a second training out of `folder`, and remove the unfinished files of a killed training.

    The system releases the lock however the process ends.
    """
    if config.test.evaluate:
        yield
        return
    lock = FileLock(folder / ".lock")
    with distributed.together():
        try:
            if distributed.is_main():
                lock.acquire(timeout=0)
                remove_unfinished(folder / "model")
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
def _logged(folder: Path, name: str) -> Iterator[Logger]:
    """Write everything that is printed to a log file in `folder` too, as the host's train script does."""
    path = folder / f"{name}.log-{time.strftime('%Y-%m-%d-%H-%M-%S')}" if distributed.is_main() else None
    logger = Logger(path)
    with contextlib.closing(logger), contextlib.redirect_stdout(logger):  # type: ignore[type-var]
        yield logger
