"""The sheet of ranked results: the best, median and worst queries with their nearest gallery images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from csalr_plugin.hosts.images import read_image

QUERIES = 4
"""Queries in each of the three sections."""
_HEIGHT, _GAP, _FRAME, _LINE = 144, 10, 4, 16  # pixels
_RIGHT, _WRONG, _INK, _FAINT = "#1a9850", "#d73027", "#222222", "#666666"


def average_precision(row: NDArray[Any], matches: NDArray[np.bool_], valid: NDArray[np.bool_]) -> float:
    """Return the average precision of one query, NaN if it has no match.

    Args:
        row: distances to the gallery images, (G,).
        matches: gallery images of the same identity, (G,).
        valid: gallery images that count: all but those of the same identity in the same camera, (G,).
    """
    places = np.flatnonzero(matches[valid][np.argsort(row[valid], kind="stable")])
    return float(np.mean(np.arange(1, len(places) + 1) / (places + 1.0))) if len(places) else float("nan")


def draw_ranked(
    path: Path,
    distances: NDArray[Any],
    query: Sequence[Any],
    gallery: Sequence[Any],
    *,
    most: int = 10,
    title: str = "",
) -> None:
    """Draw the queries with the best, the median and the worst average precision (AP), one per row.

    A row has the query and its nearest gallery images. The frame is green for the same identity and red for another
    one. Gallery images of the query's identity in its own camera are left out, as in the evaluation. Below each image
    are its identity and camera, and the distance or the AP.

    Args:
        path: the picture, a PNG or JPEG file; its folder must exist.
        distances: from each query to each gallery image, (Q, G).
        query, gallery: items (path, identity, camera, ...). The path may be a tuple of paths, as in a video dataset,
            whose first frame is drawn.
        most: gallery images in a row.
        title: the name of the dataset.
    """
    identities, cameras = (np.asarray([item[place] for item in gallery]) for place in (1, 2))
    precisions = np.full(len(query), np.nan)
    for number, (row, item) in enumerate(zip(distances, query, strict=True)):
        matches = identities == item[1]
        precisions[number] = average_precision(row, matches, ~(matches & (cameras == item[2])))
    ranked = [int(number) for number in np.argsort(-precisions, kind="stable") if not np.isnan(precisions[number])]
    if not ranked:
        return
    count = min(QUERIES, max(1, len(ranked) // 3)) if len(ranked) >= 3 else len(ranked)
    middle = max(0, (len(ranked) - count) // 2)
    sections = [("best queries", ranked[:count])]
    if len(ranked) >= 3:
        sections += [("median queries", ranked[middle : middle + count]), ("worst queries", ranked[-count:])]
    mean = float(np.nanmean(precisions))
    sheet = _Sheet(f"{title}: mAP {mean:.1%} of {len(ranked)} queries".removeprefix(": "), most)
    for heading, numbers in sections:
        sheet.heading(heading)
        for number in numbers:
            item, row = query[number], distances[number]
            matches = identities == item[1]
            valid = np.flatnonzero(~(matches & (cameras == item[2])))
            nearest = valid[np.argsort(row[valid], kind="stable")][:most]
            cells = [_Cell(item, "query", f"AP {precisions[number]:.1%}", _INK)]
            for rank, one in enumerate(nearest, start=1):
                colour = _RIGHT if matches[one] else _WRONG
                cells.append(_Cell(gallery[one], f"rank {rank}", f"d {row[one]:.3g}", colour))
            sheet.row(cells)
    sheet.save(path)


class _Cell:
    """An image of the sheet with its frame and the text below it."""

    def __init__(self, item: Any, name: str, value: str, colour: str) -> None:
        first = item[0] if isinstance(item[0], str) else item[0][0]
        self.image, self.colour = read_image(first), colour
        self.lines = (f"{name}  {value}", f"id {item[1]}  cam {item[2]}")


class _Sheet:
    """A picture that grows by headings and rows of cells."""

    def __init__(self, title: str, most: int) -> None:
        self.cell = (104, _HEIGHT)
        self.width = 2 * _GAP + (most + 1) * (self.cell[0] + _GAP) + _GAP
        self.parts: list[Image.Image] = []
        self._text(title, 20, 40)
        self._text(
            "green frame: same identity; red frame: another identity; d: distance; AP: average precision", 12, 22
        )

    def _text(self, text: str, size: int, height: int) -> None:
        part = Image.new("RGB", (self.width, height), "white")
        ImageDraw.Draw(part).text((2 * _GAP, height // 4), text, _INK, font=ImageFont.load_default(size))
        self.parts.append(part)

    def heading(self, text: str) -> None:
        self._text(text, 16, 34)

    def row(self, cells: Sequence[_Cell]) -> None:
        wide, tall = self.cell
        part = Image.new("RGB", (self.width, tall + 2 * _LINE + _GAP + 6), "white")
        pen, font = ImageDraw.Draw(part), ImageFont.load_default(11)
        left = 2 * _GAP
        for number, cell in enumerate(cells):
            picture = cell.image.copy()
            scale = min((wide - 2 * _FRAME) / picture.width, (tall - 2 * _FRAME) / picture.height)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.BICUBIC)
            x, y = left + (wide - size[0]) // 2, (tall - size[1]) // 2
            pen.rectangle(
                (x - _FRAME, y - _FRAME, x + size[0] + _FRAME - 1, y + size[1] + _FRAME - 1), fill=cell.colour
            )
            part.paste(picture, (x, y))
            for line, (text, ink) in enumerate(zip(cell.lines, (_INK, _FAINT), strict=True)):
                pen.text((left + wide // 2, tall + 3 + line * _LINE), text, ink, font=font, anchor="ma")
            left += wide + (2 * _GAP if number == 0 else _GAP)
        self.parts.append(part)

    def save(self, path: Path) -> None:
        sheet = Image.new("RGB", (self.width, sum(part.height for part in self.parts) + _GAP), "white")
        top = 0
        for part in self.parts:
            sheet.paste(part, (0, top))
            top += part.height
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
