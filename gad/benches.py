"""What all models of a backbone are measured on and by in Tables 2, 3, 5 and 6 and Figure 5: prompts, features, boxes
and who finds things. A class a world; the stages know no more of it.

Boxes (k, 4) are x0, y0, x1, y1 on a canvas of 64 × 64, whatever an image's own size.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

from . import paths
from .evaluation import diversity, layout, noise_query
from .evaluation.images import eight_bits
from .params import Params
from .world import detector, scenes
from .world import judge as judges
from .worlds import world_of

PROMPTS, LAYOUTS = 21, 23  # added to the world's seed


@dataclass(frozen=True)
class Layouts:
    """Prompts and where their objects should be: `phrases` are the words for them, `names` what the world's detector
    calls them, `boxes` an array of (objects, 4) for each prompt."""

    captions: list[str]
    phrases: list[list[str]]
    names: list[list]
    boxes: list[np.ndarray]

    def __len__(self):
        return len(self.captions)


class Mini:
    """The procedural world: its own OpenCLIP model, its detector, and its prior of layouts."""

    batch = 128  # images drawn at a time
    classes = layout.CLASSES  # of which AP is the mean
    sure = 0.0  # score from which a thing counts as there

    def __init__(self, backbone: str, p: Params, device):
        self.u, self.seed, self.device = p.uses, p.seeds.world, device
        many = scenes.sample(8 * self.u.prompts, self.seed + PROMPTS, "test")
        # No two prompts of the same objects, in whatever order or before whatever background: what is on one side of
        # Table 2's split is not on the other.
        first = {tuple(sorted(many.objects(i))): i for i in reversed(range(len(many)))}
        if len(first) < self.u.prompts:
            sets = f"{len(many)} scenes have {len(first)} different sets of objects"
            raise ValueError(f"uses.prompts={self.u.prompts}: {sets}; lower it")
        self.world = many[np.array(sorted(first.values())[:self.u.prompts])]
        self.prompts = self.world.captions()
        self.names = [self.world.objects(k) for k in range(len(self.world))]

    @cached_property
    def judge(self):
        return judges.load(paths.judge(), self.device)

    @cached_property
    def real(self) -> torch.Tensor:
        """(S, P, 3, 64, 64): what the world itself has for the same prompts: their objects laid out anew and, where
        a prompt doesn't name one, before any background."""
        own = []
        for k, named in enumerate(self.world.named):
            many = scenes.relayout(self.world[k], self.u.seeds, k)
            if not named:
                any_ = np.random.default_rng([k, PROMPTS]).integers(0, len(scenes.BACKGROUNDS), len(many))
                many = replace(many, background=any_)
            own.append(many.render())
        return torch.stack(own, 1)

    @cached_property
    def _real_features(self) -> np.ndarray:
        return self.embed(self.real.flatten(0, 1)).unflatten(0, self.real.shape[:2]).numpy()

    def keep(self, images: torch.Tensor) -> torch.Tensor:
        """Images as they are held, by thousands, on the CPU."""
        return images.cpu()

    def texts(self, prompts: list[str]) -> torch.Tensor:
        """CLIP's embeddings (n, D), of unit norm."""
        return self.judge.texts(prompts)

    def embed(self, images) -> torch.Tensor:
        """CLIP's embeddings (n, D), of unit norm."""
        return self.judge.images(images)

    def features(self, images, embedded) -> torch.Tensor:
        """What Vendi scores compare, (n, D), of images whose CLIP embeddings are `embedded`."""
        return embedded

    def fits(self, images, names: list, prompts: list[str]) -> dict[str, np.ndarray]:
        """Other measures than CLIP, (n,) each: does each image show the things of `names`, and those alone?"""
        return {k: v.astype(int) for k, v in detector.judge(images, names).items()}

    def distances(self, features: np.ndarray) -> dict:
        """FID and KID of features (S, P, D) from the world's own."""
        return diversity.distances(features, self._real_features, self.u.draws)

    def diversity(self, images) -> dict[str, list]:
        """Of layouts in images (S, P, …), by prompt: the share of images with all their colours, and how the first
        S // 3 of these differ, as many for every model; NaN where there are fewer."""
        out = {"whole": [], "layout_vendi": [], "coverage": []}
        for k, names in enumerate(self.names):
            points = detector.layouts(images[:, k], [names] * len(images))
            whole = diversity.whole(points)
            out["whole"].append(float(whole.mean()))
            points, prior = points[whole][:len(images) // 3], scenes.relayout(self.world[k], 512, k).centre[:, 0]
            enough = len(points) == len(images) // 3
            out["layout_vendi"].append(diversity.layout_vendi(points) if enough else np.nan)
            out["coverage"].append(diversity.coverage(points[:, 0], prior) if enough else np.nan)
        return out

    def attributes(self, images) -> dict[str, np.ndarray]:
        """(n,) each, by which noises are chosen."""
        return noise_query.attributes(images)

    def layouts(self, backbone) -> Layouts:
        """Scenes of two objects, each laid out anew."""
        many = scenes.sample(8 * self.u.layouts, self.seed + LAYOUTS, "test")
        world = many[np.flatnonzero(many.count == 2)[:self.u.layouts]]
        names = [world.objects(k) for k in range(len(world))]
        boxes = [scenes.relayout(world[k], 1, k).boxes(0) for k in range(len(world))]
        phrases = [[f"{colour} {shape}" for shape, colour in own] for own in names]
        return Layouts(world.captions(), phrases, names, boxes)

    def detect(self, images, names: list) -> list[list[tuple]]:
        """All that is seen in each image: (name, box, score)."""
        return layout.seen(images)


class Photographs:
    """MS-COCO's captions and boxes: OpenCLIP, PickScore, DINOv2 and a detector of photographs. No photograph is
    fetched, so there is no FID, nor any prior of layouts."""

    real, sure = None, 0.3

    def __init__(self, backbone: str, p: Params, device):
        self.u, self.seed, self.device, self.judges = p.uses, p.seeds.world, device, p.coco.judges
        self.batch, self.data = p.evaluation.batch, world_of(backbone, p).data
        self.prompts = self.data.prompts(self.u.prompts, self.seed + PROMPTS, "test")
        self.names = [[]] * len(self.prompts)

    def _expert(self, *kinds: str):
        """The first of `kinds` that there is, loaded anew each time: all at once would fill a GPU."""
        from .world import experts

        kind = next(k for k in kinds if k in self.judges)
        return experts.load(kind, self.judges[kind].path, self.judges[kind].revision, self.device)

    def keep(self, images):
        return eight_bits(images)  # as their judges take them; attributes and classifiers of seeds see the rounding

    @cached_property
    def _clip(self):
        return self._expert("openclip")

    def texts(self, prompts):
        return self._clip.texts(prompts)

    def embed(self, images):
        return self._clip.images(images)

    def features(self, images, embedded):
        return self._expert("dinov2").images(images)

    def fits(self, images, names, prompts):
        return {"pickscore": self._expert("pickscore").score(images, prompts).numpy()}

    def distances(self, features):
        return {}

    def diversity(self, images):
        return {}

    def attributes(self, images):
        """Those of colour: where things are is not known without looking for something."""
        return noise_query.colours(images)

    @cached_property
    def classes(self) -> list[str]:
        return sorted({name for own in self._layouts.names for name in own})

    def layouts(self, backbone) -> Layouts:
        """Captions of which the backbone's text encoder reads all that has a box, as many prompts of each number of
        objects as two at least: boxes are shuffled among them."""
        rows = list(zip(*self._rows(), strict=True))
        kept = [row for row in rows if self._read(backbone, row)][:self.u.layouts]
        counts = [len(boxes) for *_, boxes in kept]
        kept = [row for row, n in zip(kept, counts, strict=True) if counts.count(n) > 1]
        if not kept:
            raise ValueError(f"uses.layouts={self.u.layouts}: too few captions have boxes: raise it, or coco.layouts")
        self._layouts = Layouts(*map(list, zip(*kept, strict=True)))
        return self._layouts

    def _rows(self):
        n, seed = self.data.number_of_layouts, self.seed + LAYOUTS
        captions, phrases, boxes = zip(*self.data.layouts(n, seed), strict=True)
        return captions, phrases, self.data.categories(n, seed), [b * scenes.SIZE for b in boxes]

    @staticmethod
    def _read(backbone, row) -> bool:
        try:
            layout.phrase_tokens(backbone, row[0], row[1])
        except ValueError:  # cut off
            return False
        return True

    def detect(self, images, names):
        """The prompt's own things are looked for and no others: what else a photograph shows has no boxes here."""
        found = self._expert("rt-detr", "grounding-dino").detect(images, [list(dict.fromkeys(own)) for own in names])
        scale = scenes.SIZE / torch.tensor([*images.shape[:1:-1]] * 2)  # (W, H, W, H)
        return [
            list(zip(f["labels"], map(tuple, (f["boxes"] * scale).tolist()), f["scores"].tolist(), strict=True))
            for f in found
        ]


BENCHES = {"mini": Mini, "coco": Photographs}


def small(images: torch.Tensor, side: int = 128) -> torch.Tensor:
    """Images (n, 3, H, W) for looking at: of at most `side` pixels."""
    return images if images.shape[-1] <= side else F.interpolate(images, (side, side), mode="area")
