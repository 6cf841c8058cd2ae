"""The judges of photographs: tiny random models of the real classes, against the libraries' own pipelines."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import open_clip
import pytest
import torch
import transformers as hf
from conftest import perturb
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from gad.backbones.tokens import merge_words
from gad.evaluation.images import eight_bits
from gad.world import experts

PROMPTS = ["a red fox", "two dogs on a sofa", "", "A photograph of a fox, and of a dog", "dogs"]
NAMES = [["fox", "red dog"], ["red dog"], ["sofa", "red dog", "fox"], ["fox"], ["red dog", "sofa"]]
LABELS = ["fox", "sofa", "tvmonitor", "red dog"]


def openclip(folder):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    save_file(perturb(open_clip.CLIP(**config)).state_dict(), folder / "open_clip_model.safetensors")


def pickscore(folder):
    words = " ".join(PROMPTS).lower().replace(",", "").split()
    symbols, merges = merge_words([[*w[:-1], w[-1] + "</w>"] for w in words])
    vocab = ["<|startoftext|>", "<|endoftext|>", *symbols]
    hf.CLIPTokenizer({w: i for i, w in enumerate(vocab)}, merges, model_max_length=77).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    hf.CLIPImageProcessor(**size).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = hf.CLIPConfig(
        text_config=small | ids | {"max_position_embeddings": 12}, projection_dim=16,
        vision_config=small | {"image_size": 32, "patch_size": 8},
    )
    perturb(hf.CLIPModel(config)).save_pretrained(folder)


def dinov2(folder):
    hf.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    perturb(hf.Dinov2Model(hf.Dinov2Config(**small))).save_pretrained(folder)


def rt_detr(folder, config=hf.RTDetrConfig, model=hf.RTDetrForObjectDetection):
    hf.RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    backbone = hf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    small = {f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in (("ffn_dim", 16), ("attention_heads", 2))}
    config = config(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16] * 3, decoder_in_channels=[16] * 3,
        d_model=16, decoder_layers=2, num_queries=12, id2label=dict(enumerate(LABELS)), **small,
    )
    model = perturb(model(config), 0.2)
    with torch.no_grad():
        for head in model.model.decoder.class_embed:  # so that no class is everywhere the likeliest
            head.bias.zero_()
            head.weight.copy_(head.weight[:1] + 0.02 * head.weight)
    model.save_pretrained(folder)


def rt_detr_v2(folder):
    rt_detr(folder, hf.RTDetrV2Config, hf.RTDetrV2ForObjectDetection)


def grounding_dino(folder):
    vocab = [f"[unused{i}]" for i in range(1030)]
    known = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}  # BERT's own
    words = ("red", "fox", "dog", "so", "##fa", "sad")
    for i, word in (known | dict(enumerate(words, 200))).items():
        vocab[i] = word
    hf.BertTokenizer({w: i for i, w in enumerate(vocab)}).save_pretrained(folder)
    hf.GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    swin = hf.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, out_indices=[2, 3, 4]
    )
    bert = hf.BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    small = {f"{part}_{k}": n for part in ("encoder", "decoder")
             for k, n in (("ffn_dim", 16), ("attention_heads", 2), ("layers", 2))}
    config = hf.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, num_queries=10, max_text_len=24,
        disable_custom_kernels=True, **small,
    )
    perturb(hf.GroundingDinoForObjectDetection(config), 0.1).save_pretrained(folder)


BUILD = {
    "openclip": openclip, "pickscore": pickscore, "dinov2": dinov2, "rt-detr": rt_detr, "rt-detr-v2": rt_detr_v2,
    "grounding-dino": grounding_dino,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind, build in BUILD.items():
        torch.manual_seed(0)
        made[kind] = tmp_path_factory.mktemp(kind)
        build(made[kind])
    return made


@pytest.fixture(scope="module")
def loaded(folders):
    return {kind: experts.load(kind.removesuffix("-v2"), folder) for kind, folder in folders.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """`copy(kind)`: a folder to spoil."""
    return lambda kind: shutil.copytree(folders[kind], tmp_path / kind)


@pytest.fixture(scope="module")
def images():
    """Noise, blocks with sharp edges, and flat colour, not square."""
    g = torch.Generator().manual_seed(0)
    blocks = torch.rand(2, 3, 7, 6, generator=g).round().repeat_interleave(8, 2).repeat_interleave(8, 3)
    return torch.cat([torch.rand(2, 3, 56, 48, generator=g), blocks, torch.full((1, 3, 56, 48), 0.3)])


@pytest.fixture(scope="module")
def pictures(images):
    return [to_pil_image((255 * x).round().byte()) for x in images]


# Embeddings


def embed_openclip(folder, pictures):
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)  # the folder names no tokenizer, as the paper's does not
    pixels = torch.stack([transform(p) for p in pictures])
    images, texts, _ = model.eval()(pixels, tokens)  # normalised
    return pixels, images, (images * texts).sum(1)


def embed_pickscore(folder, pictures):
    model, processor = hf.AutoModel.from_pretrained(folder), hf.AutoProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=pictures, padding=True, truncation=True, max_length=12, return_tensors="pt")
    out = model(**inputs)
    return inputs.pixel_values, out.image_embeds, out.logits_per_image.diagonal()


def embed_dinov2(folder, pictures):
    pipe = hf.pipeline("image-feature-extraction", str(folder))
    pooled = torch.tensor([pipe(p, pool=True)[0] for p in pictures])
    pixels = pipe.image_processor(pictures, return_tensors="pt").pixel_values
    return pixels, pooled / pooled.norm(dim=1, keepdim=True), None


EMBED = {"openclip": embed_openclip, "pickscore": embed_pickscore, "dinov2": embed_dinov2}


@pytest.mark.parametrize("kind", EMBED)
def test_images_and_scores_are_the_librarys_own_of_pictures(folders, loaded, kind, images, pictures):
    expert = loaded[kind]
    with torch.no_grad():
        pixels, embeddings, scores = EMBED[kind](folders[kind], pictures)
    ours = expert._pixels(eight_bits(images))
    assert ours.shape == pixels.shape and ours.std() > 0.5
    torch.testing.assert_close(ours, pixels, rtol=0, atol=1e-6)
    found = expert.images(images)
    torch.testing.assert_close(found, embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    assert found.dtype == torch.float32 and not found.requires_grad and found.std(0).mean() > 0.02
    if scores is not None:
        score = expert.score(images, PROMPTS)
        torch.testing.assert_close(score, scores, rtol=0, atol=1e-4)
        assert score.std() > 0.02


def test_units_of_scores(loaded, images):
    """Cosines, and PickScore's times its model's own scale."""
    for kind, scale in (("openclip", 1), ("pickscore", loaded["pickscore"].model.logit_scale.exp().item())):
        expert = loaded[kind]
        cosines = [a @ b for a, b in zip(expert.images(images), expert.texts(PROMPTS), strict=True)]
        torch.testing.assert_close(expert.score(images, PROMPTS), scale * torch.stack(cosines))
    assert 13 < scale < 16  # of a model not trained: 1 / 0.07


@pytest.mark.parametrize("kind", ["pickscore", "dinov2", "rt-detr", "grounding-dino"])
def test_pixels_are_pillows_within_a_level(folders, loaded, kind, images, pictures):
    """Models were made with Pillow's bicubic, whose overshoot is cut after each of its two passes."""
    processor = hf.AutoImageProcessor.from_pretrained(folders[kind], backend="pil")
    assert type(processor).__name__.endswith("Pil")
    pixels = processor(pictures, return_tensors="pt").pixel_values
    off = (loaded[kind]._pixels(eight_bits(images)) - pixels).abs().max()
    assert off < 1.01 / 255 / (min(processor.image_std) if processor.do_normalize else 1)


@pytest.mark.parametrize("kind", EMBED)
def test_batches_keep_values_and_order(loaded, kind, images, monkeypatch):
    expert = loaded[kind]
    calls = {"images": images} if kind == "dinov2" else {"images": images, "texts": PROMPTS}
    for name, given in calls.items():
        call = getattr(expert, name)
        whole, alone = call(given), torch.cat([call(given[i:i + 1]) for i in range(5)])
        monkeypatch.setattr(expert, "batch", 2)
        torch.testing.assert_close(call(given), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
        assert (whole @ whole.T).triu(1).max() < 1 - 1e-4  # so that order would show
        monkeypatch.undo()


def test_long_prompts_are_cut(loaded):
    for kind, words in (("openclip", 75), ("pickscore", 10)):  # and a start and an end
        long, longer = ("dogs " * n for n in (words, words + 9))
        a, b, c = loaded[kind].texts([long, longer, "dogs"])
        assert torch.equal(a, b) and not torch.allclose(a, c)


# Detections


def same(ours, theirs, pixels=1e-3):
    assert ours["labels"] == theirs["labels"] and len(ours["labels"]) > 5
    torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=pixels)


@pytest.mark.parametrize("kind", ["rt-detr", "rt-detr-v2"])
def test_rt_detr_is_the_librarys_pipeline(folders, loaded, kind, images, pictures):
    pipe = hf.pipeline("object-detection", str(folders[kind]))
    found, called = loaded[kind].detect(images), {"sofa": "couch", "tvmonitor": "tv"}
    for ours, picture in zip(found, pictures, strict=True):
        theirs = pipe(picture, threshold=0.001)
        boxes = torch.tensor([[d["box"][k] for k in ("xmin", "ymin", "xmax", "ymax")] for d in theirs]).float()
        labels = [called.get(d["label"], d["label"]) for d in theirs]
        # the pipeline cuts boxes to whole pixels
        same(ours | {"boxes": ours["boxes"].trunc()}, {"labels": labels, "boxes": boxes,
                                                       "scores": torch.tensor([d["score"] for d in theirs])})
    assert {type(v) for v in found[0].values()} == {torch.Tensor, list} and found[0]["boxes"].shape[1] == 4
    assert len({label for d in found for label in d["labels"]}) > 1


def test_rt_detr_looks_for_given_names_alone(loaded, images):
    expert = loaded["rt-detr"]
    assert expert.classes == ["fox", "couch", "tv", "red dog"]
    pixels = expert._pixels(eight_bits(images[:1]))
    with torch.no_grad():
        scores = expert.model(pixels).logits[0].sigmoid()  # (queries, classes)
    for own in (["couch"], ["tv", "fox"]):
        found = expert.detect(images[:1], [own])[0]
        best = torch.stack([scores[:, expert.classes.index(name)] for name in own]).flatten().sort(descending=True)[0]
        torch.testing.assert_close(found["scores"], best[:len(scores)], rtol=1e-4, atol=1e-5)
        assert set(found["labels"]) <= set(own)


PLACES = {  # by hand: of each name's tokens, where "[CLS] fox . red dog . [SEP]" is 0 … 6, and "sofa" is "so ##fa"
    0: {"fox": [1], "red dog": [3, 4]}, 1: {"red dog": [1, 2]}, 2: {"sofa": [1, 2], "red dog": [4, 5], "fox": [7]},
    3: {"fox": [1]}, 4: {"red dog": [1, 2], "sofa": [4, 5]},
}


def test_grounding_dino_scores_names_by_their_tokens(folders, loaded, images, pictures):
    """Each picture alone, by the library's processor and model."""
    folder = folders["grounding-dino"]
    processor = hf.AutoProcessor.from_pretrained(folder)
    model = hf.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    for i, ours in enumerate(loaded["grounding-dino"].detect(images, NAMES)):
        if i == 4:  # a flat picture, whose equal places come in any order
            continue
        inputs = processor(images=pictures[i], text=". ".join(NAMES[i]) + ".", return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs)
        tokens, (cx, cy, w, h) = out.logits[0].sigmoid(), out.pred_boxes[0].T
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1) * torch.tensor([48.0, 56, 48, 56])
        pairs = [
            (tokens[q, places].mean().item(), name, corners[q]) for q in range(10) for name, places in PLACES[i].items()
        ]
        scores, labels, boxes = zip(*sorted(pairs, key=lambda pair: -pair[0])[:10], strict=True)
        same(ours, {"labels": list(labels), "scores": torch.tensor(scores), "boxes": torch.stack(boxes)}, 0.01)
        assert len({round(s, 3) for s in scores}) > 5


def test_grounding_dino_pixels_are_the_librarys(folders, loaded, images, pictures):
    ours = loaded["grounding-dino"]._pixels(eight_bits(images))
    processor = hf.AutoImageProcessor.from_pretrained(folders["grounding-dino"])
    theirs = processor(pictures, return_tensors="pt").pixel_values
    assert torch.equal(ours, theirs) and theirs.shape[2:] == (112, 96)


@pytest.mark.parametrize("kind", ["rt-detr", "grounding-dino"])
def test_detections_do_not_depend_on_batches(loaded, kind, images, monkeypatch):
    expert, names = loaded[kind], [[{"sofa": "couch"}.get(n, n) for n in own] for own in NAMES[:4]]
    names = NAMES[:4] if kind == "grounding-dino" else names
    whole = expert.detect(images[:4], names)
    monkeypatch.setattr(expert, "batch", 3)
    for i, (parts, all_at_once) in enumerate(zip(expert.detect(images[:4], names), whole, strict=True)):
        same(parts, all_at_once, 0.01)
        same(expert.detect(images[i:i + 1], names[i:i + 1])[0], all_at_once, 0.01)
        assert set(parts["labels"]) <= set(names[i])
        assert (parts["scores"].diff() <= 0).all()
    twice = expert.detect(images[:1], [names[0] * 2])[0]
    same(twice, whole[0], 0.01)  # a name is looked for once


def test_threshold(loaded, images):
    expert = loaded["grounding-dino"]
    all_of_it = expert.detect(images[:1], NAMES[:1])[0]
    cut = all_of_it["scores"][3].item()
    kept = expert.detect(images[:1], NAMES[:1], cut)[0]
    n = int((all_of_it["scores"] > cut).sum())
    assert 0 < n < 10 and [len(v) for v in kept.values()] == [n] * 3
    none = expert.detect(images[:1], NAMES[:1], 1.0)[0]
    assert none["boxes"].shape == (0, 4) and none["labels"] == []


# What is given


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("spoil", [
    lambda x: 2 * x - 1, lambda x: 255 * x, lambda x: x / 0, lambda x: x[0], lambda x: x[:, :1],
])
def test_bad_images(loaded, kind, images, spoil):
    expert = loaded[kind]
    with pytest.raises(ValueError, match=r"give \(n, 3, H, W\), all in \[0, 1\]"):
        (expert.images if kind in EMBED else expert.detect)(spoil(images))


@pytest.mark.parametrize("kind, names, match", [
    ("grounding-dino", None, "give each of the 2 images the names"),
    ("grounding-dino", [["fox"]], "give each of the 2 images the names"),
    ("rt-detr", [["fox"], []], "give each of the 2 images the names"),
    ("rt-detr", [["fox"], ["sofa"]], "'sofa' is none of RT-DETR's: fox, couch, tv, red dog"),
    ("grounding-dino", [["fox"], ["st. bernard"]], r"names\[1\] has 'st. bernard'"),
    ("grounding-dino", [[" "], ["fox"]], r"names\[0\] has ' '"),
    ("grounding-dino", [["fox"], [f"fox {a} {b}" for a in ("red", "dog", "sad") for b in ("red", "dog", "sad")]],
     r"names\[1\] are 38 tokens, Grounding DINO reads 24: look for fewer"),
])
def test_bad_names(loaded, kind, names, match, images):
    with pytest.raises(ValueError, match=match) as error:
        loaded[kind].detect(images[:2], names)
    assert "\n" not in str(error.value)


def test_each_image_needs_its_prompt(loaded, images):
    with pytest.raises(ValueError, match="5 images and 1 prompts"):
        loaded["pickscore"].score(images, PROMPTS[:1])


# Loading

KINDS = tuple(experts.EXPERTS)
PICKLE = b"cbuiltins\nexec\n(Vraise SystemExit('a pickle was loaded')\ntR."


def refused(kind, path, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        experts.load(kind, path, **options)
    text = str(error.value)
    assert "\n" not in text and str(path) in text


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def test_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="'clip' is no expert: there are openclip, pickscore"):
        experts.load("clip", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_folders(kind, tmp_path):
    refused(kind, tmp_path / "none", "is neither a folder nor a hub id: correct it")
    refused(kind, "someone/something", "not whole in the hub's cache: `hf download` it")
    refused(kind, tmp_path, f"no readable {kind} .*config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_other_classes(kind, folders):
    for other, folder in folders.items():
        if other.removesuffix("-v2") != kind:
            refused(kind, folder, "open_clip_config.json|config.json|it is a '.*', not a .*restore it or name another")


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_needed(kind, copy):
    folder = copy(kind)
    for file in sorted(folder.iterdir()):
        if file.name in ("tokenizer_config.json", "special_tokens_map.json"):
            continue
        whole = file.read_bytes()
        for spoil in (lambda f, whole: f.write_bytes(whole[:len(whole) // 2]), lambda f, whole: f.unlink()):
            spoil(file, whole)
            refused(kind, folder, f"no readable {kind}")
        file.write_bytes(whole)
    experts.load(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_are_not_read(kind, copy, images):
    folder = copy(kind)
    name = "open_clip_pytorch_model.bin" if kind == "openclip" else "pytorch_model.bin"
    (folder / name).write_bytes(PICKLE)
    experts.load(kind, folder)  # with both, the safetensors
    weights_of(folder).unlink()
    refused(kind, folder, "pickles are not read")


@pytest.mark.parametrize("kind, gone", [
    ("openclip", "visual.proj"), ("pickscore", "logit_scale"), ("dinov2", "layernorm.weight"),
    ("rt-detr", "model.decoder.class_embed.0.weight"), ("grounding-dino", "model.text_projection.weight"),
])
def test_weights_that_are_not_all_there(kind, gone, copy):
    folder = copy(kind)
    file = weights_of(folder)
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != gone}, file, {"format": "pt"})
    refused(kind, folder, gone)


def test_in_half_precision_on_disk_and_in_single_in_memory(copy, images):
    folder = copy("pickscore")
    file = weights_of(folder)
    save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    expert = experts.load("pickscore", folder, dtype=torch.float16)  # of a GPU, and here is none
    assert {p.dtype for p in expert.model.parameters()} == {torch.float32}
    assert torch.equal(expert.images(images), experts.load("pickscore", folder).images(images))


def test_pickscore_as_the_hub_and_as_the_library_lay_it_out(copy, loaded, images):
    folder, score = copy("pickscore"), loaded["pickscore"].score(images, PROMPTS)
    config = folder / "preprocessor_config.json"
    old = json.loads(config.read_text()) | {"feature_extractor_type": "CLIPFeatureExtractor"}
    config.write_text(json.dumps(old | {"image_processor_type": "CLIPFeatureExtractor"}))
    assert torch.equal(experts.load("pickscore", folder).score(images, PROMPTS), score)
    processor = hf.CLIPProcessor(loaded["pickscore"].processor, loaded["pickscore"].tokenizer)
    config.unlink()
    processor.save_pretrained(folder)
    assert not config.exists()
    assert torch.equal(experts.load("pickscore", folder).score(images, PROMPTS), score)


# The hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["openclip", "pickscore"])
def test_hub_id_from_the_cache_by_revision(kind, copy, cache, images):
    """Offline, what was fetched before is there, each revision with its own weights."""
    first, second = "a" * 40, "b" * 40
    for revision, factor in ((first, 1.0), (second, 2.0)):
        folder = copy(kind)
        file = weights_of(folder)
        weights = load_file(file)
        key = "logit_scale" if kind == "pickscore" else "visual.proj"
        save_file(weights | {key: factor * weights[key] + factor - 1}, file, {"format": "pt"})
        shutil.move(folder, cache / "models--someone--expert" / "snapshots" / revision)
    (cache / "models--someone--expert" / "refs").mkdir()
    (cache / "models--someone--expert" / "refs" / "main").write_text(second)
    main, old, new = (experts.load(kind, "someone/expert", r).score(images, PROMPTS) for r in (None, first, second))
    assert torch.equal(main, new) and not torch.allclose(old, new)
    refused(kind, "someone/expert", f"at {'c' * 40} .*not whole in the hub's cache", revision="c" * 40)


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub on this machine that answers every question with an error, `hub(code)`; and what it was asked."""
    asked, error = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(error["status"])
            self.send_header("X-Error-Code", error["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield lambda status, code: error.update(status=status, code=code) or asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status, code, match", [
    (403, "GatedRepo", "is gated: accept its terms"),
    (404, "RepoNotFound", "is not on the hub, or private"),
    (404, "RevisionNotFound", "has no such revision: correct it"),
])
def test_the_hub_says_no(hub, status, code, match):
    asked = hub(status, code)
    refused("pickscore", "someone/expert", f"someone/expert at v1 {match}", revision="v1")
    assert asked == ["/api/models/someone/expert/revision/v1"]
