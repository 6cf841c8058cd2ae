"""The README's code runs, and its tables are the pipeline's."""

import re

import pytest
import torch

from gad import readme
from gad.params import ROOT

README = (ROOT / "README.md").read_text()


def test_ten_lines_run_and_point_the_right_way():
    code = re.search(r"<!-- example:.*?-->\n```python\n(.*?)```", README, re.S).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4, bias=False)
    target = torch.randn(4, 4)
    scope = {
        "student": lambda z, cond: linear(z), "teacher": lambda z, cond: z @ target.T, "cond": None,
        "z": torch.randn(8, 4), "base_loss": torch.zeros(()),
    }
    gap = []
    optimiser = torch.optim.Adam(linear.parameters(), 0.05)
    for _ in range(200):
        exec(code, scope)
        optimiser.zero_grad()
        scope["loss"].backward()
        optimiser.step()
        gap.append((linear.weight - target).norm().item())
    assert gap[-1] < 0.05 * gap[0]


@pytest.mark.parametrize("name", ["summary", "claims"])
def test_the_tables_are_the_pipelines(name):
    shown = README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    assert shown == readme.shown()[name] and shown.count("\n") > 5


def test_claims_shown_are_the_papers():
    table = f"| claim | lower | {readme.PAPER} |\n|:--|:--|:--|\n| one | – | so |\n| two | 3 | no claim of it |\n"
    assert readme._of_the_paper(table) == f"| claim | {readme.PAPER} |\n|:--|:--|\n| one | so |\n"
    ours = table.replace("| so |", "| no claim of it |")  # a grid without the paper's claims
    assert readme._of_the_paper(ours) == ours


@pytest.mark.parametrize("page", ["README.md", "reports/findings.md"])
def test_what_it_links_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    missing = [k for k in links if not k.startswith("http") and not ((ROOT / page).parent / k).exists()]
    assert links and not missing
