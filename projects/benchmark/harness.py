"""Shared parts of the three studies: options, stored results, alternating rounds, measurements and statistics."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

import csalr_plugin
from csalr_plugin.command_line import argument, path_argument, positive
from csalr_plugin.errors import UserError, first_line, shown
from csalr_plugin.files import make_writable_folder, write_json
from csalr_plugin.hosts.keys import integer
from csalr_plugin.hosts.training import keep_freed_memory

from ..environment import machine, versions

# The median of fewer rounds is unreliable; `--quick` allows fewer, to try things out.
FEWEST_REPEATS = 5
TOO_LARGE = "spread too large"
# The measurements of one case in one round, by name, in seconds.
Sample = dict[str, float]


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every study has."""
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a smaller study of about two minutes")
    parser.add_argument("--repeats", type=positive, metavar="N", help="rounds, at least 5 (7; quick 5)")
    parser.add_argument(
        "--threads", type=argument(integer(1, 1024)), metavar="N", help="CPU threads (as many as cores)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")


def prepare(options: argparse.Namespace) -> torch.device:
    """Check the common options, create the folder and set the number of threads; return the device.

    Raises:
        UserError: there are too few repeats, the device is missing, or the folder cannot be written.
    """
    options.repeats = options.repeats or (FEWEST_REPEATS if options.quick else 7)
    if options.repeats < FEWEST_REPEATS and not options.quick:
        raise UserError(
            f"--repeats {options.repeats} is too few for a median: give {FEWEST_REPEATS} or more, or add --quick."
        )
    if options.device not in ("cpu", "cuda"):
        raise UserError(f"--device {shown(options.device)} is not known: allowed is cpu or cuda.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    keep_freed_memory()
    make_writable_folder(options.out, f"--out '{options.out}'")
    options.threads = options.threads or os.cpu_count() or 1
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = options.device == "cuda"  # as in training
    return torch.device(options.device)


@contextmanager
def memory_errors_in_one_line() -> Iterator[None]:
    """Report a lack of memory inside a with statement as a `UserError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch raises a plain RuntimeError on a CPU
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"there is not enough memory ({first_line(error)}): give smaller images or batches.") from None


def code_digest() -> str:
    """Return a digest of the project's own code: samples of different code never mix."""
    digest = hashlib.sha256()
    folders = (Path(csalr_plugin.__file__).parent, Path(__file__).parent)
    for path in sorted(path for folder in folders for kind in ("*.py", "*.cpp", "*.h") for path in folder.rglob(kind)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Results:
    """The results of a study so far, stored in one JSON file that is always complete.

    Args:
        folder: the folder of `<study>.json`. The results in that file are continued.
        study: the name of the study.
        settings: everything that the samples depend on, as JSON values.

    Attributes:
        counts: the figures of each case that are counted or measured once.
        rounds: the raw samples; each round has one sample of every case.
        summary: the numbers of the table.

    Raises:
        UserError: the file is damaged, or was measured with other settings, machine, versions or code.
    """

    def __init__(self, folder: Path, study: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"{study}.json"
        self.identity = {
            "study": study,
            "settings": json.loads(json.dumps(settings)),
            "machine": machine(),
            "versions": {**versions(), "code": code_digest()},
        }
        self.counts: dict[str, dict[str, Any]] = {}
        self.rounds: list[dict[str, Sample]] = []
        self.summary: dict[str, Any] = {}
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            before = {name: content[name] for name in self.identity}
            self.counts, self.rounds, self.summary = content["counts"], content["rounds"], content["summary"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(self.path)!r} is damaged: give another folder with --out, or remove it.") from error
        for part, now in self.identity.items():
            for name in dict.fromkeys([*before[part], *now]) if isinstance(now, dict) else ():
                was, wanted = before[part].get(name), now.get(name)
                if was != wanted:
                    raise UserError(
                        f"{str(self.path)!r} was measured with {name} {was!r}, not {wanted!r}: give another folder "
                        "with --out, or the same settings."
                    )

    def save(self) -> None:
        """Write the file in one step, so that an interruption leaves the previous complete file."""
        content = {**self.identity, "counts": self.counts, "rounds": self.rounds, "summary": self.summary}
        write_json(self.path, content)

    def samples(self, case: str, name: str) -> list[float]:
        """Return the measurement `name` of a case in every round."""
        return [one[case][name] for one in self.rounds]


def alternate(results: Results, cases: Mapping[str, Callable[[], Sample]], repeats: int) -> None:
    """Measure every case once per round until there are `repeats` rounds; save after each round.

    Alternating spreads a drift of the machine over all cases. Each round starts with another case, so that no case
    always follows the same one. Before the first round, every case runs once as a warm-up.
    """
    missing = repeats - len(results.rounds)
    if missing <= 0:
        return
    names = list(cases)
    with tqdm(total=len(cases) * (missing + 1), unit="case") as progress:

        def measure(name: str, stage: str) -> Sample:
            progress.set_description(f"{stage}: {name}")
            sample = cases[name]()
            progress.update()
            return sample

        for name in names:
            measure(name, "warm-up")
        while len(results.rounds) < repeats:
            number = len(results.rounds)
            start = number % len(names)
            stage = f"round {number + 1} of {repeats}"
            measured = {name: measure(name, stage) for name in names[start:] + names[:start]}
            results.rounds.append({name: measured[name] for name in names})
            results.save()


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `action` takes, including the work of the device and excluding garbage collection."""
    gc.collect()
    gc.disable()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started
    finally:
        gc.enable()


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of `action` in bytes, beyond the memory in use before it.

    On CUDA, this is the peak of torch's allocator. On a CPU, it is the maximum of the running sum of the allocations
    and releases that torch's profiler records. Neither includes memory that a library allocates by itself, such as
    oneDNN's scratch memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes into the progress line
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    recorded = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    return max(0, int(np.cumsum([0, *(change for _, change in changes)]).max()))


@dataclass(frozen=True)
class Statistic:
    """A median, with the interquartile range as its spread."""

    median: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Statistic:
        """Return the statistic of at least one sample."""
        low, middle, high = np.percentile(samples, (25, 50, 75))
        return cls(float(middle), float(high - low))

    def __str__(self) -> str:
        decimals = (
            2 - math.floor(math.log10(abs(self.median))) if self.median else 2
        )  # three significant digits of the median
        return f"{self.median:.{max(0, decimals)}f} ± {self.spread / 2:.{max(0, decimals)}f}"


def change(samples: Sequence[float], baseline: Sequence[float]) -> Statistic:
    """Return the relative change of `samples` from `baseline`, taken round by round: 0.1 is 10 % more."""
    return Statistic.of([one / other - 1 for one, other in zip(samples, baseline, strict=True)])


def as_percent(changed: Statistic) -> str:
    """Format a change in per cent, or as `TOO_LARGE` if its spread exceeds its size."""
    return TOO_LARGE if changed.spread > abs(changed.median) else f"{changed.median:+.1%}"


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent p of cost = a * size^p, by least squares of the logarithms of at least two sizes."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def write_report(results: Results, title: str, table: str, notes: Sequence[str]) -> None:
    """Write `<study>.md` with the table, machine, versions and settings beside the JSON file; print the table."""
    described = [
        (part, ", ".join(f"{name} {_plain(value)}" for name, value in results.identity[part].items()))
        for part in ("machine", "versions", "settings")
    ]
    described.append(("rounds", str(len(results.rounds))))
    lines = [f"# {title}", "", table, "", *(f"- {note}" for note in notes), ""]
    lines.append(tabulate(described, ("measured", "on"), tablefmt="github"))
    path = results.path.with_suffix(".md")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{path}, {path.with_suffix('.json').name}, {path.with_suffix('.png').name}")


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def pyplot() -> Any:
    """Return matplotlib's pyplot, set to draw into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
