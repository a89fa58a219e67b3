"""Settings of the documentation site. `make docs` builds it; tests/test_docs.py builds it with warnings as errors."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from csalr_plugin.hosts.keys import KEYS
from csalr_plugin.version import __version__

ROOT = Path(__file__).parents[1]

project = "csalr_plugin"
author = "The csalr_plugin developers"
copyright = "2026, The csalr_plugin developers"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # tests/test_docs.py runs the notebook
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # output of a console is no program

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "code"
smartquotes = False  # "--flag" stays as typed

html_theme = "furo"
html_title = f"csalr_plugin {__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False

AREAS = {
    "csalr_plugin/attention": "Attention blocks",
    "csalr_plugin/models": "Networks and weights",
    "csalr_plugin/hosts/torchreid": "In torchreid",
    "csalr_plugin/hosts/fastreid": "In fast-reid",
    "csalr_plugin/hosts": "Settings, data and checkpoints in both hosts",
    "projects/paper": "csalr reproduce and csalr attention-maps",
    "projects/benchmark": "csalr bench",
    "projects": "Other studies",
    "csalr_plugin": "Commands, files and export",
}
"""Heading for the messages of each folder; the first folder that fits counts."""


def settings_table() -> str:
    """Return the plugin's settings as a Markdown table."""
    rows = [
        f"| `csalr.{key.name}` | {f'`{_as_typed(key.default)}`' if _as_typed(key.default) else ''} | {key.comment} |"
        for key in KEYS
    ]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def messages() -> str:
    """Return every error message in the code as Markdown lists, one per area; `…` stands for a value."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for folder in ("csalr_plugin", "projects"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            area = next(title for prefix, title in AREAS.items() if name.startswith(prefix))
            found[area].update(messages_of(ast.parse(path.read_text(encoding="utf-8"))))
    parts = []
    for area in AREAS.values():
        parts += [f"### {area}", *(f"- {message}" for message in sorted(found[area], key=str.lower))]
    return "\n\n".join(parts)


def messages_of(tree: ast.AST) -> Iterator[str]:
    """Yield the message of each `UserError` and `SharedError` of a module that has one in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id not in ("UserError", "SharedError", "SystemExit"):
                continue
            pieces = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            texts = [str(piece.value) if isinstance(piece, ast.Constant) else "…" for piece in pieces]
            message = re.sub(r"…[….,: ]*…", "…", "".join(texts)).strip()
            if len(message) > 20:
                yield "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|$" else letter for letter in message)


def _as_typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


myst_substitutions = {"settings": settings_table(), "messages": messages()}
