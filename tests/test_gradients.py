"""What a term weighs: norms of gradients from the logs, and of each part where training begins."""

import re

import pandas as pd
import pytest

from gad import params, paths, schema
from gad.tables import gradients


def test_norms_are_of_logged_steps_at_which_the_student_moves(monkeypatch, tmp_path):
    for name in ("DATA", "TABLES"):
        monkeypatch.setattr(paths, name, tmp_path / name)
    p = params.load(**{f"further.{b}.backbones": ["sana"] for b in schema.Further.model_fields},
                    **{f"further.{b}.paradigms": [] for b in schema.Further.model_fields},
                    **{"grid.backbones": ["sana"], "grid.paradigms": ["tdm"], "distill.clip": 3.0})
    for run in p.runs():
        paths.log(run).parent.mkdir(exist_ok=True, parents=True)
        norms = [0.0, 1.0, 2.0, 6.0] if run.variant == "base" else [0.0, 4.0, 8.0, 2.0]
        pd.DataFrame({"step": range(4), "student_norm": norms}).to_csv(paths.log(run), index=False)
    found = gradients.write(p).set_index(["model", "metric"])["value"]
    assert found["TDM", "norm"] == 2 and found["TDM", "clipped"] == pytest.approx(1 / 3)
    assert found["TDM + GAD", "norm"] == 4 and found["TDM + GAD", "times"] == 2
    assert found["TDM + GAD", "clipped"] == pytest.approx(2 / 3) and ("TDM", "times") not in found
    text = (paths.TABLES / "gradients.md").read_text()
    assert re.search(r"\| TDM +\| +2 \| – +\| 33% ", text) and re.search(r"\| TDM \+ GAD +\| +4 \| 2 +\| 67% ", text)
