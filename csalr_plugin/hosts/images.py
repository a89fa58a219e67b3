"""The image reader of both hosts: any file that Pillow reads becomes the same RGB pixels in each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from csalr_plugin.errors import UserError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, ImageCms.PyCMSError)
"""Exceptions that Pillow raises for a file that is missing or does not decode."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, turned upright by its EXIF orientation.

    Transparency is dropped and the stored colours are kept, as in torchvision and OpenCV. Of 16-bit grey values the
    high byte is kept, as Pillow does for 16-bit colour. 32-bit values are taken to range from 0 to 1 (floating point
    only), 255 or 65535, whichever the largest value fits.

    Raises:
        UserError: the file is missing or does not decode, or its values have none of these ranges.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(_upright(image))
    except UNREADABLE as error:
        raise unreadable(str(path), error) from None


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # malformed EXIF fails in many ways, and the pixels may be intact
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # convert("RGB") would clip these at 255
        return Image.fromarray(_to_bytes(image)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.mode in ("La", "RGBa"):  # colours multiplied by the transparency
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif "transparency" in image.info:  # Pillow warns about a direct conversion to RGB
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_bytes(image: Image.Image) -> np.ndarray:
    """Return grey values of 16 or 32 bits as bytes, (H, W)."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    # The 16-bit formats that some versions of Pillow open as 32-bit integers.
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM", "JPEG2000"):
        return (values.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
    if not (low >= 0 and high <= 65535):  # a NaN too
        raise ValueError(f"its values range from {low:g} to {high:g}; allowed are 0 to 1, 0 to 255 and 0 to 65535")
    if image.mode == "F" and high <= 1:
        values = values * 255
    elif high > 255:
        values = np.floor(values / 256)
    return np.rint(values).astype(np.uint8)


def unreadable(path: str, error: BaseException) -> UserError:
    """Return the error for an image that Pillow raised `error`, one of `UNREADABLE`, for."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, UnidentifiedImageError):  # its text is only the path
        reason = "the content is not an image"
    return UserError(f"image '{path}' cannot be read ({reason}); replace it, or remove it from the dataset.")


def check_images(paths: Collection[str]) -> None:
    """Decode every image once, so that a damaged file is found before training starts.

    Raises:
        UserError: names the first image that cannot be read.
    """

    def decode(path: str) -> None:
        read_image(path)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(decode, paths), total=len(paths), desc="Checking images", unit="", mininterval=2.0):
            pass


def is_image_name(name: str) -> bool:
    """Return whether `name` ends like an image file that Pillow opens, in any case."""
    return Path(name).suffix.lower() in _extensions()


@lru_cache(maxsize=1)
def _extensions() -> frozenset[str]:
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)
