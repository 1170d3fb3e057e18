"""Encoders in Flax NNX, by name, with weights from timm checkpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from dlc_jax import expect
from dlc_jax.encoders import resnet, vit
from dlc_jax.encoders.encoder import POOLINGS, Encoder, module_functions
from dlc_jax.encoders.stored_tensors import Table, Tensors
from dlc_jax.encoders.weights import assign, read_checkpoint, without_prefix


class ImageArchitecture(NamedTuple):
    """How to build an encoder for a checkpoint and read the checkpoint's names.

    Attributes:
      build: Stored tensors -> the module; sizes that a checkpoint decides are read there.
      names, ignored: See `weights.assign`.
      is_prunable: See `Encoder`.
      mean, std: timm's default normalisation, for checkpoints without a `config.json`.
      poolings: What `Encoder.pooling` may be.
      head, module_order: See `Encoder`.
      image_size: Stored tensors -> the only image size it takes, or None.
    """

    build: Callable[[Tensors], nnx.Module]
    names: Table
    ignored: tuple[str, ...]
    is_prunable: Callable[[str], bool]
    mean: tuple[float, ...] = Encoder.mean
    std: tuple[float, ...] = Encoder.std
    poolings: tuple[str, ...] = ("mean",)
    head: str = Encoder.head
    module_order: Callable[[str], Any] | None = None
    image_size: Callable[[Tensors], int | None] = lambda tensors: None


def _build_resnet(size: resnet.ResNetSize, tensors: Tensors) -> nnx.Module:
    width = tensors["conv1.weight"].shape[0] if "conv1.weight" in tensors else 64
    return resnet.ResNet(size, width, rngs=nnx.Rngs(0))


def _vit_patches(tensors: Tensors) -> int:
    shape = tensors["pos_embed"].shape if "pos_embed" in tensors else ()
    num_patches = shape[1] - 1 if len(shape) == 3 else 196
    return num_patches if math.isqrt(num_patches) ** 2 == num_patches else 196


def _build_vit(size: vit.ViTSize, tensors: Tensors) -> nnx.Module:
    return vit.ViT(size, _vit_patches(tensors), rngs=nnx.Rngs(0))


ENCODERS: dict[str, ImageArchitecture] = {
    name: ImageArchitecture(
        functools.partial(_build_resnet, size), resnet.NAMES, resnet.IGNORED, resnet.is_prunable
    )
    for name, size in resnet.SIZES.items()
} | {
    name: ImageArchitecture(
        functools.partial(_build_vit, size),
        vit.NAMES,
        vit.IGNORED,
        vit.is_prunable,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        poolings=POOLINGS,
        head="cls",
        module_order=vit.module_order,
        image_size=lambda tensors: math.isqrt(_vit_patches(tensors)) * vit.PATCH_SIZE,
    )
    for name, size in vit.SIZES.items()
}


def load_encoder(
    name: str,
    weights: str,
    *,
    pooling: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Encoder:
    """Loads a pre-trained encoder, without its classifier.

    Args:
      name: `resnet18`, `resnet34`, `resnet50`, `vit_small_patch16_224` or `vit_base_patch16_224`.
      weights: A hub id (`timm/resnet18.tv_in1k`), a `.safetensors` file, a folder with
        `model.safetensors` and `config.json`, or `demo:resnet18`, the bundled one.
      pooling: See `Encoder`; None leaves it to the mode.
      mean, std: Normalisation of RGB in [0, 1]; None reads it from the checkpoint's `config.json`
        (`pretrained_cfg`), or takes the architecture's default where there is no such file.
    Returns:
      The encoder; `prefix` is what was removed from all names of the checkpoint, e.g. `module.`.
    Raises:
      ValueError: an unknown name, weights not found, or a checkpoint that does not fit; ten each
        of entries without a place, parameters without an entry and wrong shapes are listed.
    Example:
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> encoder.mean, encoder.params["conv1"]["kernel"].shape
      ((0.485, 0.456, 0.406), (7, 7, 3, 16))
    """
    expect.one_of("encoder.name", name, ENCODERS)
    expect.normalisation(mean, std)
    check_pooling(name, pooling)
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
    normalisation = "explicit"
    if mean is None or std is None:
        mean, std, normalisation = architecture.mean, architecture.std, "architecture"
        stated = config.get("pretrained_cfg", config)
        if "mean" in stated and "std" in stated:
            mean, std, normalisation = stated["mean"], stated["std"], "checkpoint"
    return Encoder(
        params=params,
        **module_functions(graph, state),
        is_prunable=architecture.is_prunable,
        name=name,
        mean=tuple(mean),
        std=tuple(std),
        normalisation=normalisation,
        pooling=pooling,
        image_size=architecture.image_size(tensors),
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
