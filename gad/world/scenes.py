"""Procedural captioned scenes: 1 to 3 coloured shapes on a plain background, 64 × 64 RGB.

A caption names shapes and colours and leaves the layout open (the background too, half of the time), so the
initial noise has to decide it. Scenes follow from `(n, seed, split)`; nothing is stored.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

SIZE = 64
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.86, 0.13, 0.15),
    "green": (0.13, 0.66, 0.25),
    "blue": (0.14, 0.28, 0.90),
    "yellow": (0.97, 0.83, 0.12),
}
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.55, 0.55, 0.55), "black": (0.05, 0.05, 0.05)}
UNSEEN = (("circle", "blue"), ("square", "yellow"), ("triangle", "red"))  # pairs that training never shows
COUNTS = (0.4, 0.4, 0.2)  # probability of 1, 2 and 3 objects
RADII = ((11.0, 15.0), (10.0, 14.0), (9.0, 12.0))  # pixels, by number of objects
WORDS = ("a", "and", ",", "on", "background", *SHAPES, *COLOURS, *BACKGROUNDS)

# Half-extents of each shape in units of its radius: left, top, right, bottom of the centre.
EXTENTS = {"circle": (1, 1, 1, 1), "square": (0.9, 0.9, 0.9, 0.9), "triangle": (1, 0.9, 1, 0.9)}
_EXTENTS = np.array([EXTENTS[s] for s in SHAPES])
_PAIRS = [(i, j) for i in range(len(SHAPES)) for j in range(len(COLOURS))]
_UNSEEN = [(SHAPES.index(s), list(COLOURS).index(c)) for s, c in UNSEEN]
SPLITS = {"train": 0, "test": 1, "unseen": 2}


@dataclass(frozen=True)
class Scenes:
    """`n` scenes as arrays. Slots beyond `count` hold no object.

    count (n,), shape and colour (n, 3) indices, centre (n, 3, 2) in pixels (x, y), radius (n, 3) in pixels,
    background (n,) index, named (n,) whether the caption says the background.
    """

    count: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    background: np.ndarray
    named: np.ndarray

    def __len__(self):
        return len(self.count)

    def __getitem__(self, index):
        index = [index] if isinstance(index, (int, np.integer)) else index
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    def objects(self, i: int) -> list[tuple[str, str]]:
        """The `(shape, colour)` names of scene `i`."""
        colours = list(COLOURS)
        return [(SHAPES[s], colours[c]) for s, c in zip(self.shape[i], self.colour[i], strict=True)][
            : self.count[i]
        ]

    def captions(self) -> list[str]:
        backgrounds = list(BACKGROUNDS)
        return [
            caption(self.objects(i), backgrounds[self.background[i]] if self.named[i] else None)
            for i in range(len(self))
        ]

    def boxes(self, i: int) -> np.ndarray:
        """`(count, 4)` boxes x0, y0, x1, y1 in pixels."""
        n = self.count[i]
        e = _EXTENTS[self.shape[i, :n]] * self.radius[i, :n, None] * np.array([-1, -1, 1, 1])
        return np.tile(self.centre[i, :n], 2) + e

    def render(self) -> torch.Tensor:
        """Images (n, 3, 64, 64) in [0, 1], edges antialiased over one pixel."""
        grid = np.arange(SIZE, dtype=np.float32) + 0.5
        palette = np.array(list(COLOURS.values()), dtype=np.float32)
        image = np.array(list(BACKGROUNDS.values()), dtype=np.float32)[self.background][:, :, None, None]
        image = np.broadcast_to(image, (len(self), 3, SIZE, SIZE)).copy()
        for k in range(self.shape.shape[1]):
            for s, name in enumerate(SHAPES):
                i = np.flatnonzero((self.count > k) & (self.shape[:, k] == s))
                if not len(i):
                    continue
                x = grid[None, None, :] - self.centre[i, k, 0].astype(np.float32)[:, None, None]
                y = grid[None, :, None] - self.centre[i, k, 1].astype(np.float32)[:, None, None]
                a = coverage(name, x, y, self.radius[i, k].astype(np.float32)[:, None, None])[:, None]
                image[i] += a * (palette[self.colour[i, k]][:, :, None, None] - image[i])
        return torch.from_numpy(image)


def coverage(shape: str, x, y, r):
    """How much of each pixel the shape covers, in [0, 1]; `x`, `y` relative to the centre, in pixels."""
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - r
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.9 * r
    else:  # apex (0, −0.9 r), base from (−r, 0.9 r) to (r, 0.9 r)
        slope = np.float32(1 / np.sqrt(1.8**2 + 1))
        distance = np.maximum(y - 0.9 * r, slope * (1.8 * abs(x) - y - 0.9 * r))
    return np.clip(0.5 - distance, 0, 1)


def caption(objects: list[tuple[str, str]], background: str | None = None) -> str:
    """'a red circle, a blue square and a green triangle on a white background'."""
    names = [f"a {colour} {shape}" for shape, colour in objects]
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return text + (f" on a {background} background" if background else "")


def sample(n: int, seed: int, split: str = "train") -> Scenes:
    """Draw `n` scenes. `split`: "train" and "test" never show an unseen pair, "unseen" always shows one."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: use one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS[split]])
    count = 1 + rng.choice(3, n, p=COUNTS)
    colour = rng.permuted(np.tile(np.arange(len(COLOURS)), (n, 1)), axis=1)[:, :3]  # no colour twice
    shape = _shapes(rng, colour, [p for p in _PAIRS if p not in _UNSEEN])
    if split == "unseen":
        slot, pair = rng.integers(0, count), np.array(_UNSEEN)[rng.integers(0, len(_UNSEEN), n)]
        rows = np.arange(n)
        other = np.argmax(colour == pair[:, 1:], axis=1)  # swap, so that colours stay distinct
        there = (colour == pair[:, 1:]).any(axis=1)
        colour[rows[there], other[there]] = colour[rows[there], slot[there]]
        colour[rows, slot] = pair[:, 1]
        shape = _shapes(rng, colour, [p for p in _PAIRS if p not in _UNSEEN])
        shape[rows, slot] = pair[:, 0]
    low, high = np.array(RADII)[count - 1].T
    radius = rng.uniform(low[:, None], high[:, None], (n, 3))
    return Scenes(count, shape, colour, _place(rng, count, radius), radius, rng.integers(0, 3, n), rng.random(n) < 0.5)


def relayout(scene: Scenes, n: int, seed: int) -> Scenes:
    """`n` scenes with the objects, background and caption of the one `scene`, laid out anew."""
    many = scene[np.zeros(n, dtype=int)]
    rng = np.random.default_rng([seed, len(SPLITS)])
    low, high = np.array(RADII)[many.count - 1].T
    radius = rng.uniform(low[:, None], high[:, None], (n, 3))
    return replace(many, radius=radius, centre=_place(rng, many.count, radius))


def _shapes(rng, colour, allowed):
    """A shape for each colour, uniform over the allowed pairs."""
    table = np.zeros((len(COLOURS), len(SHAPES)))
    for s, c in allowed:
        table[c, s] = 1
    cumulative = np.cumsum(table / table.sum(1, keepdims=True), axis=1)[colour]
    return (rng.random((*colour.shape, 1)) > cumulative).sum(-1).clip(max=len(SHAPES) - 1)


def _place(rng, count, radius, gap=1.5):
    """Centres (n, 3, 2), uniform over layouts in which no two circles of the objects' radii come nearer than `gap`
    pixels. Corners of squares and triangles reach beyond theirs, and overlap in some layouts."""
    n, centre = len(count), np.zeros((len(count), 3, 2))
    todo = np.arange(n)
    present = np.arange(3)[None, :] < count[:, None]
    while len(todo):
        r = radius[todo, :, None]
        trial = rng.uniform(r + 1, SIZE - r - 1, (len(todo), 3, 2))
        distance = np.linalg.norm(trial[:, :, None] - trial[:, None], axis=-1)
        clash = distance < radius[todo, :, None] + radius[todo, None, :] + gap
        clash &= present[todo, :, None] & present[todo, None, :] & ~np.eye(3, dtype=bool)
        ok = ~clash.any(axis=(1, 2))
        centre[todo[ok]] = trial[ok]
        todo = todo[~ok]
    return centre
