"""Roles in shares: two processes hold half of each, and train what one trains. The file is also their script."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import build
from safetensors.torch import load_file

from gad import params, training
from gad.distill import Distillation
from gad.paradigms import PARADIGMS
from gad.tangents import Samples, Tangents
from gad.training import train

P = params.load()
CASES = [*(("sana", name) for name in ("tdm", "ladd", "sid", "swiftbrush")), ("sd2", "tdm"), ("pixart", "tdm")]


class StoppedError(Exception):
    pass


def task_of(name, paradigm):
    """A paradigm with GAD in its step form; tangents of the teacher are noise, which does for training."""
    backbone, g = build(name), torch.Generator().manual_seed(0)
    shape = 8, 5, *backbone.latent_shape
    states, responses = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    cond = backbone.encode(["a red circle", "a blue square on a white background"] * 4)
    tangents = Tangents(states, responses, cond)
    torch.manual_seed(0)
    made = PARADIGMS[paradigm](backbone, 4, 2.0, P.paradigms[paradigm], P.distill)
    gad = P.gad.model_copy(update={"pairs": 4})
    return Distillation(made, cond, tangents, gad, 4, 0, Samples(tangents.z, tangents.x0, cond))


def trained(name, paradigm, folder, shard, steps=1, stop=None):
    """Train in `folder`, whose state then holds all roles; returns the task."""
    def on_step(step):
        if step == stop:
            raise StoppedError

    task, accelerator = task_of(name, paradigm), Accelerator(cpu=True)
    with contextlib.suppress(StoppedError):
        train(task, folder, steps, 0, {}, 1, 1, 1, accelerator, on_step, shard=shard)
    accelerator.wait_for_everyone()  # one may be at its checkpoint still
    return task


def share(role):
    """What of a role's trained weights this process holds."""
    return sum(p.to_local().numel() for p in role.params) / sum(p.numel() for p in role.params)


def main(folder):
    torch.set_num_threads(1)
    for name, paradigm in CASES:
        task = trained(name, paradigm, folder / f"{name}-{paradigm}", True)
        for role, its in task.roles.items():
            assert not its.sharded or share(its) < 0.6, role
        assert task.roles["student"].sharded
    trained("sana", "tdm", folder / "once", True, 3)
    trained("sana", "tdm", folder / "stopped", True, 3, stop=2)
    trained("sana", "tdm", folder / "stopped", True, 3)
    trained("sana", "tdm", folder / "at_once", False)
    training.MANY = 5000  # some weights are of more
    trained("sana", "tdm", folder / "in_many", False)
    own = folder / ("stopped", "elsewhere")[int(os.environ["RANK"])]
    with pytest.raises(RuntimeError, match=r"different steps, \[3, 0\]: .*state.safetensors has to be the same file"):
        trained("sana", "tdm", own, True, 3)


def apart(a, b, part, origin=None):
    """How far `part` of two states is apart, in units of its own size, or of its way from `origin`."""
    keys = sorted(k for k in a if part(k))
    x, y = (torch.cat([s[k].flatten() for k in keys]) for s in (a, b))
    return ((x - y).norm() / (x - (0 if origin is None else origin(keys))).norm()).item()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, forks):
    folder = tmp_path_factory.mktemp("shared")
    command = [*forks.python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29513",
               "--no-python", *forks.python, __file__, str(folder)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
                        "PYTHONPATH": str(params.ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name, paradigm", CASES)
def test_gradients_of_shares_are_those_of_the_whole(shared, tmp_path, name, paradigm):
    """After one step the first moment is the gradient, by which shares are told; a weight's step is its sign."""
    task = trained(name, paradigm, tmp_path, False)
    whole, found = (load_file(f / "state.safetensors") for f in (tmp_path, shared / f"{name}-{paradigm}"))
    assert whole.keys() == found.keys()
    for role in task.roles:
        moments = [k for k in whole if k.startswith(f"{role}/optimiser") and k.endswith("exp_avg")]
        assert apart(whole, found, moments.__contains__) < 1e-4, role


@pytest.mark.slow
def test_shares_go_where_the_whole_goes(shared, tmp_path):
    trained("sana", "tdm", tmp_path, False, 3)
    whole, found = (load_file(f / "state.safetensors") for f in (tmp_path, shared / "once"))
    for role, its in task_of("sana", "tdm").roles.items():
        prefix, start = f"{role}/module/", its.module.state_dict()

        def origin(keys, prefix=prefix, start=start):
            return torch.cat([start[k.removeprefix(prefix)].flatten() for k in keys])

        assert apart(whole, found, lambda k, p=prefix: k.startswith(p), origin) < 0.02, role
    assert apart(whole, found, lambda k: k.startswith("student/average/")) < 1e-6


@pytest.mark.slow
def test_shares_resume_with_the_same_bits(shared):
    once, twice = (load_file(shared / name / "state.safetensors") for name in ("once", "stopped"))
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)


@pytest.mark.slow
def test_gradients_are_the_same_bits_however_many_are_exchanged_at_once(shared, tmp_path):
    once, many = (load_file(shared / name / "state.safetensors") for name in ("at_once", "in_many"))
    assert once.keys() == many.keys() and all(torch.equal(once[k], many[k]) for k in once)
    trained("sana", "tdm", tmp_path, False)
    whole = load_file(tmp_path / "state.safetensors")  # of one process
    moments = [k for k in whole if k.endswith("exp_avg")]
    assert apart(whole, many, moments.__contains__) < 1e-4


if __name__ == "__main__":
    main(Path(sys.argv[1]))
