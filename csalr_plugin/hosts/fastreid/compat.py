"""Patches with which fast-reid 1.4.0 runs on today's Python, torch and torchvision, and without a GPU.

fast-reid 1.4.0 was written for torch 1.13. Numbers such as #700 are issues of JDAI-CV/fast-reid.
"""

from __future__ import annotations

import collections
import collections.abc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode, RandomResizedCrop, Resize

from csalr_plugin.extras import needs
from csalr_plugin.hosts.data import CUHK_SYSU, DUKEMTMC, MARKET1501, VERI, NameRule, named_images, padded
from csalr_plugin.hosts.folder import is_folder_name, read_folder_data
from csalr_plugin.hosts.images import read_image


def host() -> ModuleType:
    """Import fast-reid with every package that its training needs, and return its package.

    Raises:
        MissingExtraError: fast-reid, or a package that it needs, is not installed.
    """
    with needs("fastreid", "csalr_plugin"), _removed_names():
        importlib.import_module("fastreid.engine")
    return sys.modules["fastreid"]


@contextmanager
def _removed_names() -> Iterator[None]:
    """Restore two names inside a with statement that imports fast-reid; afterwards remove them again.

    Python 3.10 removed ``collections.Mapping`` (#713). torch 2.0 removed ``torch._six.string_classes``, which the
    release on PyPI imports.
    """
    add_mapping = not hasattr(collections, "Mapping")
    add_six = "torch._six" not in sys.modules
    if add_mapping:
        vars(collections)["Mapping"] = collections.abc.Mapping
    if add_six:
        six = ModuleType("torch._six")
        vars(six)["string_classes"] = str
        sys.modules["torch._six"] = six
    try:
        yield
    finally:
        if add_mapping:
            del vars(collections)["Mapping"]
        if add_six:
            del sys.modules["torch._six"]


def apply() -> None:
    """Import fast-reid and apply every patch. Further calls have no effect.

    Raises:
        MissingExtraError: fast-reid, or a package that it needs, is not installed.
    """
    if getattr(host(), "csalr_plugin_patched", False):
        return
    for patch in (
        step_every_weight,
        load_data_without_cuda,
        raise_loading_errors,
        rank_without_a_compiler,
        rank_small_galleries,
        rerank_without_cuda,
        read_every_image_mode,
        resize_alike,
        read_file_names,
        accept_folder_names,
        write_complete_checkpoints,
        transform_with_current_torchvision,
        print_short_trainings,
        protect_log,
        launch_without_cuda,
        set_up_resumed_runs,
        find_backbone_configs,
    ):
        patch()
    host().csalr_plugin_patched = True  # type: ignore[attr-defined]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fastreid.{name}")


def find_backbone_configs() -> None:
    """Find the config files of RegNet and EfficientNet in the package; fast-reid looks in the working directory."""
    cfg = _module("modeling.backbones.regnet.config").cfg
    merge, package = cfg.merge_from_file, Path(str(host().__file__)).parent

    def merge_from_file(path: str) -> None:
        inside = package.parent / path
        merge(str(inside) if not os.path.isfile(path) and inside.is_file() else path)

    object.__setattr__(cfg, "merge_from_file", merge_from_file)


def step_every_weight() -> None:
    """Give the optimizer the weights, not one contiguous buffer of them (#700, #704).

    Since torch 2.0 ``zero_grad`` sets the gradient of that buffer to None, while the gradients of the weights stay
    views of the old one. Without this patch no optimizer step changes a weight, and no error is raised; with mixed
    precision the first step is an error. The buffer was meant to make steps faster, which torch's optimizers now do
    without it.
    """
    _module("solver.build").build_optimizer.__defaults__ = (False,)


def load_data_without_cuda() -> None:
    """Load batches without a CUDA stream on a machine without CUDA."""
    if torch.cuda.is_available():
        return
    for module in (_module("data.data_utils"), _module("data.build")):
        module.DataLoaderX = LoaderWithoutCuda  # type: ignore[attr-defined]


class LoaderWithoutCuda(DataLoader):  # type: ignore[type-arg]
    """torch's `DataLoader` with the arguments of fast-reid's `DataLoaderX`.

    Args:
        local_rank: number of a GPU; unused.
        options: arguments of torch's loader; memory is never pinned.
    """

    def __init__(self, local_rank: int, **options: Any) -> None:
        super().__init__(**{**options, "pin_memory": False})


def raise_loading_errors() -> None:
    """Raise an error of the loading thread in the training loop, which would otherwise wait for ever for a batch."""
    background = _module("data.data_utils").BackgroundGenerator
    run, following = background.run, background.next

    def run_to_the_end(self: Any) -> None:
        try:
            run(self)
        except Exception as error:
            self.error = error
            self.queue.put(None)

    def next_or_raise(self: Any) -> Any:
        try:
            return following(self)
        except StopIteration:
            if getattr(self, "error", None) is not None:
                raise self.error from None
            raise

    background.run, background.next = run_to_the_end, next_or_raise


def rank_without_a_compiler() -> None:
    """Rank in Python if the Cython ranking is not compiled.

    fast-reid compiles the Cython ranking at the first evaluation, after the first epochs of a training. If that fails,
    as on Python 3.12 and newer, which have no distutils, fast-reid ends the process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cython rank")
        _module("evaluation.rank")
    evaluator: Any = _module("evaluation.reid_evaluation").ReidEvaluator
    evaluator._compile_dependencies = _compile_nothing


def _compile_nothing(evaluator: Any) -> None:
    """Replace `ReidEvaluator._compile_dependencies`."""


def rank_small_galleries() -> None:
    """Rank galleries of fewer than about 50 images, whose CMC curves differ in length: an error since NumPy 1.24."""
    rank = _module("evaluation.rank")
    rank.evaluate_rank = padded(rank.evaluate_rank)  # type: ignore[attr-defined]


def rerank_without_cuda() -> None:
    """Search on the CPU in re-ranking on a machine without CUDA; ``build_dist`` always requests a GPU."""
    if torch.cuda.is_available():
        return
    compute_dist = _module("utils.compute_dist")
    jaccard = compute_dist.compute_jaccard_distance

    def compute_jaccard_distance(features: Any, k1: int = 20, k2: int = 6, search_option: int = 0, **more: Any) -> Any:
        return jaccard(features, k1=k1, k2=k2, search_option=3, **more)

    compute_dist.compute_jaccard_distance = compute_jaccard_distance  # type: ignore[attr-defined]


def read_every_image_mode() -> None:
    """Use the image reader of both hosts.

    fast-reid reads palette indices as grey values, and passes the alpha channel to the network, which raises an error.
    """

    def read(file_name: str, format: str | None = None) -> Image.Image:
        image = read_image(_module("utils.file_io").PathManager.get_local_path(file_name))
        if format == "BGR":
            return Image.merge("RGB", image.split()[::-1])
        return image if format in (None, "RGB") else image.convert(format)

    for module in (_module("data.data_utils"), _module("data.common")):
        module.read_image = read  # type: ignore[attr-defined]


def resize_alike() -> None:
    """Resize images for the plugin's models with the bilinear filter of torchreid, not the bicubic one of fast-reid.

    The same file then has the same embedding in both hosts. The filter is bilinear because torchreid's
    `FeatureExtractor`, its pretrained models and torchvision's default are. fast-reid's own models keep the bicubic
    filter, with which their weights were trained.
    """
    build = _module("data.build")
    host_transforms = build.build_transforms

    def build_transforms(cfg: Any, is_train: bool = True) -> Any:
        from csalr_plugin.hosts.fastreid.meta_architecture import is_plugin_model

        transforms = host_transforms(cfg, is_train)
        for transform in transforms.transforms if is_plugin_model(cfg.MODEL.META_ARCHITECTURE) else ():
            if isinstance(transform, (Resize, RandomResizedCrop)):
                transform.interpolation = InterpolationMode.BILINEAR
        return transforms

    build.build_transforms = build_transforms  # type: ignore[attr-defined]


def read_file_names() -> None:
    """Read identity and camera from the file name only, in the handlers that search the whole path."""
    datasets = _module("data.datasets")
    for name, rule in (("Market1501", MARKET1501), ("DukeMTMC", DUKEMTMC), ("VeRi", VERI), ("cuhkSYSU", CUHK_SYSU)):
        getattr(datasets, name).process_dir = _process_dir(rule)


def _process_dir(rule: NameRule) -> Callable[..., list[tuple[str, Any, Any]]]:
    """Return the method `process_dir` of a handler for file names of this form."""

    def process_dir(self: Any, dir_path: str, is_train: bool = True) -> list[tuple[str, Any, Any]]:
        images = named_images(dir_path, rule)
        # The second number in a file name of CUHK-SYSU is not a camera.
        numbered = [(path, one, 0 if rule is CUHK_SYSU else camera - 1) for path, one, camera in images]
        if not is_train:
            return numbered
        return [(path, f"{self.dataset_name}_{one}", f"{self.dataset_name}_{camera}") for path, one, camera in numbered]

    return process_dir


def accept_folder_names() -> None:
    """Accept ``folder:PATH`` as the name of a dataset."""
    registry = _module("data.datasets").DATASET_REGISTRY
    registry_get = registry.get

    def get(name: str) -> Any:
        if not is_folder_name(name):
            return registry_get(name)
        from csalr_plugin.hosts.fastreid.datasets import FolderDataset

        return partial(FolderDataset, read_folder_data(name))

    registry.get = get


def write_complete_checkpoints() -> None:
    """Write checkpoints completely or not at all, and read them without running code; see the module `checkpoint`."""
    from csalr_plugin.hosts.fastreid import checkpoint

    checkpoint.patch()


def set_up_resumed_runs() -> None:
    """Make `default_setup` check OUTPUT_DIR and take settings from the checkpoint of a resumed training."""
    from csalr_plugin.hosts.fastreid import resume

    engine: Any = _module("engine")
    engine.default_setup = resume.default_setup


def transform_with_current_torchvision() -> None:
    """Accept the old argument names of `RandomAffine` for INPUT.AFFINE.ENABLED; torchvision 0.15 removed them."""
    current = SimpleNamespace(**vars(transforms))
    current.RandomAffine = RandomAffine
    _module("data.transforms.build").T = current  # type: ignore[attr-defined]


class RandomAffine(transforms.RandomAffine):
    """torchvision's `RandomAffine` with the old names `resample` and `fillcolor` of its arguments."""

    def __init__(self, *args: Any, resample: Any = None, fillcolor: Any = None, **options: Any) -> None:
        super().__init__(*args, fill=fillcolor or 0, **options)


def print_short_trainings() -> None:
    """Print the metrics twice at one iteration, as a training of fewer than three does, without a division by zero."""
    events = _module("utils.events")
    printer: Any = events.CommonMetricPrinter
    write = printer.write

    def write_again(self: Any) -> None:
        if self._last_write and self._last_write[0] == events.get_event_storage().iter:
            self._last_write = None
        write(self)

    printer.write = write_again


def protect_log() -> None:
    """Warn once if the log cannot be written. Python would print a stack trace for every line of the log.

    A closed standard output still ends the run.
    """
    set_up = _module("utils.logger").setup_logger

    def setup_logger(*args: Any, **options: Any) -> logging.Logger:
        logger: logging.Logger = set_up(*args, **options)
        for handler in logger.handlers:
            handler.handleError = _LogError()  # type: ignore[method-assign]
        return logger

    setup_logger.cache_clear = set_up.cache_clear  # type: ignore[attr-defined]
    for module in (_module("utils.logger"), _module("engine.defaults")):
        module.setup_logger = setup_logger  # type: ignore[attr-defined]


class _LogError:
    """A replacement of a handler's `handleError`, which prints a stack trace."""

    told = False

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):
            raise error
        if not self.told and sys.stderr:
            print(f"The log cannot be written ({error}); the run goes on.", file=sys.stderr)
        self.told = True


def launch_without_cuda() -> None:
    """Replace `launch` and the flags, so that any script can run in several processes, with CUDA or without."""
    from csalr_plugin.hosts.fastreid import launch

    engine: Any = _module("engine")
    engine.launch, engine.default_argument_parser = launch.launch, launch.default_argument_parser
