"""Fixtures shared by all tests, and the run-time checks of the package's annotations."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jaxtyping

# One process compiles what dozens of them run; before jax is imported, and gone afterwards.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="dlc_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)

# LLVM takes longer over a program than small arrays do in it; XLA's own passes stay. `0` compiles
# as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A million objects of torch and transformers are looked through each time.
gc.set_threshold(20_000, 20, 20)

# Threads of torch wait for each other busily: two processes on two cores take three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Decoded images of the tests do not belong in the user's cache.
if "DLC_JAX_TESTS" not in os.environ:
    _decoded = tempfile.mkdtemp(prefix="dlc_jax-tests-")
    os.environ["XDG_CACHE_HOME"] = os.environ["DLC_JAX_TESTS"] = _decoded
    atexit.register(shutil.rmtree, _decoded, ignore_errors=True)

jaxtyping.install_import_hook("dlc_jax", "runtime_types.check")

import jaxlib.version  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

import dlc_jax as dlc  # noqa: E402
from dlc_jax.training.images import Finetuner  # noqa: E402
from dlc_jax.workspace import Record, artefacts  # noqa: E402

# how long an example takes says what else the machine does
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
XLA_IS_OLD = jaxlib.version.__version_info__ < (0, 9)  # computes on CPUs otherwise


def require_shared(name: str) -> Path:
    """Returns a path in the development data beside the checkout, or skips saying why."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the development data, which users do not have")
    return path


@pytest.fixture(scope="session", autouse=True)
def timm():
    """timm, also where torchvision's compiled operators do not match the torch build.

    Before any test: transformers remembers for good that torchvision could not be imported.
    """
    from dlc_jax.encoders.converted import timm_library

    return timm_library("the tests")[1]


@pytest.fixture(scope="session")
def sample() -> dlc.Dataset:
    return dlc.load_dataset("demo:caltech15/train")


@pytest.fixture(scope="session")
def sample_encoder() -> dlc.Encoder:
    return dlc.load_encoder("resnet18", "demo:resnet18")


@pytest.fixture(scope="session")
def small_sample(sample) -> dlc.Dataset:
    """Four images of each class of the sample."""
    return subset(
        sample, np.concatenate([np.flatnonzero(sample.labels == j)[:4] for j in range(15)])
    )


@contextlib.contextmanager
def power_cut(epoch: int) -> Iterator[None]:
    """Fails fine-tuning of images in an epoch, and expects that it does."""
    real = Finetuner.batches

    def batches(self, positions, seed, number, first):
        if number == epoch:
            raise RuntimeError("power cut")
        return real(self, positions, seed, number, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuner, "batches", batches)
        with pytest.raises(RuntimeError, match="power cut"):
            yield


def slow_but(quick: Sequence[str], names: Iterable[str]) -> list:
    """Returns these as parameters of a test, slow but for the quick ones."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def subset(dataset: dlc.Dataset, positions: np.ndarray) -> dlc.Dataset:
    """Returns the samples at these positions."""
    images = [dataset[int(i)].image for i in positions]
    return dlc.Dataset(
        images, dataset.labels[positions], dataset.ids[positions], dataset.class_names, "subset"
    )


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """Returns an image file with these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def random_images(num: int, size: int = 40, seed: int = 0) -> np.ndarray:
    """Returns uint8 [num, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), np.uint8)


def narrow(model) -> None:
    """Divides every width of a timm ResNet by four."""
    import torch

    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
        leaf = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Conv2d):
            in_channels = module.in_channels if name == "conv1" else module.in_channels // 4
            new = torch.nn.Conv2d(
                in_channels,
                module.out_channels // 4,
                module.kernel_size,
                module.stride,
                module.padding,
                bias=False,
            )
            setattr(parent, leaf, new)
        if isinstance(module, torch.nn.BatchNorm2d):
            setattr(parent, leaf, torch.nn.BatchNorm2d(module.num_features // 4))
        if isinstance(module, torch.nn.Linear):
            new = torch.nn.Linear(module.in_features // 4, module.out_features)
            setattr(parent, leaf, new)


def record_scores(workdir: Path, facts: dict, settings: dict) -> None:
    """Records losses and table in a work directory as the stage `score` does."""
    paths = [Path(artefacts.LOSSES), Path(artefacts.SCORES)]
    encoder = {"name": "", "weights": ""} | settings.get("encoder", {})
    asked = {"dataset": {"train": facts["dataset"]["source"]}, "encoder": encoder}
    outputs = {path.as_posix(): artefacts.file_hash(workdir / path) for path in paths}
    settings = settings | {"asked": asked}
    Record("score", "losses", 1, {}, settings, outputs, 0.0, {}, [], facts).write(workdir)
