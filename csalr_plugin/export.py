"""Export of a trained network to ONNX, OpenVINO, TorchScript and torch.export, each file proved against the network."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csalr_plugin.attention import AttentionBlock
from csalr_plugin.errors import UserError, first_line
from csalr_plugin.files import write_json
from csalr_plugin.version import __version__

PIXELS = ("normalised", "0-255")
OPSETS = (11, 24)
SMALLEST_DYNAMO_OPSET = 18
DEFAULT_OPSET = 18
PROVED_BATCHES = (1, 3, 5)
LIMIT, HALF_LIMIT = 1e-4, 1e-3
METADATA = "metadata.json"
"""Name of the metadata in a TorchScript or pt2 file: a JSON object of text."""


@dataclass(frozen=True)
class Interface:
    """The interface of an exported file, and the origin of its weights.

    Attributes:
        model: name of the network.
        height, width: size of the images in pixels.
        pixels: "normalised": the input is float32, ``(RGB / 255 - mean) / std``. "0-255": the input is uint8 RGB, and
            the graph normalises it. A runtime refuses an input of the other type.
        mean, std: of each channel, for pixels scaled to 0 to 1.
        half: the backbone computes in fp16; input, output and attention blocks stay fp32.
        batch: the number of images, or None for any number.
        origin: further entries of the metadata by name, such as the sha256 of the checkpoint.
    """

    model: str
    height: int
    width: int
    pixels: str = "normalised"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    half: bool = False
    batch: int | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the input."""
        return torch.uint8 if self.pixels == "0-255" else torch.float32

    @property
    def limit(self) -> float:
        """Largest difference from the network that a file may have."""
        return HALF_LIMIT if self.half else LIMIT

    def input_in_words(self) -> str:
        """Describe the input for a message."""
        mean, std = (", ".join(f"{one:g}" for one in values) for values in (self.mean, self.std))
        kind = "uint8, RGB" if self.pixels == "0-255" else f"float32, (RGB / 255 - ({mean})) / ({std})"
        return f"images [{self.batch or 'batch'}, 3, {self.height}, {self.width}], {kind}"

    def metadata(self, embedding: int) -> dict[str, str]:
        """Return the metadata of a file; `embedding` is the width of the output."""
        return {
            "model": self.model,
            "input": "images",
            "output": "output",
            "height": str(self.height),
            "width": str(self.width),
            "batch": str(self.batch or "dynamic"),
            "channels": "RGB",
            "pixels": self.pixels,
            "input_type": str(self.dtype).removeprefix("torch."),
            "mean": json.dumps(list(self.mean)),
            "std": json.dumps(list(self.std)),
            "embedding": str(embedding),
            "precision": "fp16" if self.half else "fp32",
            "csalr_plugin": __version__,
            **self.origin,
        }


class Embedder(nn.Module):
    """A network with the input of an exported file.

    Args:
        network: takes normalised images (B, 3, height, width) in eval mode and returns embeddings (B, D).
        interface: the interface.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, network: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.network, self.raw = network, interface.pixels == "0-255"
        self.compute_type = torch.float16 if interface.half else torch.float32
        for name in ("mean", "std"):
            values = [255 * one for one in getattr(interface, name)]
            self.register_buffer(f"pixel_{name}", torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> embeddings (B, D) in fp32."""
        if self.raw:
            images = (images.to(torch.float32) - self.pixel_mean) / self.pixel_std
        embeddings: Tensor = self.network(images.to(self.compute_type))
        return embeddings.to(torch.float32)


def prepared(network: nn.Module, interface: Interface) -> Embedder:
    """Return a copy of `network` for export: projections folded, and with `half` all but the attention blocks in fp16.

    In fp16 alone, the inverse and the softmaxes of a block lose three digits.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    blocks = [module for module in network.modules() if isinstance(module, AttentionBlock)]
    for block in blocks:
        block.fold()
    if interface.half:
        network.half()
        for block in blocks:
            block.float()
            block.register_forward_pre_hook(lambda _, inputs: tuple(one.float() for one in inputs))
            block.register_forward_hook(lambda _, __, output: output.half())
    return Embedder(network, interface).eval()


# Images and comparison


def example_images(interface: Interface, count: int, seed: int = 0) -> Tensor:
    """Return `count` random images (count, 3, H, W) as the input of a file: coloured shapes with fine noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 12, 6, generator=generator) * 255
    size = (interface.height, interface.width)
    noise = torch.randn(count, 3, *size, generator=generator) * 20
    images = (F.interpolate(coarse, size, mode="bilinear") + noise).clamp(0, 255).round()
    if interface.pixels == "0-255":
        return images.to(torch.uint8)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (interface.mean, interface.std))
    return (images / 255 - mean) / std


@dataclass(frozen=True)
class Difference:
    """The difference of embeddings from those of the network.

    Attributes:
        largest: the largest absolute difference; relative to the largest entry if that is above 1.
        cosine: the smallest cosine similarity of the two embeddings of an image.
    """

    largest: float
    cosine: float

    def __str__(self) -> str:
        return f"largest difference {self.largest:.1e}, smallest cosine {self.cosine:.7f}"


def difference(embeddings: Tensor, expected: Tensor) -> Difference:
    """Compare embeddings (B, D) with those expected; anything not finite is an infinite difference."""
    one, other = embeddings.double(), expected.double()
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return Difference(float("inf"), -1.0)
    scale = max(1.0, other.abs().max().item())
    return Difference((one - other).abs().max().item() / scale, F.cosine_similarity(one, other).min().item())


# Formats

Run = Callable[[Tensor], Tensor]


class Exporter:
    """Writes a network in several formats, and shares the captured program among them.

    Args:
        embedder: the network, see `prepared`.
        interface: its interface.
        embedding: width of the output.
        opset: ONNX opset.
        simplify: simplify the ONNX graph with onnxslim.
    """

    def __init__(self, embedder: Embedder, interface: Interface, embedding: int, opset: int, simplify: bool) -> None:
        self.embedder, self.interface, self.embedding = embedder, interface, embedding
        self.opset, self.simplify = opset, simplify
        self.metadata = interface.metadata(embedding)
        # torch.export treats a batch of 1 as a constant.
        self.example = example_images(interface, interface.batch or 2)

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The program of torch.export."""
        shapes = None if self.interface.batch else {"images": {0: torch.export.Dim("batch", min=1)}}
        return torch.export.export(self.embedder, (self.example,), dynamic_shapes=shapes)

    @cached_property
    def onnx_model(self) -> Any:
        """The ONNX model, with metadata."""
        import onnx

        model = self._dynamo_model() if self.opset >= SMALLEST_DYNAMO_OPSET else self._torchscript_model()
        kept = next(one.version for one in model.opset_import if not one.domain)
        if kept != self.opset:
            raise UserError(f"it cannot be expressed in opset {self.opset}, only in opset {kept}")
        if self.simplify:
            import onnxslim

            model = onnxslim.slim(model)
        # The exporters give the sizes names such as s34.
        del model.graph.value_info[:]
        for one in (model.graph.input[0], model.graph.output[0]):
            dims = one.type.tensor_type.shape.dim
            if not self.interface.batch:
                dims[0].dim_param = "batch"
        dims[1].dim_value = self.embedding
        onnx.helper.set_model_props(model, self.metadata)
        onnx.checker.check_model(model)
        return model

    def _dynamo_model(self) -> Any:
        import onnxscript  # noqa: F401  # the exporter imports it late
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass

        options: dict[str, Any] = {"opset_version": self.opset, "input_names": ["images"], "output_names": ["output"]}
        try:
            program = torch.onnx.export(self.program, dynamo=True, verbose=False, **options)
        except Exception:  # an optimiser that fails, for example when two values have one name
            program = torch.onnx.export(self.program, dynamo=True, verbose=False, optimize=False, **options)
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # it holds paths of this machine
        return program.model_proto

    def _torchscript_model(self) -> Any:
        import onnx

        dynamic = {} if self.interface.batch else {"images": {0: "batch"}, "output": {0: "batch"}}
        with tempfile.TemporaryDirectory() as folder, _older_symbolics(self.opset), torch.no_grad():
            path = str(Path(folder) / "model.onnx")
            torch.onnx.export(
                self.embedder,
                (self.example,),
                path,
                dynamo=False,
                opset_version=self.opset,
                input_names=["images"],
                output_names=["output"],
                dynamic_axes=dynamic,
            )
            return onnx.load(path)

    def write_onnx(self, path: Path) -> Run:
        """Write an ONNX file; return a function that runs it in onnxruntime."""
        import onnx
        import onnxruntime

        onnx.save(self.onnx_model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["output"], {"images": images.numpy()})[0])

    def write_openvino(self, path: Path) -> Run:
        """Write OpenVINO's .xml and .bin files; return a function that runs them in OpenVINO."""
        import openvino

        core = openvino.Core()
        # Not openvino.convert_model, which reports its use over the network.
        model = core.read_model(self.onnx_model.SerializeToString())
        for name, value in self.metadata.items():
            model.set_rt_info(value, ["model_info", name])
        # OpenVINO would store the weights in fp16 by default.
        openvino.save_model(model, path, compress_to_fp16=False)
        # Newer CPUs would compute in bf16 by default.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = core.compile_model(path, "CPU", settings)
        return lambda images: torch.from_numpy(compiled({"images": images.numpy()})["output"].copy())

    def write_torchscript(self, path: Path) -> Run:
        """Write a TorchScript file; return a function that runs it in torch."""
        with torch.no_grad():
            traced = torch.jit.trace(self.embedder, (self.example,), check_trace=False)  # type: ignore[no-untyped-call]
        checked = torch.jit.script(_CheckedInput(traced, self.interface).eval())
        torch.jit.save(checked, path, _extra_files={METADATA: json.dumps(self.metadata)})  # type: ignore[no-untyped-call]
        loaded = torch.jit.load(path)  # type: ignore[no-untyped-call]
        return lambda images: loaded(images).detach()

    def write_pt2(self, path: Path) -> Run:
        """Write a program of torch.export; return a function that runs it in torch."""
        torch.export.save(self.program, path, extra_files={METADATA: json.dumps(self.metadata)})
        loaded = torch.export.load(path).module()
        return lambda images: loaded(images).detach()


class _CheckedInput(nn.Module):
    """A traced network that refuses images of another size or type, as the other formats do by themselves."""

    def __init__(self, traced: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.traced, self.raw = traced, interface.pixels == "0-255"
        self.height, self.width, self.batch = interface.height, interface.width, interface.batch or 0
        self.message = f"the input must be {interface.input_in_words()}"

    def forward(self, images: Tensor) -> Tensor:
        kind = torch.uint8 if self.raw else torch.float32
        if images.dim() != 4 or images.dtype != kind:
            raise ValueError(self.message)
        if images.size(1) != 3 or images.size(2) != self.height or images.size(3) != self.width:
            raise ValueError(self.message)
        if self.batch > 0 and images.size(0) != self.batch:
            raise ValueError(self.message)
        out: Tensor = self.traced(images)
        return out


@contextmanager
def _older_symbolics(opset: int) -> Iterator[None]:
    """Translate operations that torch's exporter for opsets below 18 lacks: ``.mT`` and, below 13, ``unflatten``."""
    exporter: Any = torch.onnx
    helper: Any = importlib.import_module("torch.onnx.symbolic_helper")

    def transpose(g: Any, x: Any) -> Any:
        axes = list(range(helper._get_tensor_rank(x) or 0))
        axes[-2:] = axes[:-3:-1]
        return g.op("Transpose", x, perm_i=axes)

    def unflatten(g: Any, x: Any, dim: Any, sizes: Any) -> Any:
        axis, rank = helper._get_const(dim, "i", "dim"), helper._get_tensor_rank(x)
        axis %= rank
        inner = g.op("Constant", value_t=torch.tensor(helper._get_const(sizes, "is", "sizes")))
        shape = g.op("Shape", x)
        before = helper._slice_helper(g, shape, axes=[0], starts=[0], ends=[axis])
        after = helper._slice_helper(g, shape, axes=[0], starts=[axis + 1], ends=[rank])
        return g.op("Reshape", x, g.op("Concat", before, inner, after, axis_i=0))

    added = [("aten::mT", transpose)] + ([("aten::unflatten", unflatten)] if opset < 13 else [])
    for name, symbolic in added:
        exporter.register_custom_op_symbolic(name, symbolic, opset)
    try:
        yield
    finally:
        for name, _ in added:
            exporter.unregister_custom_op_symbolic(name, opset)


@dataclass(frozen=True)
class Format:
    """A file format: its suffix, the method that writes it, its runtime, and the packages that it needs."""

    suffix: str
    write: Callable[[Exporter, Path], Run]
    runtime: str
    packages: tuple[str, ...] = ()


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "onnx": Format(".onnx", Exporter.write_onnx, "onnxruntime", (*_ONNX, "onnxruntime")),
    "openvino": Format(".xml", Exporter.write_openvino, "openvino", (*_ONNX, "openvino")),
    "torchscript": Format(".torchscript", Exporter.write_torchscript, "torch"),
    "pt2": Format(".pt2", Exporter.write_pt2, "torch"),
}


# Export


def import_packages(formats: Sequence[str], simplify: bool = False) -> None:
    """Import the packages that formats need, before any work is done.

    Raises:
        ModuleNotFoundError: one is not installed.
    """
    for package in [one for name in formats for one in FORMATS[name].packages] + ["onnxslim"] * simplify:
        importlib.import_module(package)


def export(
    network: nn.Module,
    interface: Interface,
    output: Path,
    formats: Sequence[str] = ("onnx",),
    *,
    opset: int = DEFAULT_OPSET,
    simplify: bool = False,
) -> dict[str, Any]:
    """Export a network, compare each written file with it, and write the comparison to ``OUTPUT.json``.

    All files appear at the end together, or none.

    Args:
        network: takes normalised images (B, 3, height, width) in eval mode and returns embeddings (B, D).
        interface: the interface of the files.
        output: the file; each format has its own suffix in place of that of another format.
        formats: names from `FORMATS`.
        opset: ONNX opset, also of the ONNX model that OpenVINO converts.
        simplify: simplify the ONNX model with onnxslim.

    Returns:
        The content of ``OUTPUT.json``: the metadata, and for each format its file, size, runtime, largest difference
        and smallest cosine, in all and for each batch.

    Raises:
        UserError: the network cannot be expressed in a format, a file differs from the network by more than
            ``interface.limit``, or the files cannot be written.
        ModuleNotFoundError: a package of a format is not installed.
    """
    import_packages(formats, simplify)
    network.eval()
    stem = output.with_suffix("") if output.suffix in {one.suffix for one in FORMATS.values()} else output
    paths = {name: stem.with_name(stem.name + FORMATS[name].suffix) for name in formats}
    report = output.with_name(f"{output.name}.json")
    for path in (output, *paths.values(), report):
        if path.is_dir():
            raise UserError(f"--output {str(output)!r}: {str(path)!r} is a folder; give the path of a file.")
    batches = sorted({interface.batch}) if interface.batch else list(PROVED_BATCHES)
    images = example_images(interface, max(batches), seed=1)
    expected = _embeddings(Embedder(network, replace(interface, half=False)), images, interface)
    embedder = prepared(network, interface)
    result: dict[str, Any] = {"limit": interface.limit, "files": {}}
    if interface.half:  # onnxruntime and OpenVINO may compute in fp32 on a CPU
        lost = difference(_embeddings(embedder, images, interface), expected)
        _check(lost, interface, "the network in fp16")
        result["fp16_in_torch"] = _as_numbers(lost)
    exporter = Exporter(embedder, interface, expected.shape[1], opset, simplify)
    with _staged(output) as folder:
        for name in formats:
            kind = FORMATS[name]
            path = folder / paths[name].name
            with _in_one_line(f"{interface.model} cannot be exported to {name}"):
                run = kind.write(exporter, path)
            proved = {}
            for batch in batches:
                with _in_one_line(f"the {name} file of {interface.model} fails with a batch of {batch}"):
                    proved[batch] = difference(run(images[:batch]), expected[:batch])
            worst = Difference(max(one.largest for one in proved.values()), min(one.cosine for one in proved.values()))
            _check(worst, interface, f"the {name} file")
            files = folder.glob(f"{stem.name}.bin") if name == "openvino" else ()
            result["files"][name] = {
                "path": str(paths[name]),
                "bytes": sum(file.stat().st_size for file in (path, *files)),
                "runtime": f"{kind.runtime} {_version(kind.runtime)}",
                **_as_numbers(worst),
                "batches": {str(batch): _as_numbers(one) for batch, one in proved.items()},
            }
        result = {**exporter.metadata, **result}
        if {"onnx", "openvino"} & set(formats):
            result["opset"] = opset
        write_json(folder / report.name, result)
    return result


@torch.no_grad()
def _embeddings(embedder: Embedder, images: Tensor, interface: Interface) -> Tensor:
    kind = f"{interface.model}{' in fp16' if interface.half else ''}"
    try:
        embeddings: Tensor = embedder.eval()(images)
    except Exception as error:  # a network raises errors of any type for a size that it does not take
        raise UserError(
            f"{kind} cannot take images of {interface.height}x{interface.width} ({first_line(error)}): give the size "
            "that it was trained with as --imgsz."
        ) from error
    if not bool(embeddings.isfinite().all()):
        raise UserError(f"the embeddings of {kind} are not finite: take an earlier checkpoint.")
    return embeddings


def _check(found: Difference, interface: Interface, subject: str) -> None:
    if not found.largest <= interface.limit:
        raise UserError(
            f"{subject} differs from the network {interface.model} by {found.largest:.1e}, above the limit of "
            f"{interface.limit:.0e} (smallest cosine {found.cosine:.7f}): no file is written; give another --opset or "
            "--include, or leave out --simplify and --half."
        )


def _version(package: str) -> str:
    version: str = importlib.import_module(package).__version__
    return version.split("-")[0]


def _as_numbers(found: Difference) -> dict[str, float]:
    return {"largest_difference": found.largest, "smallest_cosine": found.cosine}


@contextmanager
def _in_one_line(failure: str) -> Iterator[None]:
    """Silence an exporter or runtime, and turn its errors into a UserError that starts with `failure`."""
    try:
        with warnings.catch_warnings(), _silenced():
            warnings.simplefilter("ignore")
            yield
    except (ModuleNotFoundError, BrokenPipeError):
        raise
    except Exception as error:  # exporters and runtimes raise errors of any type
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        lines = str(reason).strip().splitlines()
        # TorchScript prints its own stack trace first.
        line = lines[-1] if lines and "TorchScript interpreter" in lines[0] else first_line(reason)
        raise UserError(
            f"{failure} ({' '.join(line.split())}): no file is written; give another --opset from {OPSETS[0]} to "
            f"{OPSETS[1]}, or another --include."
        ) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard logs, and all output of this process, also that of libraries in C++, which print whole graphs."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    copies = [os.dup(number) for number in (1, 2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(sink, number)
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, kept in zip((1, 2), copies, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        os.close(sink)
        logging.disable(disabled)


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Yield a new folder beside `output`, whose files move there if the with statement ends without an error.

    Raises:
        UserError: the folder of `output` cannot be written.
    """
    made: list[Path] = []
    staging = None
    try:
        try:
            made = [one for one in (output.parent, *output.parent.parents) if not one.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        except OSError as error:
            raise UserError(
                f"--output {str(output)!r} cannot be written ({error.strerror}): give a path in another folder."
            ) from error
        yield staging
        for file in sorted(staging.iterdir()):
            os.replace(file, output.with_name(file.name))
        made = []
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
