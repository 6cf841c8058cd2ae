"""Prompts encoded once, on disk: T5 and Gemma then leave the accelerator to the networks that train."""

import hashlib
import inspect
import os
import uuid
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .backbones import Backbone, Condition


def keep(backbone: Backbone, folder: Path, device) -> Backbone:
    """The same backbone on `device`, all but its text encoder; what its `encode` makes is kept in `folder`.

    The text encoder is on `device` only while it encodes what `folder` lacks, else on the CPU.
    """
    for name, part in backbone.pipeline.components.items():
        if isinstance(part, nn.Module):
            part.to("cpu" if name == "text_encoder" else device)
    backbone.encode_unlike = _Kept(backbone, folder)
    return backbone


class _Kept:
    """In place of a backbone's `encode_unlike`: the same bits, from disk where they are there."""

    def __init__(self, backbone, folder):
        self.backbone, self.folder, self.anew = backbone, folder, backbone.encode_unlike
        self.weights = _fingerprint(backbone.pipeline.text_encoder)

    def __call__(self, prompts: list[str], batch: int) -> Condition:
        path = self.folder / f"{self.backbone.name}-{self._key(prompts, batch)}.safetensors"
        if not path.exists():
            self._make(path, prompts, batch)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            name = os.path.relpath(path)
            raise ValueError(f"{name} is not readable ({error}): delete it, and prompts are encoded anew") from None
        return Condition(**found)

    def _key(self, prompts, batch) -> str:
        """Of all that fixes the bits. A tokeniser is known by what it makes of these prompts."""
        backbone, tokenizer = self.backbone, self.backbone.pipeline.tokenizer
        tokens, length = self._tokens(prompts)
        code = inspect.getsource(inspect.getmodule(type(backbone)))  # what it calls may be anywhere there
        there = torch.__version__, transformers.__version__, backbone.device.type, torch.get_num_threads()
        whole = self.weights, code, there, batch, prompts, tokens, length, tokenizer.pad_token_id, backbone.instruction
        return hashlib.sha256(repr(whole).encode()).hexdigest()[:32]

    def _tokens(self, prompts) -> tuple[list[list[int]], int]:
        """Called as by `encode_text`: a tokeniser keeps its last padding and truncation, and students are saved with
        them, which must not tell whether embeddings were there."""
        tokenizer = self.backbone.pipeline.tokenizer
        length = min(self.backbone.max_tokens or tokenizer.model_max_length, tokenizer.model_max_length)
        return tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids, length

    def _make(self, path, prompts, batch):
        encoder = self.backbone.pipeline.text_encoder.to(self.backbone.device)
        made = None
        for i in range(0, len(prompts), batch):
            part = self.anew(prompts[i:i + batch], batch)
            if made is None:  # whole, once, on the CPU: of many prompts they are larger than networks
                made = Condition(*(
                    torch.empty(len(prompts), *x.shape[1:], dtype=x.dtype) for x in (part.embeds, part.mask)
                ))
            made.embeds[i:i + batch], made.mask[i:i + batch] = part.embeds, part.mask
        encoder.to("cpu")
        if not torch.isfinite(made.embeds).all():
            name = self.backbone.name
            raise ValueError(f"the text encoder of {name} gives values that are not finite in {encoder.dtype}: set "
                             f"backbones.{name}.dtype to bfloat16 or float32")
        self._tokens(prompts)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{uuid.uuid4().hex}")  # other stages may be making the same
        made.save(part)
        os.replace(part, path)


def _fingerprint(module) -> str:
    """A hash of a module's config and every weight; seconds for T5-XXL."""
    found = hashlib.sha256(module.config.to_json_string().encode())
    add_weights(found, module)
    return found.hexdigest()


def add_weights(found, module):
    """Every weight of a module to a hash in the making."""
    for name, w in module.state_dict().items():
        found.update(f"{name} {w.dtype} {tuple(w.shape)}".encode())
        found.update(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
