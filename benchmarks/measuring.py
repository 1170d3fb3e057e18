"""What several benchmarks have in common; no flags, since each has its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

import dlc_jax as dlc
from benchmarks import peers
from dlc_jax.encoders import ENCODERS, Encoder, decoder
from dlc_jax.encoders.converted import (
    architecture_of,
    converted_encoder,
    is_converted,
    timm_module,
)
from dlc_jax.encoders.encoder import apply_module
from dlc_jax.expect import first_line
from dlc_jax.files.whole_files import atomic
from dlc_jax.masking import PathSpec
from dlc_jax.preprocess.decode import decode
from dlc_jax.probes.kernel import Forward
from dlc_jax.probes.path import LearningPath, learning_path
from dlc_jax.types import Conventions

NUM_CLASSES = 10


def random_encoder(name: str, image_size: int | None = None) -> Encoder:
    """Returns the architecture with its initial weights.

    Args:
      name: One written by hand, or `timm:` and an architecture.
      image_size: Pixels; None: what it is made for.
    """
    if is_converted(name):
        state = peers.import_timm().create_model(architecture_of(name)).state_dict()
        arrays = {key: value.numpy() for key, value in state.items()}
        built = timm_module(name, arrays, {}, "random weights", image_size)
        return dataclasses.replace(converted_encoder(name, built), pooling="mean")
    architecture = ENCODERS[name]
    graph, state = nnx.split(architecture.build({}))
    params = nnx.to_pure_dict(state)
    if image_size is not None and architecture.resized is not None:
        params = architecture.resized(params, image_size)
    return Encoder(
        params,
        functools.partial(apply_module, graph),
        architecture.is_prunable,
        name,
        pooling="mean",
    )


def peak(dtype: str) -> float:
    """Returns the FLOP/s of a square matrix product, the best of several."""
    side = 8192 if jax.default_backend() != "cpu" else 2048
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)  # ones run faster
    precision = "highest" if dtype == "float32" else "default"
    product = jax.jit(lambda a: jnp.dot(a, a, precision=precision))
    product(matrix).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


@contextlib.contextmanager
def traced_with(*, unroll: int = 1, attention: str = "") -> Iterator[None]:
    """Replaces the loop over probes and the attention of programs traced inside the block.

    Args:
      unroll: Iterations of `jax.lax.map` that become one of a scan; 1: `map` as it is.
      attention: `implementation` of `jax.nn.dot_product_attention`; empty: JAX's own choice. With
        `_causal` behind it, a decoder's rows attend as a whole, not in blocks of queries, and take
        a causal mask for theirs: equal where rows are full.
    """

    def scan(function: Callable, rows: Any, *, batch_size: int | None = None) -> Any:
        assert batch_size is None, "either chunk or unroll"
        return jax.lax.scan(lambda _, row: (None, function(row)), None, rows, unroll=unroll)[1]

    name = attention.removesuffix("_causal")
    attend = functools.partial(jax.nn.dot_product_attention, implementation=name or None)

    def attend_causally(*arrays: Any, mask: Any, scale: float) -> Any:
        return attend(*arrays, is_causal=True, scale=scale)

    is_causal = attention.endswith("_causal")
    with (
        mock.patch.object(
            decoder, "_QUERIES_AT_ONCE", 2**30 if is_causal else decoder._QUERIES_AT_ONCE
        ),
        mock.patch.object(
            jax.nn, "dot_product_attention", attend_causally if is_causal else attend
        ),
        mock.patch.object(jax.lax, "map", jax.lax.map if unroll == 1 else scan),
    ):
        yield


class Measured(NamedTuple):
    """What is known of some contenders so far.

    Attributes:
      seconds: Median of each that works.
      errors: Why the others do not.
    """

    seconds: dict[str, float]
    errors: dict[str, str]

    def rows(self, of: Callable[[float], dict[str, Any]], **shared: Any) -> list[dict[str, Any]]:
        """Returns a row per contender, with its numbers by its seconds, or its error."""
        rows = [{**shared, "by": by, **of(some)} for by, some in self.seconds.items()]
        return rows + [{**shared, "by": by, "error": why} for by, why in self.errors.items()]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints rows of a Markdown table; None is an empty cell."""
    for row in rows:
        shown = [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row.values()]
        print(f"| {' | '.join('' if cell is None else str(cell) for cell in shown)} |", flush=True)


def measured(
    contenders: Mapping[str, Callable[[], Callable[[], None]]], num_rounds: int = 5
) -> Iterator[Measured]:
    """Measures calls in turns, and yields what is known after every contender and every round.

    Args:
      contenders: Name -> function that prepares a call, whose first run is not counted. One that
        fails leaves the others to be measured.
      num_rounds: Runs per median.
    """
    calls: dict[str, Callable[[], None]] = {}
    seconds: dict[str, list[float]] = {}
    errors: dict[str, str] = {}

    def known() -> Measured:
        medians = {name: statistics.median(some) for name, some in seconds.items()}
        return Measured(medians, dict(errors))

    for name, prepare in contenders.items():
        try:
            call = prepare()
            call()
            seconds[name] = [_seconds(call)]
            calls[name] = call
        except Exception as error:
            errors[name] = first_line(error)
            print(f"{name} is left out: {errors[name]}", flush=True)
        yield known()
    for _ in range(num_rounds - 1):
        for name, call in calls.items():
            seconds[name].append(_seconds(call))
        yield known()


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def probe_arguments(
    encoder: Encoder, forward: Forward, num_probes: int, images: np.ndarray
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Returns the prunable paths, and what `losses_of_batches` takes from `params` on."""
    path = linear_path(encoder, num_probes)
    width = jax.eval_shape(lambda p, i: forward(p, i), encoder.params, images).shape[1]
    prototypes = np.random.default_rng(0).normal(size=(NUM_CLASSES, width)).astype(np.float32)
    labels = np.zeros((1, len(images)), np.int32)
    arguments = (encoder.params, None, path.thresholds, prototypes, images[None], labels)
    return path.prunable, jax.device_put(arguments)


def linear_path(encoder: Encoder, num_probes: int) -> LearningPath:
    """Returns the first steps of the paper's path."""
    path = PathSpec("linear", num_probes)
    return learning_path(encoder, path, 0, Conventions.of("default"))


def linked(folder: Path, root: Path, num: int, of_class: int | None = None) -> Path:
    """Links images by class, each `num` times, into a new folder, which is returned.

    Args:
      folder: One sub-folder per class.
      root: The new folder.
      num: Links per image.
      of_class: Most images of a class; None: all.
    """
    for source in sorted(path.resolve() for path in folder.iterdir() if path.is_dir()):
        target = root / source.name
        target.mkdir(parents=True)
        files = sorted(path for path in source.rglob("*") if path.is_file())[:of_class]
        for number in range(num):
            for path in files:
                (target / f"{number:03}-{path.name}").symlink_to(path)
    return root


def flexrand_overlap(
    scores: np.ndarray, others: np.ndarray, labels: np.ndarray, keep_fraction: float
) -> float:
    """Returns the share of FlexRand's kept set that is the same by other scores, in [0, 1]."""
    kept = [
        set(dlc.select(some, labels, keep_fraction=keep_fraction, seed=1).indices.tolist())
        for some in (scores, others)
    ]
    return len(kept[0] & kept[1]) / len(kept[0]) if kept[0] else 1.0


def peak_bytes_in_use() -> int | None:
    """Returns the most memory of the default device that this process has held; None: not known."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def enlarged_sample(root: Path) -> Path:
    """Writes the bundled photographs as JPEGs whose shorter side is 375 pixels."""
    sample = dlc.load_dataset("demo:caltech15/train")
    for position in range(len(sample)):
        image = decode(sample[position].image, "")
        scale = 375 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        path = root / str(sample.ids[position])
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def save(path: str | None, found: Any) -> None:
    """Writes results as JSON, atomically; None as path writes nothing."""
    if path is not None:
        with atomic(Path(path)) as file:
            file.write(json.dumps(found, default=np.generic.item).encode())
