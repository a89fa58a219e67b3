"""A configuration node whose merges tell a mistake in one line: what both hosts' schemas share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from csalr_plugin.errors import UserError, suggest


class CheckedConfig(CfgNode):  # type: ignore[misc]  # yacs carries no types
    """A yacs node whose merges take keys in any case and check each value at once.

    A host gives the case that its own keys are written in, and what a value may be.
    """

    def in_case(self, key: str) -> str:
        """Return `key` as the host writes its keys."""
        raise NotImplementedError

    def checked(self, key: str, value: Any, current: Any) -> Any:
        """Return `value` in the type that `key` has.

        Args:
            key: as it was given, in any case.
            value: a value or, as from a command line, the text of one.
            current: what the key is now.

        Raises:
            UserError: the value is not allowed.
        """
        raise NotImplementedError

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge a nested mapping.

        Raises:
            UserError: as `merge_from_list`.
        """
        for key, value in flatten(cfg_other):
            self._assign(key, value)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge pairs ``[key, value, key, value, ...]``; a value may be text, as on the command line.

        Raises:
            UserError: for an unknown key (with the nearest), a value of the wrong type or out of range, or
                a key without a value.
        """
        if len(cfg_list) % 2:
            raise UserError(f"config key '{cfg_list[-1]}' has no value; overrides are pairs: KEY VALUE.")
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            self._assign(str(key), value)

    def lookup(self, key: str) -> Any:
        """Return the value of a dotted key such as "train.lr"."""
        node: Any = self
        for name in key.split("."):
            node = node[name]
        return node

    def leaves(self) -> dict[str, Any]:
        """Return every setting as ``{dotted key: value}``."""
        return dict(flatten(self))

    def _assign(self, given: str, value: Any) -> None:
        *path, leaf = self.in_case(given).split(".")
        node: Any = self
        for name in path:
            node = node.get(name) if isinstance(node, CfgNode) else None
        if not isinstance(node, CfgNode) or leaf not in node:
            raise UserError(self._unknown_key(given))
        current = node[leaf]
        if isinstance(current, CfgNode):
            if value is None:  # a group of keys in a YAML file that has none
                return
            raise UserError(
                f"config key '{given}' is a group of keys and takes no value; its keys are "
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
        return f"unknown config key '{given}'.{hint}"


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting of a nested mapping as (dotted key, value)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
