"""The training loop: a run killed at any moment ends with the bits it would have had."""

import copy
import math
import os
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from gad import params, training
from gad.stages.common import prepare
from gad.training import DivergedError, Role, learning_rate, step_generator, train, update


class Regression:
    """Fits a line through noise. Uses the step's generator and, in its dropout, the global one. The second
    role, as a fake score network beside its student, is trained on `often` steps only."""

    def __init__(self, often=1, nan_at=None):
        torch.manual_seed(7)
        layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
        net = torch.nn.Sequential(*layers)
        self.roles = {
            "student": Role(net, 1e-2, ema=0.9, weight_decay=0.01, muon=5e-2),
            "fake": Role(torch.nn.Linear(4, 1), 1e-2, betas=(0.0, 0.9), ema=0.9),
        }
        self.often, self.nan_at = often, nan_at

    def losses(self, step, generator):
        x = torch.randn(16, 4, generator=generator)
        y = x.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=generator)
        losses = {"student": (self.roles["student"].module(x) - y).square().mean()}
        if step == self.nan_at:
            losses["student"] = losses["student"] * math.nan
        if step % self.often == 0:
            losses["fake"] = (self.roles["fake"].module(x) - y).square().mean()
        return losses | {"size": x.square().mean()}


class Slope:
    """Two weights, both 1, whose loss is linear in them; it can be shared."""

    part = (0, 1)

    def __init__(self):
        net = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(net.weight)
        self.roles = {"student": Role(net, 0.1, betas=(0.3, 0.7), weight_decay=0.2, clip=0.5, ema=0.5)}

    def losses(self, step, generator):
        return {"student": (self.roles["student"].module.weight * torch.tensor([3.0, 4.0])).sum()}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_adamws_at_its_rate_on_the_clipped_gradient(parts):
    """And the average keeps 1 − (1 + n)^−¾ of what it was at step n, at most what its role says."""
    task, accelerator = Slope(), Accelerator(cpu=True)
    role = task.roles["student"]
    role.optimisers = [accelerator.prepare(o) for o in role.optimisers]
    weight, (average,) = role.params[0], role.average.shadow_params
    gradient = 0.1 * torch.tensor([[3.0, 4.0]])  # its norm of 5 cut to 0.5
    for step, kept in enumerate((0, 1 - 2**-0.75, 0.5)):
        before = average.clone()
        assert update(task, step, 0, 0.5, accelerator, parts)["student_norm"] == pytest.approx(5)
        if step == 0:
            torch.testing.assert_close(role.state_of(weight)["exp_avg"], 0.7 * gradient)
            torch.testing.assert_close(role.state_of(weight)["exp_avg_sq"], 0.3 * gradient**2)
            moved = torch.ones(1, 2) - 0.05 * 0.2 - 0.05
            torch.testing.assert_close(weight.detach(), moved, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(average, kept * before + (1 - kept) * weight.detach())
        assert torch.equal(role.averaged()["weight"], average)


def test_a_step_in_bf16_rounds_activations_and_keeps_the_gradients_direction():
    moments, seen = [], []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()
        task, accelerator = Regression(), Accelerator(cpu=True, mixed_precision=precision)
        role = task.roles["student"]
        role.optimisers = [accelerator.prepare(o) for o in role.optimisers]
        role.module[2].p = 0.0
        role.module[0].register_forward_hook(lambda module, x, y: seen.append(y.dtype))
        update(task, 0, 0, 1.0, accelerator)
        kept = [v for p in role.params for k, v in role.state_of(p).items() if k in ("exp_avg", "momentum_buffer")]
        moments.append(torch.cat([v.flatten() for v in kept]))
        assert {p.dtype for p in role.params} == {v.dtype for v in kept} == {torch.float32}
    AcceleratorState._reset_state()
    assert seen == [torch.float32, torch.bfloat16]
    assert not torch.equal(*moments) and torch.cosine_similarity(*moments, dim=0) > 0.99


def test_muon_takes_hidden_weights_alone():
    net = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("time_embed", "hidden", "proj_out")})
    role = Role(net, 1e-3, muon=1e-2)
    adam, muon = ([p for g in o.param_groups for p in g["params"]] for o in role.optimisers)
    assert [p is net["hidden"].weight for p in muon] == [True] and len(adam) == 5


def test_a_slowed_part_moves_by_its_share_of_the_rates():
    net = torch.nn.ModuleDict({k: torch.nn.Linear(4, 4) for k in ("fast", "slow")})
    before = copy.deepcopy(net.state_dict())
    role = Role(net, 1e-3, muon=1e-2, slowed=((net["slow"], 0.1),))
    assert len([p for o in role.optimisers for g in o.param_groups for p in g["params"]]) == 4  # each once
    grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for p in net.parameters():
        p.grad = (grad if p.ndim == 2 else grad[0]).clone()
    for optimiser in role.optimisers:
        optimiser.step()
    moved = {k: net.state_dict()[k] - v for k, v in before.items()}
    for name in ("weight", "bias"):  # Muon's, AdamW's
        torch.testing.assert_close(moved[f"slow.{name}"], 0.1 * moved[f"fast.{name}"], rtol=1e-3, atol=1e-8)
        assert moved[f"fast.{name}"].abs().max() > 1e-4


class Killed(BaseException):
    pass


def kill_at(n):
    def on_step(step):
        if step == n:
            raise Killed

    return on_step


def run(folder, task, steps=12, identity=None, **kwargs):
    settings = {"warmup": 3, "save_every": 3, "log_every": 2} | kwargs
    return train(task, folder, steps, 5, {"lr": 1} if identity is None else identity, **settings)


def bits(task):
    """All that a run leaves: weights, averages, moments."""
    out = {}
    for name, role in task.roles.items():
        out |= {f"{name}/{k}": v for k, v in role.module.state_dict().items()}
        out |= {f"{name}/average/{i}": p for i, p in enumerate(role.average.shadow_params)}
        for i, p in enumerate(role.params):
            out |= {f"{name}/{i}/{k}": v for k, v in role.state_of(p).items()}
    return {k: v.detach().clone() for k, v in out.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("killed", [[2], [3], [7], [4, 11]], ids=str)
@pytest.mark.parametrize("often", [1, 2], ids=["every-step", "every-other-step"])
def test_a_resumed_run_is_the_same_run(tmp_path, killed, often):
    whole = Regression(often)
    log = run(tmp_path / "whole", whole)
    for n in killed:
        with pytest.raises(Killed):
            run(tmp_path / "part", Regression(often), on_step=kill_at(n))
        torch.randn(n)  # a new process has another global generator
    task, done = Regression(often), []
    resumed = run(tmp_path / "part", task, on_step=done.append)
    assert done == list(range(killed[-1] // 3 * 3, 12))
    assert resumed.read_bytes() == log.read_bytes()
    a, b = (load_file(tmp_path / f / "state.safetensors") for f in ("whole", "part"))
    assert_equal(a, b)
    assert_equal(bits(task), bits(whole))


class Images:
    """A convolution whose weights lie channels last, as the autoencoders' do."""

    def __init__(self):
        torch.manual_seed(7)
        net = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.roles = {"student": Role(net, 1e-2, ema=0.9)}

    def losses(self, step, generator):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        return {"student": (self.roles["student"].module(x) - x.mean()).square().mean()}


def test_moments_lie_as_their_weights_do(tmp_path):
    """Fused AdamW walks memory: laid out otherwise, elements would meet others' moments."""
    whole, part = Images(), Images()
    run(tmp_path / "whole", whole)
    with pytest.raises(Killed):
        run(tmp_path / "part", Images(), on_step=kill_at(7))
    run(tmp_path / "part", part)
    assert_equal(bits(part), bits(whole))
    role = part.roles["student"]
    assert {v.stride() for v in role.state_of(role.params[0]).values() if v.ndim == 4} == {role.params[0].stride()}


def test_a_finished_run_is_left_alone(tmp_path):
    first = Regression()
    log = run(tmp_path, first).read_bytes()
    again, done = Regression(), []
    assert run(tmp_path, again, on_step=done.append).read_bytes() == log
    assert done == []
    assert_equal(bits(again), bits(first))


def test_training_learns_and_logs(tmp_path):
    task = Regression(often=2)
    log = run(tmp_path, task, steps=200, log_every=75)
    rows = [line.split(",") for line in log.read_text().splitlines()]
    assert rows[0] == ["step", "student_norm", "fake_norm", "student", "fake", "size"]
    assert [row[0] for row in rows[1:]] == ["0", "75", "150", "199"]
    loss = [float(row[3]) for row in rows[1:]]
    assert loss[-1] < 0.5 * loss[0]
    assert [row[4] == "" for row in rows[1:]] == [False, True, False, True]  # absent where it wasn't trained
    role = task.roles["student"]
    assert any(not torch.equal(p, q) for p, q in zip(role.params, role.average.shadow_params, strict=True))
    assert not list(tmp_path.glob("*.part"))


def test_seed_decides(tmp_path):
    ends = []
    for i, seed in enumerate((1, 1, 2)):
        task = Regression()
        train(task, tmp_path / str(i), 3, seed, {})
        ends.append(bits(task))
    assert_equal(ends[0], ends[1])
    assert not torch.equal(ends[0]["student/0.weight"], ends[2]["student/0.weight"])


def test_only_what_has_a_gradient_is_trained(tmp_path):
    """One role's loss does not reach another role's weights."""

    class Coupled(Regression):
        def losses(self, step, generator):
            x = torch.randn(16, 4, generator=generator)
            student, fake = (r.module(x) for r in self.roles.values())
            return {"student": (student - fake).square().mean()}

    task = Coupled()
    fake = task.roles["fake"].module.weight.detach().clone()
    student = task.roles["student"].module[0].weight.detach().clone()
    run(tmp_path, task)
    assert torch.equal(task.roles["fake"].module.weight, fake)
    assert task.roles["fake"].module.weight.grad is None
    assert not torch.equal(task.roles["student"].module[0].weight, student)


def test_divergence_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(DivergedError, match=r"student loss is nan at step 7"):
        run(tmp_path, Regression(nan_at=7))
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / "state.safetensors").values())
    task, done = Regression(), []
    run(tmp_path, task, on_step=done.append)  # with the cause gone it goes on from there
    assert done == list(range(6, 12))
    whole = Regression()
    run(tmp_path / "whole", whole)
    assert_equal(bits(task), bits(whole))


def test_a_gradient_that_is_no_number_stops_before_its_step(tmp_path):
    """The loss may be finite: a root at 0 has an infinite slope."""
    class Root(Regression):
        def losses(self, step, generator):
            losses = super().losses(step, generator)
            if step == 7:
                weight = self.roles["student"].module[0].weight
                losses["student"] = losses["student"] + ((weight - weight.detach()).square().sum()).sqrt()
            return losses

    with pytest.raises(DivergedError, match=r"gradient of the student loss is nan at step 7"):
        run(tmp_path, Root())
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / "state.safetensors").values())


def test_another_identity_starts_over_and_says_so(tmp_path, capsys):
    seen = []
    run(tmp_path, Regression(), identity={"lr": 1, "seed": 0})
    run(tmp_path, Regression(), identity={"seed": 0, "lr": 1}, on_step=seen.append)
    assert not seen  # the order of keys is not part of it: all is done
    run(tmp_path, Regression(), identity={"lr": 2, "seed": 0}, on_step=seen.append)
    assert seen == list(range(12)) and "other parameters: starting over" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    run(tmp_path, Regression())
    state = tmp_path / "state.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="not a readable checkpoint") as error:
        run(tmp_path, Regression())
    assert os.path.relpath(state) in str(error.value) and "\n" not in str(error.value)


def test_step_generator_depends_on_both():
    def draw(*args):
        return torch.rand(4, generator=step_generator(*args)).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, step)) for seed in range(5) for step in range(5)}) == 25
    assert draw(1, 23) != draw(12, 3)


def test_learning_rate():
    factors = [learning_rate(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1) and factors[100] == pytest.approx(0.05)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert learning_rate(0, 5, 0) == 1 and 0 < learning_rate(4, 5, 50) < 1


@pytest.mark.parametrize(("able", "expected"), [({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "no")])
def test_bf16_gives_way_on_a_cpu_without_it(monkeypatch, capsys, able, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert prepare(params.load(), "bf16").mixed_precision == expected
    assert ("going on in fp32" in capsys.readouterr().err) == (expected == "no")


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_in_fp32_takes_torchs_step(shape):
    """Newton–Schulz in fp32 and in bf16 differ by bf16's rounding; and the step stays orthogonal."""
    start, gradient = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    moved = []
    for optimiser in (training.Muon, torch.optim.Muon):
        w = torch.nn.Parameter(start.clone())
        w.grad = gradient.clone()
        optimiser([w], 0.1, weight_decay=0.0).step()
        moved.append(w.detach() - start)
    assert torch.cosine_similarity(*(m.flatten() for m in moved), dim=0) > 0.999
    before, after = (torch.linalg.svdvals(m) for m in (gradient, moved[0]))
    assert before[0] / before.median() > 1.4 > after[0] / after.median()  # nearly equal singular values


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launchers_of_one_trained_network_are_refused(monkeypatch, kind):
    """Before accelerate looks for what they need."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=f"^distributed_type={kind}: .* use MULTI_GPU, .*hardware.shard"):
        prepare(params.load())
