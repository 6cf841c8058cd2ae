"""The teacher's tangents, made in parts: shared by processes, kept when a run stops."""

from types import SimpleNamespace

import pytest
import torch

from gad.stages.common import in_parts


def process(index, of):
    return SimpleNamespace(
        process_index=index, num_processes=of, is_main_process=index == 0, wait_for_everyone=lambda: None
    )


def test_parts_are_those_of_the_whole_in_order(tmp_path):
    x = torch.randn(7, 3)
    found = in_parts(lambda j: {"x": x[j], "twice": 2 * x[j]}, 7, 3, tmp_path / "w", process(0, 1))
    assert torch.equal(found["x"], x) and torch.equal(found["twice"], 2 * x)


def test_an_interrupted_run_makes_only_what_is_missing(tmp_path):
    x, made = torch.randn(8, 2), []

    def make(j):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(j.start)
        return {"x": x[j]}

    with pytest.raises(KeyboardInterrupt):
        in_parts(make, 8, 2, tmp_path, process(0, 1))
    again = []
    found = in_parts(lambda j: again.append(j.start) or {"x": x[j]}, 8, 2, tmp_path, process(0, 1))
    assert made == [0, 2] and again == [4, 6] and torch.equal(found["x"], x)


def test_processes_share_the_parts_and_the_main_one_has_all(tmp_path):
    x, made = torch.randn(5, 2), {0: [], 1: []}

    def make(index):
        return lambda j: made[index].append(j.start) or {"x": x[j]}

    assert in_parts(make(1), 5, 1, tmp_path, process(1, 2)) is None
    found = in_parts(make(0), 5, 1, tmp_path, process(0, 2))
    assert made == {0: [0, 2, 4], 1: [1, 3]} and torch.equal(found["x"], x)
