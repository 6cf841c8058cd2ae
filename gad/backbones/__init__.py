"""Backbones by name. To add one: a file beside these, an entry here and one in params.yaml."""

import copy
import json
import os
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import paths
from . import pixart, sana, sd2
from .base import Backbone, Condition

BACKBONES = {"sd2": sd2.SD2, "pixart": pixart.PixArt, "sana": sana.Sana}
MINIATURES = {"sd2": sd2.miniature, "pixart": pixart.miniature, "sana": sana.miniature}

__all__ = ["BACKBONES", "MINIATURES", "Backbone", "Condition", "load", "load_network", "registered", "with_lora"]


def registered(name: str, miniature: bool = False):
    """Entry `name` of BACKBONES, or of MINIATURES; ValueError that says where it is to be added."""
    table, what = (MINIATURES, "MINIATURES") if miniature else (BACKBONES, "BACKBONES")
    if name not in table:
        raise ValueError(f"backbone {name!r} is not in {what}: add it there, in gad/backbones/__init__.py")
    return table[name]


def load(
    name_or_path: str | Path, params=None, revision: str | None = None, variant: str | None = None
) -> Backbone:
    """A backbone from a name in `params.backbones`, a Diffusers pipeline folder, or a hub id (at a `revision`, of the
    files of a `variant`).

    Only safetensors are read and no remote code is run. An entry's `dtype` is that of the text encoder and the
    autoencoder: the network is in fp32, for tangents and differences are taken of it. A folder that is missing,
    incomplete, damaged or of another class raises ValueError with one line that says what to do.
    """
    entry = params.backbones.get(str(name_or_path)) if params else None
    family, options = None, {k: v for k, v in (("revision", revision), ("variant", variant)) if v}
    if entry:
        path = entry.path or paths.teacher(str(name_or_path))
        family = entry.family or str(name_or_path)
        dtype = {"default": getattr(torch, entry.dtype), registered(family).part: torch.float32}
        options = {"revision": entry.revision, "variant": entry.variant, "dtype": dtype}
    else:
        path = name_or_path
    class_name = _class_of(path, options.get("revision"))
    family = family or _family_of(class_name, path)
    cls = BACKBONES[family]
    kinds = {kind.__name__: kind for kind in (cls.pipeline_class, *(() if entry else cls.others))}
    if class_name not in kinds:
        raise ValueError(f"{path} is a {class_name}: backbone {family!r} needs a {cls.pipeline_class.__name__}")
    try:
        pipeline = kinds[class_name].from_pretrained(
            path, use_safetensors=True, local_files_only=Path(path).is_dir(), **options
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise _unloadable(path, class_name, error) from None
    for part, module in pipeline.components.items():
        _filled(module, Path(path) / part)
    _tells(pipeline.tokenizer, path)
    return cls(pipeline, str(name_or_path) if entry else family)


def load_network(folder: Path, backbone: Backbone | None = None) -> nn.Module:
    """The network of a pipeline folder and nothing else of it, in fp32: T5 or Gemma stay on disk. ValueError as of
    `load`, and where it is not one that `backbone` can call."""
    family = BACKBONES[_family_of(class_name := _class_of(folder), folder)]
    if backbone and not isinstance(backbone, family):
        raise ValueError(f"{folder} is a {class_name}: its network is none of {backbone.name!r}; make it anew")
    part = family.part
    named = json.loads((folder / "model_index.json").read_text()).get(part) or (None, None)
    if not (kind := getattr(diffusers, str(named[1]), None)):
        raise ValueError(f"{folder}/model_index.json names no class of its part {part!r}: restore the folder")
    try:
        network, told = kind.from_pretrained(
            folder, subfolder=part, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise _unloadable(folder / part, kind.__name__, error) from None
    _filled(network, folder / part)
    if extra := told["unexpected_keys"]:
        raise ValueError(f"{folder / part} has weights that its config has not ({extra[0]}, …): restore the folder")
    return network.requires_grad_(False).eval()


def _filled(module, folder: Path):
    """ValueError where weights are missing: diffusers warns and leaves them on `meta`, transformers draws new ones."""
    if not isinstance(module, nn.Module):
        return
    weights = module.state_dict()
    lacks = [k for k, w in weights.items() if w.is_meta]
    if isinstance(module, transformers.PreTrainedModel) and folder.is_dir():
        names = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as f:
                names.update(f.keys())
        ends = {end for name in names for end in _ends(name)}  # either may have a prefix that the other has not
        kept = {k for k in weights if k in ends or names & _ends(k)}
        tied = {weights[k].data_ptr() for k in kept}  # of which one is kept
        lacks += [k for k, w in weights.items() if k not in kept and w.data_ptr() not in tied]
    if lacks:
        raise ValueError(
            f"{folder} lacks {len(lacks)} of the weights its config has ({lacks[0]}, …): restore the folder"
        )


def _ends(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _tells(tokenizer, path):
    """ValueError where all prompts are the same: a tokenizer without its vocabulary loads too."""
    if tokenizer("a red circle").input_ids == tokenizer("a red square").input_ids:
        raise ValueError(f"{path}/tokenizer cannot tell prompts apart, its vocabulary is not there: restore the folder")


def with_lora(backbone: Backbone, source: str, file: str | None = None, revision: str | None = None):
    """A copy of the backbone's network with the LoRA of `source`, a folder, file or hub id, in its weights."""
    pipeline, network = backbone.pipeline, backbone.network
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{source}: a {type(pipeline).__name__} takes no LoRA; merge it elsewhere and give a path")
    try:
        pipeline.register_modules(**{backbone.part: copy.deepcopy(network)})
        pipeline.load_lora_weights(source, weight_name=file, revision=revision, use_safetensors=True)
        pipeline.fuse_lora(components=[backbone.part])
        pipeline.unload_lora_weights()
        return backbone.network
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} cannot be loaded as a LoRA of {backbone.name}: {line}") from None
    finally:
        pipeline.register_modules(**{backbone.part: network})


def _class_of(path: Path | str, revision: str | None = None) -> str:
    """The pipeline class of a folder, all of whose parts are there and whole, or of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        return _check(folder)
    if folder.is_relative_to(paths.DATA / "students"):
        stages = f"dvc stage list --name-only | grep {folder.name}"
        raise ValueError(f"student {folder.name} is not there: none ship; `dvc repro` its distill stage ({stages})")
    if folder.is_absolute() or str(path).startswith((".", "data/")):
        raise ValueError(f"{path} is not there: run `dvc pull` or `dvc repro`, or correct the path")
    try:
        return diffusers.DiffusionPipeline.load_config(str(path), revision=revision)["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(path, "pipeline", error) from None


def _family_of(class_name: str, path) -> str:
    known = {kind.__name__: name for name, cls in BACKBONES.items() for kind in (cls.pipeline_class, *cls.others)}
    if class_name not in known:
        raise ValueError(f"{path} is a {class_name}: there are backbones for {', '.join(known)}")
    return known[class_name]


def _unloadable(path, kind: str, error: Exception) -> ValueError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    fix = ""
    if not Path(path).is_dir():
        fix = "; give a folder, or for a gated model accept its terms and `hf auth login`"
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            fix += ", or fetch it first: HF_HUB_OFFLINE is 1"
    return ValueError(f"{path} cannot be loaded as a {kind}: {line}{fix}")


def _check(folder: Path) -> str:
    """The pipeline class of a folder all of whose parts are there and whole."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no model_index.json: it is not a Diffusers pipeline folder") from None
    except ValueError:  # nor text
        raise ValueError(f"{folder}/model_index.json is not JSON: restore the folder") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{folder}/model_index.json has no _class_name: restore the folder")
    for part, origin in index.items():
        if isinstance(origin, list) and len(origin) != 2:
            raise ValueError(f"{folder}/model_index.json names no class of its part {part!r}: restore the folder")
        if isinstance(origin, list) and origin[0] and not (folder / part).is_dir():
            raise ValueError(f"{folder} lacks its part {part!r} ({origin[1]}): restore the folder")
    for weights in folder.rglob("*.safetensors"):
        try:
            with safe_open(weights, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{weights} is damaged ({error}): restore it") from None
    for part in index:
        config = folder / part / "config.json"
        if config.exists() and not any((folder / part).glob("*.safetensors")):
            raise ValueError(f"{folder / part} has no safetensors weights: restore or convert it")
    return index["_class_name"]
