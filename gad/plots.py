"""The figures, from cached results alone. One colour a method, 95 % intervals over prompts."""

from itertools import cycle
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image

from . import paths, tables
from .benches import BENCHES
from .evaluation.geometry import bootstrap
from .evaluation.precision import PUBLISHED
from .params import NEED_A_FAKE, Params, Run
from .tables import chains, replicas, uses
from .world import scenes

COLOURS = {"teacher": "#444444", "base": "#0173b2", "gad": "#de8f05"}
OTHER = "#949494"
GAD = ("step", "map", *NEED_A_FAKE)  # its forms: others are controls


class Style(NamedTuple):
    """What tells one paradigm from another, where colours tell variants."""

    line: str | tuple
    beside: str | tuple  # the line in a panel whose solid one is the teacher's
    marker: str
    hatch: str


STYLES = (
    Style("-", "--", "s", ""),
    Style("--", "-.", "o", "////"),
    Style(":", ":", "D", "...."),
    Style("-.", (0, (8, 2)), "^", "xxxx"),
    *(Style((0, dashes), (0, dashes), marker, hatch) for dashes, marker, hatch in (
        ((4, 1, 1, 1, 1, 1), "v", "----"), ((8, 2, 3, 2), "P", "||||"), ((1, 4), "<", "++++"), ((3, 5), "X", "oooo"),
        ((8, 2, 1, 2, 1, 2), ">", "****"), ((4, 1, 4, 1, 1, 1), "d", "OOOO"),
    )),
)


def use_style():
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 180, "axes.spines.top": False, "axes.spines.right": False})


def write(p: Params) -> list:
    """All figures to reports/figures; returns their paths."""
    use_style()
    paths.FIGURES.mkdir(parents=True, exist_ok=True)
    made = []
    for draw in (world, figure2, nearby, figure5, layout, published, samples, seeds, before_after, students,
                 trained_again, lengths):
        figure = draw(p)
        name = {"published": "precision", "trained_again": "replicas"}.get(draw.__name__, draw.__name__)
        made.append(paths.FIGURES / f"{name}.png")
        how = {"dpi": 120} if draw in (samples, seeds) else {}  # near the pictures' own resolution
        figure.savefig(made[-1], bbox_inches="tight", metadata={"Software": None}, pil_kwargs={"optimize": True}, **how)
        plt.close(figure)
    return made


def preview(name: str, width: int = 1100) -> Image.Image:
    """Figure `name` for a notebook, which would weigh megabytes with whole ones."""
    image = Image.open(paths.FIGURES / f"{name}.png").convert("RGB")
    image.thumbnail((width, 4 * width))
    return image.quantize(dither=Image.Dither.NONE)


def world(p: Params):
    """Twelve scenes of the miniature world with their captions."""
    drawn = scenes.sample(12, p.seeds.world, "test")
    figure, axes = plt.subplots(2, 6, figsize=(10, 4.2))
    for ax, image, text in zip(axes.flat, drawn.render(), drawn.captions(), strict=True):
        ax.imshow(image.permute(1, 2, 0).numpy())
        words = text.split()
        lines = [" ".join(words[i:i + 4]) for i in range(0, len(words), 4)]
        ax.set_title("\n".join(lines), fontsize=6.5)
        ax.axis("off")
    figure.tight_layout(h_pad=2.5)
    return figure


def _styles(p: Params) -> dict[str, Style]:
    """By paradigm, the same in every figure."""
    return dict(zip(dict.fromkeys(r.paradigm for r in p.runs()), cycle(STYLES), strict=False))


def _runs(p: Params, backbone: str):
    """The grid's students on a backbone, of the first seed."""
    return [r for r in p.grid.runs(p.seeds.distill[:1]) if r.backbone == backbone]


def _interval(p: Params, values, key: str, noises: int = 1):
    """Of `noises` values a prompt."""
    values, summary = np.asarray(values), tables.SUMMARY[key]
    return bootstrap(lambda i: summary(values[i]), np.arange(len(values)) // noises, p.report.bootstrap)


def _across(ax, stats, label: str, ls="-", upright=False):
    """A line through the panel at a value that is no student's, with its interval; `upright`: on the x axis."""
    line, band = (ax.axvline, ax.axvspan) if upright else (ax.axhline, ax.axhspan)
    line(stats[0], color=COLOURS["teacher"], ls=ls, lw=1, label=label)
    band(stats[1], stats[2], color=COLOURS["teacher"], alpha=0.1, lw=0)


def _cross(ax, x, y, colour):
    """The intervals of a point, (value, low, high) each."""
    (a, *xerr), (b, *yerr) = ((v, [v - low], [high - v]) for v, low, high in (x, y))
    ax.errorbar(a, b, xerr=xerr, yerr=yerr, fmt="none", lw=0.8, ecolor=colour, alpha=0.35)


def figure2(p: Params):
    """Values match, tangents don't: over noise levels (left) and over training (right), a row a backbone."""
    n, lines = len(p.grid.backbones), {name: style.line for name, style in _styles(p).items()}
    figure, axes = plt.subplots(n, 4, figsize=(12, 2.5 * n), squeeze=False, sharex="col")
    for row, backbone in zip(axes, p.grid.backbones, strict=True):
        for number, run in enumerate(_runs(p, backbone)):
            result, colour, name = tables.read(paths.result(run)), COLOURS[run.variant], tables.label(run)
            levels, noises = [float(k) for k in result["local"]], p.evaluation.noises
            for ax, key in zip(row[:2], ("value", "cos"), strict=True):
                stats = np.array([_interval(p, at[key], key, noises) for at in result["local"].values()])
                ax.plot(levels, stats[:, 0], marker="o", ls=lines[run.paradigm], ms=3, color=colour, label=name)
                ax.fill_between(levels, stats[:, 1], stats[:, 2], color=colour, alpha=0.2, lw=0)
            probes = pd.read_csv(paths.probe(run))
            for ax, key in zip(row[2:], ("error", "cos"), strict=True):
                ax.plot(probes["step"], probes[key], marker="o", ls=lines[run.paradigm], ms=3, color=colour, label=name)
                last = probes.iloc[-1]  # intervals of the finished student alone: bands would hide each other
                at = last["step"] * (1.03 + 0.03 * number)
                ax.vlines(at, last[f"{key}_low"], last[f"{key}_high"], color=colour, ls=lines[run.paradigm], lw=1.2)
        floors = tables.read(paths.diagnosis(backbone) / "floors.json")
        for floor, label, ls in (("teacher, CFG + 1", "teacher, guidance scale + 1", "--"),
                                 ("untrained student", "untrained student", ":")):
            for ax, key in zip(row[2:], ("value", "cos"), strict=True):
                _across(ax, _interval(p, floors[floor][key], key, p.evaluation.noises), label, ls)
            for ax, key in zip(row[:2], ("value", "cos"), strict=True):
                stats = [_interval(p, at[key], key, p.evaluation.noises)[0] for at in floors[floor]["local"].values()]
                ax.plot([*map(float, floors[floor]["local"])], stats, color=COLOURS["teacher"], ls=ls, lw=1, zorder=0)
        for values, cosines in (row[:2], row[2:]):
            values.set_yscale("log")
            cosines.set_ylim(0, 1)
        row[0].set_ylabel(f"{backbone}\nrelative error of values")
        row[1].set_ylabel("JVP cosine")
        row[2].set_ylabel("relative error of values")
        row[3].set_ylabel("JVP cosine")
    axes[0, 3].plot([], [], color=COLOURS["teacher"], lw=1.2, label="upright: a student's interval")
    probes = f"(Table 1 has {p.evaluation.prompts * p.evaluation.noises} noises, this {p.endpoints.probes})"
    for ax, title in zip(axes[0], ("local map: values", "local map: tangents", f"endpoint map: values\n{probes}",
                                   f"endpoint map: tangents\n{probes}"), strict=True):
        ax.set_title(title, fontsize=9)
    for ax in axes[-1, :2]:
        ax.set_xlabel("noise level t")
    for ax in axes[-1, 2:]:
        ax.set_xlabel("training step")
    figure.tight_layout()
    _legend_below(figure, axes[0, 3:], len(p.grid.paradigms))
    return figure


def _legend_below(figure, axes, rows: int):
    """One legend for all panels, of what `axes` show, entries read down columns of `rows` at most."""
    shown = {}
    for handles, names in sorted((ax.get_legend_handles_labels() for ax in axes), key=lambda x: -len(x[1])):
        shown |= dict(zip(names, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0),
                  handlelength=3.5, ncols=max(1, -(-len(shown) // max(1, rows))))


VENDI = {"vendi": "Vendi score\nof the judge's features", "layout_vendi": "Vendi score\nof objects' places"}


def figure5(p: Params):
    """Vendi scores against CLIP, a column a backbone: arrows from a student without to the one with GAD; a marker a
    paradigm, hollow and without its interval where there is none with GAD. The judge's features count flaws as variety,
    of which the world's own images have none; of places the world's own score is what there is to reach. No panel where
    a backbone's world has no such score."""
    backbones, n = p.grid.backbones, p.report.bootstrap
    found = {b: uses.models(p, b) for b in backbones}
    keys = [k for k in VENDI if any(k in models["teacher"]["diversity"] for models in found.values())]
    figure, axes = plt.subplots(len(keys), len(backbones), figsize=(3.6 * len(backbones), 0.4 + 2.7 * len(keys)),
                                squeeze=False, sharex="col")
    styles = _styles(p)
    for column, backbone in zip(axes.T, backbones, strict=True):
        own = found[backbone]
        shown = {"teacher": ("*", COLOURS["teacher"])} | {
            tables.label(run): (styles[run.paradigm].marker, COLOURS[run.variant])
            for run in p.runs() if run.backbone == backbone and tables.label(run) in own
        }
        for ax, key in zip(column, keys, strict=True):
            if key not in own["teacher"]["diversity"]:
                ax.set_visible(False)
                continue
            at = {}
            for name, (marker, colour) in shown.items():
                result = own[name]
                x, y = (uses.interval(v, n) for v in (result["quality"]["clip"], result["diversity"][key]))
                at[name] = x[0], y[0]
                paired = name == "teacher" or {name + " + GAD", name.removesuffix(" + GAD")} & {*shown} - {name}
                if paired:
                    _cross(ax, x, y, colour)
                ax.plot(x[0], y[0], marker, ms=9 if marker == "*" else 5, color=colour, label=name,
                        mfc=colour if paired else "white", zorder=3 if paired else 2)
            if "the world" in own:
                _across(ax, uses.interval(own["the world"]["diversity"][key], n), "the world's own images", "--")
            for name, end in at.items():
                if name.endswith(" + GAD") and (start := at.get(name.removesuffix(" + GAD"))):
                    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": COLOURS["gad"], "lw": 1.2})
        there = [ax for ax in column if ax.get_visible()]
        there[0].set_title(backbone, fontsize=9)
        there[-1].set_xlabel("CLIP")
        there[-1].tick_params(labelbottom=True)
    for row, key in zip(axes, keys, strict=True):
        next(ax for ax in row if ax.get_visible()).set_ylabel(VENDI[key])
    figure.tight_layout()
    _legend_below(figure, axes[0], 2)
    return figure


def layout(p: Params):
    """Layout control against what it costs, a panel a backbone: from no guidance (hollow) to the largest move.
    Intervals of AP alone: those of CLIP would hide the points."""
    backbones = p.grid.backbones
    found = uses.long(p, ("table5",))["table5"].set_index(["backbone", "model", "metric"])
    figure, axes = plt.subplots(1, len(backbones), figsize=(3.6 * len(backbones), 3.2), squeeze=False, sharey=True)
    styles = _styles(p)
    for ax, backbone in zip(axes[0], backbones, strict=True):
        shown = {"teacher": ("-", "*", COLOURS["teacher"])}
        for run in _runs(p, backbone):
            style = styles[run.paradigm]
            shown[tables.label(run)] = style.beside, style.marker, COLOURS[run.variant]
        for name, (line, marker, colour) in shown.items():
            x, y = (found.loc[[(backbone, name, f"{how}, {k}") for how in uses.moves(p).values()],
                              ["value", "low", "high"]].to_numpy() for k in ("CLIP", "AP"))
            ax.plot(x[:, 0], y[:, 0], ls=line, marker=marker, ms=7 if marker == "*" else 4, lw=1.1, color=colour,
                    label=name)
            ax.plot(x[0, 0], y[0, 0], marker, ms=7 if marker == "*" else 4, mfc="white", mec=colour)
            ax.vlines(x[:, 0], y[:, 1], y[:, 2], color=colour, lw=0.8, alpha=0.35)
        ax.plot([], [], "o", ms=4, mfc="white", mec=COLOURS["teacher"], label="without guidance")
        ax.set_title(backbone, fontsize=9)
        ax.set_xlabel("CLIP")
    axes[0, 0].set_ylabel("AP")
    figure.tight_layout()
    _legend_below(figure, axes[0, :1], 2)
    return figure


def nearby(p: Params):
    """Where the cosine is lost. Above: tangents against values, the teacher's own at noises nearby (line) and students;
    below: students' cosines along their own path, and along their teacher's (hollow)."""
    backbones, styles = p.grid.backbones, _styles(p)
    long = chains.chains(p, p.seeds.distill[:1]).set_index(["backbone", "model", "metric"])[["value", "low", "high"]]
    number = max(len(_runs(p, b)) for b in backbones)
    figure, axes = plt.subplots(2, len(backbones), figsize=(3.6 * len(backbones), 3.6 + 0.22 * number), squeeze=False,
                                sharey="row", height_ratios=(2.8, 0.6 + 0.22 * number))
    for (above, below), backbone in zip(axes.T, backbones, strict=True):
        near = [f"teacher, ε = {size}" for size in sorted(p.nearby.sizes)]
        value, cos = (np.array([long.loc[backbone, model, key] for model in near]) for key in ("value", "cos"))
        above.plot(value[:, 0], cos[:, 0], "-*", color=COLOURS["teacher"], lw=1, label="teacher, at noises nearby")
        above.fill_between(value[:, 0], cos[:, 1], cos[:, 2], color=COLOURS["teacher"], alpha=0.1, lw=0)
        for y, run in enumerate(_runs(p, backbone)):
            name, colour, marker = tables.label(run), COLOURS[run.variant], styles[run.paradigm].marker
            found = tables.read(paths.result(run))["endpoint"]
            at = [_interval(p, found[key], key, p.evaluation.noises) for key in ("value", "cos")]
            _cross(above, *at, colour)
            above.plot(at[0][0], at[1][0], marker, ms=5, color=colour, label=name)
            own, path = (long.loc[(backbone, name, key), "value"] for key in (chains.OWN, chains.PATH))
            below.plot([own, path], [y, y], "-", color=colour, lw=1, alpha=0.5)
            below.plot(own, y, marker, ms=5, color=colour)
            below.plot(path, y, marker, ms=5, color=colour, mfc="white")
        above.set_title(backbone, fontsize=9)
        above.set(xscale="log", xlabel="value error, relative, median", ylim=(0, 1))
        runs = _runs(p, backbone)
        below.set(yticks=range(len(runs)), yticklabels=map(tables.label, runs), xlim=(0, 1),
                  xlabel="JVP cosine: own path, teacher's path (hollow)", ylim=(len(runs) - 0.5, -0.5))
    axes[0, 0].set_ylabel("JVP cosine with the teacher")
    figure.tight_layout()
    _legend_below(figure, axes[0, :1], 2)
    return figure


def published(p: Params):
    """What finite differences report: against h in each precision, and for students of known cosine at the released
    setting. Means over a few noises, with intervals."""
    n = len(p.grid.backbones)
    figure, axes = plt.subplots(n, 2, figsize=(8.5, 2.7 * n), squeeze=False)
    shades = dict(zip(("fp32", "fp16", "bf16"), sns.color_palette("colorblind", 3), strict=True))
    for (left, right), backbone in zip(axes, p.grid.backbones, strict=True):
        sweep = pd.read_csv(paths.diagnosis(backbone) / "precision.csv")
        for (name, scheme), part in sweep.groupby(["precision", "scheme"], sort=False):
            left.plot(part["h"], part["cos"], "o-" if scheme == "forward" else "s--", ms=3, color=shades[name],
                      label=f"{name}, {scheme}")
            left.fill_between(part["h"], part["cos_low"], part["cos_high"], color=shades[name], alpha=0.12, lw=0)
        left.set(xscale="log", xlabel="h, per element", ylim=(-0.1, 1.05))
        left.set_ylabel(f"{backbone}\ncosine with the exact JVP")
        left.axvline(PUBLISHED, color="gray", ls=":", lw=1)
        left.text(PUBLISHED, 1.07, "as released", ha="center", fontsize=7, color="gray")
        known = pd.read_csv(paths.diagnosis(backbone) / "published.csv")
        for key, line, name, label in (
            ("ours", "o-", "fp32", "fp32, h = 0.01 per element"),
            ("released", "D:", "fp16", "fp16, ‖hv‖ = 0.01 on these latents"),
            ("released_element", "s-", "fp16", f"fp16, {PUBLISHED:.1e} per element, as released"),
        ):
            x, (y, low, high) = known["exact_cos"], (known[f"{key}_cos{end}"] for end in ("", "_low", "_high"))
            right.plot(x, y, line, ms=4, color=shades[name], label=label)
            right.fill_between(x, low, high, color=shades[name], alpha=0.12, lw=0)
        for ax, values in ((left, sweep.loc[sweep["precision"] == "fp16", "cos"]), (right, known["released_cos"])):
            if values.isna().all():
                ax.text(0.97, 0.5, "fp16 overflows", transform=ax.transAxes, ha="right", fontsize=7,
                        color=shades["fp16"])
        for y in (0.012, 0.014):
            right.axhline(y, color="black", lw=0.6, ls=":")
        right.text(1, -0.03, "the paper's 0.012 and 0.014", fontsize=7, ha="right", va="top")
        right.set(xlabel="true JVP cosine of the student", ylabel="reported cosine", xlim=(0, 1.03), ylim=(-0.1, 1.05))
    axes[0, 0].legend(frameon=False, fontsize=6)
    axes[0, 1].legend(frameon=False, fontsize=6.5, loc=(0, 0.74))
    figure.tight_layout()
    return figure


def samples(p: Params):
    """The same prompts and noises: teacher above, student below. A row a backbone and paradigm."""
    runs, columns = [r for b in p.grid.backbones for r in _runs(p, b)], len(p.grid.variants)
    rows = len(runs) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 1.6 * rows), squeeze=False)
    for ax, run in zip(axes.flat, runs, strict=True):
        ax.imshow(np.asarray(Image.open(paths.sample_grid(run))))
        ax.set_title(f"{run.backbone}: teacher (above), {tables.label(run)} (below)", fontsize=8)
        ax.axis("off")
    figure.tight_layout()
    return figure


def seeds(p: Params):
    """The same seeds down the rows; teacher, students without and with GAD across, under two prompts (or one, where
    there are several paradigms), each above its columns."""
    backbones, across = p.grid.backbones, 1 + len(p.grid.paradigms) * len(p.grid.variants)
    n, columns = len(backbones), across * (2 if len(p.grid.paradigms) == 1 else 1)
    figure, axes = plt.subplots(n, columns, figsize=(0.95 * columns, 5.9 * n), squeeze=False)
    for row, backbone in zip(axes, backbones, strict=True):
        prompts = BENCHES[p.backbones[backbone].world](backbone, p, "cpu").prompts
        models = [("teacher", paths.references(backbone) / "teacher.png")]
        models += [(tables.label(r), paths.use(r).with_suffix(".png")) for r in _runs(p, backbone)]
        for k, ax in enumerate(row):
            name, path = models[k % across]
            image = np.asarray(Image.open(path))
            wide = (image.shape[1] - 2) // min(4, p.uses.prompts)  # pictures are two pixels apart
            left = wide * (k // across)
            ax.imshow(image[:, left:left + wide + 2])
            ax.set_title(name, fontsize=7)
            ax.axis("off")
            if k % across == 0:
                ax.text(0, 1.045, f"“{prompts[k // across]}”", transform=ax.transAxes, fontsize=8, va="bottom")
        row[0].text(-0.15, 0.5, backbone, transform=row[0].transAxes, rotation=90, va="center", fontsize=9)
    figure.subplots_adjust(wspace=0.04, hspace=0.08)
    return figure


def before_after(p: Params):
    """The claim in one picture: JVP cosine with the teacher, and the same noises drawn by all three."""
    backbones = p.grid.backbones
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 2.9), width_ratios=(1, 1.9))
    rows = []
    for backbone in backbones:
        for run in _runs(p, backbone):
            cosines = tables.read(paths.result(run))["endpoint"]["cos"]
            value, low, high = _interval(p, cosines, "cos", p.evaluation.noises)
            rows.append((backbone, run, value, low, high))
    variants = list(dict.fromkeys((r.paradigm, r.variant) for _, r, *_ in rows))
    width, styles = 0.8 / len(variants), _styles(p)
    for k, (paradigm, variant) in enumerate(variants):
        part = [r for r in rows if (r[1].paradigm, r[1].variant) == (paradigm, variant)]
        x = np.array([backbones.index(r[0]) for r in part]) + (k - (len(variants) - 1) / 2) * width
        v, a, b = np.array([r[2:] for r in part]).T
        left.bar(x, v, width, yerr=[v - a, b - v], color=COLOURS[variant], capsize=2, error_kw={"lw": 0.8},
                 hatch=styles[paradigm].hatch, edgecolor="white", lw=0.3, label=tables.label(part[0][1]))
    left.set(xticks=range(len(backbones)), xticklabels=backbones, ylabel="JVP cosine with the teacher", ylim=(0, 1))
    left.legend(frameon=False, fontsize=6 if len(variants) > 2 else 7, ncols=len(variants) // 2)
    shown = backbones[-1]
    grids = {r.variant: np.asarray(Image.open(paths.sample_grid(r))) for r in _runs(p, shown)
             if r.paradigm == p.grid.paradigms[0]}
    cell = next(iter(grids.values())).shape[0] // 2
    first = next(iter(grids.values()))
    strip = [first[: cell + 2], *(g[cell + 2:] for g in grids.values())]
    right.imshow(np.concatenate([s[: cell] for s in strip]))
    right.set_yticks([cell * (i + 0.5) for i in range(len(strip))],
                     ["teacher", *(tables.label(Run(shown, p.grid.paradigms[0], v, 0)) for v in grids)])
    right.set_xticks([])
    right.set_title(f"{shown}: one column, one prompt and noise", fontsize=8)
    for spine in right.spines.values():
        spine.set_visible(False)
    right.tick_params(length=0)
    figure.tight_layout()
    return figure


def students(p: Params):
    """Every student, those beside the grid too: JVP cosine and how well images fit, between untrained and teacher. Of
    several seeds the first, of published checkpoints all."""
    first = [r for r in p.runs() if r.seed == p.seeds.distill[0] or str(r) in p.published]
    runs = {b: [r for r in first if r.backbone == b] for b in p.grid.backbones}
    heights, shared = [len(r) for r in runs.values()], len(tables.worlds(p)) == 1  # scales differ between worlds
    size = 1.2 + 0.26 * sum(heights) + (0 if shared else 0.4 * len(runs))
    figure, axes = plt.subplots(len(runs), 2, figsize=(8.5, size), squeeze=False, sharex="col" if shared else False,
                                sharey="row", height_ratios=heights)
    for row, (backbone, own) in zip(axes, runs.items(), strict=True):
        for y, run in enumerate(own):
            result = tables.read(paths.result(run))
            measured = (result["endpoint"]["cos"], p.evaluation.noises), (tables.fit(result), 1)
            for ax, (values, noises) in zip(row, measured, strict=True):
                value, low, high = _interval(p, values, "cos", noises)  # both are means
                kind = _kind(p, run)
                colour = COLOURS.get(kind, OTHER)
                ax.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", ms=4, capsize=2, lw=1,
                            color=colour, mfc=colour if run.variant == kind else "white")
        floors = tables.read(paths.diagnosis(backbone) / "floors.json")
        for name, style in (("untrained student", ":"), ("teacher, CFG + 1", "--")):
            _across(row[0], _interval(p, floors[name]["cos"], "cos", p.evaluation.noises), name, style, upright=True)
        teacher = tables.fit(tables.read(paths.teacher_metrics(backbone)))
        _across(row[1], _interval(p, teacher, "cos"), "teacher", upright=True)
        row[0].set_yticks(range(len(own)), [tables.label(r) for r in own])
        row[0].set_ylim(len(own) - 0.5, -0.5)
        row[0].set_ylabel(backbone)
        row[0].set_xlim(0, 1)
        if "scene" in result["quality"]:
            row[1].set_xlim(0, 1)
        if not shared or backbone == p.grid.backbones[-1]:
            row[1].set_xlabel("scene accuracy" if "scene" in result["quality"] else "PickScore")
    axes[-1, 0].set_xlabel("JVP cosine with the teacher, z → x0")
    for name, colour, face in (
        ("without GAD", COLOURS["base"], None), ("with GAD", COLOURS["gad"], None),
        ("these, trained otherwise", COLOURS["teacher"], "white"), ("another term", OTHER, "white"),
    ):
        axes[0, 1].plot([], [], "o", ms=4, color=colour, mfc=face or colour, label=name)
    for ax in axes[0]:
        ax.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.tight_layout()
    return figure


def _kind(p: Params, run: Run) -> str | None:
    """"base" or "gad" of any student without a term or with GAD, however it is trained; None of one with another."""
    term = p.term(run.variant)
    return "base" if term is None else "gad" if term.form in GAD else None


def trained_again(p: Params):
    """GAD's gains by training seed (dots), and of all seeds together with their intervals."""
    long = replicas.replicas(p)
    long = long[long["model"].str.contains(" − ") & (long["backbone"] != replicas.ALL)
                | (long["model"] == replicas.MEAN)]
    rows = list(dict.fromkeys(zip(long["backbone"], long["model"], strict=True)))
    rows.sort(key=lambda row: [*p.grid.backbones, replicas.ALL].index(row[0]))
    shown = {"cos": "JVP cosine", "fit": tables.fits(p), "end": "trajectory error, relative change"}
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 1.1 + 0.26 * len(rows)), sharey=True)
    for ax, (metric, title) in zip(axes, shown.items(), strict=True):
        part = long[long["metric"] == metric].set_index(["backbone", "model"])
        for y, row in enumerate(rows):
            own = part.loc[[row]]
            for seed, value, low, high in own[["seed", "value", "low", "high"]].itertuples(index=False):
                if seed == replicas.ALL:
                    ax.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="D", ms=5, capsize=2, lw=1,
                                color=COLOURS["gad"], label="all seeds")
                else:
                    ax.plot(value, y - 0.25, ".", ms=6, color=OTHER, label="one seed")
        ax.axvline(0, color="black", lw=0.6)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(title)
    axes[0].set_yticks(range(len(rows)), [f"{b}  {m.removesuffix(' − base')}" for b, m in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.7)
    if not rows:
        axes[0].set_title("no student was trained again", fontsize=8)
    figure.tight_layout()
    _legend_below(figure, axes[:1], 1)
    return figure


def lengths(p: Params):
    """JVP cosine and how well images fit over the steps a student was trained for, without and with GAD; of the first
    seed, where there is more than one length."""
    lines, shared = {}, len(tables.worlds(p)) == 1
    for run in p.runs():
        if run.seed == p.seeds.distill[0] and (kind := _at_full_rate(p, run.variant)):
            lines.setdefault(run[:2], {}).setdefault(kind, []).append(run)
    lines = {of: kinds for of, kinds in lines.items() if max(map(len, kinds.values())) > 1}
    backbones, paradigms = ([*dict.fromkeys(names)] for names in zip(*(lines or [(None, None)]), strict=True))
    figure, axes = plt.subplots(
        2 * len(backbones), len(paradigms), figsize=(0.8 + 2.6 * len(paradigms), 0.6 + 3.2 * len(backbones)),
        squeeze=False, sharex=True, height_ratios=[1.2, 1] * len(backbones),
    )
    for of in (axes[::2].flat, axes[1::2].flat) if shared else ():
        for ax in of[1:]:
            ax.sharey(of[0])
    for k, backbone in enumerate(backbones):
        for j, paradigm in enumerate(paradigms):
            top, bottom = axes[2 * k:2 * k + 2, j]
            if (backbone, paradigm) not in lines:
                for ax in (top, bottom):
                    ax.set_visible(not lines)
                continue
            _longer(p, top, bottom, backbone, lines[backbone, paradigm])
            top.set_title(f"{backbone}, {tables.label(Run(backbone, paradigm, 'base', 0))}", fontsize=9)
        if backbone:
            axes[2 * k, 0].set_ylabel("JVP cosine")
            axes[2 * k + 1, 0].set_ylabel(tables.fits(p))
    for ax in axes[-1]:
        ax.set_xlabel("training steps")
        ax.set_xlim(left=0)
    if not lines:
        axes[0, 0].set_title("no student was trained for longer", fontsize=8)
    figure.tight_layout()
    _legend_below(figure, axes[:2, 0], 1)
    return figure


def _longer(p: Params, top, bottom, backbone: str, kinds: dict):
    """Of one backbone and paradigm: above JVP cosines, below how well images fit."""
    floors, noises = tables.read(paths.diagnosis(backbone) / "floors.json"), p.evaluation.noises
    _across(top, _interval(p, floors["untrained student"]["cos"], "cos", noises), "untrained student", ":")
    _across(bottom, _interval(p, tables.fit(tables.read(paths.teacher_metrics(backbone))), "cos"), "teacher")
    for kind, runs in kinds.items():
        runs.sort(key=lambda r: p.steps(r.paradigm, r.variant))
        found = [tables.read(paths.result(r)) for r in runs]
        x = np.array([p.steps(r.paradigm, r.variant) for r in runs])
        measured = [(r["endpoint"]["cos"], noises) for r in found], [(tables.fit(r), 1) for r in found]
        for ax, values in zip((top, bottom), measured, strict=True):
            v, low, high = np.array([_interval(p, y, "cos", each) for y, each in values]).T  # both are means
            ax.errorbar(x * {"base": 1, "gad": 1.03}[kind], v, yerr=[v - low, high - v], fmt="o-", ms=3.5, lw=1.2,
                        capsize=2, color=COLOURS[kind], label={"base": "without GAD", "gad": "with GAD"}[kind])


def _at_full_rate(p: Params, variant: str) -> str | None:
    """"base" or "gad" where a variant is trained as that is but for its length; else None."""
    if variant in ("base", "gad"):
        return variant
    term = p.term(variant)
    if p.controls[variant].rate != 1:
        return None
    if term is None:
        return "base"
    return "gad" if p.gad.model_dump().items() <= term.model_dump().items() else None
