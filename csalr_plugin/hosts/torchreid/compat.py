"""Corrections of torchreid for today's torch and NumPy, and of its datasets, each with its reason.

Numbers are those of issues of KaiyangZhou/deep-person-reid.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from csalr_plugin.errors import UserError
from csalr_plugin.hosts.data import DUKEMTMC, MARKET1501, NameRule, named_images, padded
from csalr_plugin.hosts.folder import is_folder_name, read_folder_data
from csalr_plugin.hosts.images import read_image
from csalr_plugin.hosts.script import replaced
from csalr_plugin.hosts.torchreid import host
from csalr_plugin.hosts.trained import TrainedSettings
from csalr_plugin.hosts.training import unwrapped
from csalr_plugin.models.weights import has_network_settings, load_weights, read_checkpoint


def apply() -> None:
    """Mend the imported torchreid; may be called again.

    Raises:
        UserError: torchreid is not installed.
    """
    torchreid = host()
    for mend in (
        alias_modules,
        read_weights_only,
        load_whole_networks,
        extract_as_trained,
        read_every_image_mode,
        draw_every_image_mode,
        read_file_names,
        number_identities,
        accept_folder_names,
        leave_console_open,
        rank_small_galleries,
        count_every_product,
    ):
        mend(torchreid)


def alias_modules(torchreid: ModuleType) -> None:
    """Make ``torchreid.utils`` and similar names modules under the PyPI package (#526, #563).

    There these modules are called ``torchreid.reid.utils``, so that every script of the repository fails at its first
    import.
    """
    inner = torchreid.__name__ + ".reid."
    for name, module in list(sys.modules.items()):
        if name.startswith(inner):
            sys.modules.setdefault(f"{torchreid.__name__}.{name.removeprefix(inner)}", module)


def read_weights_only(torchreid: ModuleType) -> None:
    """Load torchreid's own checkpoints on today's torch, and never run code from a checkpoint (#592).

    torchreid saves ``rank1`` as a NumPy scalar, for which torch refuses the whole file since 2.6. For a file
    with Python 2 text, torchreid uses plain pickle, which runs code in the file, and leaves the module `pickle` of the
    whole process changed.
    """
    _replace(load_checkpoint, torchreid.utils.torchtools, torchreid.utils)


def load_checkpoint(fpath: str) -> dict[str, Any]:
    """Load a checkpoint onto the CPU: weights, plain values and NumPy scalars only.

    Raises:
        UserError: the file is missing, damaged, or its pickle would run code.
    """
    return read_checkpoint(fpath)


def load_whole_networks(torchreid: ModuleType) -> None:
    """Load weights into the plugin's networks completely, or raise an error.

    torchreid ignores tensors that do not fit, and settings that do not show in the shapes: it loads the weights of 4
    groups into a network of 2.
    """
    host_load = torchreid.utils.load_pretrained_weights
    if _is_ours(host_load):
        return

    def load_pretrained_weights(model: Any, weight_path: str) -> None:
        network = unwrapped(model)
        if not has_network_settings(network):
            host_load(model, weight_path)
            return
        print(f"{weight_path}: {load_weights(network, weight_path)}")

    extractor = sys.modules[torchreid.utils.FeatureExtractor.__module__]
    _replace(load_pretrained_weights, torchreid.utils.torchtools, torchreid.utils, extractor)


def extract_as_trained(torchreid: ModuleType) -> None:
    """Let `FeatureExtractor` build the network of a checkpoint with the settings that the checkpoint records.

    These are the name and the options of the network, the image size and the normalisation. Arguments that are given
    count first. torchreid builds the network with default options, and resizes to 256x128.
    """
    extractor = torchreid.utils.FeatureExtractor
    host_init = extractor.__init__
    if _is_ours(host_init):
        return

    def init(
        self: Any,
        model_name: str = "",
        model_path: str = "",
        image_size: Any = None,
        pixel_mean: Any = None,
        pixel_std: Any = None,
        pixel_norm: bool = True,
        device: str = "cuda",
        verbose: bool = True,
    ) -> None:
        from csalr_plugin.hosts.torchreid.config import active_config, set_active_config
        from csalr_plugin.hosts.torchreid.trained import read_config

        arguments: dict[str, Any] = {"image_size": image_size, "pixel_mean": pixel_mean, "pixel_std": pixel_std}
        config = active_config()
        if model_path and os.path.isfile(os.path.expanduser(model_path)):
            settings = TrainedSettings(model_path)
            model_name = settings.model(model_name)
            mean, std = settings.normalisation()
            recorded = {"image_size": settings.size(), "pixel_mean": mean, "pixel_std": std}
            arguments = {name: recorded[name] if one is None else one for name, one in arguments.items()}
            config = read_config(settings.recorded, "", (), settings.source)
            config.csalr.update(settings.options())
        arguments = {name: one for name, one in arguments.items() if one is not None}
        previous = set_active_config(config)
        try:
            host_init(self, model_name, model_path, pixel_norm=pixel_norm, device=device, verbose=verbose, **arguments)
        finally:
            set_active_config(previous)

    extractor.__init__ = init


def read_every_image_mode(torchreid: ModuleType) -> None:
    """Use the image reader of both hosts, in `FeatureExtractor` too.

    torchreid reads 16-bit grey as white, ignores the EXIF orientation, and retries a damaged file forever.
    """
    _replace(read_image, torchreid.utils.tools, torchreid.utils, torchreid.data.datasets.dataset)
    extract = torchreid.utils.FeatureExtractor.__call__
    if _is_ours(extract):
        return

    def call(self: Any, input: Any) -> Any:
        if isinstance(input, (str, Path)):
            input = [input]
        if isinstance(input, list):
            input = [np.asarray(read_image(one)) if isinstance(one, (str, Path)) else one for one in input]
        return extract(self, input)

    torchreid.utils.FeatureExtractor.__call__ = call


def draw_every_image_mode(torchreid: ModuleType) -> None:
    """Draw ranked results with the image reader of both hosts, and write each result to its own file.

    OpenCV reads fewer formats than Pillow. If two queries in different folders have the same file name, the result of
    the second replaces that of the first.
    """
    tools = sys.modules[torchreid.utils.visualize_ranked_results.__module__]
    draw = torchreid.utils.visualize_ranked_results
    if _is_ours(draw):
        return
    opencv = tools.cv2

    def visualize_ranked_results(*args: Any, **options: Any) -> None:
        written: Counter[str] = Counter()

        def write(path: str, image: Any) -> Any:
            written[path] += 1
            target = Path(path)
            if written[path] > 1:
                target = target.with_name(f"{target.stem}-{written[path]}{target.suffix}")
            return opencv.imwrite(str(target), image)

        mended = ModuleType("cv2")
        vars(mended).update(vars(opencv))
        vars(mended).update(imread=lambda path: np.asarray(read_image(path))[..., ::-1], imwrite=write)
        with replaced(tools, {"cv2": mended}):
            draw(*args, **options)

    _replace(visualize_ranked_results, tools, torchreid.utils)


def read_file_names(torchreid: ModuleType) -> None:
    """Read identity and camera from the file name only, in the handlers that search the whole path."""
    datasets = torchreid.data.datasets
    for handler, rule in ((datasets.Market1501, MARKET1501), (datasets.DukeMTMCreID, DUKEMTMC)):
        handler.process_dir = _process_dir(rule)


def _process_dir(rule: NameRule) -> Callable[..., list[tuple[str, int, int]]]:
    """Return the method `process_dir` of a handler for file names of this form."""

    def process_dir(self: Any, dir_path: str, relabel: bool = False) -> list[tuple[str, int, int]]:
        images = named_images(dir_path, rule)
        labels = {identity: label for label, identity in enumerate(sorted({image[1] for image in images}))}
        return [(path, labels[identity] if relabel else identity, camera - 1) for path, identity, camera in images]

    return process_dir


def number_identities(torchreid: ModuleType) -> None:
    """Number the training identities of each dataset from 0 without gaps, and refuse a subset without images.

    The loss uses identities as indices. torchreid takes those of MSMT17 from its lists, so that a subset of MSMT17
    raises an IndexError. For several sources, torchreid adds the number of identities of one dataset to the identities
    of the next one, so that gaps give two people the same label.
    """
    base = torchreid.data.datasets.dataset.Dataset
    host_init = base.__init__
    if _is_ours(host_init):
        return

    def init(self: Any, train: Any, query: Any, gallery: Any, *args: Any, **options: Any) -> None:
        for subset, items in (("training", train), ("query", query), ("gallery", gallery)):
            if not items:
                raise UserError(
                    f"dataset {type(self).__name__} has no {subset} images; add them where its handler reads them."
                )
        labels = {identity: label for label, identity in enumerate(sorted({item[1] for item in train}))}
        numbered = [(item[0], labels[item[1]], *item[2:]) for item in train]
        host_init(self, numbered, query, gallery, *args, **options)

    base.__init__ = init


def accept_folder_names(torchreid: ModuleType) -> None:
    """Accept ``folder:PATH`` as the name of an image dataset."""
    manager = sys.modules[torchreid.data.ImageDataManager.__module__]
    host_init = torchreid.data.datasets.init_image_dataset
    if _is_ours(host_init):
        return

    def init_image_dataset(name: str, **options: Any) -> Any:
        if not is_folder_name(name):
            return host_init(name, **options)
        from csalr_plugin.hosts.torchreid.datasets import FolderDataset

        data = read_folder_data(name)
        if options.get("verbose", True):
            print(data.report())
        return FolderDataset(data, **options)

    _replace(init_image_dataset, torchreid.data.datasets, manager)


def _is_ours(function: Any) -> bool:
    return getattr(function, "__module__", None) == __name__


def leave_console_open(torchreid: ModuleType) -> None:
    """Keep torchreid's `Logger` from closing the console.

    It does so when it is garbage-collected; later prints of the same process then raise an error.
    """

    def close(self: Any) -> None:
        if self.file is not None:
            self.file.close()

    torchreid.utils.Logger.close = close


def rank_small_galleries(torchreid: ModuleType) -> None:
    """Rank galleries of fewer than about 50 images (#424).

    The CMC curves of queries then differ in length, which NumPy refuses to average since 1.24, and a longer rank in
    ``test.ranks`` is an IndexError, after training and before the checkpoint is saved.
    """
    if getattr(torchreid.metrics.evaluate_rank, "__module__", None) != padded.__module__:
        _replace(padded(torchreid.metrics.evaluate_rank), torchreid.metrics, torchreid.metrics.rank)


def count_every_product(torchreid: ModuleType) -> None:
    """Count all parameters and all matrix products of the plugin's models; the host counts those of layers alone.

    Its `compute_model_complexity` misses the matrix products of attention: it prints the same operations for `pcb` and
    `pcb_csalr`.
    """
    module = torchreid.utils.model_complexity
    host_count = module.compute_model_complexity
    if getattr(host_count, "__module__", None) == __name__:
        return

    def compute_model_complexity(
        model: Any, input_size: Any, verbose: bool = False, only_conv_linear: bool = True
    ) -> tuple[int, int]:
        from csalr_plugin.models import PCB
        from csalr_plugin.models.attach import is_attended
        from csalr_plugin.models.cost import count_gmacs, count_parameters

        if not isinstance(model, PCB) and not is_attended(model):
            result: tuple[int, int] = host_count(model, input_size, verbose, only_conv_linear)
            return result
        return count_parameters(model), round(count_gmacs(model, *input_size[-2:]) * 1e9)

    _replace(compute_model_complexity, module, torchreid.utils)


def _replace(function: Callable[..., Any], *modules: ModuleType) -> None:
    for module in modules:
        setattr(module, function.__name__, function)
