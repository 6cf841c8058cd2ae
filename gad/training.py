"""The one training loop: autoencoders, teachers and students all run through `train`.

Randomness at a step follows from `(seed, step)` alone, so a checkpoint is weights, moments and a step number.
It is one safetensors file, replaced atomically: a run killed at any moment resumes with the same bits.

Under `accelerate launch` the processes share each step's batch. Gradients are averaged over them by hand, not by DDP's
hooks: losses of several roles run through each other's networks, often several times, which these do not allow for.
Where memory is short each process may keep only its share of every role (`shard`).
"""

import csv
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import _muon
from tqdm.auto import tqdm

MANY = 2**26  # elements of gradients that processes exchange at once: 256 MB


@dataclass
class Role:
    """One trained module and how its optimisers treat it. `ema`: decay, or None for no average.

    AdamW at `lr`. With `muon`, the weights of hidden linear layers (all but embeddings and the output) take Muon
    (Jordan et al. 2024) at that rate instead, scaled to AdamW's RMS: transformers learn in a third of the steps.
    `slowed`: parts of the module, each with what its rates are multiplied by.
    """

    module: torch.nn.Module
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float | None = None
    muon: float | None = None
    slowed: tuple[tuple[torch.nn.Module, float], ...] = ()
    optimisers: list[torch.optim.Optimizer] = field(init=False)
    average: EMAModel | None = field(init=False, default=None)
    sharded: bool = field(init=False, default=False)

    def __post_init__(self):
        self.params = [p for p in self.module.parameters() if p.requires_grad]
        hidden = [] if self.muon is None else [
            m.weight for name, m in self.module.named_modules()
            if isinstance(m, torch.nn.Linear) and m.weight.requires_grad and "embed" not in name
            and "proj_out" not in name
        ]
        chosen = {id(p) for p in hidden}
        rest = [p for p in self.params if id(p) not in chosen]
        adamw = self._groups(rest, self.lr)
        self.optimisers = [
            torch.optim.AdamW(adamw, self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)
        ]
        if hidden:
            muon = Muon(
                self._groups(hidden, self.muon), weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimisers.append(muon)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["base_lr"] = group["lr"]
        if self.ema:
            self.average = EMAModel(self.params, decay=self.ema, use_ema_warmup=True, power=0.75)

    def _groups(self, params, lr) -> list[dict]:
        by = {id(p): factor for part, factor in self.slowed for p in part.parameters()}
        factors = [by.get(id(p), 1.0) for p in params]
        return [
            {"params": [p for p, f in zip(params, factors, strict=True) if f == factor], "lr": lr * factor}
            for factor in dict.fromkeys(factors)
        ]

    def shard(self):
        """Leave each process its share of the weights, and so of gradients, moments and average (FSDP2), before any
        step; a block's weights are whole while it works. Modules that name no blocks are small and stay whole."""
        blocks = getattr(self.module, "_no_split_modules", None)
        if not blocks:
            return
        for module in reversed([*self.module.modules()]):  # inner ones first
            if module is self.module or type(module).__name__ in blocks:
                fully_shard(module, reshard_after_forward=True)
        self.__post_init__()
        self.sharded = True

    def averaged(self) -> dict[str, torch.Tensor]:
        """The module's state, whole, with the average of what is trained: of a sharded role all processes must ask."""
        trained = [name for name, p in self.module.named_parameters() if p.requires_grad]
        state = self.module.state_dict() | dict(zip(trained, self.average.shadow_params, strict=True))
        return {k: _whole(v) for k, v in state.items()}

    def state_of(self, p: torch.nn.Parameter) -> dict:
        """The optimiser's state of one parameter, as the optimiser holds it."""
        for optimiser in self.optimisers:
            if any(p is q for group in optimiser.param_groups for q in group["params"]):
                return getattr(optimiser, "optimizer", optimiser).state[p]
        raise KeyError("the role does not train this parameter")


class Muon(torch.optim.Muon):
    """torch's, whose Newton–Schulz iteration is in bf16 alone: without such arithmetic a CPU emulates it, for three
    quarters of a step's time. On CPUs it runs in fp32 here."""

    def step(self, closure=None):
        with mock.patch.object(_muon, "_zeropower_via_newtonschulz", _orthogonal):
            return super().step(closure)


_in_bf16 = _muon._zeropower_via_newtonschulz


def _orthogonal(grad, coefficients, steps, eps):
    if grad.device.type != "cpu":
        return _in_bf16(grad, coefficients, steps, eps)
    a, b, c = coefficients
    tall = grad.shape[0] > grad.shape[1]
    x = grad.T if tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Task(Protocol):
    """What `train` trains. `losses` returns one scalar for each role to update at this step, by the role's
    name, and any further scalars to log. A task whose batch can be shared has `part`: (i, n), of which of n equal
    parts `losses` is the mean; one that has none gives every process the whole."""

    roles: dict[str, Role]

    def losses(self, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]: ...


class DivergedError(RuntimeError):
    """A loss became NaN or infinite."""


def step_generator(seed: int, step: int, device="cpu", stream: str = "") -> torch.Generator:
    """The generator of one step: a function of `(seed, step, stream)` only."""
    digest = hashlib.sha256(f"{seed}/{step}{stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def identity_key(identity: dict) -> str:
    """A run's identity as a hash."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to a twentieth; as a factor of the base rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    task: Task,
    folder: Path,
    steps: int,
    seed: int,
    identity: dict,
    warmup: int = 50,
    save_every: int = 200,
    log_every: int = 25,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int], None] | None = None,
    accumulate: int = 1,
    shard: bool = False,
) -> Path:
    """Train `task` for `steps` steps; returns the path of `folder/log.csv`.

    `identity` is whatever fixes the result (parameters, seed): a checkpoint in `folder` with another identity
    gives way and training starts over. `on_step(step)` is called before each step, with the number of steps
    already done, on the main process. `accumulate`: parts in which each process takes its share of a batch, one after
    another; more need less memory and give the same gradients. `shard`: each process keeps its share of the roles
    alone, and all of them call `on_step`. The accelerator's trackers see what is logged.
    Raises `DivergedError` at the first non-finite loss or gradient; the last checkpoint stays.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    folder.mkdir(parents=True, exist_ok=True)
    shard = shard and accelerator.num_processes > 1
    for role in task.roles.values():
        role.module.to(accelerator.device)
        if shard:
            role.shard()
        if role.average:
            role.average.to(accelerator.device)
        role.optimisers = [accelerator.prepare(o) for o in role.optimisers]
    state, log = folder / "state.safetensors", folder / "log.csv"
    key = identity_key(identity)
    start, rows = _load(state, task, key) if state.exists() else (0, [])
    if state.exists() and not start:
        note = f"{folder.name}: the interrupted run had other parameters: starting over"
        print(note, file=sys.stderr, flush=True)
    _agree(start, state, accelerator)
    torch.manual_seed(seed)
    bar = tqdm(total=steps, initial=start, disable=None, desc=folder.name, mininterval=5)
    began, last = time.monotonic(), time.monotonic()
    for step in range(start, steps):
        if on_step and (shard or accelerator.is_main_process):
            on_step(step)
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:7], "big"))
        try:
            row = update(task, step, seed, learning_rate(step, steps, warmup), accelerator, accumulate)
        except DivergedError as error:
            kept = f"; the last checkpoint is kept in {os.path.relpath(folder)}" if state.exists() else ""
            raise DivergedError(f"{error}: lower its lr or gad.lam{kept}") from None
        if step % log_every == 0 or step == steps - 1:
            rows.append(row)
            accelerator.log({k: v for k, v in row.items() if k != "step"}, step)
        bar.update()
        if step == start:  # the first step also makes data and compiles
            began = time.monotonic()
        due = step > start and time.monotonic() - last > 30
        if bar.disable and accelerator.is_main_process and due:  # no terminal: a line at times
            last = time.monotonic()
            eta = (last - began) / (step - start) * (steps - step - 1)
            print(f"{folder.name}: step {step + 1}/{steps}, {eta / 60:.1f} min to go", file=sys.stderr, flush=True)
        due = (step + 1) % save_every == 0 or step == steps - 1
        if due and (shard or accelerator.is_main_process):
            _save(state, task, key, step + 1, rows, accelerator.is_main_process)
    bar.close()
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return log
    columns = list(dict.fromkeys(k for row in rows for k in row))
    with log.open("w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if k == "step" else f"{v:.6g}" for k, v in row.items()} for row in rows)
    return log


def update(
    task: Task, step: int, seed: int, factor: float, accelerator: Accelerator, accumulate: int = 1
) -> dict[str, float]:
    """One step of all roles at their learning rates times `factor`; its losses and the gradients' norms."""
    shared = hasattr(task, "part")
    mine = accumulate if shared else 1
    logged: dict[str, torch.Tensor] = {}
    for k in range(mine):
        if shared:
            task.part = accelerator.process_index * mine + k, accelerator.num_processes * mine
        with accelerator.autocast():
            losses = task.losses(step, step_generator(seed, step, accelerator.device))
        for name, role in task.roles.items():
            if name in losses:
                if not torch.isfinite(losses[name]):
                    raise DivergedError(f"the {name} loss is {losses[name].item()} at step {step}")
                _backward(losses[name] / mine, role, task.roles.values(), accelerator)
        losses = {k: v.detach() for k, v in losses.items()}  # their graphs would stay while the next part's are made
        logged = {k: logged.get(k, 0) + v / mine for k, v in losses.items()}
    row = {"step": step}
    for name, role in task.roles.items():
        if name in losses:
            if not role.sharded:  # these come averaged
                _average(role.params, accelerator)
            norm = _whole(accelerator.clip_grad_norm_(role.params, role.clip)).item()
            if not math.isfinite(norm):
                raise DivergedError(f"the gradient of the {name} loss is {norm} at step {step}")
            row[f"{name}_norm"] = norm
    for name, role in task.roles.items():
        if name in losses:
            for optimiser in role.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["base_lr"] * factor
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            if role.average:
                role.average.step(role.params)
    if accelerator.num_processes > 1:
        logged = dict(zip(logged, accelerator.reduce(torch.stack([*logged.values()]).float(), "mean"), strict=True))
    return row | {k: v.item() for k, v in logged.items()}


def _backward(loss, role, roles, accelerator):
    """Gradients of `loss` for the parameters of `role` alone. Shares are no leaves of the graph: where there are any,
    all of it is differentiated, and other roles get back what they had."""
    if not any(r.sharded for r in roles):
        return accelerator.backward(loss, inputs=role.params)
    others = [(p, p.grad) for other in roles if other is not role for p in other.params]
    for p, _ in others:
        p.grad = None
    accelerator.backward(loss)
    for p, grad in others:
        p.grad = grad


def _whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def _share(x, like):
    """Of the whole tensor `x`, which every process has, what `like` keeps of it."""
    if not isinstance(like, DTensor):
        if x.shape != like.shape:
            return x
        # In the same layout: a fused optimiser walks weights and moments as they lie in memory, channels last or not.
        return torch.empty_like(like, dtype=x.dtype, requires_grad=False).copy_(x)
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _average(params, accelerator):
    """Gradients, averaged over processes, MANY or one of them at a time: each exchange has its own delay."""
    if accelerator.num_processes > 1:
        buckets, size = [], math.inf
        for gradient in (p.grad for p in params if p.grad is not None):
            if size + gradient.numel() > MANY:
                buckets.append([])
                size = 0
            buckets[-1].append(gradient)
            size += gradient.numel()
        try:
            for some in buckets:
                whole = accelerator.reduce(torch.cat([gradient.flatten() for gradient in some]), "mean")
                for gradient, its in zip(some, whole.split([g.numel() for g in some]), strict=True):
                    gradient.copy_(its.view(gradient.shape))
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"another process of this job has stopped ({line}): see its message; the same command resumes"
            ) from None


def _agree(start, state, accelerator):
    """RuntimeError where processes would go on from different steps, as on two nodes that don't share files."""
    if accelerator.num_processes > 1:
        starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
        if len({*starts}) > 1:
            raise RuntimeError(
                f"the processes of this job would start at different steps, {starts}: {os.path.relpath(state)} has to "
                "be the same file to all of them"
            )


def _save(path, task, key, step, rows, write=True):
    tensors = {}
    for name, role in task.roles.items():
        for k, v in role.module.state_dict().items():
            tensors[f"{name}/module/{k}"] = v
        for i, p in enumerate(role.params):
            for k, v in role.state_of(p).items():
                tensors[f"{name}/optimiser/{i}/{k}"] = torch.as_tensor(v)
        if role.average:
            tensors[f"{name}/averaged"] = torch.tensor(role.average.optimization_step)
            for i, p in enumerate(role.average.shadow_params):
                tensors[f"{name}/average/{i}"] = p
    # Tied weights share memory, which safetensors refuses: a copy each.
    whole = {}
    for k, v in tensors.items():  # one after another: of sharded roles all processes must gather, one keeps them
        made = _whole(v.detach())
        if write:
            whole[k] = made.cpu().contiguous() if made.is_cuda else made.contiguous().clone()
    if not write:
        return
    part = path.with_suffix(".part")
    save_file(whole, part, {"key": key, "step": str(step), "rows": json.dumps(rows)})
    os.replace(part, path)


def _load(path, task, key):
    """Restore in place; returns (steps done, log rows)."""
    try:
        with safe_open(path, "pt") as f:
            meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        name = os.path.relpath(path)
        raise ValueError(f"{name} is not a readable checkpoint ({error}): delete it to start over") from None
    if (meta or {}).get("key") != key:
        return 0, []
    for name, role in task.roles.items():
        prefix = f"{name}/module/"
        role.module.load_state_dict(
            {k: _share(tensors[prefix + k], like) for k, like in role.module.state_dict().items()}
        )
        for i, p in enumerate(role.params):
            prefix = f"{name}/optimiser/{i}/"
            found = {k[len(prefix):]: v.to(p.device) for k, v in tensors.items() if k.startswith(prefix)}
            role.state_of(p).update({k: _share(v, p) if v.shape == p.shape else v for k, v in found.items()})
        if role.average:
            role.average.optimization_step = int(tensors[f"{name}/averaged"])
            for i, p in enumerate(role.average.shadow_params):
                p.copy_(_share(tensors[f"{name}/average/{i}"], p))
    return int(meta["step"]), json.loads(meta["rows"])
