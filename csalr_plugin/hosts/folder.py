"""User datasets, named `folder:PATH` in both hosts: a folder of images, or a list of images.

A folder has train/, query/ and gallery/. The first and the last may also be named bounding_box_train/ and
bounding_box_test/. Each of them has either one folder for each identity, ID/anything.jpg, or files that are named like
those of Market-1501, ID_cCAMERA_anything.jpg. A list is a .csv or .json file with the columns path, identity, split
and, if known, camera.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tabulate import tabulate

from csalr_plugin.errors import UserError, suggest
from csalr_plugin.hosts.data import check_evaluation
from csalr_plugin.hosts.images import is_image_name

PREFIX = "folder:"
SPLITS = ("train", "query", "gallery")
LAYOUT = "train/, query/ and gallery/, each with ID/anything.jpg or ID_cCAMERA_anything.jpg"

_FOLDERS = {
    "train": ("train", "bounding_box_train"),
    "query": ("query",),
    "gallery": ("gallery", "bounding_box_test"),
}
_COLUMNS = ("path", "identity", "camera", "split")
_MARKET_NAME = re.compile(r"(.+?)_c(\d+)", re.ASCII)
_SEED = 0  # for drawing queries from the gallery; fixed, so that runs are evaluated on the same queries

Label: TypeAlias = "int | str"


class FolderImage(NamedTuple):
    """One image of a user dataset."""

    path: str
    identity: Label
    camera: Label | None  # None: not known
    source: str  # the path, or the row of the list, for messages

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key: identity, then path, as for the datasets of the hosts."""
        return *_natural(self.identity), self.path


@dataclass
class FolderData:
    """The images of a user dataset.

    Attributes:
        name: ``folder:PATH``, as the user gave it.
        images: the images of each of `SPLITS`, sorted by identity and path. A missing split is an empty list.
        skipped: for each split, the number of skipped files by reason.
        notes: sentences for the report.
    """

    name: str
    images: dict[str, list[FolderImage]]
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    notes: list[str] = field(default_factory=list)

    def items(self, split: str) -> list[tuple[str, int, int]]:
        """Return path, identity and camera of each image of `split`. Identities and cameras are numbered from 0.

        The identities of query and gallery are numbered together, those of train separately. Each query or gallery
        image whose camera is not known gets a camera number of its own, so that it matches every image of its identity.
        """
        together = ("train",) if split == "train" else ("query", "gallery")
        identities = _numbers(image.identity for one in together for image in self.images[one])
        cameras = _numbers(image.camera for one in SPLITS for image in self.images[one] if image.camera is not None)
        unknown = len(cameras)
        items = []
        for one in together:
            for image in self.images[one]:
                camera = unknown if image.camera is None else cameras[image.camera]
                if image.camera is None and split != "train":
                    unknown += 1
                if one == split:
                    items.append((image.path, identities[image.identity], camera))
        return items

    def report(self) -> str:
        """Return a table of the images, identities, cameras and skipped files of each split, and the notes."""
        rows = []
        for split in SPLITS:
            images = self.images[split]
            cameras = {image.camera for image in images if image.camera is not None}
            skipped = ", ".join(f"{reason}: {count}" for reason, count in self.skipped[split].items())
            known = len(cameras) if cameras or not images else "not known"
            rows.append((split, len(images), len({image.identity for image in images}), known, skipped or "none"))
        table = tabulate(rows, (self.name, "images", "identities", "cameras", "skipped"), disable_numparse=True)
        return "\n".join((table, *self.notes))

    def check(self, as_source: bool, as_target: bool, shared: bool, key: str) -> None:
        """Check that the dataset has the splits that a run needs, and that train and query share no identity.

        Args:
            as_source: whether the run trains on the dataset.
            as_target: whether the run evaluates on the dataset.
            shared: whether train and query may share identities.
            key: name of the setting `shared`, for the message.

        Raises:
            UserError: a split is missing, no query has a match, or an identity is in both train and query.
        """
        if as_source and not self.images["train"]:
            raise UserError(f"dataset '{self.name}' has no training images; it needs {LAYOUT}.")
        if not as_target:
            return
        if not self.images["gallery"]:
            raise UserError(f"dataset '{self.name}' has no gallery images to evaluate on; it needs {LAYOUT}.")
        if not self.images["query"]:
            raise UserError(
                f"dataset '{self.name}' has no query images, and they cannot be drawn from the gallery, because no "
                "gallery identity has two images from different cameras; add images."
            )
        check_evaluation(self.name, self.items("query"), self.items("gallery"))
        in_train = {image.identity: image.source for image in self.images["train"]}
        for image in self.images["query"]:
            if as_source and image.identity in in_train and not shared:
                raise UserError(
                    f"dataset '{self.name}': identity {str(image.identity)!r} is in train "
                    f"({in_train[image.identity]}) and in query ({image.source}), so the evaluation would use a person "
                    f"from the training; remove the identity from one of them, or allow it with {key} True."
                )


def is_folder_name(name: str) -> bool:
    """Return whether `name` is that of a user dataset, ``folder:PATH``."""
    return name.startswith(PREFIX)


def file_stem(name: str) -> str:
    """Return the name of a dataset in a form for file names: ``folder_data_mine`` for ``folder:data/mine``."""
    if not is_folder_name(name):
        return name
    path = re.sub(r"[^\w.-]+", "_", name.removeprefix(PREFIX)).strip("_")
    return f"folder_{path[-90:]}"


def read_folder_data(name: str) -> FolderData:
    """List the images of the user dataset ``folder:PATH``, without decoding them.

    If there is no query split, one image of each gallery identity becomes its query, provided that it has a match.

    Raises:
        UserError: the folder or list does not exist or cannot be used. The message names the file and the row.
    """
    given = name.removeprefix(PREFIX)
    if not given.strip():
        raise UserError(
            f"dataset '{name}' has no path; give a folder, or a .csv or .json list, such as folder:my-data."
        )
    place = Path(os.path.expanduser(given))
    data = FolderData(name, {split: [] for split in SPLITS})
    try:
        if place.is_dir():
            _read_folder(place, data)
        elif place.is_file() and place.suffix.lower() in (".csv", ".json"):
            _read_list(place, data)
        elif place.exists():
            raise UserError(f"dataset '{name}' is neither a folder nor a .csv or .json list; give one of them.")
        else:
            raise UserError(f"dataset '{name}' does not exist ({place.absolute()}); give the path of a folder or list.")
    except OSError as error:
        raise UserError(f"dataset '{name}': '{error.filename}' cannot be read ({error.strerror}).") from None
    for images in data.images.values():
        images.sort(key=lambda image: image.order)
    if data.images["gallery"] and not data.images["query"]:
        _hold_out(data)
    _note_cameras(data)
    _note_matches(data)
    return data


def _read_folder(folder: Path, data: FolderData) -> None:
    there = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    for split, names in _FOLDERS.items():
        found = [name for name in names if name in there]
        if len(found) > 1:
            raise UserError(f"dataset '{data.name}' has both {found[0]}/ and {found[1]}/; keep one of them.")
        if found:
            data.images[split] = _read_split(folder / found[0], data.skipped[split])
            if not data.images[split]:
                raise UserError(f"dataset '{data.name}': {folder / found[0]} has no images; it needs {LAYOUT}.")
    if not any(data.images.values()):
        content = ", ".join(sorted(there)[:3]) or "no folder"
        raise UserError(f"dataset '{data.name}' needs {LAYOUT}; {folder} has {content}.")


def _read_split(folder: Path, skipped: Counter[str]) -> list[FolderImage]:
    """List the images of train/, query/ or gallery/ in either layout, and count the skipped files."""
    files, identities = [], {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name.startswith("."):
            skipped["hidden folders"] += 1
        elif entry.is_dir():
            identities[entry.name] = list(_image_files(Path(entry.path), skipped))
        elif _is_usable(entry.name, skipped):
            files.append(entry.name)
    inside = [(name, path) for name, paths in identities.items() for path in paths]
    if inside:
        named = next((name for name in files if _MARKET_NAME.match(name)), None)
        if named is not None:
            raise UserError(
                f"{folder} mixes two layouts: a folder for each identity, such as {inside[0][0]!r}, and files with "
                f"identity and camera in their names, such as {named!r}; keep one of them."
            )
        if files:
            skipped["images outside the folders of identities"] += len(files)
        return [FolderImage(str(path), _label(name), None, str(path)) for name, path in inside]
    images = []
    for name in files:
        match = _MARKET_NAME.match(name)
        if match is None:
            raise UserError(
                f"image {str(folder / name)!r}: its name does not contain identity and camera; name it "
                "ID_cCAMERA_anything.jpg, such as 0002_c1_07.jpg, or put it into a folder named after the identity."
            )
        if match[1] == "-1":
            skipped["images of identity -1 (unusable)"] += 1
        else:
            images.append(FolderImage(str(folder / name), _label(match[1]), _label(match[2]), str(folder / name)))
    return images


def _image_files(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Yield the image files at any depth of the folder of one identity."""

    def stop(error: OSError) -> None:
        raise error  # os.walk ignores folders that it cannot read

    empty = True
    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if _is_usable(name, skipped):
                empty = False
                yield Path(place, name)
    if empty:
        skipped["folders without images"] += 1


def _is_usable(name: str, skipped: Counter[str]) -> bool:
    if name.startswith("."):
        skipped["hidden files"] += 1
    elif not is_image_name(name):
        skipped[f"files that are not images ({Path(name).suffix!r})"] += 1
    else:
        return True
    return False


def _read_list(file: Path, data: FolderData) -> None:
    rows = _csv_rows(file) if file.suffix.lower() == ".csv" else _json_rows(file)
    seen: dict[str, str] = {}
    for row, values in rows:
        image, split = _from_row(file, row, values)
        path = os.path.abspath(image.path)
        if path in seen:
            raise UserError(f"{file}, {row}: image {image.path!r} is already in {seen[path]}; keep one of them.")
        seen[path] = row
        data.images[split].append(image)
    if not seen:
        raise UserError(f"{file} lists no images; it needs a row for each image with {', '.join(_COLUMNS)}.")


def _from_row(file: Path, row: str, values: Mapping[str, str]) -> tuple[FolderImage, str]:
    for column in ("path", "identity", "split"):
        if not values.get(column):
            raise UserError(f"{file}, {row}: {column} is empty; each row needs path, identity and split.")
    split = values["split"].lower()
    if split not in SPLITS:
        hint = suggest(split, SPLITS)
        raise UserError(f"{file}, {row}: split is {values['split']!r}; it must be one of {', '.join(SPLITS)}.{hint}")
    path = file.parent / os.path.expanduser(values["path"])
    if not os.path.isfile(path):  # False for a path that is too long, where Path.is_file raises
        reason = "is not a file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{file}, {row}: image {str(path)!r} {reason}; paths are relative to the folder of the list.")
    camera = values.get("camera")
    return FolderImage(str(path), _label(values["identity"]), _label(camera) if camera else None, row), split


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield "row N", counted as in a spreadsheet, and the values of the row by column."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:  # spreadsheets may write a byte order mark
            first = text.readline()
            text.seek(0)
            # Spreadsheets separate by semicolons in countries with a decimal comma.
            reader = csv.reader(text, delimiter=max(",;\t", key=first.count), strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            _check_columns(file, header)
            for cells in reader:
                row = f"row {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise UserError(f"{file}, {row}: there are {len(cells)} values for {len(header)} columns.")
                yield row, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    except UnicodeDecodeError:
        raise UserError(f"{file} cannot be read as CSV: it is not UTF-8 text; save it as CSV UTF-8.") from None
    except csv.Error as error:
        raise UserError(f"{file}, row {reader.line_num} cannot be read as CSV: {error}.") from None


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield "entry N", counted from 1, and the values of the entry."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = str(error) or "it is nested too deeply"
        raise UserError(f"{file} cannot be read as JSON: {reason}.") from None
    if not isinstance(content, list):
        raise UserError(f"{file} must be a JSON list of objects with {', '.join(_COLUMNS)}.")
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise UserError(f"{file}, entry {number}: it must be an object with {', '.join(_COLUMNS)}.")
        values = {name.strip().lower(): value for name, value in entry.items()}
        for column in _COLUMNS:
            value = values.get(column)
            if isinstance(value, (bool, float, list, dict)):
                raise UserError(f"{file}, entry {number}: {column} must be text or an integer.")
            values[column] = "" if value is None else str(value).strip()
        yield f"entry {number}", values


def _check_columns(file: Path, header: list[str]) -> None:
    for column in ("path", "identity", "split"):
        if header.count(column) != 1:
            which = "has no column" if column not in header else "has more than one column"
            raise UserError(
                f"{file}, row 1 {which} '{column}'; the first row must name the columns: {', '.join(_COLUMNS)} (camera "
                "may be missing)."
            )


def _hold_out(data: FolderData) -> None:
    """Move one random image of each gallery identity to the query, if another image of it remains as a match."""
    by_identity = defaultdict(list)
    for image in data.images["gallery"]:
        by_identity[image.identity].append(image)
    for identity, images in by_identity.items():
        cameras = {image.camera for image in images}
        if len(images) > 1 and (len(cameras) > 1 or None in cameras):
            # Each identity has its own generator, so that a new identity does not change the queries of the others.
            query = random.Random(f"{_SEED} {identity}").choice(images)
            data.images["query"].append(query)
    held_out = {image.path for image in data.images["query"]}
    data.images["gallery"] = [image for image in data.images["gallery"] if image.path not in held_out]
    left = len(by_identity) - len(held_out)
    data.notes.append(
        f"There is no query split. Queries drawn from the gallery, one for each identity, with seed {_SEED}: "
        f"{len(held_out)}."
        + (f" Identities without a query, because they have no second image: {left}." if left else "")
    )


def _note_cameras(data: FolderData) -> None:
    unknown = sum(image.camera is None for images in data.images.values() for image in images)
    if unknown:
        which = "the cameras" if unknown == sum(map(len, data.images.values())) else f"the cameras of {unknown} images"
        data.notes.append(
            f"{which.capitalize()} are not known: images of one identity count as images from different cameras."
        )


def _note_matches(data: FolderData) -> None:
    cameras = defaultdict(set)
    for _, identity, camera in data.items("gallery"):
        cameras[identity].add(camera)
    alone = sum(not cameras[identity] - {camera} for _, identity, camera in data.items("query"))
    if 0 < alone < len(data.images["query"]):
        data.notes.append(
            "The evaluation leaves out query images without a gallery image of their identity from another camera: "
            f"{alone}."
        )


def _label(text: str) -> Label:
    """Return the integer that `text` is, so that 2 and 0002 are the same identity or camera, else the text."""
    text = unicodedata.normalize("NFC", text)  # file names of macOS are in the form NFD
    return int(text) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else text


def _natural(label: Label) -> tuple[bool, Label]:
    return isinstance(label, str), label


def _numbers(labels: Iterable[Label]) -> dict[Label, int]:
    return {label: number for number, label in enumerate(sorted(set(labels), key=_natural))}
