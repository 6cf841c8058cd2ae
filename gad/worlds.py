"""What a backbone draws: its prompts, and how well an image fits one. A class a world; stages know no more of it."""

import hashlib
import inspect
import json
from collections.abc import Callable

import torch

from . import paths
from .params import Params
from .world import detector, scenes

Draw = Callable[[list[str]], torch.Tensor]  # images (n, 3, H, W) in [0, 1], one a prompt


class Mini:
    """The procedural world. `keys` of its quality: all objects as the prompt says, its background aside; colours and
    count alone."""

    keys = ("scene", "colour_count")
    batch = 128  # images drawn at a time

    def __init__(self, p: Params):
        self.p = p

    def prompts(self, n: int, seed: int, split: str = "train") -> list[str]:
        """`n` captions of "train", "test" or "unseen" scenes."""
        return scenes.sample(n, seed, split).captions()

    def quality(self, draw: Draw, n: int, seed: int, device="cpu") -> dict[str, list[float]]:
        """How well what is drawn of each of `n` test prompts fits it, by key: 0 or 1."""
        world = scenes.sample(n, seed, "test")
        right = detector.judge(draw(world.captions()), [world.objects(i) for i in range(n)])
        return {k: v.astype(int).tolist() for k, v in right.items()}

    def hashes(self) -> dict[str, str]:
        """None: what it is made of, DVC sees."""
        return {}


class Coco:
    """Photographs, by the captions of MS-COCO. `keys`: PickScore on its authors' scale, a cosine with the prompt times
    about 100, and CLIP's cosine."""

    keys = ("pickscore", "openclip")

    def __init__(self, p: Params):
        from .world import coco, experts, prompts

        self.experts, self.judges, self.batch = experts, p.coco.judges, p.evaluation.batch
        self.code = coco, experts, prompts
        self.data = coco.Coco(paths.DATA / "coco", p.coco.prompts, p.coco.column)

    def prompts(self, n: int, seed: int, split: str = "train") -> list[str]:
        return self.data.prompts(n, seed, split)

    def quality(self, draw: Draw, n: int, seed: int, device="cpu") -> dict[str, list[float]]:
        prompts = self.prompts(n, seed, "test")
        images, out = draw(prompts).cpu(), {}
        for kind in self.keys:
            judge = self.experts.load(kind, self.judges[kind].path, self.judges[kind].revision, device)
            out[kind] = [float(f"{x:.5g}") for x in judge.score(images, prompts).tolist()]
        return out

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the captions' files and of the code that reads them and judges photographs."""
        code = {m.__name__: hashlib.sha256(inspect.getsource(m).encode()).hexdigest() for m in self.code}
        return self.data.hashes() | code


WORLDS = {"mini": Mini, "coco": Coco}


def world_of(backbone: str, p: Params, anew: bool = False) -> Mini | Coco:
    """The world of a backbone of `p`. ValueError where it lacks a file, or, but `anew`, where a file or its code is no
    longer what the backbone's teacher was measured with: DVC sees these only through the teacher's folder."""
    made = WORLDS[p.backbones[backbone].world](p)
    source = paths.teacher(backbone) / "source.json"
    if source.exists() and not anew:
        then, now = json.loads(source.read_text()).get("files", {}), made.hashes()
        if changed := [name for name in now if name in then and now[name] != then[name]]:
            raise ValueError(f"{changed[0]} has changed since teacher {backbone} was measured: "
                             f"`dvc repro -f teacher@{backbone}`, and what follows")
    return made
