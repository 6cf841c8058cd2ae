"""The judges of the paper's scale, where the world is photographs: OpenCLIP (CLIP score), PickScore, DINOv2 (features
for Vendi), and for Table 5's AP two detectors, RT-DETR of COCO's classes and Grounding DINO of any names.

Images (n, 3, H, W) in [0, 1] are rounded to 8 bits first, as a PNG would: the models then see just what the libraries'
own pipelines see of saved images. What is returned is fp32 and on the CPU.
"""

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
import transformers as hf
from huggingface_hub import errors, snapshot_download
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from ..evaluation.images import eight_bits

COCO_NAMES = {  # released RT-DETRs call six of COCO's classes by older names
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv",
}


class _Expert:
    """A model and how it is called in batches. `models`: its classes, told apart by config.json."""

    batch, models, processors = 64, (), ()
    config, weights = "config.json", "model*.safetensors"

    def __init__(self, folder: Path):
        config = json.loads((folder / self.config).read_text())
        classes = {cls.config_class.model_type: cls for cls in self.models}
        if classes and config.get("model_type") not in classes:
            raise ValueError(f"it is a {config.get('model_type')!r}, not a {' or '.join(classes)}")
        if not (files := list(folder.glob(self.weights))):
            raise ValueError(f"it has no {self.weights}, and pickles are not read")
        for file in files:
            with safe_open(file, "pt"):  # raises where one is cut short
                pass
        self.model = self._open(folder, classes.get(config.get("model_type")))

    def _open(self, folder, cls):
        self.processor, *rest = (p.from_pretrained(folder, local_files_only=True) for p in self.processors)
        self.tokenizer = rest[0] if rest else None
        # fp32 even where it was saved in fp16: what to compute in is autocast's.
        model, info = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:  # the library would fill them at random
            raise ValueError(f"its weights lack {min(info['missing_keys'])}")
        if rest and len(self.tokenizer) != (size := model.config.text_config.vocab_size):  # without a file it is empty
            raise ValueError(f"its tokenizer has {len(self.tokenizer)} tokens, its model {size}")
        return model

    def to(self, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = self.model.to(device).eval(), device, dtype
        return self

    @torch.no_grad()
    def _batches(self, call, n: int) -> list:
        low = self.device.type != "cpu" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if low else None, enabled=low):
            starts = tqdm(range(0, n, self.batch), type(self).__name__, disable=None if n > self.batch else True)
            return [call(slice(i, i + self.batch)) for i in starts]

    def _pixels(self, images: Tensor) -> Tensor:
        """What the model's own processor makes of images of 8 bits: on the CPU, where it resizes as Pillow does."""
        return self.processor(images, return_tensors="pt").pixel_values


class _Embedder(_Expert):
    def images(self, x: Tensor) -> Tensor:
        """Embeddings (n, D) of unit norm of images (n, 3, H, W) in [0, 1]."""
        _check(x)

        def embed(rows):
            return _unit(self._see(self._pixels(eight_bits(x[rows])).to(self.device)))

        return torch.cat(self._batches(embed, len(x)))


class _Scorer(_Embedder):
    def texts(self, prompts: list[str]) -> Tensor:
        """Embeddings (n, D) of unit norm of prompts, cut to the 77 tokens that the models read."""
        return torch.cat(self._batches(lambda rows: _unit(self._read(prompts[rows])), len(prompts)))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine (n,), in [−1, 1], of each image with its prompt."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give each image its own")
        return (self.images(images) * self.texts(prompts)).sum(1)


class OpenClip(_Scorer):
    """CLIP score, of ViT-H-14 in the paper: its Table 5 prints the cosine as here, about 0.33, its Table 3 100 times
    that."""

    config, weights = "open_clip_config.json", "open_clip_model.safetensors"

    def _open(self, folder, cls):
        model, self.transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        return model

    def _pixels(self, images):
        return torch.stack([self.transform(to_pil_image(image)) for image in images])  # it is for pictures alone

    def _see(self, pixels):
        return self.model.encode_image(pixels)

    def _read(self, prompts):
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))


class PickScore(_Scorer):
    """Kirstain et al. (2023), "Pick-a-Pic"."""

    models, processors = (hf.CLIPModel,), (hf.CLIPImageProcessor, hf.CLIPTokenizer)

    def _see(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def _read(self, prompts):
        most = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        return self.model.get_text_features(**ids.to(self.device)).pooler_output

    def score(self, images, prompts):
        """(n,): the cosine times the model's own scale, exp(logit_scale), near 100; 20 to 22 for usual images."""
        return self.model.logit_scale.detach().exp().cpu() * super().score(images, prompts)


class DinoV2(_Embedder):
    """Features alone: the last layer's class token."""

    models, processors = (hf.Dinov2Model,), (hf.BitImageProcessor,)

    def _see(self, pixels):
        return self.model(pixels).pooler_output


class _Detector(_Expert):
    batch = 8

    def detect(self, images: Tensor, names: list[list[str]] | None = None, threshold: float = 0.001) -> list[dict]:
        """What is seen in each of images (n, 3, H, W) in [0, 1], best first: `boxes` (k, 4), x0, y0, x1, y1 in its
        pixels, `scores` (k,) above `threshold`, and `labels`, k of the `names` to look for in it. The threshold is for
        AP, which ranks all there is; to say whether a thing is there take 0.3 or more."""
        _check(images)
        names = self._names(names, len(images))

        def found(rows):
            logits, boxes, classes = self._logits(eight_bits(images[rows]), names[rows])
            outputs, size = SimpleNamespace(logits=logits.float(), pred_boxes=boxes.float()), tuple(images.shape[2:])
            # As many pairs of a query and a class as there are queries: so is AP on COCO taken of both models.
            best = hf.RTDetrImageProcessor().post_process_object_detection(outputs, threshold, [size] * len(boxes))
            labels = [[own[k] for k in b.pop("labels").tolist()] for b, own in zip(best, classes, strict=True)]
            return [{k: v.cpu() for k, v in b.items()} | {"labels": its} for b, its in zip(best, labels, strict=True)]

        return list(chain.from_iterable(self._batches(found, len(images))))

    def _names(self, names, n):
        if names is None or len(names) != n or not all(names):
            raise ValueError(f"names={names!r:.60}: give each of the {n} images the names to look for in it")
        return [list(dict.fromkeys(own)) for own in names]


class RtDetr(_Detector):
    """Zhao et al. (2024), and its second version by Lv et al.; looks for all its classes where no names are given."""

    models = (hf.RTDetrForObjectDetection, hf.RTDetrV2ForObjectDetection)
    processors = (hf.RTDetrImageProcessor,)

    def _open(self, folder, cls):
        model = super()._open(folder, cls)
        labels = [model.config.id2label[k] for k in range(model.config.num_labels)]
        self.classes = [COCO_NAMES.get(label, label) for label in labels]
        return model

    def _names(self, names, n):
        names = super()._names([self.classes] * n if names is None else names, n)
        if unknown := set(chain(*names)) - set(self.classes):
            raise ValueError(f"name {min(unknown)!r} is none of RT-DETR's: {', '.join(self.classes)}")
        return names

    def _logits(self, images, names):
        outputs = self.model(self._pixels(images).to(self.device))
        other = torch.tensor([[c not in own for c in self.classes] for own in names], device=self.device)
        return outputs.logits.masked_fill(other[:, None], -torch.inf), outputs.pred_boxes, [self.classes] * len(names)


class GroundingDino(_Detector):
    """Liu et al. (2024). A name's score is the mean of its tokens', as in their evaluation on COCO: the library's
    `text_labels` are whatever tokens pass a threshold, be it half a name or two."""

    models = (hf.GroundingDinoForObjectDetection,)
    processors = (hf.GroundingDinoImageProcessor, hf.BertTokenizer)

    def _names(self, names, n):
        names, most = super()._names(names, n), self.model.config.max_text_len
        for i, own in enumerate(names):
            if bad := [name for name in own if "." in name or not name.strip()]:
                raise ValueError(f"names[{i}] has {bad[0]!r}: names are not empty and have no full stop")
            if (length := len(self.tokenizer(f"{'. '.join(own)}.").input_ids)) > most:
                raise ValueError(f"names[{i}] are {length} tokens, Grounding DINO reads {most}: look for fewer")
        return names

    def _logits(self, images, names):
        processor = hf.GroundingDinoProcessor(self.processor, self.tokenizer)
        inputs = processor(images, names, padding=True, return_tensors="pt").to(self.device)
        outputs, ids, tokens = self.model(**inputs), inputs.input_ids, self.tokenizer
        stop = ids == tokens.convert_tokens_to_ids(".")
        word = ~stop & ~torch.isin(ids, ids.new_tensor([tokens.cls_token_id, tokens.sep_token_id, tokens.pad_token_id]))
        k = torch.arange(max(map(len, names)), device=self.device)[:, None]
        own = (word[:, None] & (stop.cumsum(1)[:, None] == k)).double()  # (n, names, tokens): k full stops come before
        mean = own / own.sum(2, keepdim=True).clamp(min=1)
        scores = outputs.logits[..., :ids.shape[1]].double().sigmoid() @ mean.mT  # fp64: autocast leaves it alone
        return scores.logit(), outputs.pred_boxes, names


EXPERTS = {
    "openclip": OpenClip, "pickscore": PickScore, "dinov2": DinoV2, "rt-detr": RtDetr, "grounding-dino": GroundingDino,
}
_REASONS = {  # what is gated also counts as not found: first come, first told
    errors.GatedRepoError: "is gated: accept its terms on the hub, then `hf auth login`",
    errors.RepositoryNotFoundError: "is not on the hub, or private: correct it, or `hf auth login`",
    errors.RevisionNotFoundError: "has no such revision: correct it",
    errors.LocalEntryNotFoundError: "is no folder and not whole in the hub's cache: `hf download` it with a network",
    errors.HFValidationError: "is neither a folder nor a hub id: correct it",
    Exception: "could not be fetched: see that there is a network and room on the disk",
}


def load(kind: str, path: str | Path, revision: str | None = None, device="cpu", dtype=torch.float32) -> _Expert:
    """The expert `kind`, of `EXPERTS`, from a folder or else a hub id at a `revision`. On a GPU it computes in `dtype`
    by autocast, on the CPU in fp32. Only safetensors are read, no remote code is run, and HF_HUB_OFFLINE=1 is obeyed.
    ValueError of one line that says what to do where it is missing, gated, damaged or of another class."""
    if kind not in EXPERTS:
        raise ValueError(f"{kind!r} is no expert: there are {', '.join(EXPERTS)}")
    cls, folder = EXPERTS[kind], Path(path)
    try:
        if not folder.is_dir():
            files = ["*.json", "*.txt", cls.weights]
            folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=files))
    except Exception as error:
        why = next(why for known, why in _REASONS.items() if isinstance(error, known))
        raise ValueError(f"{path}{f' at {revision}' if revision else ''} {why}") from None
    try:
        expert = cls(folder)
    except Exception as error:  # damage shows as whatever four libraries make of it
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{folder} is no readable {kind} ({line}): restore it or name another") from None
    return expert.to(torch.device(device), dtype)


def _check(images):
    low = images.dtype == torch.uint8
    if images.ndim != 4 or images.shape[1] != 3 or not (low or (images.min() >= 0 and images.max() <= 1)):
        raise ValueError(f"images of shape {tuple(images.shape)}: give (n, 3, H, W), all in [0, 1] or of 8 bits")


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1).cpu()
