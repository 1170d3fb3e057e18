"""How fast this machine is, from about two seconds of real work on made-up data."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import expect
from dlc_jax.encoders.decoder import Architecture, DecoderConfig
from dlc_jax.planning.image_memory import ImageScoring
from dlc_jax.planning.machine import is_processor
from dlc_jax.planning.programs import count_flops
from dlc_jax.preprocess.decode import RandomCrops, decode, in_order
from dlc_jax.preprocess.transform import PAPER, Transform
from dlc_jax.types import Dataset, file_of

_SECONDS, _DECODING_SECONDS = 2.0, 1.0
_CALL = 5e10, 2e13  # operations of a call that a processor, or another device, does in a second
_MOST_IMAGES, _MOST_CROPS = 512, 64  # looked at
_SMALL_VOCABULARY = 256


def scoring_speed(job: ImageScoring) -> tuple[float, str]:
    """Runs the program that scores, on noise, with fewer probes and images where they are slow.

    Returns:
      Operations per second of one device, as `count_flops` counts them, and what was measured.
    """
    most = _CALL[not is_processor()]
    least = dataclasses.replace(job, num_probes=1, chunk=1, batch_size=1)
    each = count_flops(least.program(), *least.arguments())
    chunk = max(1, min(job.chunk, int(most // each)))
    num_probes = min(job.num_probes, chunk if 2 * chunk * each > most else 2 * chunk)
    num_images = max(1, min(job.batch_size, int(most // (num_probes * each))))
    small = dataclasses.replace(
        job, num_probes=num_probes, chunk=chunk, batch_size=num_images, holds_importance=False
    )
    _, _, thresholds, prototypes, images, labels = small.arguments()
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), (thresholds, prototypes))
    pixels = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    arguments = (job.encoder.params, None, *zeros, pixels, np.zeros(labels.shape, np.int32))
    program, what = small.program(), f"{num_images} images x {num_probes} probes"
    flops = count_flops(program, *small.arguments())
    return _speed(what, flops, program, jax.device_put(arguments))


def block_speed(
    config: DecoderConfig, dtype: str, num_tokens: int, length: int
) -> tuple[float, str]:
    """Runs one block of a language model, weights of zeros, on rows of this length.

    Args:
      config: Sizes and switches of the model.
      dtype: Type of weights and activations.
      num_tokens: Most tokens of a batch.
      length: Tokens of a row.
    Returns:
      See `scoring_speed`.
    """
    one = dataclasses.replace(
        config, windows=config.windows[:1], vocab_size=_SMALL_VOCABULARY, tied=True
    )
    architecture = Architecture(one, dtype)
    length = min(length, num_tokens)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    each = count_flops(architecture.hidden, architecture.abstract_params(), row, row)
    most = _CALL[not is_processor()]
    if each > most:  # a large model on a processor: a few tokens have to do
        length = max(1, int(length * most / each))
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)
        each = count_flops(architecture.hidden, architecture.abstract_params(), row, row)
    num_rows = max(1, min(num_tokens // length, int(most // each)))
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), architecture.abstract_params()
    )
    tokens = jnp.ones((num_rows, length), jnp.int32)
    what = f"one block, {num_rows} rows of {length} tokens"
    program = jax.jit(architecture.hidden)
    return _speed(what, num_rows * each, program, (params, tokens, tokens))


def _speed(what: str, flops: int, program: Callable, arguments: Any) -> tuple[float, str]:
    """Calls a program of so many operations, first once, which compiles, then for some time."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    first = time.perf_counter() - start
    start, num_calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _SECONDS or not num_calls:
        jax.block_until_ready(program(*arguments))
        num_calls += 1
    seconds = elapsed / num_calls
    rate = flops / seconds
    return rate, (
        f"{what}: {seconds:.3g} s on one device, {rate / 1e9:.4g} GFLOP/s (compiled in "
        f"{max(0.0, first - seconds):.1f} s, not counted)"
    )


class Decoding(NamedTuple):
    """Speed of decoding images of the data set, on all cores of one host.

    Attributes:
      seconds: For an image: read, decoded, resized and cropped.
      crop_seconds: For a random crop of a decoded image.
      pixels: Average number of pixels of an image.
      num_bytes: Average size of an image as it is stored.
      num_read: Images looked at.
      num_unreadable: Images among them that cannot be read.
    """

    seconds: float
    crop_seconds: float
    pixels: float
    num_bytes: float
    num_read: int
    num_unreadable: int


def decoding_speed(dataset: Dataset, image_size: int, transform: Transform = PAPER) -> Decoding:
    """Decodes some images for a second, and cuts random crops of them.

    Raises:
      ValueError: none of them can be read.
    """
    num = min(len(dataset), _MOST_IMAGES)
    positions = np.arange(num)
    if file_of(dataset.images, 0) is not None:  # else neighbours lie in the same row group
        positions = positions * len(dataset) // num

    def one(place: int) -> tuple[int, Any] | str:
        try:
            sample = dataset[int(positions[place])]
            image = decode(sample.image, sample.id, dataset.deep_images)
            transform(image, image_size)
        except expect.NeedsSetting as error:
            raise expect.NeedsSetting(f"{dataset.name}: {error}") from error
        except (expect.InputError, OSError) as error:
            return str(error)
        encoded = sample.image
        return encoded.nbytes if isinstance(encoded, np.ndarray) else len(encoded), image

    found = []
    start = time.perf_counter()
    for result in in_order(one, num):
        found.append(result)
        if time.perf_counter() - start > _DECODING_SECONDS:
            break
    seconds = (time.perf_counter() - start) / len(found)
    read = [image for image in found if not isinstance(image, str)]
    expect.some_readable(dataset.name, len(read), len(found))
    crops = RandomCrops(dataset, image_size, 0, transform.interpolation)
    to_crop = read[:_MOST_CROPS]
    start = time.perf_counter()
    for position, (_, image) in enumerate(to_crop):
        crops.crop(image, position, draw=0)
    crop_seconds = (time.perf_counter() - start) / len(to_crop) / (os.cpu_count() or 1)
    return Decoding(
        seconds,
        crop_seconds,
        float(np.mean([image.width * image.height for _, image in read])),
        float(np.mean([num_bytes for num_bytes, _ in read])),
        len(found),
        len(found) - len(read),
    )
