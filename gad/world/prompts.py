"""Training prompts from any file, streamed: of a large one no more is held than what is asked for."""

import csv
import gzip
import heapq
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

COLUMNS = ("prompt", "caption", "text")  # where a file's prompts are looked for, unless its column is named
LONGEST = 2**20  # bytes of a line: one without an end would fill the memory


def read_prompts(path: Path | str, column: str | None = None) -> Iterator[str]:
    """The prompts of a UTF-8 file, one at a time, whatever its length: .txt (one a line), .jsonl (an object a line)
    or .csv (with a header), each also as .gz.

    `column`: the key or column that holds them; without it the first of `prompt`, `caption`, `text` that the file
    has. White space within a prompt becomes single blanks; empty prompts are skipped. Raises ValueError with file
    and line: at once for a file that is not there or of another kind, on the way for what is wrong inside.
    """
    path = Path(path)
    read = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if read is None:
        raise ValueError(f"{path}: prompts are read from .txt, .jsonl or .csv, also with .gz: rename or convert it")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the path of a file of prompts")
    return filter(None, map(_clean, read(_lines(path), path, column)))


def sample_prompts(path: Path | str, n: int, seed: int, column: str | None = None) -> list[str]:
    """`n` of a file's prompts in random order, in one pass that holds `n` of them: see `read_prompts`.

    A reservoir by random keys (Efraimidis & Spirakis 2006, with equal weights): each prompt draws a number in
    [0, 1), the n lowest stay, in the order of their numbers. So a smaller sample is the beginning of a larger one
    with the same `seed`. Of fewer than `n` prompts all are taken, over and over in one order, so that none comes
    twice more than another. Raises ValueError for a file without prompts.
    """
    found = draw(read_prompts(path, column), n, seed)
    if not found:
        raise ValueError(f"{path} has no prompts: give another file")
    return filled(found, n)


def draw(items: Iterable, n: int, seed: int) -> list:
    """`n` of `items` in random order, or all of fewer; of a smaller `n` the first of these."""
    rng = random.Random(seed)  # its random() is the same in every version of Python
    return [item for *_, item in heapq.nsmallest(n, ((rng.random(), i, item) for i, item in enumerate(items)))]


def filled(found: list, n: int) -> list:
    """`n` entries: those of `found` over and over."""
    return [found[i % len(found)] for i in range(n)]


def _clean(text: str) -> str:
    return " ".join(text.split())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1."""
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), start=1):
                if len(line) == LONGEST:
                    raise ValueError(f"{path}:{number}: a line of {LONGEST} bytes or more: put one prompt on each")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}:{number}: not UTF-8: save the file as UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}:{number + 1}: not gzip, or damaged ({error}): compress or copy it again") from None


def _txt(lines, path, column) -> Iterator[str]:
    return (line for _, line in lines)


def _jsonl(lines, path, column) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}): write one object on each line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a {type(row).__name__}: write one object on each line")
        column = _column(row, column, f"{path}:{number}")
        if not isinstance(row[column], str):
            raise ValueError(f"{path}:{number}: {column} is a {type(row[column]).__name__}: make it a string")
        yield row[column]


def _csv(lines, path, column) -> Iterator[str]:
    reader = csv.DictReader((line for _, line in lines), strict=True)
    try:
        if reader.fieldnames is None:
            return
        column = _column(reader.fieldnames, column, f"{path}:1")
        for row in reader:
            if None in row or None in row.values():
                few = "fewer" if None in row.values() else "more"
                raise ValueError(
                    f"{path}:{reader.line_num}: {few} fields than the header's {len(reader.fieldnames)}: "
                    "put prompts with commas in quotes"
                )
            yield row[column]
    except csv.Error as error:
        where = f"{path}:{reader.reader.line_num}"
        raise ValueError(f"{where}: {error}: put the prompt in quotes, and double its own") from None


def _column(there: Iterable[str], column: str | None, where: str) -> str:
    for name in (column,) if column else COLUMNS:
        if name in there:
            return name
    missing = repr(column) if column else f"column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
    raise ValueError(f"{where}: there is no {missing}: name the column that holds the prompts, of {', '.join(there)}")
