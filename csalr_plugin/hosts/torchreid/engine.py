"""The host's engines with the plugin's training: Eq. 18, exact resuming, a checkpoint per epoch."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torchreid
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from csalr_plugin.errors import SharedError, UserError, first_line
from csalr_plugin.files import check_space, complete_file, write_json
from csalr_plugin.hosts import distributed
from csalr_plugin.hosts.config import recordable
from csalr_plugin.hosts.folder import file_stem
from csalr_plugin.hosts.ranked import draw_ranked
from csalr_plugin.hosts.records import (
    METRICS,
    Checkpoints,
    about_checkpoint,
    copy_file,
    mean_precision,
    never_fatal,
    phase_line,
    read_metrics,
)
from csalr_plugin.hosts.report import REPORT, write_report
from csalr_plugin.hosts.torchreid.config import active_config, training_keys
from csalr_plugin.hosts.torchreid.loading import (
    check_batches,
    check_tracklets,
    draw_from,
    evaluation_loader,
    training_loader,
)
from csalr_plugin.hosts.torchreid.monitor import Monitor, Writer
from csalr_plugin.hosts.torchreid.optimizer import check_layers
from csalr_plugin.hosts.torchreid.ranking import evaluate_rank
from csalr_plugin.hosts.training import (
    MACHINE_FAILURES,
    keep_freed_memory,
    machine_failure,
    single_image_batch,
    unwrapped,
)
from csalr_plugin.models import RefinedPCB, recipe

BEST = "model-best.pth.tar"
"""Name of the checkpoint with the best mAP, which is also the host's name."""

PROGRESS = ("batches_done", "images", "scaler")
"""Entries of an optimizer's parameter groups that describe how far an epoch is; the host's resuming keeps them."""


@cache
def plugin_engine(host_engine: type) -> type:
    """Return the host's engine class with this plugin's training, e.g. of ``torchreid.engine.ImageSoftmaxEngine``.

    The signature is the host's. Models of the host keep its loss, and gain exact resuming, a checkpoint per epoch,
    and evaluation results as a file.
    """
    return type(f"Plugin{host_engine.__name__}", (_PluginTraining, host_engine), {})


_HostEngine: Any = object  # `plugin_engine` puts the host's engine in its place


class _StopBetweenBatches(KeyboardInterrupt):
    """Ctrl-C after the batch during which it came: weights and optimizer state are consistent."""


class _PluginTraining(_HostEngine):
    """Methods that :func:`plugin_engine` adds to a host's engine. Settings come from the active config."""

    model: Any
    train_loader: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = active_config()
        self.settings = config.csalr
        self.recorded = recordable({key: config.lookup(key) for key in training_keys(config)})
        self.resumed_from: str = config.model.resume
        self.seed: int = config.train.seed
        self.settings_of_run = config
        self.normalisation = (config.data.norm_mean, config.data.norm_std)
        self.network = unwrapped(self.model)
        self.blocks = recipe.attention_blocks(self.network)
        self.device = next(self.model.parameters()).device
        self.train_loader = training_loader(self.train_loader, self.seed)
        if self.settings.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if isinstance(self.model, nn.DataParallel) and len(self.model.device_ids) > 1:
            keep_autocast_in_threads(self.network, self._autocast())
        if self.settings.compile:
            self.network.compile()  # in place: weights keep their names, hooks and other methods work as before
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.amp == "fp16")
        self.warm_up = recipe.WarmUp(self.optimizer, self.settings.warmup, self.settings.warmup_all)
        self.save_dir = Path(config.data.save_dir)
        self.results: dict[str, dict[str, float]] = {}
        self.monitor = Monitor(self)
        self.tested: dict[str, Any] = {}  # the checkpoint that a run without training evaluates
        self._print_freq = 20
        self._trains = False  # inside a training
        self._kept = Checkpoints(self.settings.keep)
        self._best = -1.0  # the best mAP so far
        self._stopped_at = 0.0  # the time at which this process was asked to stop
        self._stops = False  # all processes stop after this batch
        self._batches_done = 0  # batches of this epoch that were trained before the checkpoint that was resumed
        self._completed = 0  # batches of this epoch whose gradients are in the weights
        self._stepping = False  # weights are being changed
        self._buffers_before: dict[str, Tensor] = {}  # buffers before the first batch of an incomplete step

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Train on one batch of the host's loop; return the numbers for TensorBoard."""
        if self.batch_idx < self._batches_done:  # trained before the checkpoint that was resumed
            summary = {}
        else:
            draw_from(self.seed, self.epoch, self.batch_idx, "model")
            summary = self.iteration(data, self.epoch * self.num_batches + self.batch_idx)
            self._print_batch(summary)
        if self._stops:
            raise _StopBetweenBatches
        return summary

    def _print_batch(self, summary: dict[str, float]) -> None:
        """Print a line every `train.print_freq` batches; on a terminal, which has a progress bar, log it alone."""
        number = self.batch_idx + 1
        tell = getattr(sys.stdout, "to_file", None) if sys.stderr.isatty() else print
        if tell is not None and distributed.is_main() and number % self._print_freq == 0 and number < self.num_batches:
            tell(
                f"epoch {self.epoch + 1}/{self.max_epoch}, batch {number}/{self.num_batches}: "
                f"loss {summary['loss']:.4g}, accuracy {summary['acc']:.1f} %, lr {self.get_current_lr():.3g}"
            )

    def iteration(self, data: dict[str, Any], number: int) -> dict[str, float]:
        """Train on one batch of the host's loader.

        Args:
            data: the batch.
            number: the iteration, counted from 0 over the whole training. It sets the warm-up, and which batches
                form one optimizer step (`csalr.accumulate`).

        Returns:
            "loss", each term of Eq. 18, each block's "alpha", and "acc", the accuracy of the parts' vote in per
            cent; with fp16 also "loss_scale".

        Raises:
            UserError: a term or a gradient is not finite; the weights are those before the batch. With fp16,
                gradients may overflow as long as a smaller loss scale can help: that step is left out.
        """
        images, identities = self.parse_data_for_train(data)
        images, identities = self._on_device(images), identities.to(self.device, non_blocking=True)
        step, batches = self._step_of(number)
        batch = number % len(self.train_loader)
        if batch == batches[0]:
            self.optimizer.zero_grad()
            if len(batches) > 1 or distributed.world_size() > 1 or self.train_loader.num_workers:
                self._buffers_before = {name: value.clone() for name, value in self.network.named_buffers()}
        complete = batch == batches[-1]
        with self._exchanged(complete):
            with self._forward():
                outputs = self.model(images)
            logits, features = outputs if hasattr(self, "criterion_t") else (outputs, ())
            logits, features = ([one.float() for one in _as_list(given)] for given in (logits, features))
            terms, loss = self.loss_terms(logits, features, identities)
            self.scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        vote = recipe.vote(self.network, logits)
        watched = {"loss": loss, **terms, "acc": torchreid.metrics.accuracy(vote, identities)[0]}
        if complete:
            self.scaler.unscale_(self.optimizer)
            watched["gradient norm"] = recipe.clip_gradients(self.network, self.settings.clip_gradient)
        watched["stops"] = float(self._stopped)
        values = distributed.means(watched)
        self._stops = values["stops"] > 0  # so all processes stop after the same batch
        summary = {name: values[name] for name in ("loss", *terms)}
        self._require_finite(summary, images, number)
        if complete:
            norm = values["gradient norm"]
            # The scaler skips a step that overflowed and halves the scale, which no longer helps at a scale of 1.
            if math.isfinite(norm) or not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
                self._require_finite({"gradient norm": norm}, images, number)
            self._stepping = True
            with self.warm_up.at(step):
                self.scaler.step(self.optimizer)
            self._completed = batch + 1
            self._stepping = False
            self.scaler.update()
            self._buffers_before = {}
        summary |= distributed.numbers({f"alpha_{name}": block.alpha for name, block in self.blocks.items()})
        if self.scaler.is_enabled():
            summary["loss_scale"] = self.scaler.get_scale()
        summary["acc"] = values["acc"]
        self.monitor.count(summary, logits, identities)
        return summary

    def _exchanged(self, complete: bool) -> contextlib.AbstractContextManager[None]:
        """Exchange gradients between processes once per step, not once per batch."""
        if complete or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self.model.no_sync()
        return context

    def _step_of(self, number: int) -> tuple[int, range]:
        """Return the optimizer step of iteration `number`, and the batches of that step within the epoch.

        Steps are counted from 0 over the whole training. The last step of an epoch may have fewer batches.
        """
        per_epoch, size = len(self.train_loader), self.settings.accumulate
        epoch, batch = divmod(number, per_epoch)
        first = batch - batch % size
        return epoch * math.ceil(per_epoch / size) + batch // size, range(first, min(first + size, per_epoch))

    def _on_device(self, images: Tensor) -> Tensor:
        # The host evaluates videos as five-dimensional tensors, for which channels_last does not exist.
        last = self.settings.channels_last and images.dim() == 4
        layout = torch.channels_last if last else torch.preserve_format
        return images.to(self.device, non_blocking=True, memory_format=layout)

    def _autocast(self) -> torch.autocast:
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.amp]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """Run the network under autocast; raise a UserError if it cannot be compiled or the batch is too small."""
        try:
            with self._autocast():
                yield
        except ValueError as error:
            if not single_image_batch(error):
                raise
            raise UserError(
                "config key 'train.batch_size' is too small: batch norm cannot normalise a training batch of one image "
                "on a map of 1x1; use larger batches or larger images (data.height, data.width)."
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:  # imported here only
            cause = getattr(error, "inner_exception", error)
            raise UserError(
                f"csalr.compile True: the network cannot be compiled here ({first_line(cause)}); torch.compile needs a "
                "C++ compiler such as g++, and Triton on a GPU. Install them, or set csalr.compile False."
            ) from error

    def loss_terms(
        self, logits: Sequence[Tensor], features: Sequence[Tensor], identities: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms of Eq. 18 by name, and their sum L = L_F + lambda * sum_i L_DS_i.

        See :func:`recipe.loss_terms`. With the host's triplet loss, L_F is `weight_x` times the identity loss plus
        `weight_t` times the mean triplet loss of the embeddings.

        Args:
            logits: (B, num_classes) of each classifier.
            features: (B, width) of each embedding for the triplet loss; none for the softmax loss.
            identities: (B,).
        """
        criterion = self.criterion_x if features else self.criterion
        losses = recipe.loss_terms(
            self.network, logits, lambda one: criterion(one, identities), self.settings.supervision_weight
        )
        triplet = {}
        if features:
            everyone = [distributed.embeddings_of_all(one, identities) for one in features]
            triplet["triplet"] = sum(self.criterion_t(*one) for one in everyone) / len(features)
            losses = losses.with_triplet(triplet["triplet"], self.weight_x, self.weight_t)
        branches = {f"L_DS_{name}": branch for name, branch in losses.branches.items()}
        return {"L_F": losses.main, **triplet, **branches}, losses.total()

    def _require_finite(self, terms: dict[str, float], images: Tensor, number: int) -> None:
        bad = [f"{name} = {term}" for name, term in terms.items() if not math.isfinite(term)]
        if bad:
            change = "csalr.amp bf16, or " if self.scaler.is_enabled() else ""
            change += "a lower train.lr, csalr.attention_lr or csalr.clip_gradient"
            raise SharedError(
                f"Training stopped at epoch {self.epoch + 1}, iteration {number + 1}: {', '.join(bad)}; "
                f"{self._first_non_finite(images)}. {self._last_checkpoint(change=change)}."
            )

    @torch.no_grad()
    def _first_non_finite(self, images: Tensor) -> str:
        """Name the first layer whose output is not finite on the batch `images`."""
        found: list[str] = []

        def watch(name: str, layer: nn.Module) -> Any:
            # The input of a supervision branch is its block's attention output, pooled.
            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                seen = inputs[0] if name.startswith("block") else output
                if isinstance(seen, Tensor) and not torch.isfinite(seen).all():
                    found.append(name)

            return layer.register_forward_hook(hook)

        layers = dict(self.network.named_children())
        branches = getattr(self.network, "supervision", {})
        layers |= {f"block {name} (attention)": branch for name, branch in branches.items()}
        handles = [watch(name, layer) for name, layer in layers.items()]
        try:
            with self._autocast():
                self.network.forward(images)  # not the compiled network, which would not call these hooks
        finally:
            for handle in handles:
                handle.remove()
        if found := [layer for layers in distributed.gathered(found) for layer in layers]:
            return f"the first output that is not finite is that of {found[0]}"
        weights = [name for name, value in self.network.named_parameters() if not torch.isfinite(value).all()]
        return f"the output of every layer is finite{f', weights that are not: {weights[0]}' if weights else ''}"

    def run(self, save_dir: str = "log", **options: Any) -> None:
        """Run the host's `run`; Ctrl-C leaves a checkpoint that can be resumed, also in the middle of an epoch."""
        self.save_dir = Path(save_dir)
        done = options.get("start_epoch", 0)
        self.epoch = max(0, done - 1)  # a finished training that is only evaluated is at its last epoch
        self._trains = trains = not options.get("test_only", False)
        if not trains:
            config = self.settings_of_run
            self.tested = about_checkpoint(config.model.load_weights or config.model.resume)
            self.epoch = (self.tested["epoch"] or 1) - 1
        self._print_freq = options.get("print_freq", 10)
        with distributed.together():
            if trains:
                self.save_dir.mkdir(parents=True, exist_ok=True)
                check_space(self.save_dir, _size_of(self.network.state_dict().values()), "a checkpoint")
                check_batches(self.train_loader)
                check_tracklets(self.train_loader, "train.batch_size")
                if options.get("fixbase_epoch"):
                    check_layers(self.network, options["open_layers"], "train.open_layers")
            for loaders in self.test_loader.values():
                for loader in loaders.values():
                    check_tracklets(loader, "test.batch_size")
        if trains:
            self.monitor.begin(done)
            self._best = mean_precision(read_metrics(self.save_dir / METRICS)[1])
        if trains and done >= options.get("max_epoch", 0):
            print(f"All {done} epochs are done: the model is only evaluated. train.max_epoch trains further.")
        if not distributed.is_main():
            self.writer = Writer(None)
        elif trains and self.writer is None:
            self.writer = Writer(self.save_dir)
        if not self.use_gpu:
            keep_freed_memory()
        try:
            super().run(save_dir=save_dir, **options)
            if trains and distributed.is_main():
                self._write_report()
        except MACHINE_FAILURES as error:
            if distributed.is_lost(error):
                raise self._lost(error) from error
            if cause := machine_failure(error):
                raise UserError(f"Stopped after epoch {self.epoch + 1}: {cause}. {self._last_checkpoint()}.") from error
            raise

    def _write_report(self) -> None:
        config = self.settings_of_run
        with never_fatal(f"the report {REPORT}"):
            files = sorted((self.save_dir / "model").glob("model*"), key=lambda path: path.stat().st_mtime)
            path = write_report(
                self.save_dir,
                host=f"torchreid {torchreid.__version__}",
                model=f"{config.model.name} on {', '.join(config.data.sources)}",
                settings=config.leaves(),
                defaults=config.defaults,
                checkpoints=[file.name for file in files],
            )
            print(f'Report of the training: "{path}"')

    def train(self, *args: Any, **options: Any) -> None:
        """Train one epoch, then save a checkpoint.

        Random numbers depend on (seed, epoch, batch) alone, so that a resumed run equals a run without a stop.
        """
        self._resume_epoch()
        draw_from(self.seed, self.epoch, 0, "epoch")
        self.train_loader.sampler.epoch = self.epoch
        self.monitor.start_epoch(self._batches_done)
        options["print_freq"] = sys.maxsize  # the host's lines have up to 300 characters
        with self._stop_between_batches():
            try:
                super().train(*args, **options)
            except (_StopBetweenBatches, BrokenPipeError, *MACHINE_FAILURES) as error:
                if distributed.is_lost(error):
                    raise self._lost(error, self._save_interrupted(alone=True)) from error
                # On Ctrl-C a worker of the loader may die first: the host's loop then raises a RuntimeError.
                if self._stopped or self._stops:
                    self._save_interrupted()
                    raise KeyboardInterrupt from error
                cause = machine_failure(error)
                if not cause and not isinstance(error, BrokenPipeError):
                    raise
                consistent = not self._stepping and distributed.world_size() == 1
                saved = self._save_interrupted() if consistent else None
                if not cause:  # nobody reads the output any more, as in csalr train | head
                    raise
                raise UserError(
                    f"Training stopped at epoch {self.epoch + 1}: {cause}. {self._last_checkpoint(saved)}."
                ) from error
            finally:
                self.monitor.close_epoch()
        self._mark_progress(0)
        with distributed.together():  # an error of the first process ends all of them
            if distributed.is_main():
                self._kept.add(self._save(self._name(), self.epoch + 1))
        self.monitor.end_epoch()
        if any(distributed.gathered(self._stopped)):
            raise KeyboardInterrupt

    def _resume_epoch(self) -> None:
        """Read from the optimizer how many batches of this epoch were trained before the checkpoint."""
        resumed = self.optimizer.param_groups[0]
        done, images = resumed.get("batches_done", 0), resumed.get("images")
        if done and images not in (None, len(self.train_loader.dataset)):
            print(
                f"The checkpoint was saved within an epoch of {images} images, and there are "
                f"{len(self.train_loader.dataset)} now: epoch {self.epoch + 1} begins again."
            )
            done = 0
        self._batches_done = self._completed = done
        if self.scaler.is_enabled() and resumed.get("scaler"):
            self.scaler.load_state_dict(resumed["scaler"])

    def _lost(self, error: BaseException, saved: Path | None = None) -> UserError:
        # The first process prints it, or the second one if it was the first that ended.
        return (UserError if distributed.rank() < 2 else SharedError)(
            f"Training stopped at epoch {self.epoch + 1}, for another process of it has ended or cannot be reached "
            f"({first_line(error)}). {self._last_checkpoint(saved)}, with any number of processes."
        )

    def two_stepped_transfer_learning(
        self, epoch: int, fixbase_epoch: int, open_layers: Any, model: nn.Module | None = None
    ) -> None:
        """Open and freeze layers as the host does, and in the phases of a model with refined parts (section 4.2)."""
        rpp = self.settings.rpp
        phase = recipe.begin_epoch(
            self.network, epoch, pcb_epochs=rpp.pcb_epochs, part_classifier_epochs=rpp.part_classifier_epochs
        )
        if isinstance(self.network, RefinedPCB) and distributed.is_main():
            begins = epoch == self.start_epoch
            if line := phase_line(epoch, self.max_epoch, rpp.pcb_epochs, rpp.part_classifier_epochs, begins):
                print(line)
        if phase is recipe.Phase.PART_CLASSIFIER:
            fixbase_epoch, open_layers = epoch + 1, ["part_classifier"]
        super().two_stepped_transfer_learning(epoch, fixbase_epoch, open_layers, model or self.network)

    @property
    def _stopped(self) -> bool:
        return self._stopped_at > 0

    @contextlib.contextmanager
    def _stop_between_batches(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM wait for the end of the batch; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._stopped:
                if now - self._stopped_at < 2:  # torchrun passes on the Ctrl-C that the terminal has already sent
                    return
                raise KeyboardInterrupt
            self._stopped_at = now
            print("Stopping after this batch; once more stops at once, without a checkpoint.", flush=True)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        """Save an evaluated epoch's checkpoint as the host does, and a copy of it if its mAP is the best so far.

        A file is complete or absent. With several targets the mean of their mAP counts.
        """
        with distributed.together():
            if distributed.is_main():
                precision = sum(result["mAP"] for result in self.results.values()) / max(1, len(self.results))
                path = self._save(self._name(), epoch + 1, float(rank1))
                print(f'Checkpoint saved to "{path}"')
                self._kept.add(path)
                if precision > self._best:
                    self._best = precision
                    with never_fatal(f"the best checkpoint {BEST}"):
                        copy_file(path, path.with_name(BEST))
                        print(f'Best mAP so far, {precision:.1%}: "{path.with_name(BEST)}"')

    def _save_interrupted(self, alone: bool = False) -> Path:
        """Save the epoch so far, without the incomplete step.

        Args:
            alone: the other processes may have ended, the first one too; then the second saves, as weights are equal.
        """
        done = max(self._batches_done, self._completed)
        for name, value in self.network.named_buffers():
            if name in self._buffers_before:  # the batches of an incomplete step will be trained again
                value.copy_(self._buffers_before[name])
        self._mark_progress(done)
        path = self.save_dir / "model" / f"model.pth.tar-{self.epoch}-batch{done}"
        if alone and distributed.rank() == 1:
            time.sleep(5)
        if distributed.is_main() or (alone and distributed.rank() == 1 and not path.exists()):
            self._save(path.name, self.epoch)
            print(f'Checkpoint saved to "{path}"\nGo on with: model.resume {path}')
        return path

    def _name(self) -> str:
        """Return the name of the checkpoint of the current epoch."""
        return f"model.pth.tar-{self.epoch + 1}"

    def _mark_progress(self, batches_done: int) -> None:
        """Write `PROGRESS` into the optimizer's groups, which the host's own resuming carries over."""
        for group in self.optimizer.param_groups:
            group["batches_done"] = batches_done
            group["images"] = len(self.train_loader.dataset)
            group["scaler"] = self.scaler.state_dict()  # empty without fp16

    def _save(self, name: str, epoch: int, rank1: float | None = None) -> Path:
        path = self.save_dir / "model" / name
        state = {
            "state_dict": self.network.state_dict(),
            "epoch": epoch,
            "optimizer": self.optimizer.state_dict(),
            "settings": self.recorded,
        }
        if rank1 is not None:
            state["rank1"] = rank1
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        values = (value for one in state["optimizer"]["state"].values() for value in one.values())
        size = _size_of([*state["state_dict"].values(), *values])
        with complete_file(path, size, f"{self._last_checkpoint()}.") as unfinished, unfinished.open("wb") as file:
            torch.save(state, file)
        return path

    def _last_checkpoint(self, saved: Path | None = None, change: str = "") -> str:
        """Describe the last complete checkpoint, and how to go on from it, for a message.

        Args:
            saved: the last checkpoint, if it is known.
            change: settings to change, in words.
        """
        files = sorted((self.save_dir / "model").glob("model.pth.tar-*"), key=lambda path: path.stat().st_mtime)
        path = str(saved or (files[-1] if files else self.resumed_from))
        if not path:
            return f"No checkpoint is saved yet; start anew{' with ' if change else ''}{change}"
        return f"The last checkpoint is {path!r}; go on from it with model.resume{' and ' if change else ''}{change}"

    @torch.inference_mode()
    def _evaluate(
        self,
        dataset_name: str = "",
        query_loader: Any = None,
        gallery_loader: Any = None,
        dist_metric: str = "euclidean",
        normalize_feature: bool = False,
        visrank: bool = False,
        visrank_topk: int = 10,
        save_dir: str = "",
        use_metric_cuhk03: bool = False,
        ranks: Sequence[int] = (1, 5, 10, 20),
        rerank: bool = False,
    ) -> tuple[float, float]:
        """Evaluate as the host does, with a progress bar, and write the results to a file too.

        Each process embeds its share of the images; the first process ranks them.
        """
        distributed.share_buffers(self.network)
        query, query_ids, query_cameras = self._embed(query_loader, "query", normalize_feature)
        gallery, gallery_ids, gallery_cameras = self._embed(gallery_loader, "gallery", normalize_feature)
        if not distributed.is_main():
            self.results[dataset_name], outcome = distributed.from_main(({}, (0.0, 0.0)))
            return outcome
        distance = torchreid.metrics.compute_distance_matrix
        distances = distance(query, gallery, dist_metric).numpy()
        if rerank:
            print("Applying person re-ranking ...")
            among_query = distance(query, query, dist_metric).numpy()
            among_gallery = distance(gallery, gallery, dist_metric).numpy()
            distances = torchreid.utils.re_ranking(distances, among_query, among_gallery)
        cmc, mean_ap = evaluate_rank(
            distances,
            query_ids,
            gallery_ids,
            query_cameras,
            gallery_cameras,
            use_metric_cuhk03=use_metric_cuhk03,
        )
        ranks = [rank for rank in ranks if rank <= len(cmc)]
        results = {"mAP": float(mean_ap), **{f"rank-{rank}": float(cmc[rank - 1]) for rank in ranks}}
        # In the host's form, which its tools/parse_test_res.py reads.
        print(f"** Results **\nmAP: {mean_ap:.1%}\nCMC curve")
        for rank in ranks:
            print(f"Rank-{rank:<3}: {cmc[rank - 1]:.1%}")
        self.results[dataset_name] = results
        folder = Path(save_dir or self.save_dir)
        path = folder / f"results_{file_stem(dataset_name)}.json"
        size = [self.datamanager.height, self.datamanager.width]
        trained = {"checkpoint": str(self.save_dir / "model" / self._name()), "epoch": self.epoch + 1}
        about = {
            **(self.tested or trained),
            "dataset": dataset_name,
            "image_size": size,
            "dist_metric": dist_metric,
            "rerank": rerank,
        }
        about |= {"normalize_feature": normalize_feature, "use_metric_cuhk03": use_metric_cuhk03}
        with never_fatal(f"the results file {str(path)!r}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**about, **results})
        if self._trains:
            self.monitor.evaluated(dataset_name, results)
        if self.settings.tensorboard.projector:
            self.monitor.show_embeddings(dataset_name, query, query_ids, query_cameras, self.epoch + 1)
        if visrank or (self._trains and self.epoch + 1 >= self.max_epoch):
            with never_fatal("the picture of ranked results"):
                subsets = self.datamanager.test_dataset[dataset_name]
                target = folder / f"ranked_{file_stem(dataset_name)}.png"
                draw_ranked(
                    target, distances, subsets["query"], subsets["gallery"], most=visrank_topk, title=dataset_name
                )
                print(f'Ranked results drawn to "{target}"')
        outcome = float(cmc[0]), float(mean_ap)
        return distributed.from_main((results, outcome))[1]

    def _embed(self, loader: Any, subset: str, normalise: bool) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Return embeddings (N, width), identities (N,) and cameras (N,) of a loader's images.

        The first process returns all embeddings, every other process its own.
        """
        loader, parallel = evaluation_loader(loader), self.model
        if isinstance(parallel, nn.parallel.DistributedDataParallel):
            self.model = self.network  # DDP's forward would wait for processes with fewer batches
        rows = len(loader.dataset if distributed.is_main() else loader.sampler)
        embeddings = torch.empty(0)
        identities: list[int] = []
        cameras: list[int] = []
        progress = {"desc": f"Embedding {subset}", "unit": "batch", "mininterval": 2.0}
        for batch in tqdm(loader, **progress, disable=not distributed.is_main()):
            images, batch_identities, batch_cameras = self.parse_data_for_eval(batch)
            with self._forward():
                embedding = self.extract_features(self._on_device(images)).float()
            if not identities:
                # Filled in place: concatenating a list at the end would take the gallery's memory twice.
                embeddings = torch.empty(rows, embedding.shape[1])
            embeddings[len(identities) : len(identities) + len(embedding)] = embedding
            identities += batch_identities.tolist()
            cameras += batch_cameras.tolist()
        self.model = parallel
        if not_finite := sum(distributed.gathered(int((~torch.isfinite(embeddings[: len(identities)])).any(1).sum()))):
            raise SharedError(
                f"the embeddings of {not_finite} {subset} images are not finite, so they cannot be ranked: evaluate an "
                f"earlier checkpoint{', or set csalr.amp none' if self.settings.amp == 'fp16' else ''}."
            )
        distributed.collect_rows(embeddings)
        if normalise:
            F.normalize(embeddings, out=embeddings)
        everyone = [np.concatenate(distributed.gathered(np.asarray(own, int))) for own in (identities, cameras)]
        return embeddings, everyone[0], everyone[1]


def _as_list(outputs: Any) -> list[Tensor]:
    """Return the outputs of a model, one tensor or several, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _size_of(values: Iterable[Any]) -> int:
    """Return the bytes of all tensors among `values`."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def keep_autocast_in_threads(network: nn.Module, autocast: torch.autocast) -> None:
    """Make `network` compute in the dtype of `autocast` in the threads of DataParallel too.

    DataParallel enables autocast in its threads, but each thread has its own dtype: bf16 would become fp16 there.
    """

    def adopt(*_: Any) -> None:
        torch.set_autocast_dtype(autocast.device, autocast.fast_dtype)

    network.register_forward_pre_hook(adopt)
