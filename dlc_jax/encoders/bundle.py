"""Converted encoders as one file each, which runs without torch and without timm.

A bundle is a safetensors file: the weights by path, the network as programs of `jax.export`, as
bytes, and whatever else an `Encoder` holds as JSON in the metadata. Nothing in it is executed when
it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float
from safetensors.flax import save_file

from dlc_jax import expect
from dlc_jax.encoders.converted import CONVERTED, is_converted
from dlc_jax.encoders.encoder import Encoder, precision_of
from dlc_jax.encoders.stored_tensors import WHOLE, opened
from dlc_jax.files.json_files import NAME, parse_json
from dlc_jax.files.whole_files import atomic
from dlc_jax.preprocess.transform import PAPER, Transform
from dlc_jax.types import Params
from dlc_jax.workspace.artefacts import versions

VERSION = 1
PLATFORMS = ("cpu", "cuda")
_BACKENDS = ("cpu", "gpu")  # as JAX names them when it runs
_TRAINING = "apply_training"
_ROLES = ("apply", "apply_head", _TRAINING)
# Number types of the programs, and how far a stored one may be off the network, as a share
_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
_METADATA, _PROGRAM = "dlc_jax.encoder", "program:"
_NUMBERS = [float, float, float]
_STATED = {
    "jax": str,
    "image_size": int,
    "batch_size": int,
    "prunable_paths": [str],
    "transform": {NAME: (str, int, float, bool, [int], None)},
    "name": str,
    "mean": _NUMBERS,
    "std": _NUMBERS,
    "normalisation": str,
    "pooling": (str, None),
    "head": str,
    "statistics": [str],
    "prefix": str,
    "function": str,
    "prunable": (str, None),
}
_AS_THEY_ARE = ("name", "normalisation", "pooling", "head", "prefix", "prunable", "batch_size")


def save_encoder(
    encoder: Encoder, path: str | Path, *, image_size: int | None = None, batch_size: int = 128
) -> None:
    """Writes a converted encoder into a file that `load_encoder` reads where no torch is installed.

    The file holds the network in evaluation and in training mode, with gradients, in float32 and
    bfloat16, for CPUs and NVIDIA's GPUs. What it gives is compared with the encoder's own before
    it takes its place.

    Args:
      encoder: One of `timm:` or `hf:`, as hand-written ones need no torch; what `prunable`, `mean`
        and other arguments of `load_encoder` have decided is kept.
      path: Ends in `.safetensors`; what is there is replaced.
      image_size: Side of the images that it will take, in pixels; None: the encoder's own.
      batch_size: Images that it will compute at a time: other numbers are filled up or divided,
        but training takes at most so many in a step.
    Raises:
      ValueError: another encoder, another ending, a size that the encoder does not take, a network
        that cannot be exported, or a file that gives other features than the encoder does (more
        than 1e-5 apart, norm of the difference by norm).
    Example:
      >>> encoder = dlc.load_encoder(None, "demo:efficientnet_lite0")
      >>> dlc.save_encoder(encoder, "lite0.safetensors", image_size=32, batch_size=4)
      >>> dlc.load_encoder(None, "lite0.safetensors").name
      'timm:tf_efficientnet_lite0'
    """
    expect.is_a(Encoder, encoder=encoder)
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise expect.InputError(f"path: {str(path)!r}; expected a name that ends in .safetensors.")
    if path.is_dir() or not next(p for p in path.parents if p.exists()).is_dir():
        found = "is a folder" if path.is_dir() else "lies below something that is no folder"
        raise expect.InputError(f"path: {str(path)!r} {found}; expected a file or nothing there.")
    expect.integer("batch_size", batch_size, 1)
    if encoder.batch_size is not None or not is_converted(encoder.name):
        found = "is a bundle already" if encoder.batch_size is not None else "needs no torch"
        raise expect.InputError(
            f"encoder {encoder.name}: {found}; expected one of {' or '.join(CONVERTED)}."
        )
    if encoder.drop_path or encoder.dropout:
        raise expect.InputError(
            f"encoder {encoder.name}: has drop_path {encoder.drop_path} and dropout "
            f"{encoder.dropout}, and a bundle trains without; expected 0."
        )
    side = image_size
    if side is None:
        side = encoder.transform.size if encoder.image_size is None else encoder.image_size
    encoder.check_image_size(side)
    programs = _programs(encoder, side, batch_size)
    metadata = {_METADATA: json.dumps(_stated(encoder, side, batch_size))}
    with atomic(path) as file:
        save_file({**encoder.params, **programs}, file.name, metadata=metadata)
        _check_is_the_same(encoder, load_bundle(Path(file.name)))


def _stated(encoder: Encoder, side: int, batch_size: int) -> dict[str, Any]:
    assert encoder.module_order is not None  # of a converted one
    transform = encoder.transform
    transform = dataclasses.replace(transform, size=side, scaled=transform.scaled_side(side))
    own = {field: getattr(encoder, field) for field in _STATED if hasattr(encoder, field)}
    prunable = filter(encoder.is_prunable, encoder.params)
    # at another size the paper's is no longer equal to it, and `official` would refuse it
    is_asked_for = encoder.transform.is_asked_for and encoder.transform != PAPER
    return {
        **own,
        "version": VERSION,
        "jax": versions()["jax"],
        "image_size": side,
        "batch_size": batch_size,
        "statistics": sorted(encoder.statistics),
        "prunable_paths": sorted(prunable, key=encoder.module_order),
        "transform": {**dataclasses.asdict(transform), "is_asked_for": is_asked_for},
    }


def _programs(encoder: Encoder, side: int, batch_size: int) -> dict[str, Array]:
    """Returns the encoder's functions in every number type, as bytes."""

    def exported(role: str, dtype: str) -> bytes:
        def program(params: Params, images: Array, *real: Array) -> Any:
            with precision_of(dtype):
                output = getattr(encoder, role)(params, images, *real)
            if role != _TRAINING:
                return output
            return output[0], {name: output[1][name] for name in encoder.statistics}

        def shape_of(name: str, leaf: Array) -> jax.ShapeDtypeStruct:
            is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            # statistics stay float32, and the network takes them so, see `TorchNetwork`
            given = dtype if is_floating and name not in encoder.statistics else leaf.dtype
            return jax.ShapeDtypeStruct(leaf.shape, given)

        params = {name: shape_of(name, leaf) for name, leaf in encoder.params.items()}
        images = jax.ShapeDtypeStruct((batch_size, side, side, 3), dtype)
        real = [jax.ShapeDtypeStruct((batch_size,), jnp.float32)][: role == _TRAINING]
        with _without_places():
            found = export.export(jax.jit(program), platforms=PLATFORMS)(params, images, *real)
            return bytes(found.serialize(vjp_order=1))

    found = {}
    problem = f"encoder {encoder.name}: cannot be exported for {', '.join(PLATFORMS)}"
    for role, dtype in itertools.product(_ROLES, _TOLERANCES):
        with expect.refusing(problem, Exception, shown=expect.first_line):
            content = exported(role, dtype)
        found[f"{_PROGRAM}{role}:{dtype}"] = jnp.asarray(np.frombuffer(content, np.uint8))
    return found


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Keeps paths of source files out of programs: the same network gives the same bytes."""
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def bundle_at(weights: str) -> Path | None:
    """Returns the file that these weights name, or that is in their folder, if it is a bundle."""
    path = Path(weights).expanduser()
    path = path / WHOLE if path.is_dir() else path
    if not weights or not path.is_file():
        return None
    with opened(path) as file:
        return path if _METADATA in (file.metadata() or {}) else None


def load_bundle(path: Path) -> Encoder:
    """Reads what `save_encoder` wrote.

    Raises:
      ValueError: a file that is damaged, or of another version; a machine that it is not for.
    """
    if (backend := jax.default_backend()) not in _BACKENDS:
        raise expect.InputError(
            f"{path}: a bundle for {' and '.join(PLATFORMS)}, and JAX runs on {backend} here; "
            "expected the checkpoint that it was made of."
        )
    with opened(path) as file:
        text = file.metadata()[_METADATA]
        version = parse_json(text, {"version": int}, path)["version"]
        if version != VERSION:
            raise expect.InputError(
                f"{path}: a bundle of version {version}, expected {VERSION}; write it again with "
                "save_encoder of this version of dlc_jax."
            )
        stated = parse_json(text, _STATED, path)
        names = [*file.keys()]
        params = {n: file.get_tensor(n) for n in names if not n.startswith(_PROGRAM)}
        stored = {
            name.removeprefix(_PROGRAM): np.asarray(file.get_tensor(name)).tobytes()
            for name in sorted(set(names) - params.keys())
        }
    own, wrote = versions()["jax"], stated["jax"]
    problem = f"{path}: jax {own} cannot read its programs, which jax {wrote} wrote"
    with expect.refusing(problem, Exception, shown=expect.first_line):
        programs = {name: export.deserialize(bytearray(text)) for name, text in stored.items()}
    network = _Network(programs, stated)
    transform = stated["transform"]
    with expect.refusing(f"{path}: transform", TypeError, ValueError, shown=expect.first_line):
        transform = Transform(**{**transform, "border": tuple(transform["border"])})
    paths = stated["prunable_paths"]
    digest = hashlib.sha256(b"".join(stored.values())).hexdigest()
    return Encoder(
        params=params,
        apply=network.apply,
        apply_head=network.apply_head,
        apply_training=network.apply_training,
        is_prunable=frozenset(paths).__contains__,
        module_order={name: place for place, name in enumerate(paths)}.__getitem__,
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
        image_size=stated["image_size"],
        statistics=frozenset(stated["statistics"]),
        function=f"{stated['function']} {digest}",
        transform=transform,
        **{field: stated[field] for field in _AS_THEY_ARE},
    )


class _Network:
    """The functions of an encoder over programs that take a fixed number of images.

    Args:
      programs: By role and number type.
      stated: The bundle's metadata.
    """

    def __init__(self, programs: Mapping[str, export.Exported], stated: Mapping[str, Any]):
        self._programs = programs
        self._name, self._size = stated["name"], stated["batch_size"]

    def apply(self, params: Params, images: Float[Array, "b s s 3"]) -> Array:
        """Returns what the encoder's own `apply` gives."""
        return self._evaluated("apply", params, images)

    def apply_head(self, params: Params, images: Float[Array, "b s s 3"]) -> Array:
        """Returns what the encoder's own `apply_head` gives."""
        return self._evaluated("apply_head", params, images)

    def _evaluated(self, role: str, params: Params, images: Array) -> Array:
        program, num = self._with(role, params, images), len(images)
        num_calls = -(-num // self._size)
        images = _filled(images, num_calls * self._size)
        if num_calls == 1:
            return program(images)[:num]
        # neighbours go into different calls, so that images spread over devices stay where they are
        apart = jnp.moveaxis(images.reshape(self._size, num_calls, *images.shape[1:]), 1, 0)
        output = jnp.moveaxis(jax.lax.map(program, apart), 0, 1)
        return output.reshape(-1, *output.shape[2:])[:num]

    def apply_training(
        self, params: Params, images: Float[Array, "b s s 3"], real: Float[Array, " b"]
    ) -> tuple[Array, Params]:
        """Returns features in training mode, and all parameters with statistics moved."""
        num = len(images)
        if num > self._size:
            raise expect.InputError(
                f"encoder {self._name}: a bundle that trains on {self._size} images at a time, got "
                f"{num}; expected finetune.batch_size={self._size} or less, or a bundle of "
                f"save_encoder(..., batch_size={num})."
            )
        program = self._with(_TRAINING, params, images)
        padding = jnp.zeros(self._size - num, jnp.float32)
        real = jnp.concatenate([real.astype(jnp.float32), padding])
        output, moved = program(_filled(images, self._size), real)
        return output[:num], {**params, **moved}

    def _with(self, role: str, params: Params, images: Array) -> Any:
        """Returns the program that computes as these images are, with all its weights."""
        if str(images.dtype) not in _TOLERANCES:
            raise expect.InputError(
                f"encoder {self._name}: a bundle that computes in {' or '.join(_TOLERANCES)}, got "
                f"images in {images.dtype}."
            )
        program = self._programs[f"{role}:{images.dtype}"]
        (taken, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        given = {name: params[name].astype(aval.dtype) for name, aval in taken.items()}
        return functools.partial(program.call, given)


def _filled(images: Array, num: int) -> Array:
    """Returns the images, and so many more of them once again that there are `num`."""
    return images if len(images) == num else images[jnp.arange(num) % len(images)]


def _check_is_the_same(encoder: Encoder, stored: Encoder) -> None:
    """Raises ValueError unless a bundle gives what the encoder gives that it was made of."""
    assert stored.batch_size is not None
    assert stored.image_size is not None
    shape = (stored.batch_size, stored.image_size, stored.image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    real = (jnp.arange(len(images)) != 1).astype(jnp.float32)  # one is padding

    def outputs(one: Encoder, dtype: str) -> dict[str, Array]:
        @jax.jit
        def compute(params: Params, images: Array) -> dict[str, Any]:
            assert one.apply_head is not None
            assert one.apply_training is not None
            with precision_of(dtype):
                evaluated = {"apply": one.apply(params, images)}
                evaluated["apply_head"] = one.apply_head(params, images)
                trained, moved = one.apply_training(params, images, real)
            return {**evaluated, _TRAINING: trained, **{n: moved[n] for n in one.statistics}}

        return compute(one.params, images.astype(dtype))

    for dtype, tolerance in _TOLERANCES.items():
        expected, found = outputs(encoder, dtype), outputs(stored, dtype)
        for what, value in expected.items():
            off = _distance(found[what], value)
            if not off <= tolerance:
                raise expect.InputError(
                    f"encoder {encoder.name}: in {dtype}, {what} of the bundle is {off:.1e} off "
                    f"the encoder's own, norm of the difference by norm; expected at most "
                    f"{tolerance}. Nothing was written."
                )


def _distance(found: Array, expected: Array) -> float:
    one, other = (np.asarray(array, np.float64) for array in (found, expected))
    return float(np.linalg.norm(one - other)) / max(float(np.linalg.norm(other)), 1e-30)
