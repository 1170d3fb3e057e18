"""Encoders in Flax NNX, by name, with weights from timm checkpoints, mapped strictly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from dlc_jax import expect
from dlc_jax.encoders import convnext, resnet, vit
from dlc_jax.encoders.encoder import POOLINGS, Encoder, module_functions
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
from dlc_jax.files.json_files import read_json
from dlc_jax.files.libraries import fetching
from dlc_jax.types import Params, by_path, path_name

_CONFIG = "config.json"
_NORMALISATION = {"mean?": [float], "std?": [float]}
_STATED = {"architecture?": str, "pretrained_cfg?": _NORMALISATION, **_NORMALISATION}


class ImageArchitecture(NamedTuple):
    """How to build an encoder for a checkpoint and read the checkpoint's names.

    Attributes:
      build: Stored tensors -> the module; sizes that a checkpoint decides are read there.
      names, ignored: See `assign`.
      is_prunable: See `Encoder`.
      mean, std: timm's default normalisation, for checkpoints without a `config.json`.
      poolings: What `Encoder.pooling` may be.
      head, module_order: See `Encoder`.
      image_size: Stored tensors -> the only image size it takes, or None.
      resized: Parameters and an image size -> parameters for images of that size; None: it takes
        any size.
      pools: Whether the module gives what its head reads with `pooled=True`, and tokens otherwise.
    """

    build: Callable[[Tensors], nnx.Module]
    names: Table
    ignored: tuple[str, ...]
    is_prunable: Callable[[str], bool]
    mean: tuple[float, ...] = Encoder.mean
    std: tuple[float, ...] = Encoder.std
    poolings: tuple[str, ...] = ("mean", "own")
    head: str = Encoder.head
    module_order: Callable[[str], Any] | None = None
    image_size: Callable[[Tensors], int | None] = lambda tensors: None
    resized: Callable[[Params, int], Params] | None = None
    pools: bool = False


def _build_resnet(size: resnet.ResNetSize, tensors: Tensors) -> nnx.Module:
    width = tensors["conv1.weight"].shape[0] if "conv1.weight" in tensors else 64
    return resnet.ResNet(size, width, rngs=nnx.Rngs(0))


def _build_vit(size: vit.ViTSize, tensors: Tensors) -> nnx.Module:
    """Builds the ViT; queries are normed where the checkpoint has norms for them."""
    size = size._replace(norms_queries="blocks.0.attn.q_norm.weight" in tensors)
    return vit.ViT(size, vit.grid_of(size, tensors) ** 2, rngs=nnx.Rngs(0))


def _build_convnext(size: convnext.ConvNeXtSize, tensors: Tensors) -> nnx.Module:
    return convnext.ConvNeXt(size, rngs=nnx.Rngs(0))


def _vit(size: vit.ViTSize) -> ImageArchitecture:
    mean, std = size.normalisation
    return ImageArchitecture(
        functools.partial(_build_vit, size),
        vit.NAMES,
        vit.IGNORED,
        vit.is_prunable,
        mean=mean,
        std=std,
        poolings=tuple(name for name in POOLINGS if name != "cls" or size.class_token),
        head="own" if size.attention_pool else "cls",
        module_order=vit.module_order,
        image_size=lambda tensors: vit.grid_of(size, tensors) * size.patch,
        resized=functools.partial(vit.resized, size),
        pools=size.attention_pool,
    )


ENCODERS: dict[str, ImageArchitecture] = {
    **{
        name: ImageArchitecture(
            functools.partial(_build_resnet, size), resnet.NAMES, resnet.IGNORED, resnet.is_prunable
        )
        for name, size in resnet.SIZES.items()
    },
    **{name: _vit(size) for name, size in vit.SIZES.items()},
    **{
        name: ImageArchitecture(
            functools.partial(_build_convnext, size),
            convnext.NAMES,
            convnext.IGNORED,
            convnext.is_prunable,
            head="own",
            module_order=convnext.module_order,
        )
        for name, size in convnext.SIZES.items()
    },
}


def load_encoder(
    name: str,
    weights: str,
    *,
    pooling: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
) -> Encoder:
    """Loads a pre-trained encoder, without its classifier.

    Args:
      name: `resnet18`, `convnext_tiny`, `vit_small_patch14_dinov2` or another key of
        `dlc_jax.encoders.ENCODERS`, which are timm's names.
      weights: A hub id (`timm/resnet18.tv_in1k`), a `.safetensors` file, a folder with
        `model.safetensors` and `config.json`, or `demo:resnet18`, the bundled one.
      pooling: See `Encoder`; None leaves it to the mode.
      mean, std: Normalisation of RGB in [0, 1]; None reads it from the checkpoint's `config.json`
        (`pretrained_cfg`), or takes the architecture's default where there is no such file.
      image_size: In pixels; position embeddings are resampled to it, as timm does. None: the size
        that the checkpoint was trained at.
    Returns:
      The encoder; `prefix` is what was removed from all names of the checkpoint, e.g. `module.`.
    Raises:
      ValueError: an unknown name, weights not found, an image size that patches do not fill, or a
        checkpoint that does not fit; ten each of entries without a place, parameters without an
        entry and wrong shapes are listed.
    Example:
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> encoder.mean, encoder.params["conv1"]["kernel"].shape
      ((0.485, 0.456, 0.406), (7, 7, 3, 16))
    """
    expect.one_of("encoder.name", name, ENCODERS)
    expect.normalisation(mean, std)
    check_pooling(name, pooling)
    if image_size is not None:
        expect.integer("encoder.image_size", image_size, 8)
    architecture = ENCODERS[name]
    tensors, config = read_checkpoint(str(weights))
    graph, state = _abstract(architecture, tensors)
    tensors, prefix = without_prefix(tensors, nnx.to_pure_dict(state), architecture.ignored)
    if prefix:  # sizes are those of entries by name
        graph, state = _abstract(architecture, tensors)
    expected = nnx.to_pure_dict(state)
    try:
        params = assign(tensors, expected, architecture.names, architecture.ignored)
    except expect.InputError as error:
        stated = config.get("architecture")
        hint = f" (its config.json says {stated!r})" if stated and stated != name else ""
        hint += f" (names read without their prefix {prefix!r})" if prefix else ""
        raise expect.InputError(
            f"encoder.weights: {weights!r} does not fit {name!r}{hint}: {error}"
        ) from error
    own_size = architecture.image_size(tensors)
    if architecture.resized is not None and image_size not in (None, own_size):
        params, own_size = architecture.resized(params, image_size), image_size
    normalisation = "explicit"
    if mean is None or std is None:
        mean, std, normalisation = architecture.mean, architecture.std, "architecture"
        stated = config.get("pretrained_cfg", config)
        if "mean" in stated and "std" in stated:
            mean, std, normalisation = stated["mean"], stated["std"], "checkpoint"
    return Encoder(
        params=params,
        **module_functions(graph, state, pools=architecture.pools),
        is_prunable=architecture.is_prunable,
        name=name,
        mean=tuple(mean),
        std=tuple(std),
        normalisation=normalisation,
        pooling=pooling,
        image_size=own_size,
        module_order=architecture.module_order,
        head=architecture.head,
        prefix=prefix,
    )


def _abstract(architecture: ImageArchitecture, tensors: Tensors) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: architecture.build(tensors)))


def check_pooling(name: str, pooling: str | None) -> None:
    """Raises ValueError unless the architecture can be pooled like this."""
    if pooling is not None:
        expect.one_of(f"encoder.pooling of {name}", pooling, ENCODERS[name].poolings)


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
