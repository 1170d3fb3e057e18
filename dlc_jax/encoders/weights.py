"""timm checkpoints in safetensors, found and mapped to the encoders' parameters, strictly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dlc_jax import checks
from dlc_jax.datasets.files import regular
from dlc_jax.types import Params, by_path, path_name

_CHECKPOINT = "model.safetensors"
_CONFIG = "config.json"
_SAMPLE = "demo:resnet18"
# torch's names for the leaves of norm layers -> ours
_NORM_LEAVES = {"weight": "scale", "running_mean": "mean", "running_var": "var"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors by their torch names, and the `config.json` beside them ({} if there is none)."""

    source: str
    tensors: dict[str, np.ndarray]
    config: dict


def read_checkpoint(weights: str) -> Checkpoint:
    """Reads a checkpoint.

    Args:
      weights: A hub id (`timm/resnet18.tv_in1k`), a `.safetensors` file, a folder with
        `model.safetensors` and `config.json`, or `demo:resnet18`, the bundled one.
    Raises:
      ValueError: nothing there, the hub cannot be reached, or not a safetensors file.
    """
    tensors_file, config_file = _locate(weights)
    config = {}
    if config_file is not None and config_file.is_file():
        try:
            config = json.loads(config_file.read_text())
        except (ValueError, RecursionError) as error:
            raise checks.InputError(f"{config_file}: not valid JSON: {error}.") from error
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
        if any(re.fullmatch(pattern, name) for pattern in ignored):
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
    report = [f"{what}: {', '.join(which)}" for what, which in problems.items() if which]
    if report:
        raise checks.InputError("; ".join(report))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(found[path_name(path)]), expected
    )


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
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
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
