"""timm checkpoints in safetensors, found and mapped to the encoders' parameters, strictly."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dlc_jax import checks
from dlc_jax.datasets.files import regular
from dlc_jax.files.json_files import read_json
from dlc_jax.types import Params, by_path, path_name

_CHECKPOINT = "model.safetensors"
_CONFIG = "config.json"
_NORMALISATION = {"mean?": [float], "std?": [float]}
_STATED = {"architecture?": str, "pretrained_cfg?": _NORMALISATION, **_NORMALISATION}
_SAMPLE = "demo:resnet18"
# torch's names for the leaves of norm layers -> ours
_NORM_LEAVES = {"weight": "scale", "running_mean": "mean", "running_var": "var"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors by their torch names, and the `config.json` beside them ({} if there is none)."""

    source: str
    tensors: dict[str, np.ndarray]
    config: dict

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_checkpoint(weights: str) -> Checkpoint:
    """Reads a checkpoint.

    Args:
      weights: A hub id (`timm/resnet18.tv_in1k`), a `.safetensors` file, a folder with
        `model.safetensors` and `config.json`, or `demo:resnet18`, the bundled one.
    Raises:
      ValueError: nothing there, the hub cannot be reached, or not a safetensors file.
    """
    tensors_file, config_file = _locate(weights)
    config = {} if config_file is None else read_json(config_file, _STATED)
    with opened(tensors_file) as file:
        tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(weights, tensors, config)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; ValueError where it, or a tensor in it, cannot be read."""
    try:
        # framework="flax" because NumPy's reader has no bfloat16
        with safe_open(regular(path), framework="flax") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise checks.InputError(f"{path}: not a readable safetensors file: {error}.") from error


def without_prefix(
    checkpoint: Checkpoint, own: Collection[str], ignored: tuple[str, ...]
) -> tuple[Checkpoint, str]:
    """Returns the checkpoint without the prefix that all its names have, and the prefix or "".

    Wrappers of a model put their own name before every other: `module._orig_mod.conv1.weight`.

    Args:
      checkpoint: What was read.
      own: Names of the encoder's outermost parts, none of which is a prefix.
      ignored: See `assign`; entries without the prefix do not matter either.
    """
    tensors, prefix = checkpoint.tensors, ""
    while True:
        names = [name for name in tensors if not _matches(name, ignored)]
        first = {name.partition(".")[0] for name in names}
        wrapper = "".join(first) + "."
        if len(first) != 1 or first <= set(own) or not all(n.startswith(wrapper) for n in names):
            return dataclasses.replace(checkpoint, tensors=tensors), prefix
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
        prefix += wrapper


def assign(
    checkpoint: Checkpoint,
    expected: Params,
    names: tuple[tuple[str, str], ...],
    ignored: tuple[str, ...],
) -> Params:
    """Returns the checkpoint's tensors in the shape of `expected`, as float32.

    Args:
      checkpoint: What was read.
      expected: Pytree of shapes to fill.
      names: (pattern of the torch name, path with `.`) pairs; the first full match counts.
      ignored: Patterns of torch names that are left out on purpose.
    Raises:
      ValueError: listing every entry not used, leaf not assigned, shape that differs and tensor
        with NaN or infinite values.
    """
    leaves = by_path(expected)
    found: dict[str, np.ndarray] = {}
    problems: dict[str, list[str]] = {
        "entries the encoder has no place for": [],
        "entries of another shape": [],
        "entries with NaN or infinite values": [],
    }
    unused, misshaped, not_finite = problems.values()
    for name, tensor in checkpoint.tensors.items():
        if _matches(name, ignored):
            continue
        path = _translate(name, names)
        if path not in leaves:
            unused.append(name)
            continue
        shape = tuple(leaves[path].shape)
        value = _to_layout(tensor, len(shape))
        if value.size == np.prod(shape) and value.ndim == 4 and len(shape) == 2:
            value = value.reshape(shape)  # patch embedding: a convolution used as a linear layer
        if value.shape != shape:
            misshaped.append(f"{name} {value.shape} instead of {shape}")
        elif not np.isfinite(value).all():
            not_finite.append(name)
        found[path] = value
    problems["parameters without an entry"] = [path for path in leaves if path not in found]
    report = [f"{what}: {checks.listed(which)}" for what, which in problems.items() if which]
    if report:
        raise checks.InputError("; ".join(report))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(found[path_name(path)]), expected
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _translate(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, template in table:
        match = re.fullmatch(pattern, name)
        if match:
            *modules, leaf = match.expand(template).split(".")
            return "/".join([*modules, _NORM_LEAVES.get(leaf, leaf)])
    return None


def _to_layout(tensor: np.ndarray, target_ndim: int) -> np.ndarray:
    """torch's [out, in, h, w] -> [h, w, in, out], [out, in] -> [in, out]; the rest as it is."""
    tensor = np.asarray(tensor, np.float32)
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if tensor.ndim == 2 and target_ndim == 2 else tensor


def _locate(weights: str) -> tuple[Path, Path | None]:
    if not weights:
        raise checks.InputError(
            "encoder.weights: missing; give a hub id such as 'timm/resnet18.tv_in1k', a "
            ".safetensors file, a folder, or 'demo:resnet18'."
        )
    if weights.startswith("demo:"):
        checks.one_of("encoder.weights", weights, [_SAMPLE])
        folder = Path(str(resources.files("dlc_jax.datasets") / "sample"))
        return folder / _CHECKPOINT, folder / _CONFIG
    path = Path(weights).expanduser()
    if path.is_dir():
        if not (path / _CHECKPOINT).is_file():
            inside = checks.listed(sorted(p.name for p in path.iterdir())) or "nothing"
            raise checks.InputError(
                f"encoder.weights: {path} holds no {_CHECKPOINT} (found: {inside})."
            )
        return path / _CHECKPOINT, path / _CONFIG
    if path.is_file():
        return path, path.parent / _CONFIG
    if weights.endswith(".safetensors") or not checks.is_hub_id(weights):
        raise checks.InputError(
            f"encoder.weights: no file or folder {weights!r}, and that is no hub id "
            "(owner/name) either."
        )
    return _download(weights)


def _download(repository: str) -> tuple[Path, Path]:
    import huggingface_hub  # only when a hub id is used: the import costs half a second

    try:
        files = [
            Path(huggingface_hub.hf_hub_download(repository, name))
            for name in (_CHECKPOINT, _CONFIG)
        ]
    except Exception as error:  # its errors for no network, no such id and no access vary
        raise checks.InputError(
            f"encoder.weights: {repository!r} is neither a local path nor could it be fetched "
            f"from the Hugging Face hub ({checks.first_line(error)}). "
            f"Without network: on a machine that has it, download {_CHECKPOINT} and {_CONFIG} of "
            f"https://huggingface.co/{repository} into one folder, bring it here and give that "
            "folder as encoder.weights."
        ) from error
    return files[0], files[1]
