"""Table 5: layouts by guidance of the first states through the cross-attention, without training.

Chen, Laina & Vedaldi (2024), "Training-free layout control with cross-attention guidance": a state moves against the
gradient of how much of its words' attention falls outside their boxes. Ours: every move has the same size (theirs is
the gradient times σ_t² and a constant); attention is added up over heads and an object's words before its share is
taken; every model has as many moves, at the same noise or, with a number of steps of its own, near it. Boxes are
(k, 4) arrays x0, y0, x1, y1 in pixels of 64 × 64, onto which images of another size are scaled.
"""

import io
import re
from collections import Counter
from contextlib import redirect_stdout
from itertools import chain

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from ..backbones import Backbone, Condition
from ..world.detector import detect
from ..world.scenes import COLOURS, SHAPES, SIZE

FAR = SIZE / 2**0.5  # pixels, half the image's diagonal: the farthest that counts, and where an absent object is
CLASSES = [(s, c) for s in SHAPES for c in COLOURS]


def phrase_tokens(backbone: Backbone, caption: str, phrases: list[str]) -> list[list[int]]:
    """For each phrase the places of its tokens in `backbone.encode([caption])`; the k-th of equal phrases is the
    caption's k-th. ValueError where the caption, as far as the encoder reads it, has no such words."""
    tokenizer, (text, *wanted) = backbone.pipeline.tokenizer, [p.lower().strip() for p in (caption, *phrases)]
    most = min(backbone.max_tokens or tokenizer.model_max_length, tokenizer.model_max_length)
    lead, skipped, text = len(backbone.instruction), backbone.skipped, backbone.instruction + text
    # Without padding: encode_text pads on the right.
    full = tokenizer(text, truncation=True, max_length=most + skipped, return_offsets_mapping=tokenizer.is_fast)
    found = []
    for i, phrase in enumerate(wanted):
        spans = [m.span() for m in re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)").finditer(text, lead)]
        places, k = [], wanted[:i].count(phrase)
        if phrase and k < len(spans):
            if tokenizer.is_fast:
                start, end = spans[k]
                places = [j for j, (a, b) in enumerate(full["offset_mapping"]) if max(a, start) < min(b, end)]
            else:
                places = list(range(*(_shared(tokenizer, text[:n].rstrip(), full["input_ids"]) for n in spans[k])))
            places = [j - skipped for j in places]
        if not places:
            raise ValueError(f"the first {most} tokens of {caption!r} have no phrase {phrases[i]!r}")
        found.append(places)
    return found


def _shared(tokenizer, text: str, full: list[int]) -> int:
    """How many tokens of `full` are those of its text's beginning `text`, cut between words."""
    ids = tokenizer(text)["input_ids"]
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    return next((k for k, (a, b) in enumerate(zip(ids, full, strict=False)) if a != b), min(len(ids), len(full)))


def inside(boxes: Tensor, side: int) -> Tensor:
    """The share in [0, 1] of each cell of a `side` × `side` grid that a box covers: (..., 4) to (..., side²)."""
    edges = torch.arange(side + 1, device=boxes.device)
    low, high = (boxes * side / SIZE).unflatten(-1, (2, 2, 1)).unbind(-3)
    x, y = (torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)).clamp(min=0).unbind(-2)
    return (y[..., :, None] * x[..., None, :]).flatten(-2)


def energy(maps: list[Tensor], words: Tensor, boxes: Tensor) -> Tensor:
    """(B,) in [0, 1], of attention `maps` [(B, K, N)] of K tokens over square grids of any N: the mean over maps and
    objects of (1 − attention inside the object's box / attention everywhere)². `words` (B, O, K): 1 where a token is
    the object's, all 0 for an object that is not there; `boxes` (B, O, 4)."""
    there, parts = words.any(-1), []
    for m in maps:
        m = words @ m.float()
        inner = (m * inside(boxes, round(m.shape[-1] ** 0.5))).sum(-1)
        share = inner / m.sum(-1).clamp(min=torch.finfo(m.dtype).tiny)  # fp32 may leave none at all
        parts.append(((1 - share).square() * there).sum(1) / there.sum(1).clamp(min=1))
    return torch.stack(parts).mean(0)


def rows(tokens: list[list[list[int]]], boxes: list[np.ndarray], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Samples with any numbers of objects and tokens as `attention` and `energy` read them: token places (B, K),
    `words` (B, O, K) and boxes (B, O, 4), padded with tokens of no object and objects of no token."""
    places = pad_sequence([torch.tensor([*chain(*t)], dtype=torch.long) for t in tokens], True)
    own = [torch.as_tensor(np.reshape(b, (len(t), 4))).float() for t, b in zip(tokens, boxes, strict=True)]
    words = torch.zeros(len(tokens), max(map(len, tokens)), places.shape[1])
    for i, objects in enumerate(tokens):
        for k, j in enumerate(j for j, each in enumerate(objects) for _ in each):  # its k-th token is object j's
            words[i, j, k] = 1
    return places.to(device), words.to(device), pad_sequence(own, True).to(device)


def move(backbone: Backbone, network, x: Tensor, t: Tensor, cond: Condition, goal: tuple, scale: float) -> Tensor:
    """States (B, C, H, W) after one move of RMS `scale` per element down the gradients of their energies; `goal` is
    what `rows` gives. A state whose gradient is zero or not finite stays."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        g = torch.autograd.grad(energy(backbone.attention(network, x, t, cond, goal[0]), *goal[1:]).sum(), x)[0]
    rms = g.double().square().mean((1, 2, 3), keepdim=True).sqrt()
    return x.detach() - scale * torch.where(rms.isfinite() & (rms > 0), g / rms, 0).to(x.dtype)


@torch.no_grad()
def guided(
    backbone: Backbone, network, z: Tensor, cond: Condition, tokens: list[list[list[int]]], boxes: list[np.ndarray],
    steps: int, cfg: float, times: list[float], evals: int, scale: float,
) -> Tensor:
    """`backbone.sample`, with `evals` moves of the state at its sampling time nearest to each of `times`: a flow's
    many steps only come near those of its few, and where a model of fewer has one time near two of them, all their
    moves are there. `tokens`: a sample's objects' `phrase_tokens`, in the order of its boxes."""
    x, own, goal = z, backbone.times(steps).to(z.device), rows(tokens, boxes, z.device)
    at = Counter(int((own[:-1] - time).abs().argmin()) for time in times)
    for k, (t, s) in enumerate(zip(own[:-1].unbind(), own[1:].unbind(), strict=True)):
        for _ in range(evals * at[k]):
            x = move(backbone, network, x, t, cond, goal, scale)
        x = backbone.step(network, x, t.expand(len(x)), s.expand(len(x)), cond, cfg)
    return x


Seen = list[tuple[object, tuple[float, float, float, float], float]]  # in one image: (name, box, score in [0, 1])


def seen(images: Tensor) -> list[Seen]:
    """What the miniature world's detector sees in images (N, 3, 64, 64) in [0, 1]; names are `(shape, colour)`."""
    return [[((f.shape, f.colour), f.box, f.score) for f in detect(image)[0]] for image in images]


def score(found: list[Seen], wanted: list[list], boxes: list[np.ndarray], sure: float = 0.0) -> dict[str, list[float]]:
    """How what was `found` in N images keeps to the boxes of their prompts' objects, `wanted` by name: `iou` in [0, 1]
    of a box and the best detection of its name with a score of `sure`, and the `centre` distance of the two in pixels,
    at most FAR, means over objects. An absent object has 0 and FAR."""
    out: dict[str, list[float]] = {"iou": [], "centre": []}
    for there, names, own in zip(found, wanted, boxes, strict=True):
        best = []
        for name, box in zip(names, own, strict=True):
            pairs = [
                (float(box_iou(torch.tensor([its]), torch.tensor(box[None]))),
                 -min(np.linalg.norm(np.add(its[:2], its[2:]) / 2 - (box[:2] + box[2:]) / 2), FAR))
                for what, its, value in there if what == name and value >= sure
            ]
            best.append(max(pairs, default=(0, -FAR)))
        for key, value in zip(out, np.mean(best, axis=0) * (1, -1), strict=True):
            out[key].append(float(value))
    return out


def average_precision(
    found: list[Seen], wanted: list[list], boxes: list[np.ndarray], draws: int, classes: list = CLASSES, seed: int = 0
) -> dict[str, float | list[float]]:
    """COCO's `ap` (mean over IoU .5:.95) and `ap50`, in [0, 1], of all that was `found` in N images and is of
    `classes`, by its scores. `ap_draws` and `ap50_draws`: of `draws` resamplings of the prompts, which follow
    from N and `seed` alone, so that two models' are paired."""
    n, values = len(wanted), []
    truth = [(i, w, b, 1.0) for i in range(n) for w, b in zip(wanted[i], boxes[i], strict=True)]
    seen = [(i, *each) for i in range(n) for each in found[i]]
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        coco = COCOeval(_coco(truth, n, classes), _coco(seen, n, classes), "bbox")
        coco.params.areaRng, coco.params.areaRngLbl, coco.params.maxDets = [[0, 1e10]], ["all"], [100]
        coco.evaluate()  # each image once: a draw only gathers them
        table = [coco.evalImgs[k: k + n] for k in range(0, len(coco.evalImgs), n)]
        for order in (np.arange(n), *np.random.default_rng(seed).integers(0, n, (draws, n))):
            coco.evalImgs = [row[i] for row in table for i in order]
            coco.accumulate()
            precision = coco.eval["precision"]  # (IoU, recall, class, 1, 1), −1 for a class that is not there
            values.append([float(p[p > -1].mean()) for p in (precision, precision[0])])
    (ap, ap50), *rest = values
    return {"ap": ap, "ap50": ap50, "ap_draws": [v[0] for v in rest], "ap50_draws": [v[1] for v in rest]}


def _coco(objects: list[tuple], n: int, classes: list) -> COCO:
    """A data set of `n` images from (image, name, box, score)."""
    data = COCO()
    data.dataset = {"images": [{"id": i} for i in range(n)], "categories": [{"id": k} for k in range(len(classes))]}
    data.dataset["annotations"] = [
        {"id": k, "image_id": i, "category_id": classes.index(name), "iscrowd": 0, "score": value,
         "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
        for k, (i, name, (x0, y0, x1, y1), value) in enumerate(objects, start=1) if name in classes
    ]
    data.createIndex()
    return data
