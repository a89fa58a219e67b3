"""A small data set of drawn pedestrians in the layout of Market-1501, for training and tests without a download.

Identities differ in clothes, bags, hair and build. Cameras differ in light, colour, viewpoint and scenery.
Bounding boxes are loose, shifted, cut and occluded like those of a detector. Four identities each share the
colours of their clothes, so that colours alone give a low accuracy across cameras. An accuracy on this data set
shows that a pipeline works; it does not predict the accuracy on photographs.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from csalr_plugin.errors import UserError

VERSION = 2  # increase it with any change of the images: data of another version is refused
HEIGHT, WIDTH = 128, 64  # pixels of an image
FOLDER = Path("market1501", "Market-1501-v15.09.15")  # torchreid's place for it below the data root
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
MANIFEST = "demo_data.json"

_MOST_IDENTITIES = 1501  # the host refuses a larger number in a file name
_OVER = 3  # supersampling factor, for smooth edges
_FAMILY = 4
_STRANGER = 10_000  # first number of passers-by and distractors, above those of the identities

Colour: TypeAlias = "tuple[int, int, int]"
Ink: TypeAlias = "int | tuple[int, ...]"
Fill: TypeAlias = "tuple[int, ...] | Image.Image"
Point: TypeAlias = "tuple[float, float]"
_T = TypeVar("_T")

_BLACK, _GREY, _WHITE, _NAVY = (34, 34, 38), (118, 120, 124), (218, 216, 210), (38, 48, 98)
_RED, _GREEN, _BEIGE, _BLUE = (158, 42, 44), (52, 98, 66), (186, 158, 118), (84, 128, 182)
_CLOTH = (_BLACK, _GREY, _WHITE, _NAVY, _RED, _GREEN, _BEIGE, _BLUE)
_SKIN = ((236, 200, 172), (206, 156, 120), (140, 94, 66))
_HAIR = ((28, 24, 22), (86, 56, 36), (176, 140, 86), (150, 148, 146))
_PATTERNS = ("plain", "hoops", "logo", "checks", "open", "block", "pinstripes")


def make_demo_data(
    root: Path | str,
    *,
    seed: int = 0,
    train_identities: int = 60,
    test_identities: int = 40,
    train_images: int = 11,
    gallery_images: int = 6,
    distractors: int = 40,
    cast: float = 0.0,
) -> Path:
    """Draw the data set under `root`, unless it exists already, and return `root`.

    The same settings give the same bytes with the same versions of Pillow and NumPy. An interrupted call
    leaves no incomplete data set.

    Args:
        root: the data root of torchreid; created if missing. It must be empty or hold the data set of these settings.
        seed: of all images, 0 or more.
        train_identities: people in the training images, 2 or more; their numbers start at 1.
        test_identities: other people, 1 or more. Each has a query in each of two cameras.
        train_images: images for each training identity, 1 or more, over four to six cameras.
        gallery_images: images for each test identity, 2 or more, over up to four cameras.
        distractors: gallery images, numbered 0000, of scenery, parts of bodies and people of no identity.
        cast: largest change of each colour channel's gain in an image, as a share from 0 to 0.9; 0 by default. With a
            cast, a colour alone does not tell who it is, but its relation to the other colours of the person does.

    Raises:
        UserError: a setting is out of range, or `root` holds something else.
    """
    settings: dict[str, Any] = {
        "seed": seed,
        "train_identities": train_identities,
        "test_identities": test_identities,
        "train_images": train_images,
        "gallery_images": gallery_images,
        "distractors": distractors,
        "cast": cast,
    }
    for (name, value), least in zip(settings.items(), (0, 2, 1, 1, 2, 0, 0), strict=True):
        if value < least:
            raise UserError(f"demo data: {name} is {value}; give {least} or more")
    if not 0 <= cast <= 0.9:
        raise UserError(f"demo data: cast is {cast}; give 0 to 0.9")
    if train_identities + test_identities > _MOST_IDENTITIES:
        given = f"{train_identities} + {test_identities}"
        raise UserError(f"demo data: {given} identities; give {_MOST_IDENTITIES} or fewer in all")
    root = Path(root).expanduser()
    home = root / FOLDER.parts[0]
    if _is_made(home, settings):
        return root
    _check_free(root)
    root.mkdir(parents=True, exist_ok=True)
    shots = _plan(settings)
    with tempfile.TemporaryDirectory(prefix=".demo-data-", dir=root) as scratch:
        for split in (TRAIN, QUERY, GALLERY):
            (scratch / FOLDER / split).mkdir(parents=True)
        for shot in tqdm(shots, desc="demo data", unit="image"):
            (scratch / FOLDER / shot.split / shot.name).write_bytes(_render(seed, shot, cast))
        made = scratch / FOLDER.parent
        manifest = {"version": VERSION, "images": len(shots), "settings": settings}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        try:
            made.rename(home)
        except OSError:
            if not _is_made(home, settings):  # otherwise another process has made the same images
                raise
    return root


def _is_made(home: Path, settings: Mapping[str, int]) -> bool:
    """Return whether `home` is the complete data set; raise UserError if it exists and is something else."""
    if not home.exists():
        return False
    try:
        manifest = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
        version, images, made_with = (manifest[key] for key in ("version", "images", "settings"))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"demo data: {home} holds something else; give another folder") from None
    if (version, made_with) != (VERSION, settings):
        given = f"version {VERSION} with {dict(settings)}"
        raise UserError(
            f"demo data: {home} is of version {version} with {made_with}, not of {given}; give another folder"
        )
    found = sum(1 for _ in home.glob("*/*/*.jpg"))
    if found != images:
        raise UserError(f"demo data: {home} has {found} of its {images} images; remove it, then make it again")
    return True


def _check_free(root: Path) -> None:
    """Raise UserError unless `root` is missing or an empty folder."""
    if root.exists() and not root.is_dir():
        raise UserError(f"demo data: {root} is a file; give a folder")
    if root.is_dir() and any(not one.name.startswith(".") for one in root.iterdir()):
        raise UserError(f"demo data: {root} holds something else; give an empty or a new folder")


class _Shot(NamedTuple):
    """One image of the set. Identity 0 is a distractor; cameras are numbered from 1."""

    split: str
    identity: int
    camera: int
    number: int

    @property
    def name(self) -> str:
        return f"{self.identity:04d}_c{self.camera}s1_{self.number:06d}_00.jpg"


def _plan(settings: Mapping[str, int]) -> list[_Shot]:
    train, test = settings["train_identities"], settings["test_identities"]
    shots = []
    for identity in range(1, train + test + 1):
        rng = _rng(settings["seed"], "cameras", identity)
        seen = [int(camera) + 1 for camera in rng.permutation(len(_CAMERAS))[: rng.integers(4, 7)]]
        if identity <= train:
            shots += [_Shot(TRAIN, identity, seen[i % len(seen)], i) for i in range(settings["train_images"])]
        else:
            shots += [_Shot(QUERY, identity, camera, 0) for camera in seen[:2]]
            shots += [_Shot(GALLERY, identity, seen[i % 4], i) for i in range(settings["gallery_images"])]
    return shots + [_Shot(GALLERY, 0, 1 + i % len(_CAMERAS), i) for i in range(settings["distractors"])]


def _rng(seed: int, label: str, *numbers: int) -> np.random.Generator:
    """Return the generator of one purpose, which is independent of all others."""
    return np.random.default_rng([seed, zlib.crc32(label.encode()), *numbers])


def _pick(rng: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[int(rng.integers(len(choices)))]


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, int(value * factor)) for value in colour)
    return red, green, blue


def _image(pixels: npt.NDArray[np.floating[Any]]) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class _Camera(NamedTuple):
    """Properties that all images of a camera share."""

    gain: float
    gamma: float
    cast: tuple[float, float, float]
    yaw: float  # degrees; 0 is a person walking towards the camera, 90 one walking to the right
    tilt: float  # above 0 the camera looks down: heads grow and legs shrink
    blur: float  # largest radius, in pixels
    noise: float  # standard deviation, where white is 255
    horizon: float  # share of the scene above the ground
    wall: Colour
    ground: Colour


_CAMERAS = (
    _Camera(1.00, 1.00, (1.00, 1.00, 1.00), 10, 0.05, 0.5, 4, 0.45, (148, 144, 138), (130, 128, 124)),
    _Camera(0.86, 1.08, (0.94, 0.99, 1.09), 170, 0.15, 0.8, 7, 0.30, (110, 116, 122), (104, 108, 112)),
    _Camera(1.12, 0.93, (1.07, 1.01, 0.92), -65, 0.00, 0.6, 4, 0.55, (162, 150, 132), (152, 144, 130)),
    _Camera(0.96, 1.05, (0.97, 1.05, 0.96), 95, 0.20, 0.9, 6, 0.25, (100, 116, 96), (116, 128, 106)),
    _Camera(1.05, 1.12, (1.03, 0.97, 1.04), -150, 0.10, 0.7, 8, 0.50, (128, 106, 102), (136, 132, 136)),
    _Camera(0.80, 0.90, (1.09, 0.98, 0.88), 40, 0.25, 1.0, 9, 0.40, (98, 92, 88), (116, 108, 96)),
)


class _Body:
    """Paints parts of a body. Units are body heights: x to the right of its axis, y down from the crown.

    A place on the body is given as (across the shoulders, ahead of the spine). The yaw turns it into x and
    into how near it is, and `paint` goes from the farthest part to the nearest: one description of a person
    serves every viewpoint.
    """

    def __init__(self, canvas: Image.Image, left: float, top: float, unit: float, yaw: float, tilt: float) -> None:
        self.canvas, self.left, self.top, self.unit, self.tilt = canvas, left, top, unit, tilt
        self.cos, self.sin = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
        self.parts: list[tuple[float, Callable[[], None]]] = []

    def x(self, across: float, ahead: float) -> float:
        return across * self.cos + ahead * self.sin

    def near(self, across: float, ahead: float) -> float:
        return ahead * self.cos - across * self.sin

    def half(self, across: float, ahead: float) -> float:
        """Return half the width of an upright elliptic cylinder."""
        return math.hypot(across * self.cos, ahead * self.sin)

    def _pixel(self, x: float, y: float) -> Point:
        x *= 1 + self.tilt * (0.5 - y)
        y += 0.6 * self.tilt * y * (1 - y)
        return self.left + x * self.unit, self.top + y * self.unit

    def slab(self, near: float, fill: Fill, x: float, top: float, bottom: float, upper: float, lower: float) -> None:
        """Add a trapezoid about `x` with the half widths `upper` and `lower`."""
        corners = ((x - upper, top), (x + upper, top), (x + lower, bottom), (x - lower, bottom))
        places = [self._pixel(*corner) for corner in corners]
        self._add(near, fill, lambda pen, ink: pen.polygon(places, fill=ink))

    def oval(self, near: float, fill: Fill, x: float, y: float, half_width: float, half_height: float) -> None:
        box = (*self._pixel(x - half_width, y - half_height), *self._pixel(x + half_width, y + half_height))
        self._add(near, fill, lambda pen, ink: pen.ellipse(box, fill=ink))

    def limb(self, near: float, fill: Fill, width: float, *points: Point) -> None:
        """Add a bent tube with a dark rim, so that an arm stands out from a chest of the same colour."""
        places = [self._pixel(*point) for point in points]

        def tube(size: int, pen: ImageDraw.ImageDraw, ink: Ink) -> None:
            pen.line(places, fill=ink, width=size, joint="curve")
            for x, y in places:
                pen.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=ink)

        self._add(near, (0, 0, 0, 80), partial(tube, int(width * self.unit) + 2))
        self._add(near, fill, partial(tube, int(width * self.unit)))

    def _add(self, near: float, fill: Fill, shape: Callable[[ImageDraw.ImageDraw, Ink], None]) -> None:
        def paint() -> None:
            if isinstance(fill, Image.Image):
                mask = Image.new("L", self.canvas.size)
                shape(ImageDraw.Draw(mask), 255)
                self.canvas.paste(fill, None, mask)
            else:
                shape(ImageDraw.Draw(self.canvas, "RGBA"), fill)

        self.parts.append((near, paint))

    def paint(self) -> None:
        for _, paint in sorted(self.parts, key=lambda part: part[0]):
            paint()


class _Person:
    """The appearance of an identity in every camera. `tall` and `wide` are factors on a slim body."""

    def __init__(self, seed: int, identity: int) -> None:
        family, own = _rng(seed, "family", identity // _FAMILY), _rng(seed, "person", identity)
        self.upper, self.lower = _pick(family, _CLOTH), _pick(family, _CLOTH)
        # Neighbours in number differ, so that no two of a family wear the same pattern.
        self.pattern = _PATTERNS[(int(family.integers(len(_PATTERNS))) + identity) % len(_PATTERNS)]
        self.trim = _pick(own, [colour for colour in _CLOTH if colour != self.upper])
        self.pitch = own.uniform(0.05, 0.09)
        self.tall, self.wide = own.uniform(0.92, 1.08), own.uniform(1.0, 1.4)
        self.skin, self.hair = _pick(own, _SKIN), _pick(own, _HAIR)
        self.long_hair, self.hat = own.random() < 0.4, own.random() < 0.25
        self.coat, self.long_sleeves = own.random() < 0.2, own.random() < 0.6
        self.legs = _pick(own, ("trousers", "trousers", "shorts", "skirt"))
        self.shoes, self.bag_colour = _pick(own, _CLOTH), _pick(own, _CLOTH)
        self.bag = _pick(own, ("none", "backpack", "shoulder", "hand"))

    def draw(self, body: _Body, stride: float) -> None:
        """Draw the person with the feet `stride` ahead of and behind the spine."""
        cloth, wide = self._fabric(body), self.wide
        for side in (-1, 1):
            self._leg(body, 0.05 * side * wide, stride * side)
            self._arm(body, cloth, side, -0.8 * side * stride)
        self._torso(body, cloth)
        self._head(body)
        if self.bag == "backpack":
            half = body.half(0.09, 0.05)
            body.slab(body.near(0, -0.1), self.bag_colour, body.x(0, -0.1), 0.19, 0.44, 0.9 * half, half)
        if self.bag == "shoulder":
            strap = (body.x(-0.08, 0), 0.18), (body.x(0.1 * wide, 0), 0.47)
            body.limb(0.001, self.bag_colour, 0.02, *strap)
            body.slab(body.near(0.13, 0), self.bag_colour, body.x(0.12 * wide, 0), 0.45, 0.54, 0.06, 0.06)
        body.paint()

    def _leg(self, body: _Body, across: float, ahead: float) -> None:
        near = body.near(across, ahead) - 9  # behind the torso from every side: it covers the hips
        hip, knee = (body.x(across, 0), 0.49), (body.x(across, 0.6 * ahead + 0.02), 0.71)
        x, y = body.x(across, ahead), 0.94 - 0.3 * max(0.0, -ahead)  # the foot behind is lifted
        bare = self.legs != "trousers"
        body.limb(near, self.skin if bare else self.lower, (0.05 if bare else 0.068) * self.wide, hip, knee, (x, y))
        if self.legs == "shorts":
            body.limb(near, self.lower, 0.085 * self.wide, hip, knee)
        body.limb(near, self.shoes, 0.04, (x, y + 0.02), (body.x(across, ahead + 0.05), y + 0.025))

    def _arm(self, body: _Body, cloth: Fill, side: int, swing: float) -> None:
        near, reach = body.near(0.12 * side, 0), 0.115 * self.wide
        shoulder = (body.x(side * reach, 0), 0.215)
        elbow = (body.x(side * (reach + 0.02), 0.4 * swing - 0.01), 0.34)
        hand = body.x(side * (reach + 0.015), swing + 0.02)
        body.limb(near, self.skin, 0.04, elbow, (hand, 0.47))
        sleeve = (shoulder, elbow, (hand, 0.44)) if self.long_sleeves or self.coat else (shoulder, elbow)
        body.limb(near, cloth, 0.06 * self.wide, *sleeve)
        if self.bag == "hand" and side > 0:
            body.slab(near, self.bag_colour, hand, 0.5, 0.6, 0.05, 0.06)

    def _torso(self, body: _Body, cloth: Fill) -> None:
        chest, hips = (self.wide * body.half(across, 0.075) for across in (0.118, 0.088))
        if self.legs == "skirt":
            body.slab(0, self.lower, 0, 0.44, 0.67, hips, 1.35 * hips)
        end, hem = (0.68, 1.25 * hips) if self.coat else (0.5, hips)
        body.slab(0, cloth, 0, 0.16, 0.2, 0.5 * chest, chest)
        body.slab(0, cloth, 0, 0.2, 0.33, chest, 0.92 * chest)
        body.slab(0, cloth, 0, 0.33, end, 0.92 * chest, hem)
        front = body.x(0, 0.07)
        if self.pattern == "logo" and body.cos > 0.2:
            body.slab(0, self.trim, front, 0.25, 0.35, 0.06 * body.cos, 0.06 * body.cos)
        if self.pattern == "open" and body.cos > 0.2:
            body.slab(0, self.trim, front, 0.17, end, 0.025, 0.05 * body.cos)
        if self.bag == "backpack" and body.cos > 0.2:
            for side in (-1, 1):
                body.slab(0, self.bag_colour, body.x(0.065 * side, 0.07), 0.17, 0.36, 0.014, 0.014)

    def _head(self, body: _Body) -> None:
        near, size = 0.01, 1 / self.tall  # heads differ less than heights
        body.limb(near, self.skin, 0.05, (0, 0.13), (0, 0.17))
        body.oval(near, self.hair, 0, 0.075, 0.052 * size, 0.073 * size)
        if body.cos > -0.35:
            body.oval(near, self.skin, body.x(0, 0.022), 0.09, 0.042 * size, 0.056 * size)
        if self.hat:
            body.oval(near, self.trim, 0, 0.03, 0.058 * size, 0.038 * size)
            body.oval(near, self.trim, body.x(0, 0.035), 0.05, body.half(0.05, 0.06), 0.012)
        if self.long_hair:
            half = body.half(0.06, 0.045)
            body.slab(body.near(0, -0.12), self.hair, body.x(0, -0.03), 0.06, 0.23, half, half)

    def _fabric(self, body: _Body) -> Image.Image:
        """Return the cloth of the upper garment, over the whole canvas."""
        width, height = body.canvas.size
        x = ((np.arange(width) - body.left) / body.unit + 0.1 * body.sin)[None, :]
        y = ((np.arange(height) - body.top) / body.unit)[:, None]
        hoops, bars = y / self.pitch % 1 < 0.5, x / self.pitch % 1 < 0.5
        trimmed = {
            "hoops": hoops,
            "checks": hoops ^ bars,
            "block": y < 0.31,
            "pinstripes": 1.4 * x / self.pitch % 1 < 0.3,
        }.get(self.pattern, np.zeros((1, 1), dtype=bool))
        folds = 1 + 0.07 * np.sin(31 * x + 23 * y) + 0.06 * np.sin(47 * y - 19 * x)
        return _image(np.where(trimmed[..., None], self.trim, self.upper) * folds[..., None])


@lru_cache(maxsize=len(_CAMERAS))
def _scene(seed: int, camera: int) -> Image.Image:
    """Return the wide view without people of which every image of `camera` shows a part."""
    rng, look = _rng(seed, "scene", camera), _CAMERAS[camera - 1]
    width, height = 6 * WIDTH * _OVER, int(1.4 * HEIGHT * _OVER)
    horizon = int(look.horizon * height)
    image = Image.new("RGB", (width, height), look.wall)
    pen = ImageDraw.Draw(image)
    for x in range(0, width, int(rng.integers(30, 90))):
        pen.line((x, 0, x, horizon), fill=_shade(look.wall, 0.8), width=3)
    for _ in range(12):  # windows, doors and signs
        x, y, wide, high = (int(v) for v in rng.uniform((0, 0, 20, 20), (width, horizon, 130, 120)))
        pen.rectangle((x, y, x + wide, y + high), _shade(_pick(rng, _CLOTH), 0.9), (50, 50, 50), 3)
    pen.rectangle((0, horizon, width, height), fill=look.ground)
    lean = int(rng.integers(-120, 120))
    for x in range(-width, 2 * width, int(rng.integers(60, 130))):
        pen.line((x, horizon, x + lean, height), fill=_shade(look.ground, 0.85), width=4)
    for _ in range(10):  # posts, bins and boxes
        x, foot, wide, high = (int(v) for v in rng.uniform((0, horizon, 10, 40), (width, height, 60, 260)))
        pen.rounded_rectangle((x, foot - high, x + wide, foot), 8, fill=_shade(_pick(rng, _CLOTH), 0.8))
    coarse = Image.fromarray(rng.normal(0, 12, (height // 8, width // 8)).astype(np.float32))
    return _image(np.asarray(image) + np.asarray(coarse.resize(image.size, Image.Resampling.BICUBIC))[..., None])


def _render(seed: int, shot: _Shot, cast: float = 0.0) -> bytes:
    """Return the JPEG file of `shot`."""
    rng, look = _rng(seed, *shot), _CAMERAS[shot.camera - 1]
    width, height = WIDTH * _OVER, HEIGHT * _OVER
    scene = _scene(seed, shot.camera)
    left, top = int(rng.integers(scene.width - width)), int(rng.integers(scene.height - height))
    canvas = scene.crop((left, top, left + width, top + height))

    def add(identity: int, x: float, y: float, size: float) -> None:
        """Draw a person whose crown is at (x, y); all three arguments are shares of the box."""
        person = _Person(seed, identity)
        yaw = look.yaw + rng.normal(0, 25) + (180 if rng.random() < 0.2 else 0)
        body = _Body(canvas, x * width, y * height, size * person.tall * height, yaw, look.tilt)
        person.draw(body, rng.uniform(-0.16, 0.16))

    other = _STRANGER + int(rng.integers(1000))
    if rng.random() < 0.2:
        add(other, _pick(rng, (0.05, 0.95)), rng.uniform(0.05, 0.2), rng.uniform(0.6, 0.75))
    kind = ("scenery", "part", "whole")[shot.number // len(_CAMERAS) % 3] if shot.identity == 0 else "whole"
    if kind == "part":
        add(other + 1000, rng.uniform(0.1, 0.9), rng.uniform(-0.9, 0.35), rng.uniform(1.3, 1.8))
    elif kind == "whole":
        size = rng.uniform(0.8, 1.06)
        add(shot.identity or other + 1000, rng.normal(0.5, 0.07), rng.normal((1 - size) / 2, 0.035), size)
        _occlude(canvas, rng, lambda x: add(other, x, 0.08, 1.1))
    file = io.BytesIO()
    _photograph(canvas, look, rng, cast).save(file, "JPEG", quality=int(rng.integers(45, 90)))
    return file.getvalue()


def _occlude(canvas: Image.Image, rng: np.random.Generator, pass_by: Callable[[float], None]) -> None:
    """Hide a part of two images in five behind a pole, a bin, a rail or the edge of another person."""
    (width, height), pen = canvas.size, ImageDraw.Draw(canvas)
    colour, kind = _shade(_pick(rng, _CLOTH), 0.8), int(rng.integers(10))
    x, y = rng.uniform(0.05, 0.85) * width, rng.uniform(0.6, 0.85) * height
    if kind == 0:
        pen.rectangle((x, 0, x + rng.uniform(0.08, 0.2) * width, height), fill=colour)
    elif kind == 1:
        pen.rounded_rectangle((x - 0.3 * width, y, x + 0.3 * width, height), 12, fill=colour)
    elif kind == 2:
        pen.rectangle((0, y, width, y + 0.06 * height), fill=colour)
    elif kind == 3:
        pass_by(_pick(rng, (-0.08, 1.08)))


def _photograph(canvas: Image.Image, look: _Camera, rng: np.random.Generator, cast: float) -> Image.Image:
    """Return `canvas` at its final size, with the light, blur and noise of a camera."""
    small = canvas.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0, look.blur)))
    light = (np.asarray(small) / 255) ** look.gamma * look.gain * np.array(look.cast) * rng.uniform(0.85, 1.15)
    fall = np.linspace(rng.uniform(0.75, 1.2), rng.uniform(0.75, 1.2), WIDTH)  # light from one side
    noise = rng.normal(0, look.noise, light.shape)
    gain = rng.uniform(1 - cast, 1 + cast, 3)  # drawn last, so that no cast leaves the images as they are
    return _image(255 * light * fall[None, :, None] * gain + noise)
