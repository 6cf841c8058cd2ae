"""What the README shows of the report, as it is made and never typed in: the tables' summary and the claims' verdicts,
each between two comments with its name."""

import re
from pathlib import Path

from . import paths

PAPER = "the paper"  # the column of claims.md


def shown() -> dict[str, str]:
    """Tables by name, of those there are."""
    summary, claims = paths.TABLES / "summary.md", paths.REPORTS / "claims.md"
    made = {"summary": summary.read_text()} if summary.exists() else {}
    if claims.exists() and (first := re.search(r"\n(\|.*?\n)\n", claims.read_text(), re.S)):
        made["claims"] = _of_the_paper(first[1])
    return made


def _of_the_paper(table: str) -> str:
    """The rows of claims that are the paper's; all, where there are none of those. Without columns in which nothing is
    left."""
    head, line, *rows = (row.strip("|").split("|") for row in table.splitlines())
    paper = [name.strip() for name in head].index(PAPER)
    kept = [row for row in rows if row[paper].strip() != "no claim of it"] or rows
    columns = [i for i in range(len(head)) if any(row[i].strip() != "–" for row in kept)]
    return "".join(f"|{'|'.join(row[i] for i in columns)}|\n" for row in (head, line, *kept))


def fill(path: Path):
    """Write them into the README at `path`, where there is one."""
    if not path.exists():
        return
    text = path.read_text()
    for name, table in shown().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            head, rest = text.split(begin)
            text = head + begin + table + end + rest.split(end)[1]
    path.write_text(text)
