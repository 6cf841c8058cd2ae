import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test may reach for the network
if "GAD_TEST_CUDA" not in os.environ:  # before torch is: tests compare bits, which are the CPU's
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import signal
from functools import cache

import pytest
import torch
from kernels import warm

from gad.backbones import BACKBONES, MINIATURES
from gad.world import autoencoder, scenes

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with slow tests first: workers that take file after file then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def perturb(module, scale=0.05, seed=1):
    """Add noise to every weight: at initialisation biases are zero and gates small, so Jacobians are tame."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module


def build(name, **components):
    """A miniature backbone with random but not trivial weights; `components` replace the pipeline's."""
    torch.manual_seed(0)
    pipeline = MINIATURES[name](autoencoder.build("dc" if name == "sana" else "kl"), scenes.WORDS)
    if components:
        pipeline.register_modules(**components)
    backbone = BACKBONES[name](pipeline, name)
    perturb(backbone.network)
    return backbone


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """From here on notebooks' kernels are forked, not started, here and in what is run from here."""
    process, environment = warm(tmp_path_factory.mktemp("kernels"))
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def mini():
    """`mini(name)`: the backbone `name`, one a session. Tests leave it as they found it."""
    return cache(build)


@pytest.fixture(scope="session", params=list(BACKBONES))
def backbone(request, mini):
    return mini(request.param)


@pytest.fixture
def prompts():
    return ["a red circle, a green square and a yellow triangle on a gray background", "a blue square"]


@pytest.fixture
def z():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
