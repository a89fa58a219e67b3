"""The host's engines, optimising Eq. 18, resuming where they stopped, and saying what happens."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from csalr_plugin.hosts import distributed
from csalr_plugin.hosts.folder import file_stem
from csalr_plugin.hosts.torchreid.config import active_config
from csalr_plugin.hosts.torchreid.loading import draw_from, evaluation_loader, training_loader
from csalr_plugin.hosts.torchreid.monitor import Monitor
from csalr_plugin.hosts.torchreid.ranking import evaluate_rank
from csalr_plugin.hosts.training import keep_freed_memory, unwrapped
from csalr_plugin.models import recipe


@cache
def plugin_engine(host_engine: type) -> type:
    """The host's engine class with this plugin's training, for example of ``torchreid.engine.ImageSoftmaxEngine``.

    The signature stays the host's. Models that are not the plugin's keep the host's loss, and gain exact
    resuming, a checkpoint an epoch, and evaluation results as a file.
    """
    return type(f"Plugin{host_engine.__name__}", (_PluginTraining, host_engine), {})


_HostEngine: Any = object  # in what `plugin_engine` makes, the host's engine comes next


class _StopBetweenBatches(KeyboardInterrupt):
    """Ctrl-C, once the batch that it came in is done: weights and optimizer are whole."""


class _PluginTraining(_HostEngine):
    """What :func:`plugin_engine` puts before a host's engine. Settings come from the active config."""

    model: Any
    train_loader: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = active_config()
        self.settings = config.csalr
        self.seed: int = config.train.seed
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
        self.warm_up = recipe.WarmUp(self.optimizer, self.settings.warmup)
        self.save_dir = Path(config.data.save_dir)
        self.results: dict[str, dict[str, float]] = {}
        self.monitor = Monitor(self)
        self._rolling: Path | None = None
        self._stopped_at = 0.0  # when this process was asked to stop
        self._stops = False  # after this batch, as all processes do
        self._batches_done = 0  # of this epoch, before the stop that this run resumes from
        self._completed = 0  # of this epoch, by now: those whose gradients have made a step
        self._buffers_before: dict[str, Tensor] = {}  # a step that several batches make, while they do

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """One step of the host's loop: returns what is printed and goes to TensorBoard."""
        if self.batch_idx < self._batches_done:  # trained before the stop that this run resumes from
            summary = {}
        else:
            draw_from(self.seed, self.epoch, self.batch_idx, "model")
            summary = self.iteration(data, self.epoch * self.num_batches + self.batch_idx)
        if self.batch_idx == self._step_of(self.batch_idx)[1][-1]:
            self._completed = self.batch_idx + 1
        if self._stops:
            raise _StopBetweenBatches
        return summary

    def iteration(self, data: dict[str, Any], number: int) -> dict[str, float]:
        """Train on one batch of the host's loader.

        Args:
            data: the batch.
            number: of the iteration, counted from 0 over the whole training; sets the warm-up, and which batches'
                gradients make one optimizer step (`csalr.accumulate`).

        Returns:
            "loss", each term of Eq. 18, each block's "alpha", and "acc", the accuracy of the parts' vote in per
            cent; with fp16 "loss_scale" too.

        Raises:
            UserError: a term or a gradient is not finite; the weights are those from before the batch. With fp16
                gradients may overflow, as long as a smaller loss scale can help: the step is then left out.
        """
        images, identities = self.parse_data_for_train(data)
        images, identities = self._on_device(images), identities.to(self.device, non_blocking=True)
        step, batches = self._step_of(number)
        batch = number % len(self.train_loader)
        if batch == batches[0]:
            self.optimizer.zero_grad()
            if len(batches) > 1 or distributed.world_size() > 1:
                self._buffers_before = {name: value.clone() for name, value in self.network.named_buffers()}
        complete = batch == batches[-1]
        with self._exchanged(complete):
            with self._forward():
                outputs = self.model(images)
            logits, features = outputs if isinstance(outputs, tuple) else (outputs, None)
            logits = [one.float() for one in logits] if isinstance(logits, list) else logits.float()
            terms, loss = self.loss_terms(logits, None if features is None else features.float(), identities)
            self.scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        vote = recipe.vote(self.network, logits)
        watched = {"loss": loss, **terms, "acc": torchreid.metrics.accuracy(vote, identities)[0]}
        if complete:
            self.scaler.unscale_(self.optimizer)
            watched["gradient norm"] = recipe.clip_gradients(self.network, self.settings.clip_gradient)
        watched["stops"] = float(self._stopped)
        values = distributed.means(watched)
        self._stops = values["stops"] > 0  # so all stop after the same batch
        summary = {name: values[name] for name in ("loss", *terms)}
        self._require_finite(summary, images, number)
        if complete:
            norm = values["gradient norm"]
            # The scaler leaves out a step that overflowed, and halves the scale; from 1 on that is no help.
            if math.isfinite(norm) or not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
                self._require_finite({"gradient norm": norm}, images, number)
            with self.warm_up.at(step):
                self.scaler.step(self.optimizer)
            self.scaler.update()
            self._buffers_before = {}
        summary |= distributed.numbers({f"alpha_{name}": block.alpha for name, block in self.blocks.items()})
        if self.scaler.is_enabled():
            summary["loss_scale"] = self.scaler.get_scale()
        self.monitor.count(summary, logits, identities)
        return {**summary, "acc": values["acc"]}

    def _exchanged(self, complete: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged once a step, not once a batch."""
        if complete or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self.model.no_sync()
        return context

    def _step_of(self, number: int) -> tuple[int, range]:
        """The optimizer step that iteration `number` adds to, and that step's batches within the epoch.

        Steps are counted from 0 over the whole training. The last of an epoch may have fewer batches.
        """
        per_epoch, size = len(self.train_loader), self.settings.accumulate
        epoch, batch = divmod(number, per_epoch)
        first = batch - batch % size
        return epoch * math.ceil(per_epoch / size) + batch // size, range(first, min(first + size, per_epoch))

    def _on_device(self, images: Tensor) -> Tensor:
        # The host's evaluation of videos has five dimensions, for which there is no such layout.
        last = self.settings.channels_last and images.dim() == 4
        layout = torch.channels_last if last else torch.preserve_format
        return images.to(self.device, non_blocking=True, memory_format=layout)

    def _autocast(self) -> torch.autocast:
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.amp]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """Autocast for what the network computes, and one line where it cannot be compiled."""
        try:
            with self._autocast():
                yield
        except torch._dynamo.exc.TorchDynamoException as error:  # looked up, and imported, only then
            cause = getattr(error, "inner_exception", error)
            raise UserError(
                f"csalr.compile True: the network cannot be compiled here ({first_line(cause)}); torch.compile needs a "
                "C++ compiler such as g++, and Triton on a GPU. Install them, or set csalr.compile False."
            ) from error

    def loss_terms(
        self, logits: Sequence[Tensor] | Tensor, features: Tensor | None, identities: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of Eq. 18 by name, and their sum: L = L_F + lambda * sum_i L_DS_i.

        See :func:`recipe.loss_terms`. With the host's triplet loss, L_F is `weight_x` times the identity loss plus
        `weight_t` times the triplet loss of the embedding.
        """
        criterion = self.criterion if features is None else self.criterion_x
        losses = recipe.loss_terms(
            self.network, logits, lambda one: criterion(one, identities), self.settings.supervision_weight
        )
        triplet = {}
        if features is not None:
            everyone = distributed.embeddings_of_all(features, identities)
            triplet["triplet"] = self.compute_loss(self.criterion_t, *everyone)
            losses = losses.with_triplet(triplet["triplet"], self.weight_x, self.weight_t)
        branches = {f"L_DS_{name}": branch for name, branch in losses.branches.items()}
        return {"L_F": losses.main, **triplet, **branches}, losses.total()

    def _require_finite(self, terms: dict[str, float], images: Tensor, number: int) -> None:
        bad = [f"{name} = {term}" for name, term in terms.items() if not math.isfinite(term)]
        if bad:
            raise SharedError(
                f"Training stopped at epoch {self.epoch + 1}, iteration {number + 1}: {', '.join(bad)}; "
                f"{self._first_non_finite(images)}. The last checkpoint is {self._last_checkpoint()}; go on from "
                f"it with {'csalr.amp bf16, or ' if self.scaler.is_enabled() else ''}"
                "a lower train.lr, csalr.attention_lr or csalr.clip_gradient."
            )

    @torch.no_grad()
    def _first_non_finite(self, images: Tensor) -> str:
        """Which layer's output is the first that is not finite, on the batch that showed it."""
        found: list[str] = []

        def watch(name: str, layer: nn.Module) -> Any:
            # A supervision branch is given what its block attended, pooled; every other layer gives its own output.
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                seen = inputs[0] if name.startswith("block") else output
                if not torch.isfinite(seen).all():
                    found.append(name)

            return layer.register_forward_hook(hook)

        layers = {name: layer for name, layer in self.network.named_children() if name.startswith("layer")}
        branches = getattr(self.network, "supervision", {})
        layers |= {f"block {name} (attention)": branch for name, branch in branches.items()}
        handles = [watch(name, layer) for name, layer in layers.items()]
        try:
            with self._autocast():
                self.network.forward(images)  # not compiled: what is compiled calls no hook that came later
        finally:
            for handle in handles:
                handle.remove()
        # In whichever process it is.
        if found := [layer for layers in distributed.gathered(found) for layer in layers]:
            return f"the first output that is not finite is that of {found[0]}"
        weights = [name for name, value in self.network.named_parameters() if not torch.isfinite(value).all()]
        return f"every block's output is finite{f', weights that are not: {weights[0]}' if weights else ''}"

    def run(self, save_dir: str = "log", **options: Any) -> None:
        """The host's `run`; Ctrl-C leaves a checkpoint that resumes, in the middle of an epoch too."""
        self.save_dir = Path(save_dir)
        # A training that is done, and is only evaluated again, is at its last epoch.
        self.epoch = max(0, options.get("start_epoch", 0) - 1)
        if not distributed.is_main():
            self.writer = _NoWriter()
        if not self.use_gpu:
            keep_freed_memory()
        try:
            super().run(save_dir=save_dir, **options)
        except RuntimeError as error:
            if not distributed.is_lost(error):
                raise
            raise self._lost(error, self._last_checkpoint()) from error

    def train(self, *args: Any, **options: Any) -> None:
        """One epoch, then a checkpoint.

        Random numbers are drawn from (seed, epoch, batch), so that a resumed run equals one without a stop.
        """
        resumed = self.optimizer.param_groups[0]
        self._batches_done = self._completed = resumed.get("batches_done", 0)
        if self.scaler.is_enabled() and resumed.get("scaler"):
            self.scaler.load_state_dict(resumed["scaler"])
        draw_from(self.seed, self.epoch, 0, "epoch")
        self.train_loader.sampler.epoch = self.epoch
        self.monitor.start_epoch()
        with self._stop_between_batches():
            try:
                super().train(*args, **options)
            except (_StopBetweenBatches, RuntimeError) as error:
                if distributed.is_lost(error):
                    raise self._lost(error, repr(str(self._save_interrupted(alone=True)))) from error
                # A worker that got the same Ctrl-C may die first: the host's loop then sees a RuntimeError.
                if not self._stopped and not self._stops:
                    raise
                self._save_interrupted()
                raise KeyboardInterrupt from error
        self._mark_batches_done(0)
        self.monitor.end_epoch()
        self._save_rolling()
        if any(distributed.gathered(self._stopped)):
            raise KeyboardInterrupt

    def _lost(self, error: BaseException, checkpoint: str) -> UserError:
        # The first process tells it, or the second where it was the first that ended.
        return (UserError if distributed.rank() < 2 else SharedError)(
            f"Training stopped at epoch {self.epoch + 1}, for another process of it has ended or cannot be reached "
            f"({first_line(error)}). The last checkpoint is {checkpoint}; go on from it "
            "with model.resume, with as many processes as you like."
        )

    def two_stepped_transfer_learning(
        self, epoch: int, fixbase_epoch: int, open_layers: Any, model: nn.Module | None = None
    ) -> None:
        """The host's two steps and, for a model with refined parts, the phases of its training (section 4.2)."""
        rpp = self.settings.rpp
        phase = recipe.begin_epoch(
            self.network, epoch, pcb_epochs=rpp.pcb_epochs, part_classifier_epochs=rpp.part_classifier_epochs
        )
        if phase is recipe.Phase.PART_CLASSIFIER:
            fixbase_epoch, open_layers = epoch + 1, ["part_classifier"]
        super().two_stepped_transfer_learning(epoch, fixbase_epoch, open_layers, model or self.network)

    @property
    def _stopped(self) -> bool:
        return self._stopped_at > 0

    @contextlib.contextmanager
    def _stop_between_batches(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the end of the batch; a second one does not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._stopped:
                if now - self._stopped_at < 2:  # torchrun passes the Ctrl-C on that the terminal has sent already
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
        """Save as the host does, in one step (a half-written file never bears the name), and plain numbers only."""
        if not distributed.is_main():
            return
        path = self._save(f"model.pth.tar-{epoch + 1}", epoch + 1, float(rank1))
        if self._rolling == path:
            self._rolling = None  # evaluated: it stays

    def _save_rolling(self) -> None:
        """The newest epoch's checkpoint replaces the one before, unless that was evaluated."""
        if not distributed.is_main():
            return
        before, self._rolling = self._rolling, self._save(f"model.pth.tar-{self.epoch + 1}", self.epoch + 1)
        if before and before != self._rolling:
            before.unlink(missing_ok=True)

    def _save_interrupted(self, alone: bool = False) -> Path:
        """Save what is trained, without the step that is under way.

        `alone`: the other processes may be gone, the first among them; the second then saves, for weights are alike.
        """
        # Within the optimizer's state, which the host's own resuming carries over.
        done = max(self._batches_done, self._completed)
        for name, value in self.network.named_buffers():
            if name in self._buffers_before:  # the batches of a step that is not complete are trained again
                value.copy_(self._buffers_before[name])
        self._mark_batches_done(done)
        path = self.save_dir / "model" / f"model.pth.tar-{self.epoch}-batch{done}"
        if alone and distributed.rank() == 1:
            time.sleep(5)
        if distributed.is_main() or (alone and distributed.rank() == 1 and not path.exists()):
            self._save(path.name, self.epoch)
            print(f"Go on with: model.resume {path}")
        return path

    def _mark_batches_done(self, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["batches_done"] = number
            group["scaler"] = self.scaler.state_dict()  # empty without fp16

    def _save(self, name: str, epoch: int, rank1: float | None = None) -> Path:
        folder = self.save_dir / "model"
        folder.mkdir(parents=True, exist_ok=True)
        path, unfinished = folder / name, folder / f".{name}.unfinished"
        state = {
            "state_dict": self.network.state_dict(),
            "epoch": epoch,
            "optimizer": self.optimizer.state_dict(),
        }
        if rank1 is not None:
            state["rank1"] = rank1
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        torch.save(state, unfinished)
        os.replace(unfinished, path)
        print(f'Checkpoint saved to "{path}"')
        return path

    def _last_checkpoint(self) -> str:
        saved = sorted((self.save_dir / "model").glob("model.pth.tar-*"), key=lambda path: path.stat().st_mtime)
        return repr(str(saved[-1])) if saved else "the one that training started from"

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
        """The host's evaluation by its own parts, with progress, and with the results as a file too.

        Each process embeds its share of the images, the first ranks them.
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
        print(f"** Results on {dataset_name} **")
        for name, value in results.items():
            print(f"{name:<8} {value:.1%}")
        self.results[dataset_name] = results
        path = Path(save_dir or self.save_dir) / f"results_{file_stem(dataset_name)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"epoch": self.epoch + 1, "rerank": rerank, **results}, indent=2) + "\n")
        self.monitor.evaluated(dataset_name, results, query, query_ids, query_cameras)
        if visrank:
            torchreid.utils.visualize_ranked_results(
                distances,
                self.datamanager.fetch_test_loaders(dataset_name),
                self.datamanager.data_type,
                width=self.datamanager.width,
                height=self.datamanager.height,
                save_dir=str(Path(save_dir) / f"visrank_{file_stem(dataset_name)}"),
                topk=visrank_topk,
            )
        outcome = float(cmc[0]), float(mean_ap)
        return distributed.from_main((results, outcome))[1]

    def _embed(self, loader: Any, subset: str, normalise: bool) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Embeddings (N, width), identities (N,) and cameras (N,) of a loader's images, in the first process all."""
        loader, parallel = evaluation_loader(loader), self.model
        if isinstance(parallel, nn.parallel.DistributedDataParallel):
            self.model = self.network  # the wrapper would wait for processes that have fewer batches
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
                # Filled in place: a list that is concatenated at the end takes the gallery's memory twice.
                embeddings = torch.empty(rows, embedding.shape[1])
            embeddings[len(identities) : len(identities) + len(embedding)] = embedding
            identities += batch_identities.tolist()
            cameras += batch_cameras.tolist()
        self.model = parallel
        distributed.collect_rows(embeddings)
        if normalise:
            F.normalize(embeddings, out=embeddings)
        everyone = [np.concatenate(distributed.gathered(np.asarray(own, int))) for own in (identities, cameras)]
        return embeddings, everyone[0], everyone[1]


class _NoWriter:
    """In place of TensorBoard's, in processes that write nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def keep_autocast_in_threads(network: nn.Module, autocast: torch.autocast) -> None:
    """Let `network` compute in the dtype of `autocast` in DataParallel's threads too.

    They take over that autocast is on, but its dtype is a thread's own: bf16 would be fp16 there.
    """

    def adopt(*_: Any) -> None:
        torch.set_autocast_dtype(autocast.device, autocast.fast_dtype)

    network.register_forward_pre_hook(adopt)
