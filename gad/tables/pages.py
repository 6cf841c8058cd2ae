"""Tables 2, 3, 5, 6 and Figure 5's numbers as pages."""

from collections.abc import Callable

import pandas as pd

from .. import paths
from ..params import Params
from . import uses
from .common import cell, pivot, read, save, worlds

ATTRIBUTES = {  # by which noises are chosen, as gad.evaluation.noise_query measures them
    "brightness": "mean of all pixels and channels, in [0, 1]",
    "saturation": "mean over pixels of the largest channel less the smallest, in [0, 1] (NoiseQuery: HSV's saturation)",
    "warmth": "mean over pixels of red less blue, in [−1, 1]; in the place of hue, which has no mean",
    "area": "share of pixels whose colour is nearer to an object's colour than to any background's",
    "centroid x": "mean place of those pixels from the left, as a share of the width",
    "centroid y": "the same from the top, as a share of the height",
}
SWAPS = {"colour": "another colour", "shape": "another shape", "pairing": "two colours exchanged"}  # in a caption


def _paper(columns: list[str], rows: list[tuple]) -> str:
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False)


PAPER = {
    "table2": ("## The paper's Table 2 (SD2 at full size; as shares; its protocol is not known)",
               "SD-Turbo is a student by ADD.", _paper(
        ["model", "self", "teacher"],
        [("SD2 teacher", 0.937, "–"), ("SD-Turbo", 0.778, 0.632), ("SwiftBrush", 0.529, 0.458), ("TCD", 0.873, 0.845),
         ("LADD", 0.876, 0.837), ("LADD + GAD", 0.924, 0.874)])),
    "table3": ("## The paper's Table 3", "CLIP and PickScore over all backbones and paradigms are not lower with GAD; "
               "SiD on SANA: CLIP 0.3275 → 0.3440 as a cosine."),
    "table5": ("## The paper's Table 5 (SD2 at full size, COCO, YOLOv4 looking for everything; levels of AP are not "
               "comparable)", "SD-Turbo is a student by ADD.", _paper(
        ["model", "AP", "AP50", "CLIP"],
        [("SD2 teacher", 0.066, 0.213, 0.3333), ("SD-Turbo", 0.030, 0.084, 0.3237), ("LADD", 0.050, 0.174, 0.3187),
         ("LADD + GAD", 0.058, 0.206, 0.3184)])),
    "table6": ("## The paper's Table 6", "The teacher's best noise for an attribute is of use to students with GAD, "
               "and of none to those without; its numbers are not at hand."),
    "figure5": ("## The paper's Figure 5", "GAD moves all three backbones toward the teacher's corner of Vendi and "
                "CLIP."),
}


UP = {"CLIP", "PickScore", "scene accuracy", "colours and count", "AP", "AP50", "IoU", "top-1", "top-5", "coverage",
      "images with all colours", "mean ρ"}
DOWN = {"FID", "KID", "centre, px"}


def _headed(metric: str) -> str:
    """A metric as a column's head: with an arrow where more, or less, of it is better whatever the teacher's is."""
    ends = [name for name in UP | DOWN if metric == name or metric.endswith(f", {name}")]
    down = metric.startswith("distance from") or DOWN.intersection(ends)
    return metric + (" ↓" if down else " ↑" if ends or metric.startswith("ρ") else "")


def _section(part: pd.DataFrame, metrics: list[str], title: str, keep: Callable[[str], bool], spec=".3g") -> list[str]:
    rows = part[part["metric"].isin(metrics) & part["model"].map(keep)]
    if not len(rows):
        return []
    table = pivot(rows, "metric", spec=spec)
    table = table[["backbone", "model", *(m for m in metrics if m in table)]].rename(columns=_headed)
    return [f"## {title}", table.to_markdown(index=False)]


def _own(name):
    return not name.endswith(("− base", "− teacher", "/ teacher"))


def _difference(name):
    return name.endswith("− base")


def _judge() -> list[str]:
    """How often the world's OpenCLIP model is itself right."""
    found = read(paths.judge() / "metrics.json")
    splits = {"test": "as teachers and students are trained on", "unseen": "with a shape in a colour kept from these"}
    rows = [
        {"scenes": scenes} | {name: cell(*found[split][key]) for key, name in SWAPS.items()}
        for split, scenes in splits.items()
    ]
    text = (
        "Share of held-out scenes whose own caption it scores above the same caption with one thing wrong: an object's "
        "colour, its shape, or whose colour is whose. 95 % bootstrap intervals over scenes; 1 [1, 1] says only that "
        "none was got wrong."
    )
    return ["## What CLIP's model tells apart", text, pd.DataFrame(rows).to_markdown(index=False)]


def write(p: Params) -> dict[str, pd.DataFrame]:
    """reports/tables/table2, table3, table5, table6 and figure5, .csv and .md; returns the long forms."""
    u, found = p.uses, uses.long(p)
    note, there = "95 % bootstrap intervals over prompts; the same noises and prompts for all.", worlds(p)
    if there == {"mini"}:
        note = f"Miniature models; {note}"

    def on(world, text):
        return f" {text}" if world in there else ""

    seeds = f"{u.seeds} seeds under {u.prompts} prompts"
    named = [f"{side}, {kind}, top-{k}" for side in ("self", "teacher") for kind in uses.KINDS.values() for k in (1, 5)]
    quality = [*uses.QUALITY.values(), uses.SHARE, *uses.DISTANCES.values()]
    diversity = [*uses.DIVERSITY.values(), "CLIP"]
    layout = [f"guided, {k}" for k in ("AP", "AP50", *uses.LAYOUT.values())]
    floors = [f"{how}, {k}" for how in uses.FLOORS for k in ("AP", "AP50", "IoU", "centre, px", "CLIP")]
    effect = [f"guided − {how}, {k}" for how in uses.FLOORS for k in uses.EFFECT]
    sweep = {k: [f"{how}, {k}" for how in uses.moves(p).values()] for k in ("AP", "AP50", "CLIP")}
    shifts, rhos = ([m for m in dict.fromkeys(found["table6"]["metric"]) if m.startswith(s)] for s in ("shift", "ρ"))
    pages = {
        "table2": ["# Table 2, seeds told from images", (
            f"{note} A classifier names the seed of an image, {seeds}: it learns from {u.train} of the prompts and "
            f"is tested on the other {u.prompts - u.train}; chance is {1 / u.seeds:.3f} (top-1) and "
            f"{5 / u.seeds:.3f} (top-5). Linear: logistic regression on 16 × 16 pooled pixels; CNN: a small "
            "convolutional network. Self: it learns from the model's own images; teacher: from the teacher's, made "
            "of the same noises, and is tested on the model's. All that is ours: the paper's classifier and seeds "
            f"are not published. Intervals rest on {u.prompts - u.train} test prompts, and what other noises would "
            "change is in none; a top-5 "
            "of 1 [1, 1] says only that none of them failed. After all of the images most accuracies are near 1, where "
            "models can differ little: the last section, for one classifier, has fewer."),
            *_section(found["table2"], named, "Accuracy", _own), *PAPER["table2"],
            *_section(found["table2"], named, "Differences, paired", _difference, "+.3g"),
            *_section(found["table2"], named, "Students minus their teacher, paired", lambda m: m.endswith("− teacher"),
                      "+.3g"),
            *_section(found["table2"], [*uses.learnt(p).values()],
                      f"Self, linear, top-1, by how many images are learnt from: prompts × {u.seeds} seeds", _own)],
        "table3": ["# Table 3, quality", (
            f"{note} {seeds}; what other noises would change is in no interval. Untrained student: the teacher's "
            "network in the student's steps, unguided."
            + on("mini", (
                "CLIP: cosine by the world's own OpenCLIP model; what that can tell apart stands last; scene accuracy, "
                "by the detector, stands where the paper has PickScore; FID and KID on that model's features, against "
                "the world's own images of the same prompts; few images make FID large; KID takes "
                "the two sets for independent, and as these share their prompts, of equal distributions it is below "
                "zero by as much as images of a prompt are more alike than others: of both only differences are to be "
                "read. Resampled prompts repeat, which makes FID "
                "larger still: intervals are the spread of such draws, about the value."))
            + on("coco", (
                "Photographs: CLIP is OpenCLIP's cosine, of which the paper prints 100 times as much, and PickScore on "
                "its authors' scale; no photograph is fetched, so there is neither FID nor KID."))),
            *_section(found["table3"], quality, "Quality", _own), *PAPER["table3"],
            *_section(found["table3"], quality, "Differences, paired", _difference, "+.3g"),
            *(_judge() if "mini" in there else ())],
        "table5": ["# Table 5, layout control without training", (
            f"{note} {uses.layouts(p)} draws of prompts of objects and a box for each, of which the prompt says "
            f"nothing. Attention guidance at the student's first two times, {u.evals} gradients at each for every "
            f"model, each moving the state by an RMS of {u.scale:g} (guided). AP against the boxes by pycocotools, its "
            "intervals the spread of resampled prompts about the value, cut at 0 and 1; free: no guidance; shuffled: "
            "guided into another prompt's boxes, and held against the prompt's own; RMS: guided by moves of that "
            "size. torchmetrics' mean average precision runs pycocotools too, and gives the same."
            + on("mini", "Two objects a prompt; detections by the analytic detector.")
            + on("coco", (
                "Photographs: captions of COCO that name things with one box each, and a detector that looks for these "
                "and no others, which makes AP higher than looking for everything would; but for AP, which ranks all "
                "it finds, a thing is there from a score of 0.3. Pixels are those of an image scaled to 64."))),
            *_section(found["table5"], layout, "Guided", _own), *PAPER["table5"],
            *_section(found["table5"], floors, "Floors", _own),
            *_section(found["table5"], effect, "What guidance does: guided less floors, paired", _own, "+.3g"),
            *_section(found["table5"], layout, "Differences, paired", _difference, "+.3g"),
            *_section(found["table5"], effect, "What GAD adds to what guidance does, paired", _difference, "+.3g"),
            *_section(found["table5"], [m for pair in zip(sweep["AP"], sweep["CLIP"], strict=True) for m in pair],
                      "AP against CLIP over the size of a move", _own),
            *_section(found["table5"], sweep["AP50"], "AP50 over the size of a move", _own)],
        "table6": ["# Table 6, noises chosen by the teacher", (
            f"{note} The teacher draws {u.library} noises unprompted; of each attribute the {u.picks} highest and the "
            f"{u.picks} lowest noises are drawn under {u.query} prompts. Shift: their difference, in units of the "
            "attribute's spread over the seeds of a prompt in the teacher's images; its intervals rest on those "
            f"{u.query} prompts, and what other noises would change is in none. Its multiple of the teacher's is "
            "left out (–) where the teacher's own interval contains 0. ρ: rank correlation over "
            f"{u.seeds} seeds under {u.prompts} prompts; last: CLIP at the noise whose unprompted image is nearest to "
            "the prompt, less CLIP at the seeds." + on("coco", "Photographs: attributes of colour alone.")
            + " An image's attributes:"),
            "\n".join(f"- {name}: {what}" for name, what in ATTRIBUTES.items() if f"shift, {name}" in shifts),
            *_section(found["table6"], ["mean shift", *shifts], "Shift", _own), *PAPER["table6"],
            *_section(found["table6"], ["mean shift", *shifts], "Shift, as a multiple of the teacher's",
                      lambda m: m.endswith("/ teacher")),
            *_section(found["table6"], ["mean ρ", *rhos, "CLIP, nearest less usual"], "Rank correlation", _own),
            *_section(found["table6"], [
                "mean shift", "mean ρ", *(f"distance from the teacher's {k}" for k in uses.NEARER["table6"]),
                "CLIP, nearest less usual",
            ], "Differences, paired", _difference, "+.3g")],
        "figure5": ["# Figure 5, diversity and fidelity", (
            f"{note} {seeds}; what other noises would change is in no interval. Vendi: of a prompt's images by the "
            f"judge's features, at most {u.seeds}."
            + on("mini", (
                "Layout Vendi: of the places of objects (their centres, whatever their size) in the first "
                f"{u.seeds // 3} of a prompt's images that have all their colours, as many for every model, over "
                "the prompts that have so many (differences: over "
                "those of both); coverage: share of the world's own places of the first object that those "
                f"{u.seeds // 3} come near to. The world: its own images of the same prompts, of any background where "
                "none is named."))
            + on("coco", "Photographs: features are DINOv2's.")),
            *_section(found["figure5"], diversity, "Diversity", _own), *PAPER["figure5"],
            *_section(found["figure5"], [
                *diversity, *(f"distance from the teacher's {k}" for k in uses.NEARER["figure5"]),
            ], "Differences, paired", _difference, "+.3g")],
    }
    for name, text in pages.items():
        save(name, found[name], text)
    return found
