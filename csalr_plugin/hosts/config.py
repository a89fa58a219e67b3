"""Configuration that both hosts share: YAML files, and a node that checks every value that is merged into it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from csalr_plugin.errors import UserError, first_line, shown, suggest


class CheckedConfig(CfgNode):  # type: ignore[misc]  # yacs carries no types
    """A yacs node whose merges accept keys in any case and check each value.

    A host's subclass defines the case of its keys and the check of each value.
    """

    def in_case(self, key: str) -> str:
        """Return `key` in the host's spelling."""
        raise NotImplementedError

    def checked(self, key: str, value: Any, current: Any) -> Any:
        """Return `value` in the type of the setting `key`.

        Args:
            key: the key as it was given, in any case.
            value: a value, or its text as from a command line.
            current: the present value of the setting.

        Raises:
            UserError: the value is not allowed.
        """
        raise NotImplementedError

    @property
    def given(self) -> set[str]:
        """Keys that a file or a list has set, in the host's spelling."""
        names: set[str] = self.__dict__.setdefault("_given", set())
        return names

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge a nested mapping.

        Raises:
            UserError: as `merge_from_list`, or a key stands in it twice, in two spellings.
        """
        seen: dict[str, str] = {}
        for key, value in flatten(cfg_other):
            if before := seen.get(self.in_case(key)):
                raise UserError(f"config keys {shown(before)} and {shown(key)} are the same key; give it once.")
            seen[self.in_case(key)] = key
            self._set(key, value)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge pairs ``[key, value, key, value, ...]``; a value may be text, as on the command line.

        Raises:
            UserError: for an unknown key (with the nearest names), a value that is not allowed, or a key without a
                value.
        """
        if len(cfg_list) % 2:
            raise UserError(f"config key {shown(cfg_list[-1])} has no value; overrides are pairs: KEY VALUE.")
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            self._set(str(key), value)

    def lookup(self, key: str) -> Any:
        """Return the value of a dotted key such as "train.lr"."""
        node: Any = self
        for name in key.split("."):
            node = node[name]
        return node

    def leaves(self) -> dict[str, Any]:
        """Return every setting as ``{dotted key: value}``."""
        return dict(flatten(self))

    def take_over(
        self, saved: Mapping[str, Any], keys: Collection[str], defaults: Mapping[str, Any], source: str
    ) -> list[str]:
        """Take from a checkpoint those settings that the user has not given now.

        A setting counts as given if a file or a list has set it, or if its value is not the default.

        Args:
            saved: settings that the checkpoint recorded, ``{dotted key: value}``.
            keys: the settings that a checkpoint may set.
            defaults: the default of every setting, ``{dotted key: value}``.
            source: the checkpoint's name, for messages.

        Returns:
            A line for the log about each setting on which the user and the checkpoint differ: its value, and which of
            the two it is from.

        Raises:
            UserError: a recorded value is not allowed.
        """
        lines = []
        for key in keys:
            now, before = self.lookup(key), defaults[key]
            if key in saved:
                try:
                    before = self.checked(key, saved[key], now)
                except UserError as error:
                    raise UserError(f"{source} records settings that are not allowed: {error}") from None
            if _untyped(now) == _untyped(before):
                continue
            if key in self.given or _untyped(now) != _untyped(defaults[key]):
                lines.append(f"{key} {shown(now)}: given now; {shown(before)} in the checkpoint")
            else:
                self._assign(key, before)
                lines.append(f"{key} {shown(before)}: from the checkpoint")
        return lines

    def merge_trained(
        self,
        recorded: Mapping[str, Any],
        keys: Collection[str],
        config_file: str,
        overrides: Sequence[str],
        source: str,
    ) -> None:
        """Merge the settings of a trained network: overrides count before the file, and the file before the checkpoint.

        Args:
            recorded: settings of the checkpoint, ``{dotted key: value}``.
            keys: the settings that a checkpoint may set.
            config_file: a file of the host, or empty.
            overrides: pairs ``[key, value, ...]``.
            source: the checkpoint's name, for messages.

        Raises:
            UserError: a key is unknown, or a value is not allowed.
        """
        defaults = self.leaves()
        if config_file:
            self.merge_from_file(config_file)
        self.merge_from_list(overrides)
        self.take_over(recorded, keys, defaults, source)

    def _set(self, given: str, value: Any) -> None:
        """Assign a value that the user gave."""
        self._assign(given, value)
        self.given.add(self.in_case(given))

    def _assign(self, given: str, value: Any) -> None:
        *path, leaf = self.in_case(given).split(".")
        node: Any = self
        for name in path:
            node = node.get(name) if isinstance(node, CfgNode) else None
        if not isinstance(node, CfgNode) or leaf not in node:
            raise UserError(self._unknown_key(given))
        current = node[leaf]
        if isinstance(current, CfgNode):
            if value is None:  # a group in a YAML file with no keys in it
                return
            raise UserError(
                f"config key {shown(given)} is a group of keys and takes no value; its keys are "
                f"{', '.join(f'{given}.{name}' for name in current)}."
            )
        wanted = self.checked(given, value, current)
        if wanted != current or type(wanted) is not type(current):
            setattr(node, leaf, wanted)

    def _unknown_key(self, given: str) -> str:
        known = list(self.leaves())
        hint = suggest(self.in_case(given), known)
        if not hint:
            node = self.in_case(given).split(".")[0]
            below = [key for key in known if key.startswith(node + ".")]
            hint = f" Known keys: {', '.join(below)}." if below else f" Known groups: {', '.join(self)}."
        return f"unknown config key {shown(given)}.{hint}"


def _untyped(value: Any) -> Any:
    """Return tuples as lists: files and checkpoints do not tell them apart."""
    return list(value) if isinstance(value, tuple) else value


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting of a nested mapping as (dotted key, value)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recordable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint can hold: numbers, text, booleans, and lists or tuples of these."""
    plain = (bool, int, float, str)
    return {
        key: list(value) if isinstance(value, (list, tuple)) else value
        for key, value in settings.items()
        if isinstance(value, plain)
        or (isinstance(value, (list, tuple)) and all(isinstance(one, plain) for one in value))
    }


def recorded_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint recorded under "settings", or an empty dictionary."""
    settings = checkpoint.get("settings")
    if not isinstance(settings, Mapping):
        return {}
    return recordable({key: value for key, value in settings.items() if isinstance(key, str)})


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plugin's rule for numbers, and without keys given twice, dates and cycles.

    Text that is no number by the rule of `keys` stays text, so that the check of a number refuses it.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] not in ("int", "float", "timestamp", "value")
        ]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # so that an alias inside its own anchor is an error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {shown(name)} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"-?(0|[1-9][0-9]{0,29})$", re.ASCII), None)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"-?([0-9]+\.[0-9]*([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)$", re.ASCII),
    None,
)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML file of config keys; no file runs code.

    Raises:
        UserError: the file cannot be read, is not YAML, gives a key twice, or holds no mapping.
    """
    # yacs would execute a .py file.
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"config file {str(path)!r} must be a .yaml or .yml file.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, UnicodeDecodeError):
            reason = "not text"
        else:
            reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"config file {str(path)!r}{where} cannot be read as YAML: {reason}.") from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"config file {str(path)!r} must hold a mapping of config keys, such as 'model: {{name: pcb}}'."
        )
    return content
