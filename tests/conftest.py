import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test may reach for the network
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is, as the next
if "GAD_TEST_CUDA" not in os.environ:  # tests compare bits, which are the CPU's
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from forks import Forks, stop

# torch and gad are imported where they are used: xdist's first process runs no test.


def pytest_configure(config):
    if "GAD_TEST_FORKS" not in os.environ:  # one for all workers
        os.environ["GAD_TEST_FORKS"] = config.forks = tempfile.mkdtemp()


def pytest_unconfigure(config):
    if folder := getattr(config, "forks", None):
        stop(Path(folder))
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["GAD_TEST_FORKS"]


def pytest_collection_modifyitems(items):
    """Files with slow tests first: workers that take file after file then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_generate_tests(metafunc):
    if "backbone_name" in metafunc.fixturenames:
        from gad.backbones import BACKBONES

        metafunc.parametrize("backbone_name", list(BACKBONES), scope="session")


def perturb(module, scale=0.05, seed=1):
    """Add noise to every weight: at initialisation biases are zero and gates small, so Jacobians are tame."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module


def build(name, **components):
    """A miniature backbone with random but not trivial weights; `components` replace the pipeline's."""
    import torch

    from gad.backbones import BACKBONES, MINIATURES
    from gad.world import autoencoder, scenes

    torch.manual_seed(0)
    pipeline = MINIATURES[name](autoencoder.build("dc" if name == "sana" else "kl"), scenes.WORDS)
    if components:
        pipeline.register_modules(**components)
    backbone = BACKBONES[name](pipeline, name)
    perturb(backbone.network)
    return backbone


@pytest.fixture(scope="session")
def forks():
    """From here on notebooks' kernels are forked, not started, here and in what is run from here; `forks.python` is for
    other commands."""
    with pytest.MonkeyPatch.context() as patch:
        made = Forks(Path(os.environ["GAD_TEST_FORKS"]))
        patch.setenv("JUPYTER_PATH", str(made.jupyter))
        yield made


@pytest.fixture(scope="session")
def mini():
    """`mini(name)`: the backbone `name`, one a session. Tests leave it as they found it."""
    return cache(build)


@pytest.fixture(scope="session")
def backbone(backbone_name, mini):
    return mini(backbone_name)


@pytest.fixture
def prompts():
    return ["a red circle, a green square and a yellow triangle on a gray background", "a blue square"]


@pytest.fixture
def z():
    import torch

    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
