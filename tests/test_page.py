"""The report's figures, and its page: all that the reports say, once each, and nothing to fetch."""

import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import groupby, islice
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib import pyplot as plt

from gad import page, params, paths, plots, schema, tables
from gad.__main__ import main
from gad.params import ROOT, Run
from gad.tables import chains, uses

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Elements as dicts: tag, attrs, the ids and classes around them, their text. Asserts that tags are balanced."""

    def __init__(self, html):
        super().__init__()
        self.all, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        inside = [e["attrs"].get("id") for e in self.open] + [e["attrs"].get("class") for e in self.open]
        self.all.append({"tag": tag, "attrs": attrs, "inside": set(inside), "text": ""})
        if tag not in VOID:
            self.open.append(self.all[-1])

    def handle_startendtag(self, tag, attrs):
        self.all.append({"tag": tag, "attrs": dict(attrs), "inside": set(), "text": ""})

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()["tag"] == tag, tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, *tags, inside=None, without=None):
        return [e for e in self.all if e["tag"] in tags and (inside is None or inside in e["inside"])
                and (without is None or without not in e["inside"])]


def plain(text):
    """A cell's characters, however it is set."""
    return re.sub(r"\s", "", text.replace("−", "-").replace("`", ""))


def cells(markdown):
    rows = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return [plain(c) for row in rows if not set("".join(row)) <= set(":-") for c in row]


def copied(patch, folder):
    """The shipped reports in `folder`, where a page of their own is to be."""
    shutil.copytree(ROOT / "reports", folder / "reports", ignore=shutil.ignore_patterns("notebooks", "index.html"))
    for name, place in (("REPORTS", "reports"), ("TABLES", "reports/tables"), ("FIGURES", "reports/figures")):
        patch.setattr(paths, name, folder / place)
    return folder / "reports"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The shipped reports, with the page that is made of them, `html` and `page`."""
    with pytest.MonkeyPatch.context() as patch:
        reports = copied(patch, tmp_path_factory.mktemp("whole"))
        html = page.write(params.load()).read_text()
    return SimpleNamespace(reports=reports, html=html, page=Page(html))


@pytest.fixture
def reports(monkeypatch, tmp_path):
    """A copy of the reports with the first rows of each table, which is the sooner a page."""
    made = copied(monkeypatch, tmp_path)
    for file in (made / "tables").glob("*.md"):
        rows = groupby(file.read_text().splitlines(keepends=True), lambda line: line.startswith("|"))
        file.write_text("".join(line for table, lines in rows for line in islice(lines, 8 if table else None)))
    return made


def made(**overrides):
    return Page(page.write(params.load(**overrides)).read_text())


def sections(found):
    return [e["attrs"]["id"] for e in found.find("section")]


def test_every_table_is_there_once_and_whole(whole):
    found = whole.page
    for path in (whole.reports / "tables").glob("*.md"):
        assert sections(found).count(path.stem) == 1
        shown = [plain(e["text"]) for e in found.find("th", "td", inside=path.stem)]
        assert shown == cells(path.read_text()), path.name


def test_tables_and_figures_to_come_need_no_change(reports):
    for name in ("table6", "table2", "figure5", "another"):
        shutil.copy(reports / "tables/table4.md", reports / f"tables/{name}.md")
    shutil.copy(reports / "figures/world.png", reports / "figures/figure5.png")
    found = made()
    ids = sections(found)
    order = ["verdicts", "summary", "teachers", "table1", "table2", "table4", "table6", "another", "figure5", "figures"]
    assert [i for i in ids if i in order] == order
    for name in ("table6", "another"):
        assert [plain(e["text"]) for e in found.find("th", "td", inside=name)] == cells(
            (reports / "tables/table4.md").read_text())
    assert [e["attrs"]["src"] for e in found.find("img")].count("figures/figure5.png") == 1
    ids = [e["attrs"]["id"] for e in found.all if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))


def test_every_figure_is_there_once_and_described(whole):
    images = whole.page.find("img")
    on_disk = sorted(f"figures/{f.name}" for f in (whole.reports / "figures").glob("*.png"))
    assert sorted(e["attrs"]["src"] for e in images) == on_disk
    assert images[0]["attrs"]["src"] == "figures/before_after.png"
    assert all(len(e["attrs"]["alt"]) > 20 and int(e["attrs"]["width"]) > 0 for e in images)
    captions, said = [e["text"] for e in whole.page.find("figcaption")], page.captions(params.load())
    assert sorted(captions) == sorted(said[f.split("/")[1][:-4]][1] for f in on_disk)


def test_a_figure_that_is_not_there_is_left_out(reports):
    (reports / "figures/students.png").unlink()
    html = page.write(params.load()).read_text()
    assert "figures/students.png" not in html and page.FIGURES["students"][1].split("'")[0] not in html


def test_nothing_is_fetched_and_links_lead_somewhere(whole):
    found = whole.page
    assert not found.find("script", "link", "iframe", "object", "embed", "video", "audio", "source", "base")
    style = found.find("style")
    assert len(style) == 1 and "url(" not in style[0]["text"] and "@import" not in style[0]["text"]
    ids = {e["attrs"].get("id") for e in found.all}
    for element in found.all:
        assert not {"srcset", "onload", "poster", "background"} & set(element["attrs"])
        for link in (element["attrs"].get("src"), element["attrs"].get("href")):
            if link:
                assert not re.match(r"\w+:|/", link), link
                assert link[1:] in ids if link.startswith("#") else (whole.reports / link).is_file(), link


def test_the_shipped_page_is_of_this_graph(whole):
    """It shows stages of dvc.yaml, which DVC does not take for a dependency."""
    assert whole.html == (ROOT / "reports/index.html").read_text()


def test_every_verdict_is_there(whole):
    text = (whole.reports / "claims.md").read_text()
    rows = re.findall(r"^\| (\w+) +\| (.+?) +\| (.+?) +\| (.+?) +\|$", text, re.M)
    wanted = Counter(tuple(map(plain, row)) for row in rows if row[0] not in ("backbone", "claim"))
    found = whole.page
    results = [e for e in found.find("li", inside="results")]
    shown = Counter(plain(e["text"]) for e in results)
    assert wanted and shown == Counter({"".join(row): n for row, n in wanted.items()})
    assert {e["attrs"]["class"] for e in results} == {row[3].replace("notr", "not-r") for row in wanted}
    table = [line.strip("| ").split("|") for line in text.split("\n## ")[1].splitlines() if line.startswith("| ")]
    head, *lines = [[cell.strip() for cell in line] for line in table]
    whole = [(line[head.index("the paper")], line[head.index("as a whole")]) for line in lines]
    counts = Counter(verdict.split(" within ")[0] for paper, verdict in whole if paper != "no claim of it")
    counts = Counter({plain(v): n for v, n in counts.items() if not set(v) <= set(":-")})
    assert len(counts) > 1 and counts == Counter({
        plain(e["text"]).lstrip("0123456789"): int(re.match(r"\d+", plain(e["text"]))[0])
        for e in found.find("li", inside="counts")
    })
    for title in re.findall(r"^## (.+)$", text, re.M):
        assert title in [e["text"] for e in found.find("h3", inside="verdicts")]


def test_marks_are_where_the_intervals_are(reports):
    text = "# C\n\n## A\n\nThe paper: x.\n\n| backbone | student | difference | verdict |\n|:--|:--|:--|:--|\n"
    rows = "| a | s | -0.5 [-1, +1.0e-3] | undecided |\n| b | s | +nan [+nan, +nan] | undecided |\n"
    (claim,) = page.judged(page.parse(text + rows)[1])
    value, low, high = claim["rows"][0]["mark"]
    assert low < value < 50 < high < 50.1 and abs((50 - value) - (value - low)) < 0.1 and low > 0
    assert claim["rows"][1]["mark"] is None and claim["edges"] == [50]
    (claim,) = page.judged(page.parse(text + rows)[1], {"A": [-2, 2]})  # further out than any interval
    left, right = claim["edges"]
    assert 0 < left < claim["rows"][0]["mark"][1] and left + right == 100


def test_claims_that_are_not_the_papers_and_an_overview(reports):
    head = "# C\n\nRule.\n\n## All\n\n| claim | the paper | as a whole |\n|:--|:--|:--|\n"
    head += "| A | x | mixed |\n| B | no claim of it | mixed |\n| C | y | reproduced |\n"
    row = "| backbone | student | difference | verdict |\n|:--|:--|:--|:--|\n| a | s | -0.5 [-1, -0.1] | reproduced |\n"
    (reports / "claims.md").write_text(f"{head}\n## A\n\nThe paper: x.\n\n{row}\n## B\n\nOurs.\n\n{row}")
    found = made()
    said = [plain(e["text"]) for e in found.find("div", inside="verdicts")
            if e["attrs"].get("class") == "claim-paper"]
    assert said == ["thepaper’sx.", "Ours."]
    shown = [e["text"] for e in found.find("th", "td", inside="verdicts")]
    assert shown[:6] == ["claim", "the paper", "as a whole", "A", "x", "mixed"]
    assert [plain(e["text"]) for e in found.find("li", inside="counts")] == ["1reproduced", "1mixed"]
    assert len(found.find("li", inside="results")) == 2


def test_the_papers_numbers_stand_apart(whole):
    found = whole.page
    for name in (f"table{i}" for i in range(1, 7)):
        parts = re.split(r"\n(?=## |The paper \()", (whole.reports / f"tables/{name}.md").read_text())
        theirs = [x for x in parts if x.startswith(("## The paper's", "The paper ("))]
        ours = [x for x in parts if x not in theirs]
        shown = [plain(e["text"]) for e in found.find("th", "td", inside="theirs") if name in e["inside"]]
        assert theirs and shown == cells("\n".join(theirs))
        assert [plain(e["text"]) for e in found.find("th", "td", inside=name, without="theirs")] == cells(
            "\n".join(ours))
    paragraph = next(e for e in found.find("p", inside="table4") if e["text"].startswith("The paper"))
    assert "theirs" in paragraph["inside"]


def test_how_to_rerun_is_what_dvc_and_params_say(reports):
    found = made(**{"gad.h": 0.02})
    rows = found.find("tr", inside="rerun")
    assert any(re.fullmatch(r"gad\.h0\.02", plain(r["text"])) for r in rows)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name in ("tables", "figures"):
        for out in (next(iter(o)) for o in stages[name]["outs"]):
            if out.endswith((".md", ".png")) and (reports.parent / out).exists() and "claims" not in out:
                (row,) = (r["text"] for r in rows if out.removeprefix("reports/").split(".")[0] + "\n" in r["text"])
                assert f"dvc repro --allow-missing {name}" in row
                assert all(key in row for key in stages[name]["params"])
    known = page.graph(params.load())
    for code in found.find("code", inside="rerun"):
        if code["text"].startswith("dvc repro "):
            names = code["text"].removeprefix("dvc repro ").removeprefix("--allow-missing ").split()
            assert set(names) <= set(known), names
    table1 = next(r["text"] for r in rows if r["text"].strip().startswith("tables/table1"))
    assert "dvc repro diagnose evaluate evaluate-baselines evaluate-controls evaluate-maps" in table1
    for command in re.findall(r"python -m gad (\w+)", found.find("pre")[0]["text"]):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])


def test_graph_follows_dependencies():
    p = params.load()
    stages = page.graph(p)
    assert stages["autoencoder"]["needs"] == []
    assert stages["teacher"]["needs"] == ["autoencoder"]
    assert {"autoencoder", "teacher", "diagnose", "distill", "evaluate"} <= set(stages["tables"]["needs"])
    assert "tables" not in stages["figures"]["needs"]
    assert {f"backbones.{b}" for b in p.grid.backbones} <= set(stages["teacher"]["params"])
    assert not any("${" in key for stage in stages.values() for key in stage["params"])


def test_template_has_no_number_of_its_own():
    text = (ROOT / "gad/page.html.j2").read_text()
    for part in (r"<style>.*?</style>", r"\{%.*?%\}", r"\{\{.*?\}\}", r"<[^>]*>"):
        text = re.sub(part, "", text, flags=re.S)
    assert not re.search(r"\d", text)


def test_bytes_repeat(reports):
    first = page.write(params.load()).read_bytes()
    assert page.write(params.load()).read_bytes() == first and first.endswith(b"</html>\n")


@pytest.mark.parametrize("name, stage", [("claims.md", "tables"), ("figures/before_after.png", "figures")])
def test_what_is_missing_is_named_with_its_stage(reports, name, stage):
    (reports / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^reports/{name} is missing: .*`dvc repro {stage}`$") as error:
        page.write(params.load())
    assert "\n" not in str(error.value)


def test_a_figure_without_caption_is_an_error(reports):
    shutil.copy(reports / "figures/world.png", reports / "figures/new.png")
    with pytest.raises(ValueError, match=r"figures/new\.png has no caption"):
        page.write(params.load())


PHOTOGRAPHS = {"backbones.sd2.world": "coco", "backbones.sd2.path": "somewhere"}
ALL_PHOTOGRAPHS = {k.replace("sd2", b): v for b in ("sd2", "pixart", "sana") for k, v in PHOTOGRAPHS.items()}


def test_photographs_are_not_called_miniatures(reports):
    def said(found):
        (banner,) = (plain(e["text"]) for e in found.find("aside"))
        return banner, plain(found.find("h2")[0]["text"] + found.find("title")[0]["text"])

    found = made(**ALL_PHOTOGRAPHS)
    banner, titles = said(found)
    assert "miniature" not in banner + titles and "Studentstake4steps." in banner and banner.endswith("here.")
    assert not any("world.png" in str(e["attrs"]) for e in found.all)
    assert "PickScore on the right" in page.captions(params.load(**ALL_PHOTOGRAPHS))["students"][0]
    assert "places" not in str(page.captions(params.load(**ALL_PHOTOGRAPHS))["figure5"])
    found = made(**PHOTOGRAPHS)
    banner, titles = said(found)
    assert "Thoseofpixart,sanaareminiatures" in banner and "miniature" not in titles
    assert any(e["attrs"]["src"] == "figures/world.png" for e in found.find("img"))
    assert "scene accuracy or PickScore on" in page.captions(params.load(**PHOTOGRAPHS))["students"][0]


def test_figures_of_one_seed_of_several_say_so():
    one, several = (page.captions(params.load(**{"seeds.distill": seeds})) for seeds in ([3], [3, 4]))
    assert one == page.captions(params.load())
    assert {n for n in several if several[n] != one[n]} == set(page.ONE_SEED)
    assert all("seed 3 alone" in several[n][1] for n in page.ONE_SEED)


@pytest.fixture
def figure(monkeypatch):
    """Of `figure(draw, results, **overrides)`; `results` has what each file says, by its path."""
    def drawn(draw, results=None, **overrides):
        monkeypatch.setattr(tables, "read", results)
        made = draw(params.load(**{"report.bootstrap": 20, **overrides}))
        made.canvas.draw()
        return made

    yield drawn
    plt.close("all")


def test_figure5_has_no_panel_of_what_a_world_has_not(figure, monkeypatch):
    def models(p, backbone):
        scores = {"vendi": [1.0, 2.0], **({} if backbone == "sd2" else {"layout_vendi": [2.0, 3.0]})}
        names = "teacher", "TDM", "TDM + GAD"
        return {name: {"quality": {"clip": [0.2, 0.3]}, "diversity": scores} for name in names}

    monkeypatch.setattr(uses, "models", models)
    axes = np.reshape(figure(plots.figure5, **PHOTOGRAPHS).axes, (2, 3))
    assert [[ax.get_visible() for ax in row] for row in axes] == [[True] * 3, [False, True, True]]
    assert axes[0, 0].get_xlabel() == "CLIP" and axes[1, 1].get_ylabel() == plots.VENDI["layout_vendi"]
    assert any(t.label1.get_visible() for t in axes[0, 0].xaxis.get_major_ticks())


def test_longer_trained_students_have_a_panel_and_a_line_with_gad_and_one_without(figure):
    """At the rate of the grid alone, and GAD as the grid has it; backbones without a further length have no panel."""
    def results(path):
        cos = {"cos": [0.1, 0.2]}
        return {"endpoint": cos, "quality": {"scene": [0, 1]}, "untrained student": cos}

    lengths = {"backbones": ["sana"], "paradigms": ["tdm"], "variants": ["thrice", "thrice_gad"]}
    blocks = {f"further.{name}.backbones": [] for name in schema.Further.model_fields}
    blocks["further.rates.backbones"] = ["sana"]
    del blocks["further.lengths.backbones"]
    found = figure(plots.lengths, results, **blocks, **{"further.lengths": lengths})
    (top, bottom), p = found.axes, params.load()
    assert top.get_title() == "sana, TDM" and bottom.get_ylabel() == "scene accuracy"
    for ax in found.axes:
        lines = [c.lines[0].get_xdata() for c in ax.containers]
        assert [list(x / x[0]) for x in lines] == [[1, p.controls["thrice"].longer]] * 2
    none = figure(plots.lengths, results, **blocks, **{"further.lengths": lengths | {"backbones": []}})
    assert "no student was trained for longer" in none.axes[0].get_title()


def test_students_have_an_axis_for_each_measure_and_published_ones_a_row(figure):
    def results(path):
        cos = {"cos": [0.1, 0.2]}
        quality = {"pickscore": [20.0, 21.0]} if "sd2" in str(path) else {"scene": [0, 1]}
        return {"endpoint": cos, "quality": quality, "untrained student": cos, "teacher, CFG + 1": cos}

    turbo = {"sd2-turbo-base-0": {"backbone": "sd2", "paradigm": "turbo", "path": "somewhere"}}
    seeds = {"seeds.distill": [1, 2], "further.replicas.seeds": []}
    found = figure(plots.students, results, **PHOTOGRAPHS, published=turbo, **seeds)
    right = np.reshape(found.axes, (3, 2))[:, 1]
    faces = {}  # of a row's point, by its name: full where it is the grid's own
    for name, (point, *_) in zip(found.axes[2].get_yticklabels(), found.axes[2].containers, strict=False):
        faces[name.get_text()] = point.get_color(), point.get_markerfacecolor()
    blue, orange = (plots.COLOURS[k] for k in ("base", "gad"))
    assert faces["TDM"] == (blue, blue) and faces["TDM + GAD"] == (orange, orange)
    assert faces["TDM, half the rate"] == (blue, "white") and faces["TDM + GAD, map form"] == (orange, "white")
    assert faces["TDM + RKD"] == (plots.OTHER, "white")
    assert [ax.get_xlabel() for ax in right] == ["PickScore", "scene accuracy", "scene accuracy"]
    assert right[0].get_xlim()[0] > 10 and right[1].get_xlim() == (0, 1)
    names = [t.get_text() for t in found.axes[0].get_yticklabels()]
    assert names.count("TURBO") == names.count("TDM") == 1


def test_nearby_shows_one_seeds_students_beside_their_teachers_curve(figure, monkeypatch):
    """Own path, and hollow the teacher's, below; above, the same cosine against the value error."""
    def results(path):
        seed = int(path.stem[-1]) if path.parent.name in ("results", "chains") else 0
        if path.parent.name == "results":
            return {"endpoint": {"cos": [0.2 + seed] * 2, "value": [0.1, 0.1]}}
        if path.parent.name == "chains" or path.stem == "untrained":
            return {"step": [[0.9] * 2] * 2, "path": [[0.9] * 2, [0.8] * 2], "own": [[0.9] * 2, [0.2 + seed] * 2]}
        return {s: {"cos": [c] * 2, "value": [v] * 2} for s, c, v in (("0.02", 0.9, 0.01), ("0.3", 0.4, 0.2))}

    for name in ("read", "grouped"):
        made = results if name == "read" else lambda runs, b, place: {
            (r.paradigm, r.variant): [results(place(r))] for r in runs if r.backbone == b}
        monkeypatch.setattr(chains, name, made)
    only = {"grid.paradigms": ["tdm"], "seeds.distill": [0, 1], "nearby.sizes": [0.3, 0.02],
            "further.replicas.seeds": []}
    above, *_, below = np.reshape(figure(plots.nearby, results, **only).axes, (2, 3))[:, 0]
    curve, *students = (line.get_xydata().tolist() for line in above.lines if line.get_marker() not in ("", "None"))
    assert curve == [[0.01, pytest.approx(0.9)], [0.2, pytest.approx(0.4)]]  # by size, whatever their order
    assert students == [[[pytest.approx(0.1), pytest.approx(0.2)]]] * 2
    points = [line.get_xdata()[0] for line in below.lines if len(line.get_xdata()) == 1]
    assert points == pytest.approx([0.2, 0.8] * 2)


def test_no_two_paradigms_look_alike(figure, monkeypatch):
    p = params.load()
    styles = plots._styles(p)
    assert len({*styles.values()}) == len(styles) == len({r.paradigm for r in p.runs()})
    for looks in zip(*plots.STYLES, strict=True):
        assert len(set(looks)) == len(plots.STYLES)
    assert {n: styles[n] for n in ("tdm", "ladd", "sid")} == {
        "tdm": ("-", "--", "s", ""), "ladd": ("--", "-.", "o", "////"), "sid": (":", ":", "D", "....")}
    names = ["teacher", *(tables.label(Run("", n, v, 0)) for n in p.paradigms for v in ("base", "gad"))]
    rows = [(b, name, f"{how}, {k}", 0.5, 0.4, 0.6) for b in p.grid.backbones for name in names
            for how in uses.moves(p).values() for k in ("CLIP", "AP")]
    table = pd.DataFrame(rows, columns=["backbone", "model", "metric", "value", "low", "high"])
    monkeypatch.setattr(uses, "long", lambda p, names: {"table5": table})
    found = figure(plots.layout, **{"grid.paradigms": [*p.paradigms], "further.baselines.paradigms": []})
    shown = {line.get_label(): line.get_marker() for line in found.axes[0].lines if line.get_label() in names}
    assert set(shown) == set(names) and len(set(shown.values())) == 1 + len(p.paradigms)
