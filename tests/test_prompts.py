"""Training prompts from files."""

import gzip
import random
import tracemalloc

import numpy as np
import pytest

from gad.world.prompts import read_prompts, sample_prompts

PROMPTS = ["a cat", 'a "big" dog, running', "two lines", "ein Bär"]
CONTENT = {
    "p.txt": '\ufeffa cat\r\n\n  \n a "big"  dog, running \ntwo lines\nein Bär',
    "p.jsonl": '{"id": 1, "caption": "no", "prompt": "a cat"}\n\n{"prompt": "a \\"big\\" dog, running"}\n'
    '{"prompt": "two\\nlines"}\n{"prompt": " "}\n{"prompt": "ein B\\u00e4r"}\n',
    "p.csv": '\ufeffid,prompt\r\n1,a cat\r\n\r\n2,"a ""big"" dog, running"\r\n3,"two\nlines"\r\n4,\r\n5,ein Bär\r\n',
}


def put(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", [n + end for n in CONTENT for end in ("", ".gz")])
def test_every_format_gives_the_same_prompts(name, tmp_path):
    path = put(tmp_path / name, CONTENT[name.removesuffix(".gz")])
    assert list(read_prompts(path)) == PROMPTS
    if ".txt" not in name:
        assert list(read_prompts(path, "prompt")) == PROMPTS
        with pytest.raises(ValueError, match=r":1: there is no 'words': name the column .* id, "):
            list(read_prompts(path, "words"))


def test_columns_are_looked_for_in_order(tmp_path):
    assert list(read_prompts(put(tmp_path / "a.csv", "text,caption\n1,2\n"))) == ["2"]
    assert list(read_prompts(put(tmp_path / "a.jsonl", '{"text": "1", "prompt": "3"}\n'))) == ["3"]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.csv", "id,words\n1,a\n", r"a\.csv:1: there is no column prompt, caption or text: .*, of id, words$"),
        ("a.csv", "id,prompt\n1,a\n2,b, c\n", r"a\.csv:3: more fields than the header's 2: put prompts with commas"),
        ("a.csv", "id,prompt\n1,a\n2\n", r"a\.csv:3: fewer fields"),
        ("a.csv", 'prompt\na\n"b\n', r"a\.csv:3: unexpected end of data: put the prompt in quotes"),
        ("a.csv", f'prompt\n"{"b" * 140000}"\n', r"a\.csv:2: field larger than field limit"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl:2: not JSON .*: write one object on each line"),
        ("a.jsonl", '\n["a"]\n', r"a\.jsonl:2: a list: write one object"),
        ("a.jsonl", '{"prompt": 3}\n', r"a\.jsonl:1: prompt is a int: make it a string"),
        ("a.jsonl", '{"prompt": "a"}\n{"caption": "b"}\n', r"a\.jsonl:2: there is no 'prompt'"),
        ("a.txt", "a\n" + "b" * 2**20, r"a\.txt:2: a line of 1048576 bytes or more: put one prompt on each"),
    ],
)
def test_what_is_wrong_inside_a_file(name, text, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        list(read_prompts(put(tmp_path / name, text)))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet: prompts are read from \.txt, \.jsonl or \.csv"):
        read_prompts(tmp_path / "a.parquet")  # at once, before the first prompt is asked for
    with pytest.raises(ValueError, match=r"a\.txt does not exist: give"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8"):
        list(read_prompts(tmp_path / "a.txt"))
    (tmp_path / "a.txt.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"a\.txt\.gz:1: not gzip, or damaged"):
        list(read_prompts(tmp_path / "a.txt.gz"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\nb\n" * 5000)[:-20])
    with pytest.raises(ValueError, match=r"a\.txt\.gz:\d+: not gzip, or damaged"):
        list(read_prompts(tmp_path / "a.txt.gz"))


def test_a_sample_has_the_lowest_keys(tmp_path):
    lines = [f"p{i}" for i in range(200)]
    path = put(tmp_path / "a.txt", "\n".join(lines))
    rng = random.Random(5)
    keys = {line: rng.random() for line in lines}
    expected = sorted(lines, key=keys.get)
    for n in (1, 7, 200):
        assert sample_prompts(path, n, 5) == expected[:n]
    assert sample_prompts(path, 7, 6) != expected[:7]


def test_a_sample_is_uniform(tmp_path):
    path = put(tmp_path / "a.txt", "\n".join(map(str, range(20))))
    drawn = np.array([sample_prompts(path, 5, seed) for seed in range(2000)], dtype=int)
    for part, share in ((drawn, 5 / 20), (drawn[:, :1], 1 / 20)):
        counts = np.bincount(part.ravel(), minlength=20)
        assert abs(counts - 2000 * share).max() < 4.5 * np.sqrt(2000 * share * (1 - share))


def test_a_small_file_is_gone_through_again(tmp_path):
    path = put(tmp_path / "a.jsonl", "".join(f'{{"caption": "{c}"}}\n' for c in "xyz"))
    drawn = sample_prompts(path, 7, 0)
    assert sorted(drawn[:3]) == ["x", "y", "z"] and drawn == (drawn[:3] * 3)[:7]
    with pytest.raises(ValueError, match=r"b\.txt has no prompts: give another file"):
        sample_prompts(put(tmp_path / "b.txt", "\n \n"), 1, 0)
    with pytest.raises(ValueError, match=r"b\.csv has no prompts"):
        sample_prompts(put(tmp_path / "b.csv", ""), 1, 0)


def test_a_large_file_takes_no_memory(tmp_path):
    path = put(tmp_path / "a.csv.gz", "prompt\n" + "".join(f"prompt {i} {'x' * 500}\n" for i in range(8000)))
    tracemalloc.start()
    sample_prompts(path, 10, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5e6  # of 4.1 MB
