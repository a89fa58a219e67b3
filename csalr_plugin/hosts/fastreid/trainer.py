"""fast-reid's `DefaultTrainer` with the plugin's training recipe."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import fastreid
import torch
from fastreid.config import CfgNode
from fastreid.data import build as host_data
from fastreid.engine import DefaultTrainer, defaults, hooks
from fastreid.engine.train_loop import HookBase
from fastreid.evaluation import rank
from fastreid.solver import build_optimizer
from fastreid.utils import comm
from fastreid.utils.events import CommonMetricPrinter, EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard.writer import SummaryWriter

from csalr_plugin.attention.batch_norm import synchronise, world_size
from csalr_plugin.errors import UserError, first_line, one_line
from csalr_plugin.files import remove_unfinished, write_json
from csalr_plugin.hosts.distributed import gathered, is_lost, is_main, one_first, share_buffers, together
from csalr_plugin.hosts.fastreid.config import default_settings, validate
from csalr_plugin.hosts.fastreid.datasets import check_data, check_target, data_root
from csalr_plugin.hosts.fastreid.hooks import NEW_LAYERS, MetricsWriter, Records, SafeWriter, TrainedLayers
from csalr_plugin.hosts.fastreid.launch import gone
from csalr_plugin.hosts.fastreid.ranges import IDENTITY_SAMPLERS
from csalr_plugin.hosts.fastreid.resume import (
    last_checkpoint,
    load_training,
    training_settings,
)
from csalr_plugin.hosts.folder import file_stem
from csalr_plugin.hosts.keys import check_phases
from csalr_plugin.hosts.ranked import draw_ranked
from csalr_plugin.hosts.records import (
    METRICS,
    Checkpoints,
    about_checkpoint,
    mean_precision,
    never_fatal,
    read_metrics,
    show_embeddings,
    write_line,
)
from csalr_plugin.hosts.report import REPORT, write_report
from csalr_plugin.hosts.resume import name_parameters
from csalr_plugin.hosts.script import replaced
from csalr_plugin.hosts.training import MACHINE_FAILURES, keep_freed_memory, machine_failure, unwrapped
from csalr_plugin.models import RefinedPCB, recipe
from csalr_plugin.models.cost import count_gmacs, count_parameters

logger = logging.getLogger(__name__.replace("csalr_plugin.hosts.fastreid", "fastreid.csalr"))


class Trainer(DefaultTrainer):  # type: ignore[misc]  # fast-reid carries no types
    """fast-reid's `DefaultTrainer` for any of its models, and the training recipe of the plugin's models.

    Args:
        cfg: fast-reid's settings after `add_csalr_config`.

    Raises:
        UserError: something that the user gave cannot be used; raised before the training starts.
    """

    told_to_stop = False  # by a signal

    def __init__(self, cfg: CfgNode) -> None:
        with together():
            validate(cfg)
            if cfg.MODEL.META_ARCHITECTURE.startswith("pcb_rpp"):
                lengths = ("SOLVER.MAX_EPOCH", cfg.SOLVER.MAX_EPOCH, "CSALR.RPP.PCB_EPOCHS", cfg.CSALR.RPP.PCB_EPOCHS)
                check_phases(*lengths, cfg.MODEL.META_ARCHITECTURE)
            check_data(cfg)
        with replaced(defaults, {"DistributedDataParallel": partial(_in_several_processes, cfg)}):
            super().__init__(cfg)
        network = unwrapped(self.model)
        if not next(network.parameters()).is_cuda:
            keep_freed_memory()
        self.checkpointer.settings = training_settings(self.cfg)
        self._kept = Checkpoints(cfg.CSALR.KEEP)
        self._best = -1.0  # the best mAP so far, from 0 to 1
        self.warm_up = recipe.WarmUp(self.optimizer, cfg.CSALR.WARMUP, cfg.CSALR.WARMUP_ALL)
        if recipe.applies_to(network):
            clip = _ClipGradients(network, cfg.CSALR.CLIP_GRADIENT)
            self.optimizer.register_step_pre_hook(clip)

    @staticmethod
    def auto_scale_hyperparams(cfg: CfgNode, num_classes: int) -> CfgNode:
        """Set MODEL.HEADS.NUM_CLASSES to the number of training identities where it is 0.

        Raises:
            UserError: it is less than that number.
        """
        if 0 < cfg.MODEL.HEADS.NUM_CLASSES < num_classes:
            raise UserError(
                f"config key 'MODEL.HEADS.NUM_CLASSES' is {cfg.MODEL.HEADS.NUM_CLASSES}; it must be 0 or at least "
                f"{num_classes}, the training identities of {', '.join(cfg.DATASETS.NAMES)}."
            )
        return DefaultTrainer.auto_scale_hyperparams(cfg, num_classes)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build the host's loader of training batches.

        The root of the datasets is the current value of FASTREID_DATASETS; fast-reid reads it when it is imported.

        Raises:
            UserError: there are fewer training images than a batch has, or fewer identities than a batch of an identity
                sampler has.
        """
        host_data._root = data_root()
        loader = super().build_train_loader(cfg)
        if len(loader.dataset) < cfg.SOLVER.IMS_PER_BATCH:
            raise UserError(
                f"config key 'SOLVER.IMS_PER_BATCH' is {cfg.SOLVER.IMS_PER_BATCH}, more than the "
                f"{len(loader.dataset)} training images of {', '.join(cfg.DATASETS.NAMES)}; give a smaller batch."
            )
        identities = cfg.SOLVER.IMS_PER_BATCH // cfg.DATALOADER.NUM_INSTANCE
        if cfg.DATALOADER.SAMPLER_TRAIN in IDENTITY_SAMPLERS and loader.dataset.num_classes < identities:
            raise UserError(  # the sampler would never end
                f"config key 'DATALOADER.NUM_INSTANCE' is {cfg.DATALOADER.NUM_INSTANCE}, so a batch of "
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} has {identities} identities, more than the "
                f"{loader.dataset.num_classes} of {', '.join(cfg.DATASETS.NAMES)}; give a smaller batch."
            )
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build the host's loader of query and gallery images; see `build_train_loader` for the root.

        Raises:
            UserError: the dataset is missing or empty, or no query has a match in its gallery.
        """
        host_data._root = data_root()
        check_target(cfg, dataset_name)
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model on the GPU, or on the CPU of a machine without CUDA, and log its cost.

        Raises:
            UserError: for settings that are not allowed.
        """
        validate(cfg)
        resumes, cfg = getattr(cfg, "resumes", False), cfg.clone()
        cfg.defrost()
        if resumes:
            cfg.MODEL.BACKBONE.PRETRAIN = False
        if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
            logger.info("There is no CUDA: MODEL.DEVICE becomes cpu")
            cfg.MODEL.DEVICE = "cpu"
        try:
            model: nn.Module = one_first(partial(super().build_model, cfg))
        except OSError as error:  # requests' errors are
            raise UserError(
                f"pretrained weights for {cfg.MODEL.META_ARCHITECTURE} cannot be read or downloaded "
                f"({first_line(error)}): give a file with MODEL.BACKBONE.PRETRAIN_PATH, or set MODEL.BACKBONE.PRETRAIN "
                "False."
            ) from error
        except KeyError as error:  # such as an unknown MODEL.BACKBONE.DEPTH
            raise UserError(
                f"fast-reid cannot build {cfg.MODEL.META_ARCHITECTURE}: {first_line(error)} is not known; check "
                "the keys of MODEL.BACKBONE and MODEL.HEADS."
            ) from error
        if recipe.applies_to(model):
            try:
                gmacs = count_gmacs(model.eval(), *cfg.INPUT.SIZE_TEST)
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"{cfg.MODEL.META_ARCHITECTURE} cannot take images of {'x'.join(map(str, cfg.INPUT.SIZE_TEST))} "
                    f"({first_line(error)}): give a larger INPUT.SIZE_TEST and INPUT.SIZE_TRAIN."
                ) from error
            model.train()
            logger.info(
                f"{cfg.MODEL.META_ARCHITECTURE}: {count_parameters(model) / 1e6:.2f} million parameters, "
                f"{gmacs:.2f} GMACs an image at test time"
            )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        """Build the host's optimizer, with the learning rates of the plugin's models.

        With r = SOLVER.BASE_LR the backbone has the rate r and new layers the rate h = r * SOLVER.HEADS_LR_FACTOR.
        Blocks and supervision branches have h * CSALR.ATTENTION_LR, gates h * CSALR.GATE_LR; see `recipe.assign_role`.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.FREEZE_ITERS = 0  # `TrainedLayers` freezes layers
        optimizer, parameters = build_optimizer(cfg, model)
        if recipe.applies_to(model):
            _assign_rates(cfg, model, optimizer)
        recipe.fuse_steps(optimizer)
        name_parameters(optimizer, model)
        return optimizer, parameters

    def build_hooks(self) -> list[HookBase]:
        """Return the host's hooks, and before them the hook for frozen layers and the phases of refined part pooling.

        If an evaluation fails, the weights of its epoch are saved first.
        """
        own: list[HookBase] = []
        network = unwrapped(self.model)
        if is_main():
            own.append(Records(network, self.cfg, partial(_queries, self.cfg)))
        if self.cfg.MODEL.FREEZE_LAYERS or isinstance(network, RefinedPCB):
            own.append(TrainedLayers(network, self.cfg))
        theirs = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.LayerFreeze):  # `TrainedLayers` takes its place
                continue
            if isinstance(hook, hooks.PeriodicWriter):
                hook = MetricsWriter(hook._writers, hook._period)
            theirs.append(hook)
            if isinstance(hook, hooks.EvalHook):
                hook._func = partial(self._evaluate, hook._func)
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.best_metric = math.inf  # `_evaluate` saves the best checkpoint
                hook.after_epoch = partial(_in_every_process, partial(self._save, hook.after_epoch))
        if not is_main():  # which alone saves
            theirs.append(hooks.CallbackHook(after_epoch=lambda _: _in_every_process()))
        return [*own, *theirs]

    def build_writers(self) -> list[EventWriter]:
        """Return the host's writers of metrics without its printer, which `Records` replaces.

        Their errors do not end the training.
        """
        writers = super().build_writers()
        return [SafeWriter(writer) for writer in writers if not isinstance(writer, CommonMetricPrinter)]

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint in OUTPUT_DIR, or load MODEL.WEIGHTS.

        Args:
            resume: whether to resume, if there is a checkpoint.

        Raises:
            UserError: a checkpoint cannot be used; or `resume` is False, and OUTPUT_DIR holds the checkpoints of an
                earlier training.
        """
        with together():
            if not resume and self.checkpointer.has_checkpoint() and not self.cfg.CSALR.OVERWRITE:
                raise UserError(
                    f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' holds an earlier training's checkpoints: give another folder, "
                    "resume that training with --resume, or replace the checkpoints with CSALR.OVERWRITE True."
                )
            if is_main() and self.cfg.OUTPUT_DIR:
                remove_unfinished(Path(self.cfg.OUTPUT_DIR))
            if resume and (path := last_checkpoint(self.cfg.OUTPUT_DIR)):
                load_training(self, path)
            else:
                super().resume_or_load(resume=False)
        _, evaluations = read_metrics(Path(self.cfg.OUTPUT_DIR) / METRICS)
        self._best = mean_precision([line for line in evaluations if line["epoch"] <= self.start_epoch])
        if len(epochs := set(gathered(self.start_epoch))) > 1:
            raise UserError(
                f"--resume: the machines would resume from different epochs ({', '.join(map(str, sorted(epochs)))}); "
                f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' must be a folder that all machines share."
            )

    def train(self) -> Any:
        """Train, or only evaluate if all epochs are done.

        Raises:
            UserError: for a loss or gradient that is not finite, an image that does not decode, a checkpoint that
                cannot be written, or a process that has ended.
        """
        if self.start_epoch >= self.max_epoch:
            logger.info(f"All {self.max_epoch} epochs of SOLVER.MAX_EPOCH are done: only the evaluation is left")
            return self.test(self.cfg, self.model)
        if world_size() > 1:
            # When one process dies, torchrun stops the others, often before they notice it.
            signal.signal(signal.SIGTERM, self._stop)
        loop_logger = logging.getLogger("fastreid.engine.train_loop")
        loop_logger.addFilter(_without_trace)
        try:
            results = super().train()
            if is_main():
                self._write_report()
            return results
        except MACHINE_FAILURES as error:
            if is_lost(error):
                raise gone(self._last_checkpoint()) from error
            if cause := machine_failure(error):
                raise UserError(
                    f"Training stopped at epoch {self.epoch + 1}: {cause}; {self._how_to_go_on()}."
                ) from error
            raise
        except (KeyboardInterrupt, BrokenPipeError):
            if is_main():
                print(f"Training stopped; {self._how_to_go_on()}.", file=sys.stderr)
            raise
        finally:
            loop_logger.removeFilter(_without_trace)

    def _stop(self, *_: object) -> None:
        self.told_to_stop = True  # read at the next step, so that no checkpoint is left incomplete

    def after_train(self) -> None:
        """Call the hooks at the end of a training; after an error only close the writers.

        An evaluation after an error would wait for processes that have ended, or evaluate weights that are not finite.
        """
        if sys.exc_info()[0] is None:
            super().after_train()
            return
        for hook in self._hooks:
            if isinstance(hook, MetricsWriter):
                hook.close()

    def run_step(self) -> None:
        """Run one iteration of the host with the warm-up of blocks and gates."""
        if self.told_to_stop:
            raise gone(self._last_checkpoint())
        wrong, cause = "", None
        try:
            with self.warm_up.at(self.iter):
                super().run_step()
        except (FloatingPointError, _GradientError) as error:
            wrong, cause = ", ".join(str(error).splitlines()[1:]) or str(error), error
        with together():  # only the first process checks the loss
            if wrong:
                raise UserError(
                    f"Training stopped at epoch {self.epoch + 1}, iteration {self.iter + 1}: {wrong}; "
                    f"{self._how_to_go_on()}, with a lower SOLVER.BASE_LR, CSALR.ATTENTION_LR or CSALR.CLIP_GRADIENT."
                ) from cause

    def _evaluate(self, evaluate: Callable[[], Any]) -> Any:
        """Call the host's evaluation after an epoch, and save the checkpoint with the best mAP.

        If the evaluation fails, the weights of that epoch are saved.
        """
        _Evaluated.epoch, _Evaluated.draws = self.epoch + 1, self.epoch + 1 >= self.max_epoch
        try:
            results = evaluate()
            _in_every_process(partial(self._record_results, results))
            return results
        except Exception as error:
            if getattr(self.checkpointer, "saved_epoch", -1) < self.epoch:
                self.checkpointer.save(f"model_{self.epoch:04d}", epoch=self.epoch, metric=-1.0)
            if isinstance(error, UserError):
                raise UserError(
                    f"The evaluation after epoch {self.epoch + 1} failed, and {self._how_to_go_on()}: {one_line(error)}"
                ) from error
            raise
        finally:
            _Evaluated.epoch, _Evaluated.draws = 0, True

    def _record_results(self, results: Mapping[str, Any]) -> None:
        """Write results to ``metrics.jsonl``, and save the checkpoint if its mAP is the best so far."""
        found = _by_dataset(self.cfg, results) if is_main() else {}
        for dataset, numbers in found.items():
            write_line(Path(self.cfg.OUTPUT_DIR), {"epoch": self.epoch + 1, "dataset": dataset, **numbers})
        precision = mean_precision([{"epoch": self.epoch, **numbers} for numbers in found.values()])
        if precision > self._best:
            self._best = precision
            logger.info(f"Best mAP so far, {precision:.1%}: model_best.pth")
            self.checkpointer.save("model_best", epoch=self.epoch, metric=100 * precision)

    def _save(self, save: Callable[[], None]) -> None:
        """Let the host save its checkpoint, and remove the oldest ones beyond CSALR.KEEP."""
        save()
        path = Path(self.cfg.OUTPUT_DIR) / f"model_{self.epoch:04d}.pth"
        if path.is_file():
            self._kept.add(path)

    def _write_report(self) -> None:
        cfg, folder = self.cfg, Path(self.cfg.OUTPUT_DIR)
        with never_fatal(f"the report {REPORT}"):
            path = write_report(
                folder,
                host=f"fast-reid {fastreid.__version__}",
                model=f"{cfg.MODEL.META_ARCHITECTURE} on {', '.join(cfg.DATASETS.NAMES)}",
                settings=cfg.leaves(),
                defaults=default_settings(),
                checkpoints=[file.name for file in sorted(folder.glob("*.pth"), key=lambda file: file.stat().st_mtime)],
            )
            logger.info(f"Report of the training: {path}")

    def _last_checkpoint(self) -> str:
        return str(self.checkpointer.get_checkpoint_file())

    def _how_to_go_on(self) -> str:
        last = self._last_checkpoint()
        return f"the last checkpoint is {last}, go on from it with --resume" if last else "start anew"

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> tuple[Any, Any]:
        """Build the loader and the host's evaluator of a dataset."""
        loader, evaluator = super().build_evaluator(cfg, dataset_name, output_dir)
        _Evaluated.parts.append((dataset_name, loader.dataset.img_items, evaluator))
        return loader, evaluator

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> Any:
        """Evaluate the first process's model as the host does, and write the results to OUTPUT_DIR/results.json.

        The file also names the checkpoint, its epoch, the image size, the distance and whether it was re-ranked. After
        the last epoch of a training, and without a training, the sheet of ranked results is drawn.

        Raises:
            UserError: a data set cannot be used.
        """
        share_buffers(model)
        _Evaluated.parts.clear()
        distances: list[Any] = []
        host_rank = rank.evaluate_rank

        def evaluate_rank(found: Any, *args: Any, **options: Any) -> Any:
            distances.append(found)
            return host_rank(found, *args, **options)

        try:
            with replaced(rank, {"evaluate_rank": evaluate_rank}):
                results = super().test(cfg, model)
        except MACHINE_FAILURES as error:
            if is_lost(error) or not (cause := machine_failure(error)):
                raise
            raise UserError(f"The evaluation stopped: {cause}.") from error
        if comm.is_main_process() and cfg.OUTPUT_DIR:
            _write_results(cfg, results)
            _show_results(cfg, distances)
        _Evaluated.parts.clear()
        return results


class _Evaluated:
    """The evaluation that runs in this process.

    Attributes:
        epoch: completed epochs of the training; 0 for an evaluation without a training.
        draws: whether to draw ranked results.
        parts: name, images and evaluator of each dataset.
    """

    epoch = 0
    draws = True
    parts: ClassVar[list[tuple[str, Any, Any]]] = []


def _write_results(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Write the file results.json."""
    epoch, folder = _Evaluated.epoch, Path(cfg.OUTPUT_DIR)
    if not epoch:
        about = about_checkpoint(cfg.MODEL.WEIGHTS)
    elif epoch >= cfg.SOLVER.MAX_EPOCH:
        about = {"checkpoint": str(folder / "model_final.pth"), "epoch": epoch}
    else:  # also the name of a checkpoint that CSALR.KEEP will remove
        saved = epoch % cfg.SOLVER.CHECKPOINT_PERIOD == 0
        about = {"checkpoint": str(folder / f"model_{epoch - 1:04d}.pth") if saved else None, "epoch": epoch}
    about |= {"datasets": list(cfg.DATASETS.TESTS), "image_size": list(cfg.INPUT.SIZE_TEST)}
    about |= {"dist_metric": cfg.TEST.METRIC, "rerank": cfg.TEST.RERANK.ENABLED, "flip": cfg.TEST.FLIP.ENABLED}
    path = folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**about, **json.loads(json.dumps(results, default=float))})
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error.strerror})")


def _show_results(cfg: CfgNode, distances: Sequence[Any]) -> None:
    """Draw the sheets of ranked results, and show the queries' embeddings in TensorBoard's projector."""
    for (name, items, evaluator), found in zip(_Evaluated.parts, distances, strict=False):
        queries = len(found)
        if _Evaluated.draws:
            with never_fatal("the picture of ranked results"):
                path = Path(cfg.OUTPUT_DIR) / f"ranked_{file_stem(name)}.png"
                draw_ranked(path, found, items[:queries], items[queries:], title=name)
                logger.info(f"Ranked results drawn to {path}")
        if cfg.CSALR.TENSORBOARD.PROJECTOR and evaluator._predictions:
            with never_fatal("the embeddings in TensorBoard's projector"):
                # The first process embeds the first images, which are queries.
                embeddings = torch.cat([batch["feats"] for batch in evaluator._predictions])[:queries]
                identities, cameras = ([item[place] for item in items[: len(embeddings)]] for place in (1, 2))
                writer = _projector(cfg.OUTPUT_DIR)
                show_embeddings(writer, file_stem(name), embeddings, identities, cameras, _Evaluated.epoch)


@cache
def _projector(folder: str) -> SummaryWriter:
    """Return the writer of the embeddings in a folder: a second one would replace the list of embeddings."""
    return SummaryWriter(folder)


def _by_dataset(cfg: CfgNode, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return mAP and "rank-1", "rank-5", ... of each dataset, from 0 to 1, from the host's results in per cent."""
    each = {cfg.DATASETS.TESTS[0]: results} if len(cfg.DATASETS.TESTS) == 1 else results
    return {
        dataset: {
            name.replace("Rank", "rank"): float(value) / 100
            for name, value in numbers.items()
            if name == "mAP" or name.startswith("Rank-")
        }
        for dataset, numbers in each.items()
    }


def _queries(cfg: CfgNode, most: int = 2) -> torch.Tensor:
    """Return the first query images of the first target, (B, 3, H, W), RGB from 0 to 255."""
    loader, _ = Trainer.build_test_loader(cfg, cfg.DATASETS.TESTS[0])
    return torch.stack([loader.dataset[index]["images"].float() for index in range(min(most, len(loader.dataset)))])


def _assign_rates(cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set the learning rate of each parameter of a network, and merge the groups of equal settings, in place.

    The host makes a group for each parameter; torch steps all parameters of a group at once.
    """
    role_of = recipe.parameter_roles(model)
    # fast-reid itself applies HEADS_LR_FACTOR to the child `heads` of its own networks.
    new = {parameter for name, parameter in model.named_parameters() if name.split(".")[0] in NEW_LAYERS}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in optimizer.param_groups:
        parameter = group["params"][0]
        if parameter in new:
            group["lr"] *= cfg.SOLVER.HEADS_LR_FACTOR
        rates = {
            "attention_lr": cfg.CSALR.ATTENTION_LR,
            "gate_lr": recipe.gate_rate(cfg.CSALR.GATE_LR, optimizer),
        }
        recipe.assign_role(group, role_of[parameter], **rates)
        kind = (role_of[parameter], parameter in new)
        alike = (kind, group["lr"], group["weight_decay"])
        if alike in groups:
            groups[alike]["params"] += group["params"]
        else:
            groups[alike] = group
    optimizer.param_groups[:] = list(groups.values())


def _in_every_process(action: Callable[[], None] = lambda: None) -> None:
    """Call `action`, and let its error end every process."""
    with together():
        action()


def _in_several_processes(cfg: CfgNode, model: nn.Module, device_ids: list[int], **options: Any) -> nn.Module:
    """Wrap a model in torch's DistributedDataParallel, also on the CPU, where it accepts no device_ids."""
    if cfg.CSALR.SYNC_BATCH_NORM:
        synchronise(model)
    on_gpu = next(model.parameters()).is_cuda
    # Frozen layers get no gradient, and without cross entropy the classifiers get none.
    frozen = cfg.MODEL.FREEZE_LAYERS and cfg.SOLVER.FREEZE_ITERS
    unused = bool(frozen) or isinstance(model, RefinedPCB) or "CrossEntropyLoss" not in cfg.MODEL.LOSSES.NAME
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # an option of the host's call
        return DistributedDataParallel(
            model, device_ids=device_ids if on_gpu else None, find_unused_parameters=unused, **options
        )


class _GradientError(ArithmeticError):
    """A gradient is not finite. The weights are those before the step."""


class _ClipGradients:
    """A hook that clips the gradient of each block before the optimizer's step, after mixed precision unscaled it."""

    def __init__(self, network: nn.Module, limit: float) -> None:
        self.network, self.limit = network, limit

    def __call__(self, *_: Any) -> None:
        norm = float(recipe.clip_gradients(self.network, self.limit))
        if not math.isfinite(norm):
            raise _GradientError(f"gradient norm = {norm}")


def _without_trace(record: logging.LogRecord) -> bool:
    """Return whether to log a record. A stack trace is left out if the error is reported in one line."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    return not (isinstance(error, (UserError, BrokenPipeError)) or is_lost(error) or machine_failure(error))
