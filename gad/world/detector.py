"""Reads objects, colours and boxes back from an image: nearest palette colour, connected components,
overlap with the three templates. No learning, so it is the same judge for every model."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from .scenes import BACKGROUNDS, COLOURS, EXTENTS, SHAPES, SIZE, coverage

_NAMES = (*COLOURS, *BACKGROUNDS)
_PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], dtype=np.float32)
MIN_AREA = 40  # pixels; the smallest triangle drawn covers 140
MIN_OVERLAP = 0.7  # of a component with the best template; below it the object has no shape ("blob")


@dataclass(frozen=True)
class Found:
    shape: str  # one of SHAPES, or "blob"
    colour: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    score: float  # overlap with the template, in [0, 1]

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def detect(image: torch.Tensor) -> tuple[list[Found], str]:
    """Objects and background of one image (3, 64, 64) in [0, 1]."""
    pixels = image.detach().float().cpu().numpy()
    if pixels.shape != (3, SIZE, SIZE):
        raise ValueError(f"image has shape {tuple(pixels.shape)}: the detector reads (3, {SIZE}, {SIZE})")
    distance = ((pixels[None] - _PALETTE[:, :, None, None]) ** 2).sum(1)
    nearest = distance.argmin(0)
    found = []
    for c, colour in enumerate(COLOURS):
        # Opening drops one-pixel rims (half-covered yellow on black is nearest to green); propagating back
        # restores the corners of what stays.
        mask = nearest == c
        labels, _ = ndimage.label(ndimage.binary_propagation(ndimage.binary_opening(mask), mask=mask))
        for k, where in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[where] == k
            if mask.sum() >= MIN_AREA:
                rows, columns = where
                box = (columns.start, rows.start, columns.stop, rows.stop)
                shape, score = _classify(mask)
                found.append(Found(shape, colour, tuple(map(float, box)), score))
    counts = np.bincount(nearest.ravel(), minlength=len(_NAMES))[len(COLOURS):]
    return found, list(BACKGROUNDS)[counts.argmax()]


def _classify(mask):
    """Best template for a component's mask, by intersection over union."""
    height, width = mask.shape
    y, x = np.mgrid[0:height, 0:width] + 0.5
    best = ("blob", 0.0)
    for shape in SHAPES:
        left, top, right, bottom = EXTENTS[shape]
        rx, ry = width / (left + right), height / (top + bottom)
        template = coverage(shape, (x - left * rx) / rx * 10, (y - top * ry) / ry * 10, 10.0) > 0.5
        overlap = (mask & template).sum() / (mask | template).sum()
        if overlap > best[1]:
            best = (shape, float(overlap))
    return best if best[1] >= MIN_OVERLAP else ("blob", best[1])


def judge(images: torch.Tensor, objects: list[list[tuple[str, str]]]) -> dict[str, np.ndarray]:
    """Per-image booleans against the `(shape, colour)` pairs a prompt names.

    `colour_count`: the right colours, each as often as named; `scene`: shapes too, and nothing else.
    """
    out = {"colour_count": [], "scene": []}
    for image, wanted in zip(images, objects, strict=True):
        found, _ = detect(image)
        out["colour_count"].append(sorted(f.colour for f in found) == sorted(c for _, c in wanted))
        out["scene"].append(sorted((f.shape, f.colour) for f in found) == sorted(wanted))
    return {k: np.array(v) for k, v in out.items()}


def centres(images: torch.Tensor, objects: list[list[tuple[str, str]]]) -> np.ndarray:
    """Centre (n, 2) of the first named object in each image, as `layouts` finds it."""
    return layouts(images, [wanted[:1] for wanted in objects])[:, 0]


def layouts(images: torch.Tensor, objects: list[list[tuple[str, str]]]) -> np.ndarray:
    """Centres (n, K, 2) in pixels of the K named objects in each image, matched by colour; NaN where one is absent."""
    out = np.full((len(images), len(objects[0]), 2), np.nan)
    for i, (image, wanted) in enumerate(zip(images, objects, strict=True)):
        found = detect(image)[0]
        for k, (_, colour) in enumerate(wanted):
            if match := [f for f in found if f.colour == colour]:
                out[i, k] = max(match, key=lambda f: f.score).centre
    return out
