"""timm checkpoints in safetensors, found and mapped to the encoders' parameters, strictly."""

from __future__ import annotations

from collections.abc import Collection
from importlib import resources
from pathlib import Path

import jax

from dlc_jax import expect
from dlc_jax.encoders.stored_tensors import (
    WHOLE,
    Table,
    Tensors,
    headers,
    matches,
    misfits,
    names_of,
    read_tensors,
)
from dlc_jax.files.hub import fetching
from dlc_jax.files.json_files import read_json
from dlc_jax.types import Params, by_path, path_name

_CONFIG = "config.json"
_NORMALISATION = {"mean?": [float], "std?": [float]}
_STATED = {"architecture?": str, "pretrained_cfg?": _NORMALISATION, **_NORMALISATION}


def read_checkpoint(weights: str) -> tuple[Tensors, dict]:
    """Reads which tensors a checkpoint has.

    Args:
      weights: A hub id (`timm/resnet18.tv_in1k`), a `.safetensors` file, a folder with
        `model.safetensors` and `config.json`, or `demo:resnet18`, the bundled one.
    Returns:
      Tensors by their torch names, and the `config.json` beside them ({} if there is none).
    Raises:
      ValueError: nothing there, the hub cannot be reached, or not a safetensors file.
    """
    tensors_file, config_file = _locate(weights)
    config = read_json(config_file, _STATED)
    return headers(tensors_file, only_floats=False), config


def without_prefix(
    tensors: Tensors, own: Collection[str], ignored: tuple[str, ...]
) -> tuple[Tensors, str]:
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


def assign(tensors: Tensors, expected: Params, table: Table, ignored: tuple[str, ...]) -> Params:
    """Reads the checkpoint's tensors into the shape of `expected`.

    Args:
      tensors: Tensors of the checkpoint, by name.
      expected: Pytree of shapes to fill.
      table: How the parameters are stored.
      ignored: Patterns of torch names that are left out on purpose.
    Raises:
      ValueError: listing every entry not used, leaf not assigned, shape that differs and tensor
        with NaN or infinite values.
    """
    leaves = by_path(expected)
    names = names_of(table, leaves)
    unused, missing, misshaped = misfits(leaves, names, tensors, ignored)
    unfit = {*missing, *misshaped}
    fitting = {path: leaf for path, leaf in leaves.items() if path not in unfit}
    params, not_finite = read_tensors(fitting, names, tensors)
    problems = {
        "entries the encoder has no place for": unused,
        "entries of another shape": [
            f"{names[path].name} {shape} instead of {leaves[path].shape}"
            for path, shape in misshaped.items()
        ],
        "entries with NaN or infinite values": not_finite,
        "parameters without an entry": missing,
    }
    if report := expect.problems(problems):
        raise expect.InputError(report)
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_name(path)], expected)


def _locate(weights: str) -> tuple[Path, Path]:
    if not weights:
        raise expect.InputError(
            "encoder.weights: missing; give a hub id such as 'timm/resnet18.tv_in1k', a "
            ".safetensors file, a folder, or 'demo:resnet18'."
        )
    path = Path(weights).expanduser()
    if weights.startswith("demo:"):
        expect.one_of("encoder.weights", weights, ["demo:resnet18"])
        path = Path(str(resources.files("dlc_jax.datasets") / "sample"))
    if path.is_dir():
        if not (path / WHOLE).is_file():
            inside = expect.listed(sorted(p.name for p in path.iterdir())) or "nothing"
            raise expect.InputError(f"encoder.weights: {path} holds no {WHOLE} (found: {inside}).")
        path = path / WHOLE
    if path.is_file():
        return path, path.with_name(_CONFIG)
    if weights.endswith(".safetensors") or not expect.is_hub_id(weights):
        raise expect.InputError(
            f"encoder.weights: no file or folder {weights!r}, and that is no hub id "
            "(owner/name) either."
        )
    with fetching(
        f"encoder.weights: {weights!r} is neither a local path nor could it be",
        f"Without network: on a machine that has it, download {WHOLE} and {_CONFIG} of "
        f"https://huggingface.co/{weights} into one folder, bring it here and give that folder as "
        "encoder.weights.",
    ) as hub:
        files = [Path(hub.hf_hub_download(weights, name)) for name in (WHOLE, _CONFIG)]
    return files[0], files[1]
