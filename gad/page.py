"""The report as one static page, reports/index.html: what the other stages wrote, set for reading. Every number comes
from reports/, params.yaml, dvc.yaml or CITATION.cff; page.html.j2 has none."""

import re
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, reduce
from itertools import takewhile
from pathlib import Path, PurePosixPath

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from PIL import Image

from . import paths
from .claims import CLAIMS
from .params import ROOT, Params
from .tables import fits, worlds

FIRST = "before_after"
ORDER = (  # others follow by name
    "summary", "teachers", "table1", "means", "replicas", "chains", "gradients", *(f"table{i}" for i in range(2, 7))
)
MEASURED = {  # the stages, * for their further blocks, that measure a result; keys of params.yaml that say on how much
    "teachers": ("teacher", "teacher.prompts"),
    "summary": ("evaluate", "evaluation.prompts evaluation.noises evaluation.quality_prompts"),
    "table1": ("diagnose evaluate*", "evaluation.prompts evaluation.noises evaluation.quality_prompts"),
    "table2": ("references use*", "uses.seeds uses.prompts uses.train uses.fit"),
    "table3": ("references use*", "uses.seeds uses.prompts uses.draws"),
    "table4": ("diagnose evaluate*", "evaluation.trajectory_prompts"),
    "table5": ("references use*", "uses.layouts uses.evals uses.scale uses.sweep uses.draws"),
    "table6": ("references use*", "uses.library uses.picks uses.query uses.seeds uses.prompts"),
    "figure2": ("diagnose distill evaluate", "evaluation.prompts endpoints.probes"),
    "figure5": ("references use*", "uses.seeds uses.prompts"),
    "gradients": ("distill*", "distill.clip"),
    "replicas": ("diagnose evaluate*", "evaluation.prompts evaluation.noises evaluation.quality_prompts "
                 "evaluation.trajectory_prompts"),
    "means": ("diagnose evaluate* use", "evaluation.prompts evaluation.noises evaluation.quality_prompts "
              "evaluation.trajectory_prompts uses.seeds uses.prompts"),
    "chains": ("nearby chain", "evaluation.prompts evaluation.noises nearby.sizes"),
    "nearby": ("nearby chain evaluate", "evaluation.prompts evaluation.noises nearby.sizes"),
    "layout": ("references use", "uses.layouts uses.evals uses.scale uses.sweep uses.draws"),
    "precision": ("diagnose", ""),
    "seeds": ("references use", "uses.seeds uses.prompts"),
    **dict.fromkeys(("students", "lengths"),
                    ("teacher diagnose evaluate*", "evaluation.prompts evaluation.quality_prompts")),
    **dict.fromkeys(("samples", FIRST), ("evaluate", "evaluation.prompts")),
}
BESIDE = {  # the tables that figures stand under; others have a section of their own
    "figure2": "table1", "students": "table1", "nearby": "chains", "lengths": "means", "replicas": "replicas",
    "seeds": "table2", "layout": "table5", "figure5": "figure5",
}
LONG = 8  # rows; a longer table is folded, unless it is its section's first
FIGURES = {  # alternative text, caption; what stands in braces depends on the worlds that are drawn
    "world": ("Coloured shapes on plain grounds, with captions.", "The world that stands for photographs."),
    FIRST: ("Bars of JVP cosines by backbone, without and with GAD; pictures of the same noises by all three models.",
            "JVP cosine with the teacher, with intervals; the same noises through the teacher and both students."),
    "figure2": ("Curves of value errors and JVP cosines over noise level and over training, a row a backbone.",
                "Values and tangents: of the local map over noise levels, with intervals; of noise to image over "
                "training, of few noises, where Table 1 has many; upright lines at the end are the finished students' "
                "intervals. Grey: the teacher at another guidance scale, and the untrained student."),
    "figure5": ("Points of {vendi} against CLIP, a column a backbone, with arrows from without to with GAD.",
                "Diversity against fidelity; an arrow leads from a student without GAD to the one with it. Hollow: "
                "students of paradigms that have none with it; their intervals are in the table. Crosses and bands "
                "are intervals."),
    "nearby": ("Above, points of JVP cosines against value errors with the teacher's own curve, a panel a backbone; "
               "below, two JVP cosines a student joined by a line.",
               "Where the cosine is lost. Above, tangents against values: students, and the teacher against itself at "
               "noises nearby, of as different values. Below: the cosine along a student's own path, Table 1's, and "
               "along its teacher's path (hollow), where its steps begin at the teacher's states. Without intervals "
               "below: the table has them."),
    "layout": ("Curves of AP against CLIP over the size of a guided move, a panel a backbone, a line a model.",
               "Layout control against fidelity to the prompt, from no guidance (hollow) to the largest move. "
               "Control that costs nothing would go straight up. AP is against the boxes, with its intervals; "
               "those of CLIP, with the prompt, are in the table."),
    "students": ("Points with intervals, a row a student: JVP cosine on the left, {fit} on the right.",
                 "Every student, between floors and teacher. Hollow: at another rate, for longer, in another form, or, "
                 "grey, with something else in GAD's place."),
    "lengths": ("Lines of JVP cosine and {fit} over training steps, without and with GAD, a pair of panels a student.",
                "Trained for longer: in each pair tangents above, {fit} below, with intervals of prompts alone. "
                "Shaded: the untrained student (above), the teacher (below)."),
    "replicas": ("Points by row, a row a student: differences of {fit}, JVP cosine and trajectory error, by seed.",
                 "What GAD changes, trained again from other seeds: each seed (dots), and all together with intervals "
                 "of prompts and of training."),
    "seeds": ("Columns of {pictures}, six seeds down, by teacher and students, of one prompt a backbone.",
              "The same six seeds down the rows: teacher, students without and with GAD, under the prompt above them."),
    "samples": ("Rows of {pictures} in pairs, teacher above student, for every backbone without and with GAD.",
                "The same prompts and noises through teacher (above) and student (below)."),
    "precision": ("Curves of reported cosines against the size of a difference and against the true cosine.",
                  "What finite differences report, by size and precision (left), and of students whose true cosine is "
                  "known, the teacher with noise on its weights (right): means of few noises, with intervals. "
                  "Dotted: the released size, the paper's values. The released script's h is the norm of the whole "
                  "perturbation: on larger latents it changes each element less (squares), on these more (diamonds)."),
}
MINI = {  # what captions say besides, where the miniature world is drawn
    "figure5": " Above, by the judge's features: these count flaws as variety, and the world's own images, dashed, "
               "have none: a lower score may mean fewer flaws. Below, by the places of objects alone: the variety that "
               "a prompt leaves open, of as many images with all colours for every model, over the prompts that have "
               "so many.",
}
ONE_SEED = (FIRST, "figure2", "nearby", "students", "lengths", "samples", "seeds")  # they show the first seed alone
ITEM = re.compile(r"\$\{item\.(\w+)\}")  # in a stage's keys
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


@dataclass
class Table:
    head: list[str]
    rows: list[list[str]]

    @cached_property
    def labels(self) -> int:
        """How many columns, from the left, name a row."""
        words = takewhile(lambda c: not any(re.match(r"[+-]?\d|nan|–", x) for x in c), zip(*self.rows, strict=True))
        return max(1, len(list(words)))

    @cached_property
    def name(self) -> int:
        """Which of these, from 1, stays in sight: the first that tells all rows apart, else the last."""
        columns = [*zip(*self.rows, strict=True)][:self.labels]
        return next((i for i, c in enumerate(columns, 1) if len(set(c)) == len(c)), self.labels)


@dataclass
class Section:
    """A heading with what follows it. `paper`: these numbers are the paper's, not ours."""

    title: str = ""
    paper: bool = False
    parts: list[Table | str] = field(default_factory=list)

    @property
    def table(self) -> Table | None:
        return next((part for part in self.parts if isinstance(part, Table)), None)


def parse(text: str) -> tuple[str, list[Section]]:
    """Title and sections of Markdown as gad.tables and gad.claims write it; the first section has no heading."""
    title, sections = "", [Section()]
    for node in SyntaxTreeNode(MARKDOWN.parse(text)).children:
        words = node.children[0].content if node.type in ("heading", "paragraph") else ""
        if node.type == "heading" and node.tag == "h1":
            title = words
        elif node.type == "heading":
            sections.append(Section(words, words.startswith("The paper's")))
        elif node.type == "table":
            rows = [[c.children[0].content for c in row.children] for part in node.children for row in part.children]
            sections[-1].parts.append(Table(rows[0], rows[1:]))
        else:
            if words.startswith("The paper") and sections[-1].table:  # it is no part of our table above it
                sections.append(Section(paper=True))
            sections[-1].parts.append(MARKDOWN.renderer.render(node.to_tokens(), MARKDOWN.options, {}))
    return title, sections


def cell(text: str) -> str:
    """As HTML: a minus is one, an arrow stays with its word, an interval is set apart from its number."""
    html = MARKDOWN.renderInline(re.sub(r" (?=[↑↓])", "\xa0", re.sub(r"(?<![\w.])-(?=[\d.])", "−", text)))
    return re.sub(r"^(\S+) (\[[^\]]*\])$", r'\1 <span class="ci">\2</span>', html)


def counted(overview: list[Section]) -> Counter:
    """How many of the paper's claims have which verdict as a whole."""
    rows = [dict(zip(s.table.head, row, strict=True)) for s in overview for row in s.table.rows]
    return Counter(row["as a whole"].split(" within ")[0] for row in rows if row.get("the paper") != "no claim of it")


def judged(sections: list[Section], edges: dict[str, list[float]] | None = None) -> list[dict]:
    """The claims of claims.md, a section with results each. A result's `mark`: value, low and high of its interval in
    per cent of a line whose middle is zero, as long as the claim's results need; none where they aren't numbers.
    `edges`: by a claim's title, where its side begins, if not at zero; in per cent of that line too."""
    claims = []
    for title, table, parts in ((s.title, s.table, s.parts) for s in sections
                                 if s.table and "difference" in s.table.head):
        rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
        numbers = [[float(x) for x in re.findall(r"[+-]?[\d.]+(?:e[+-]\d+)?", row["difference"])] for row in rows]
        ends = (edges or {}).get(title, [0.0])
        reach = 1.06 * max(abs(x) for found in [*numbers, ends] for x in found) or 1
        for row, found in zip(rows, numbers, strict=True):
            row["mark"] = [round(50 + 50 * x / reach, 2) for x in found] if len(found) == 3 else None
        marks = [round(50 + 50 * x / reach, 2) for x in ends]
        claims.append({"title": title, "paper": parts[0], "rows": rows, "edges": marks})
    for claim in claims:
        found = Counter(row["verdict"] for row in claim["rows"])
        claim["counts"] = [(n, v) for v in ("reproduced", "undecided", "not reproduced") if (n := found[v])]
    return claims


def graph(p: Params) -> dict[str, dict]:
    """The stages of dvc.yaml that have something to run: outs, keys of params.yaml, all stages before them."""
    found = {}
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        matrix = stage.get("matrix", {})
        matrix |= {k: reduce(getattr, v[2:-1].split("."), p) for k, v in matrix.items() if isinstance(v, str)}
        if "foreach" in stage:  # of the checkpoints of others
            matrix, stage = {"backbone": list(dict.fromkeys(e.backbone for e in p.published.values()))}, stage["do"]
        if not all(matrix.values()):
            continue
        keys = [ITEM.sub(value, key.removesuffix(".${key}")) for key in stage.get("params", [])
                for item in [ITEM.search(key)] for value in (matrix[item[1]] if item else [""])]
        outs = [next(iter(o)) if isinstance(o, dict) else o for o in stage["outs"]]
        needs = {n for n, s in found.items() if any(_meet(d, o) for d in stage["deps"] for o in s["outs"])}
        needs |= {before for n in needs for before in found[n]["needs"]}
        found[name] = {"desc": stage["desc"], "outs": outs, "params": keys, "needs": [n for n in found if n in needs]}
    return found


def _meet(dep: str, out: str) -> bool:
    """Whether one may lie in the other, whatever ${…} stands for."""
    a, b = (PurePosixPath(*takewhile(lambda x: "$" not in x, PurePosixPath(x).parts)) for x in (dep, out))
    return a.is_relative_to(b) or b.is_relative_to(a)


def captions(p: Params) -> dict[str, tuple[str, str]]:
    """FIGURES that are of these worlds and seeds, and what they say of them."""
    there, (seed, *more), found = worlds(p), p.seeds.distill, {}
    words = {
        "fit": fits(p),
        "pictures": "small scenes" if there == {"mini"} else "images",
        "vendi": "two Vendi scores, of features and of places," if "mini" in there else "the Vendi score of features",
    }
    for name, texts in FIGURES.items():
        alt, caption = (text.format(**words) for text in texts)
        caption += MINI.get(name, "") if "mini" in there else ""
        if more and name in ONE_SEED:
            caption += f" Students of distillation seed {seed} alone, where tables have all."
        found[name] = alt, caption
    if "mini" not in there:
        del found["world"]
    return found


def write(p: Params) -> Path:
    """reports/index.html; returns its path."""
    stages = graph(p)
    maker = {out: name for name, stage in stages.items() for out in stage["outs"]}
    for name in ("claims.md", f"figures/{FIRST}.png"):
        if not (paths.REPORTS / name).exists():
            raise FileNotFoundError(f"reports/{name} is missing: run its stage, `dvc repro {maker[f'reports/{name}']}`")
    texts = sorted(paths.TABLES.glob("*.md"), key=lambda f: ((*ORDER, f.stem).index(f.stem), f.stem))
    pictures = {path.stem: Image.open(path).size for path in sorted(paths.FIGURES.glob("*.png"))}
    if unknown := set(pictures) - set(FIGURES):
        raise ValueError(f"reports/figures/{min(unknown)}.png has no caption: add it to FIGURES in gad/page.py")
    _, claims = parse((paths.REPORTS / "claims.md").read_text())
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = cell
    overview = [s for s in claims if s.table and "difference" not in s.table.head]
    path = paths.REPORTS / "index.html"
    path.write_text(environment.get_template("page.html.j2").render(
        p=p, small=[b for b in p.grid.backbones if p.backbones[b].world == "mini"],
        stages=stages, maker=maker, rule=claims[0].parts, long=LONG, first=FIRST,
        claims=judged(claims, {claim.text: claim.edges(p) for claim in CLAIMS}),
        overview=overview, counts=counted(overview), read=(paths.REPORTS / "findings.md").exists(),
        tables={f.stem: parse(f.read_text()) for f in texts}, csv={f.stem for f in paths.TABLES.glob("*.csv")},
        measured={
            n: ([s for s in stages if any(fnmatch(s, x) for x in by.split())],
                [(k, reduce(getattr, k.split("."), p)) for k in keys.split()]) for n, (by, keys) in MEASURED.items()
        },
        figures={n: (*pictures[n], *texts) for n, texts in captions(p).items() if n in pictures},
        beside={f.stem: [n for n, table in BESIDE.items() if table == f.stem and n in pictures] for f in texts},
        paper=yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]) + "\n")
    return path
