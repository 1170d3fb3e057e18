"""How a checkpoint says its images are to be prepared, by timm's or transformers' files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dlc_jax import expect
from dlc_jax.files.json_files import check_shape
from dlc_jax.preprocess.transform import INTERPOLATIONS, PAPER, Transform

# What `transform` may be asked for: the paper's preparation, or the checkpoint's own.
TRANSFORMS = ("paper", "model")
PROCESSOR = "preprocessor_config.json"

Numbers = tuple[float, ...]


class Preparation(NamedTuple):
    """How images become an encoder's input; see `Encoder`."""

    transform: Transform
    mean: Numbers
    std: Numbers
    normalisation: str


def preparation(
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    *,
    weights: str,
    transform: str | None,
    default: str,
    mean: Numbers | None,
    std: Numbers | None,
    architecture: tuple[Numbers, Numbers],
) -> Preparation:
    """Returns what was asked for, else what the checkpoint states, else what is usual.

    Args:
      config: The checkpoint's `config.json`: timm's `pretrained_cfg`, or its entries at top level.
      processor: The checkpoint's `preprocessor_config.json`, as transformers has it; {} without.
      weights: Name of the checkpoint, for messages.
      transform: `paper` or `model`; None: `default`, but `paper` where the checkpoint states none.
      default: `paper` or `model`.
      mean, std: Normalisation of RGB in [0, 1]; None: the checkpoint's.
      architecture: Mean and std where the checkpoint states none.
    Raises:
      ValueError: `model`, and the checkpoint states nothing, or something that is not supported.
    """
    expect.normalisation(mean, std)
    if transform is not None:
        expect.one_of("encoder.transform", transform, TRANSFORMS)
    timm, processor = _timm_entries(config), dict(processor)
    normalisation = "explicit"
    if mean is None or std is None:
        (mean, std), normalisation = architecture, "architecture"
        if timm.get("mean") and timm.get("std"):
            mean, std, normalisation = timm["mean"], timm["std"], "checkpoint"
        elif processor:
            (mean, std), normalisation = _normalisation(processor, weights), "checkpoint"
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    found = PAPER
    if (transform or default) == "model":
        if "pretrained_cfg" in config or _TIMM.keys() & timm.keys():
            found = _of_timm(timm, mean, weights, transform is not None)
        elif processor:
            found = _of_transformers(processor, weights, transform is not None)
        elif transform is not None:
            raise expect.InputError(
                f"encoder.transform: 'model', and {weights!r} has neither a config.json with "
                f"timm's pretrained_cfg nor a {PROCESSOR}; expected 'paper'."
            )
    return Preparation(found, mean, std, normalisation)


_TIMM = {
    "input_size": ([int, int, int], None),
    "crop_pct": (float, None),
    "crop_mode": (str, None),
    "interpolation": (str, None),
}


def _timm_entries(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("pretrained_cfg", config)


def _of_timm(
    entries: Mapping[str, Any], mean: Numbers, weights: str, is_asked_for: bool
) -> Transform:
    """Returns what timm's `resolve_data_config` and `create_transform` make of these entries."""
    shape = {f"{name}?": kind for name, kind in _TIMM.items()}
    check_shape(entries, shape, Path(f"encoder.weights {weights}: config.json"), "pretrained_cfg")
    crop_fraction = entries.get("crop_pct") or 0.875
    crop_mode = entries.get("crop_mode") or "center"
    with _unsupported(weights, "config.json"):
        expect.at_least("crop_pct", crop_fraction, 0, exclusive=True)
        size = _side(entries.get("input_size") or [3, 224, 224], "input_size")
        return Transform(
            size=size,
            scaled=math.floor(size / crop_fraction),
            crop_mode=crop_mode,
            interpolation=entries.get("interpolation") or "bicubic",
            crop_fraction=crop_fraction,
            border=tuple(round(255 * v) for v in mean) if crop_mode == "border" else PAPER.border,
            is_asked_for=is_asked_for,
        )


_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
_CLIP |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR.value, Image.Resampling.BICUBIC.value
_BOTH_SIDES = {"size": {"height": 224, "width": 224}}
_CROP = {"do_center_crop": True, "crop_size": 224}
_SHORTER_SIDE = {"size": {"shortest_edge": 224}, **_CROP, **_CLIP, "resample": _BICUBIC}
_MOBILENET = {"size": {"shortest_edge": 256}, **_CROP, **_HALVES, "resample": _BILINEAR}
# Image processors of transformers that differ in these defaults only, and ConvNeXT's rule.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {**_BOTH_SIDES, **_HALVES, "resample": _BILINEAR},
    "DeiT": {"size": {"height": 256, "width": 256}, **_CROP, **_HALVES, "resample": _BICUBIC},
    "Beit": {**_BOTH_SIDES, "crop_size": 224, **_HALVES, "resample": _BICUBIC},
    "Siglip": {**_BOTH_SIDES, **_HALVES, "resample": _BICUBIC},
    "DINOv3ViT": {**_BOTH_SIDES, **_IMAGENET, "resample": _BILINEAR},
    "Pvt": {**_BOTH_SIDES, **_IMAGENET, "resample": _BICUBIC},
    "Segformer": {"size": {"height": 512, "width": 512}, **_IMAGENET, "resample": _BILINEAR},
    "Bit": _SHORTER_SIDE,
    "CLIP": _SHORTER_SIDE,
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "ConvNext": {
        "size": {"shortest_edge": 384},
        **_HALVES,
        "crop_pct": 224 / 256,
        "resample": _BICUBIC,
    },
}
_SIZE = (int, {"height?": (int, None), "width?": (int, None), "shortest_edge?": (int, None)}, None)
_STATED = {
    "image_processor_type?": str,
    "feature_extractor_type?": str,  # of old files
    "size?": _SIZE,
    "crop_size?": _SIZE,
    "resample?": (int, None),
    "crop_pct?": (float, None),
    "rescale_factor?": (float, None),
    "image_mean?": ([float, float, float], None),
    "image_std?": ([float, float, float], None),
    **{f"do_{what}?": (bool, None) for what in ("resize", "center_crop", "rescale", "normalize")},
    "do_pad?": (bool, None),
}


def _processor(stated: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Returns the settings of an image processor with its defaults; `kind` is its name's stem."""
    check_shape(stated, _STATED, Path(f"encoder.weights {weights}: {PROCESSOR}"))
    name = stated.get("image_processor_type") or stated.get("feature_extractor_type") or ""
    kind = name.removesuffix("Fast").removesuffix("Pil")
    kind = kind.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if kind not in _PROCESSORS:
        raise expect.InputError(
            f"encoder.weights {weights}: {PROCESSOR}: image_processor_type is {name!r}, which is "
            f"not supported, expected {', '.join(_PROCESSORS)} and ImageProcessor; give "
            "encoder.transform='paper' with encoder.mean and encoder.std."
        )
    given = {key: value for key, value in stated.items() if value is not None}
    usual: dict[str, Any] = {"rescale_factor": 1 / 255, "do_pad": False}
    usual |= {"do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True}
    return {**usual, **_PROCESSORS[kind], **given, "kind": kind}


def _normalisation(stated: Mapping[str, Any], weights: str) -> tuple[Numbers, Numbers]:
    """Returns mean and std of RGB in [0, 1] that an image processor takes."""
    settings = _processor(stated, weights)
    mean, std = settings["image_mean"], settings["image_std"]
    where = f"encoder.weights {weights}: {PROCESSOR}: rescale_factor"
    expect.at_least(where, settings["rescale_factor"], 0, exclusive=True)
    if not settings["do_normalize"]:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    largest = 255 * settings["rescale_factor"] if settings["do_rescale"] else 255.0  # of white
    return tuple(value / largest for value in mean), tuple(value / largest for value in std)


def _of_transformers(stated: Mapping[str, Any], weights: str, is_asked_for: bool) -> Transform:
    """Returns what an image processor of transformers does before normalisation."""
    settings = _processor(stated, weights)
    with _unsupported(weights, PROCESSOR):
        for name, expected in (("do_resize", True), ("do_pad", False)):
            if settings[name] != expected:
                raise expect.InputError(f"{name}: expected {expected}, got {settings[name]}.")
        names = {kind.value: name for name, kind in INTERPOLATIONS.items()}
        expect.one_of("resample", settings["resample"], names)
        size = settings["size"]
        if not isinstance(size, int):
            size = {key: value for key, value in size.items() if value is not None}
        elif "shortest_edge" in _PROCESSORS[settings["kind"]]["size"]:
            size = {"shortest_edge": size}
        crop_mode, crop_fraction = "squash", None
        if isinstance(size, dict) and [*size] == ["shortest_edge"]:
            crop_mode, size = "center", size["shortest_edge"]
        crop = scaled = _side(size, "size")
        if settings["kind"] == "ConvNext":  # which has a rule of its own
            if settings["do_center_crop"]:
                raise expect.InputError("do_center_crop: expected False, got True.")
            if scaled < 384:
                crop_fraction = settings["crop_pct"]
                expect.at_least("crop_pct", crop_fraction, 0, exclusive=True)
                scaled = math.floor(scaled / crop_fraction)
            else:
                crop_mode = "squash"
        elif settings["do_center_crop"]:
            crop = _side(settings["crop_size"], "crop_size")
            expect.at_most("crop_size", crop, scaled)
        elif crop_mode == "center":
            raise expect.InputError("do_center_crop: expected True with size.shortest_edge.")
        return Transform(
            size=crop,
            scaled=scaled,
            crop_mode=crop_mode,
            interpolation=names[settings["resample"]],
            crop_fraction=crop_fraction,
            rounds_down=crop_mode == "center" or crop < scaled,
            is_asked_for=is_asked_for,
        )


def _side(size: Any, name: str) -> int:
    """Returns the side of a square size: a number, height and width, or timm's (3, h, w)."""
    sides = size
    if isinstance(size, dict):
        sides = [size.get("height"), size.get("width")] if len(size) == 2 else [None, None]
    elif isinstance(size, int):
        sides = [size, size]
    elif size[0] == 3:
        sides = size[1:]
    if len(sides) != 2 or sides[0] != sides[1] or not sides[0]:
        raise expect.InputError(f"{name}: expected a square of RGB, got {size}.")
    return int(sides[0])


@contextlib.contextmanager
def _unsupported(weights: str, file: str) -> Iterator[None]:
    try:
        yield
    except expect.InputError as error:
        raise expect.InputError(
            f"encoder.transform: 'model' is not supported for {weights}, by its {file}: {error} "
            "encoder.transform='paper' prepares images as the paper does."
        ) from error
