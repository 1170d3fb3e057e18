"""Safetensors files, and the parameters that a table of names finds in them.

A table has a row for every kind of parameter: a pattern of paths here, the tensor's name in torch,
and torch's axes in the order that they have here. The first row whose pattern matches counts.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from dlc_jax import expect
from dlc_jax.datasets.files import regular
from dlc_jax.distributed import place, sharding_of
from dlc_jax.files.json_files import NAME, read_json

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0]+")  # a file of the folder
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_BYTES_AT_ONCE = 64 * 2**20  # of a tensor that is compared

Axes = tuple[int, ...]
AS_IT_IS: Axes = ()
LINEAR: Axes = (1, 0)  # [out, in] -> [in, out]
CONVOLUTION: Axes = (2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]
Table = tuple[tuple[str, str, Axes], ...]
# Our names of the leaves of norm layers -> torch's
_NORM_LEAVES = {"scale": "weight", "mean": "running_mean", "var": "running_var"}


class Stored(NamedTuple):
    """How a parameter is stored.

    Attributes:
      name: In torch.
      axes: Torch's axes in the order that they have here; empty: the same order.
    """

    name: str
    axes: Axes

    def axes_of(self, num_stored: int, num_axes: int) -> Axes:
        """Returns the axes of a tensor of so many axes, for a parameter of `num_axes`.

        A linear layer may be stored as one or as a convolution, as patches are embedded, or as a
        convolution of 1 x 1.
        """
        if num_axes != len(LINEAR) or self.axes not in (LINEAR, CONVOLUTION):
            return self.axes
        return {len(LINEAR): LINEAR, len(CONVOLUTION): CONVOLUTION}.get(num_stored, self.axes)

    def shape_here(self, shape: Sequence[int], num_axes: int) -> tuple[int, ...]:
        """Returns the shape here of a tensor of this shape, for a parameter of so many axes."""
        axes = self.axes_of(len(shape), num_axes)
        if len(shape) != len(axes) or (self.axes == LINEAR and any(n != 1 for n in shape[2:])):
            return tuple(shape)
        moved = tuple(shape[axis] for axis in axes)
        if axes == CONVOLUTION and num_axes == len(LINEAR):
            return (math.prod(moved[:-1]), moved[-1])
        return moved


class StoredTensor(NamedTuple):
    """Where a tensor is, its shape as torch has it, and whether its type is floating-point."""

    file: Path
    name: str
    shape: tuple[int, ...]
    is_float: bool = True


Tensors = Mapping[str, StoredTensor]  # by name
Stands = TypeVar("Stands")  # for a tensor


@contextlib.contextmanager
def opened(path: Path, framework: str = "flax") -> Iterator[Any]:
    """Opens a safetensors file; ValueError where it, or a tensor in it, cannot be read.

    Tensors come as those of `framework`; NumPy's reader has no bfloat16.
    """
    try:
        with safe_open(regular(path), framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise expect.InputError(f"{path}: not a readable safetensors file: {error}.") from error


def names_of(table: Table, paths: Iterable[str]) -> dict[str, Stored]:
    """Returns how each of these parameters is stored."""
    found = {}
    for path in paths:
        pattern, template, axes = next(row for row in table if re.fullmatch(row[0], path))
        *modules, leaf = re.sub(pattern, template, path).replace("/", ".").split(".")
        found[path] = Stored(".".join([*modules, _NORM_LEAVES.get(leaf, leaf)]), axes)
    return found


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fully matches one of the patterns."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def misfits(
    expected: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    names: Mapping[str, Stored],
    tensors: Tensors,
    ignored: Collection[str] = (),
) -> tuple[list[str], list[str], dict[str, tuple[int, ...]]]:
    """Compares a model with the headers of stored tensors.

    Args:
      expected: Parameters by path, or their shapes and types.
      names: How they are stored.
      tensors: Stored tensors by name.
      ignored: Patterns of names that are left out on purpose.
    Returns:
      Names of tensors without a parameter, paths of parameters without a tensor, and, by the path
      of the parameter, shapes here of tensors that have another shape.
    """
    paths = {stored.name: path for path, stored in names.items()}
    unused = [name for name in tensors if name not in paths and not matches(name, ignored)]
    missing = [path for path in expected if names[path].name not in tensors]
    shapes = {
        path: names[path].shape_here(tensors[name].shape, expected[path].ndim)
        for name in tensors
        if (path := paths.get(name))
    }
    misshaped = {path: shape for path, shape in shapes.items() if shape != expected[path].shape}
    return unused, missing, misshaped


def read_tensors(
    expected: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    names: Mapping[str, Stored],
    tensors: Tensors,
    mesh: Mesh | None = None,
) -> tuple[dict[str, jax.Array], list[str]]:
    """Reads parameters one at a time.

    Args:
      expected, names, tensors: As for `misfits`; tensors that have the shapes of the parameters.
      mesh: Devices that the parameters are spread over; None: the default device.
    Returns:
      Parameters by path, and names of those with NaN or infinite values.
    """
    params, not_finite = {}, []
    with contextlib.ExitStack() as stack:
        paths = sorted({tensors[names[path].name].file for path in expected})
        files = {path: stack.enter_context(opened(path)) for path in paths}
        for path, leaf in expected.items():
            tensor = tensors[names[path].name]
            with jax.default_device("cpu"):
                value = np.asarray(files[tensor.file].get_tensor(tensor.name))
            with np.errstate(over="ignore"):  # what the type cannot hold is not finite
                value = value.astype(leaf.dtype)
            if not np.isfinite(value.astype(np.float32)).all():
                not_finite.append(names[path].name)
            axes = names[path].axes_of(value.ndim, leaf.ndim)
            value = (value.transpose(axes) if axes else value).reshape(leaf.shape)
            where = None if mesh is None or mesh.size == 1 else sharding_of(mesh, path, leaf.shape)
            params[path] = place(value, where)
    return params, not_finite


def without_prefix(
    tensors: Mapping[str, Stands], own: Collection[str], ignored: tuple[str, ...]
) -> tuple[Mapping[str, Stands], str]:
    """Returns the tensors without the prefix that all their names have, and the prefix or "".

    Wrappers of a model put their own name before every other: `module._orig_mod.conv1.weight`.

    Args:
      tensors: Tensors of the checkpoint, by name.
      own: Names of the encoder's outermost parts, none of which is a prefix.
      ignored: See `assign`; entries without the prefix do not matter either.
    """
    prefix = ""
    while True:
        names = [name for name in tensors if not matches(name, ignored)]
        first = {name.partition(".")[0] for name in names}
        wrapper = "".join(first) + "."
        if len(first) != 1 or first <= set(own) or not all(n.startswith(wrapper) for n in names):
            return tensors, prefix
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
        prefix += wrapper


def stored_tensors(folder: Path, *, only_floats: bool = True) -> dict[str, StoredTensor]:
    """Reads the headers of the weights that transformers loads, by tensor name.

    `model.safetensors` is used where it is there, and otherwise the shards of the index.

    Raises:
      ValueError: neither is there, a damaged index, a shard that is missing or does not hold what
        the index says; with `only_floats` tensors that are not floating-point, such as those of a
        quantised model.
    """
    if (folder / WHOLE).is_file():
        return headers(folder / WHOLE, only_floats=only_floats)
    index = folder / INDEX
    if not index.is_file():
        raise expect.InputError(f"{folder}: neither {WHOLE} nor {INDEX} is there.")
    table = read_json(index, {"weight_map": {NAME: _SHARD}})["weight_map"]
    shards = sorted(set(table.values()))
    if lost := [name for name in shards if not (folder / name).is_file()]:
        shown = expect.listed(lost)
        raise expect.InputError(f"{folder}: shards that {INDEX} names are missing: {shown}.")
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        there = headers(folder / shard, only_floats=only_floats)
        listed = {name for name, file in table.items() if file == shard}
        if wrong := sorted(listed ^ there.keys()):
            raise expect.InputError(
                f"{folder / shard}: does not hold what {INDEX} says; they disagree about "
                f"{expect.listed(wrong)}."
            )
        found |= there
    return found


def headers(path: Path, *, only_floats: bool = True) -> dict[str, StoredTensor]:
    """Reads names and shapes of a file's tensors.

    Raises:
      ValueError: a file that cannot be read; with `only_floats` a tensor of another type.
    """
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name, some in slices.items():
            if only_floats and some.get_dtype() not in _FLOATS:
                raise expect.InputError(
                    f"{path}: {name} is {some.get_dtype()}; expected {', '.join(_FLOATS)}, that "
                    "is, weights that are not quantised."
                )
        return {
            name: StoredTensor(path, name, tuple(s.get_shape()), s.get_dtype() in _FLOATS)
            for name, s in slices.items()
        }


def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors, [rows, columns], have the same values; reads some rows at a time."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    num_rows, step = one.shape[0], max(1, _BYTES_AT_ONCE // (4 * max(1, one.shape[1])))
    with opened(one.file) as file, opened(other.file) as other_file, jax.default_device("cpu"):
        this, that = file.get_slice(one.name), other_file.get_slice(other.name)
        some = (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
        return all(np.array_equal(this[rows], that[rows]) for rows in some)


def refuse(folder: Path, problems: Mapping[str, list[str]]) -> None:
    """Raises ValueError with everything that is wrong with the weights of a folder, if anything."""
    if found := expect.problems(problems):
        raise expect.InputError(f"{folder}: {found}.")
