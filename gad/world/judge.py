"""The judge of how well an image fits its prompt, and the source of image features: a small OpenCLIP model of the
world, which no teacher or student is trained on. Its folder is OpenCLIP's own: "local-dir:" loads it anywhere."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..evaluation.geometry import bootstrap
from ..training import Role, train
from . import scenes

HELD_OUT = 29  # added to the world's seed: the scenes on which the judge is itself judged
SWAPS = ("colour", "shape", "pairing")
TOKENS = ("<pad>", "<start>", *scenes.WORDS, "<unk>", "<end>")  # the text tower reads at the highest id: <end> is last
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": scenes.SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {
        "context_length": 20, "vocab_size": len(TOKENS), "width": 96, "heads": 4, "layers": 2,
        "hf_tokenizer_name": "tokenizer.json",  # has OpenCLIP read the folder's own
    },
}
FILES = ("open_clip_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the world's words; any other word is <unk>."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(w, TOKENS.index(w)) for w in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tokenize(tokenizer, prompts: list[str], length: int) -> torch.Tensor:
    """Ids (n, length). ValueError for words that are not the world's, and for more of them than fit."""
    rows = tokenizer(prompts, padding="max_length", max_length=length).input_ids
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > length or tokenizer.unk_token_id in row:
            raise ValueError(f"the judge reads up to {length - 2} of the world's words, not {prompt!r}")
    return torch.tensor(rows)


class Judge:
    """Embeddings of unit norm, (n, 32) in fp32 on the CPU, made 256 at a time."""

    def __init__(self, model: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, device="cpu"):
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device

    @torch.no_grad()
    def images(self, x: torch.Tensor) -> torch.Tensor:
        """Of images (n, 3, 64, 64) in [0, 1]."""
        parts = (2 * part.to(self.device, torch.float32) - 1 for part in x.split(256))
        return torch.cat([self.model.encode_image(part, normalize=True).cpu() for part in parts])

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> torch.Tensor:
        """Of prompts; ValueError as `tokenize`."""
        parts = tokenize(self.tokenizer, prompts, self.model.context_length).to(self.device).split(256)
        return torch.cat([self.model.encode_text(part, normalize=True).cpu() for part in parts])

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosine (n,), in [−1, 1], of each image with its prompt."""
        return (self.images(images) * self.texts(prompts)).sum(1)


def swapped(world: scenes.Scenes, kind: str, rng: np.random.Generator) -> scenes.Scenes:
    """The scenes with one thing wrong: "colour" gives an object a colour that the scene lacks, "shape" another shape;
    "pairing" exchanges the colours of two objects of unlike shape, and leaves a scene as it is that has none."""
    rows, slot = np.arange(len(world)), rng.integers(0, world.count)
    shape, colour, present = world.shape.copy(), world.colour.copy(), np.arange(3) < world.count[:, None]
    if kind == "colour":
        used = ((colour[:, :, None] == np.arange(len(scenes.COLOURS))) & present[:, :, None]).any(1)
        colour[rows, slot] = np.where(used, -1, rng.random(used.shape)).argmax(1)
    elif kind == "shape":
        shape[rows, slot] = (shape[rows, slot] + rng.integers(1, len(scenes.SHAPES), len(world))) % len(scenes.SHAPES)
    else:
        unlike = present & (shape != shape[rows, slot][:, None])
        other = np.where(unlike, 2 + rng.random(unlike.shape), slot[:, None] == np.arange(3)).argmax(1)
        colour[rows, slot], colour[rows, other] = colour[rows, other], colour[rows, slot]
    return replace(world, shape=shape, colour=colour)


def join(worlds: list[scenes.Scenes]) -> scenes.Scenes:
    return scenes.Scenes(*(np.concatenate([getattr(w, f.name) for w in worlds]) for f in fields(scenes.Scenes)))


def fits(world: scenes.Scenes, texts: scenes.Scenes) -> np.ndarray:
    """(n, m): whether a text's caption is true of a scene: the same objects in any order, no other background."""
    a, b = (np.sort(np.where(np.arange(3) < w.count[:, None], 10 * w.shape + w.colour, -1)) for w in (world, texts))
    return (a[:, None] == b).all(2) & (~texts.named | (world.background[:, None] == texts.background))


class ClipLoss(open_clip.ClipLoss):
    """n images choose among m texts, the first n of which are theirs; these choose among the images. `logit_bias`
    (n, m) is −∞ where a text but the image's own is true of it: in so small a world that is common and no error."""

    def get_logits(self, image_features, text_features, logit_scale, logit_bias):
        logits = logit_scale * image_features @ text_features.T + logit_bias
        return logits, logits[:, :len(logits)].T


class JudgeTask:
    """Contrastive, with every caption's swaps among the texts. A third of the scenes show pairs that the teachers and
    students never see, for these are to be judged too."""

    def __init__(self, model, batch, lr):
        self.model, self.batch, self.tokenizer = model, batch, build_tokenizer()
        self.roles = {"judge": Role(model, lr, (0.9, 0.98))}

    def losses(self, step, generator):
        device, third = generator.device, self.batch // 3
        seed = int(torch.randint(2**31, (1,), generator=generator, device=device))
        rng = np.random.default_rng(seed)
        world = join([scenes.sample(self.batch - third, seed), scenes.sample(third, seed, "unseen")])
        texts = join([world, *(swapped(world, kind, rng) for kind in SWAPS)])
        others = torch.from_numpy(fits(world, texts)).fill_diagonal_(False)
        bias = torch.zeros(others.shape).masked_fill(others, -torch.inf).to(device)
        ids = tokenize(self.tokenizer, texts.captions(), self.model.context_length).to(device)
        y = self.model.encode_image(2 * world.render().to(device) - 1, normalize=True)
        c = self.model.encode_text(ids, normalize=True)
        scale = self.model.logit_scale.clamp(max=np.log(100)).exp()
        with torch.autocast(device.type, enabled=False):  # logits reach 100, too much for half precision
            return {"judge": ClipLoss()(y.float(), c.float(), scale, bias)}


def save(model: open_clip.CLIP, config: dict, folder: Path) -> None:
    """An OpenCLIP folder. Half precision is ample for weights, and halves what ships."""
    build_tokenizer().save_pretrained(folder)
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}  # 2 x − 1, as in `images`
    (folder / FILES[0]).write_text(json.dumps(whole, indent=1) + "\n")
    save_file({k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}, folder / FILES[1])


def load(folder: Path, device="cpu") -> Judge:
    """The judge in `folder`. ValueError of one line where it is missing, incomplete or damaged."""
    try:
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise FileNotFoundError(f"it lacks {', '.join(missing)}")
        model = open_clip.CLIP(**open_clip.get_model_config(f"local-dir:{folder}"))
        model.load_state_dict(load_file(folder / FILES[1]))
        return Judge(model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), device)
    except Exception as error:  # damage shows as whatever three libraries make of it
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} is no readable judge ({line}): run its stage, `dvc repro judge`") from None


def pretrain(folder: Path, work: Path, p: dict, seed: int, accelerator=None) -> dict:
    """Train the judge, save it to `folder`, return its metrics."""
    torch.manual_seed(seed)
    task = JudgeTask(open_clip.CLIP(**CONFIG), p["batch"], p["lr"])
    train(task, work, p["steps"], seed, {"judge": CONFIG, **p}, p["warmup"], accelerator=accelerator)
    save(task.model, CONFIG, folder)
    return evaluate(load(folder), seed, p["scenes"])


def evaluate(judge: Judge, seed: int, n: int = 2500) -> dict[str, dict]:
    """On `n` held-out scenes of each split: by kind of swap `[value, low, high]`, the share of scenes whose caption
    scores above the swapped one and its 95 % interval; the mean cosines of images with their captions, `matched`, and
    with others', `shuffled`, those left out that are true of them as well."""
    out = {}
    for split in ("test", "unseen"):
        world, rng = scenes.sample(n, seed + HELD_OUT, split), np.random.default_rng(seed)
        y, c = judge.images(world.render()), judge.texts(world.captions())
        right = (y * c).sum(1)
        out[split] = {"matched": right.mean().item(), "shuffled": (y @ c.T)[~fits(world, world)].mean().item()}
        for kind in SWAPS:
            wrong = swapped(world, kind, rng)
            won = (right > (y * judge.texts(wrong.captions())).sum(1)).numpy()[~fits(world, wrong).diagonal()]
            share = bootstrap(lambda rows, won=won: won[rows].mean(-1), np.arange(len(won)), 1000, expanded=False)
            out[split][kind] = list(share)
    return out
