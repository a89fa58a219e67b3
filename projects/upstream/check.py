"""Check the patches of a host against the newest commit of a clone of its repository.

    python projects/upstream/check.py {torchreid,fastreid} CLONE [--patch NAME ...]

Each patch must apply to the newest commit alone, add no finding of the host's own linter and no failure of its own
tests, and mend its failing case (see `cases.py`). A patch with a model must also agree with the plugin's model (see
`agreement.py`). CLONE is only read: everything happens in a temporary copy. The exit code is 0 if every check passes, 1
if one does not, and 2 if CLONE cannot be used. README.md beside this file explains the checks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from csalr_plugin.command_line import Parser, exit_code, path_argument
from csalr_plugin.errors import UserError, first_line, shown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from any folder
from projects.upstream.cases import CASES

HERE = Path(__file__).resolve().parent
LINTERS = HERE.parents[1] / ".venv-linters"
LIMITS = {"embeddings": 1e-5, "loss": 1e-4, "gradients": 1e-4}


class Host(NamedTuple):
    """The conventions of a host's repository.

    Attributes:
        linters: packages of its linters, with the versions that it names.
        lint: the command of its linter, run in a checkout; it may change files, print findings, or both.
        models: by patch, the model that must agree with the plugin's.
    """

    linters: tuple[str, ...]
    lint: tuple[str, ...]
    models: dict[str, str]


HOSTS = {
    # requirements.txt names isort==4.3.21, and yapf and flake8 without a version. isort needs setuptools.
    "torchreid": Host(
        ("isort==4.3.21", "yapf", "flake8", "setuptools<81"),
        ("bash", "linter.sh"),
        {"pcb_csalr": "pcb_csalr", "pcb_rpp": "pcb_rpp"},
    ),
    # .github/workflows/lint_python.yml enforces these errors alone. There is no dev/linter.sh any more.
    "fastreid": Host(("flake8",), ("flake8", ".", "--select=E9,F63,F7,F82"), {"pcb_csalr": "pcb_csalr"}),
}


class Baseline(NamedTuple):
    """Results of the host's linter and tests without a patch."""

    findings: Counter[str]
    tests: int
    failed: set[str]


@dataclass
class Checkout:
    """A copy of a clone, at its newest commit.

    Attributes:
        folder: the copy.
        host: conventions of the host.
    """

    folder: Path
    host: Host

    def git(self, *words: str) -> str:
        """Run git in the copy and return its output."""
        author = ("-c", "user.name=check", "-c", "user.email=check@localhost")
        return run(["git", *author, *words], self.folder, check=True).stdout

    def reset(self) -> None:
        """Restore the newest commit."""
        self.git("reset", "--quiet", "--hard", "start")
        self.git("clean", "--quiet", "-dfx")

    def findings(self) -> Counter[str]:
        """Run the host's linter; return its findings, and the lines that it changed, without line numbers."""
        environment = {"PATH": f"{LINTERS / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        done = run(self.host.lint, self.folder, environment)
        found = Counter(
            re.sub(r":\d+:\d+:", ":", line) for line in done.stdout.splitlines() if re.search(r":\d+:", line)
        )
        file = ""
        for line in self.git("diff", "--unified=0").splitlines():
            if line.startswith("+++"):
                file = line.removeprefix("+++ b/")
            elif line.startswith(("+", "-")) and not line.startswith("---"):
                found[f"{file}: the linter changes {line}"] += 1
        self.git("checkout", "--quiet", ".")
        return found

    def failures(self) -> tuple[int, set[str]]:
        """Run the host's own tests with pytest; return their number, and the names of those that fail."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors"]
            done = self.python("-m", "pytest", ".", "-q", *options, f"--junit-xml={report}")
            if not report.exists():
                return 0, {f"pytest itself: {last_line(done)}"}
            tests = list(ElementTree.parse(report).iter("testcase"))
        failed = {
            f"{one.get('classname')}.{one.get('name')}".strip(".")  # a file that cannot be imported has no class
            for one in tests
            if one.find("failure") is not None or one.find("error") is not None
        }
        return len(tests), failed

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run this Python with the copy of the host in place of an installed one."""
        return run([sys.executable, *words], self.folder, {"PYTHONPATH": str(self.folder), "PYTHONWARNINGS": "ignore"})


def run(
    words: Sequence[str | Path], folder: Path, environment: dict[str, str] | None = None, *, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` and return its result.

    Raises:
        UserError: with `check`, the command failed; or after 20 minutes.
    """
    command = [str(word) for word in words]
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=1200
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{' '.join(command[:3])} ... did not end in 20 minutes; run it in {str(folder)!r}.") from error
    if check and done.returncode:
        raise UserError(f"{' '.join(command[:8])} failed: {last_line(done)}")
    return done


def last_line(done: subprocess.CompletedProcess[str], *, errors: bool = True) -> str:
    """Return the last line that a process printed, to its standard error if `errors` and it printed there."""
    lines = ((errors and done.stderr.strip()) or done.stdout.strip()).splitlines()
    if not lines:
        return f"exit code {done.returncode}"
    return lines[-1] if len(lines[-1]) <= 150 else lines[-1][:147] + "..."


def make_linters(host: Host) -> None:
    """Install the linters of a host into the virtual environment `LINTERS`, apart from the project's environment.

    Raises:
        UserError: they cannot be installed.
    """
    if not (LINTERS / "bin" / "python").exists():
        venv.create(LINTERS, with_pip=True)
    run([LINTERS / "bin" / "python", "-m", "pip", "install", "--quiet", *host.linters], HERE, check=True)


def patches(host: str) -> list[str]:
    """Return the names of the patches of a host, the one with the model first."""
    names = sorted(path.stem for path in (HERE / host).glob("*.patch"))
    return sorted(names, key=lambda name: name != "pcb_csalr")


def size(patch: Path) -> str:
    """Return the number of added and removed lines of a patch, and of its files."""
    lines = patch.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("diff --git"))
    added = sum(line.startswith("+") and not line.startswith("+++ ") for line in lines[start:])
    removed = sum(line.startswith("-") and not line.startswith("--- ") for line in lines[start:])
    files = sum(line.startswith("diff --git") for line in lines)
    return f"+{added} -{removed} in {files} file{'s' if files > 1 else ''}"


class Report:
    """Prints one line for each check, and remembers whether one failed."""

    def __init__(self) -> None:
        self.passed = True

    def line(self, name: str, passed: bool, text: str) -> None:
        """Print the result of the check `name`."""
        self.passed &= passed
        print(f"  {name:14} {'ok  ' if passed else 'FAIL'}  {text}", flush=True)


def check_patch(checkout: Checkout, host: str, name: str, before: Baseline, report: Report) -> None:
    """Run every check of one patch."""
    patch = HERE / host / f"{name}.patch"
    print(f"{name}: {size(patch)}")
    checkout.reset()
    case = f"{host}/{name}"
    without = checkout.python(str(HERE / "cases.py"), case) if case in CASES else None

    done = run(["git", "apply", "--check", patch], checkout.folder)
    report.line("applies", not done.returncode, last_line(done) if done.returncode else "git apply --check")
    if done.returncode:
        return
    checkout.git("apply", "--whitespace=nowarn", str(patch))
    checkout.git("add", "--all")
    checkout.git("commit", "--quiet", "--no-verify", "--message", name)

    if ".py b/" in patch.read_text(encoding="utf-8"):
        compare_with_baseline(checkout, before, report)
    else:
        report.line("code", True, "no Python file is changed, so linter and tests give the same results")
    if without is not None:
        fixed = checkout.python(str(HERE / "cases.py"), case)
        passed = bool(without.returncode) and not fixed.returncode
        first, second = (last_line(done, errors=False).removeprefix(f"{case}: ") for done in (without, fixed))
        report.line("failing case", passed, f"without the patch: {first}; with it: {second}")
    if name in checkout.host.models:
        check_agreement(checkout, host, checkout.host.models[name], report)


def compare_with_baseline(checkout: Checkout, before: Baseline, report: Report) -> None:
    """Run the host's linter and tests with the patch, and compare their results with those without it."""
    new = list((checkout.findings() - before.findings).elements())
    linter = " ".join(checkout.host.lint)
    report.line("linter", not new, f"{linter}: {len(new)} new findings{': ' + new[0] if new else ''}")
    tests, failed = checkout.failures()
    # A test of a file that could not even be imported without the patch is no new failure.
    more = sorted(one for one in failed if not any(f"{one}.".startswith(f"{old}.") for old in before.failed))
    text = f"{len(before.failed)} of {before.tests} fail without the patch, {len(failed)} of {tests} with it"
    if not before.tests + tests:
        text = "pytest finds none, with and without the patch"
    report.line("host's tests", not more, f"{text}{'; new: ' + more[0] if more else ''}")


def check_agreement(checkout: Checkout, host: str, model: str, report: Report) -> None:
    """Compare embeddings in single precision, and a training step in double precision, with those of the plugin."""
    for dtype, names in (("float32", ("embeddings",)), ("float64", ("loss", "gradients"))):
        done = checkout.python(str(HERE / "agreement.py"), host, model, "--dtype", dtype)
        if done.returncode:
            report.line("agreement", False, last_line(done))
            return
        found = json.loads(done.stdout.splitlines()[-1])
        if dtype == "float32":
            report.line("weights", True, f"{found['tensors']} tensors loaded strictly, in both directions")
        for name in names:
            text = f"differ by {found[name]:.1e} in {dtype}; at most {LIMITS[name]:g}"
            report.line(name, found[name] <= LIMITS[name], text)


def check(host: str, clone: Path, names: Sequence[str]) -> bool:
    """Check patches of a host against the newest commit of `clone`; return whether every check passed.

    Raises:
        UserError: `clone` is no repository of the host, or a tool is missing.
    """
    conventions, report = HOSTS[host], Report()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(Path(folder) / "host", conventions)
        done = run(["git", "clone", "--quiet", "--shared", clone.resolve(), checkout.folder], Path(folder))
        if done.returncode:
            raise UserError(f"{str(clone)!r} is not a clone of a git repository ({last_line(done)}): give its folder.")
        if not (checkout.folder / host).is_dir():
            raise UserError(f"{str(clone)!r} has no folder {host!r}: give a clone of the repository of {host}.")
        checkout.git("tag", "start")
        print(checkout.git("log", "-1", f"--format={host} at %h of %cs: %s").strip(), flush=True)
        make_linters(conventions)
        before = Baseline(checkout.findings(), *checkout.failures())
        print(f"without a patch: {before.findings.total()} findings of the linter")
        for name in names:
            check_patch(checkout, host, name, before, report)
    return report.passed


def main(arguments: Sequence[str]) -> int:
    """Run the check with `arguments`; return the exit code."""
    passed = False

    def command() -> None:
        nonlocal passed
        parser = Parser(prog="check.py", description=first_line(__doc__ or ""))
        parser.add_argument("host", choices=tuple(HOSTS))
        parser.add_argument("clone", type=path_argument, metavar="CLONE", help="clone of the host's repository")
        parser.add_argument("--patch", nargs="+", metavar="NAME", help="patches to check (all)")
        given = parser.parse_args(arguments)
        known = patches(given.host)
        for name in given.patch or ():
            if name not in known:
                raise UserError(f"--patch {shown(name)} is unknown: {given.host} has {', '.join(known)}.")
        passed = check(given.host, given.clone, given.patch or known)
        print("every check passed" if passed else "a check FAILED")

    return exit_code("check.py", command) or int(not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
