"""Evaluation transforms: every crop mode and interpolation against timm, sizes, cache, errors."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import random_images
from PIL import Image

import dlc_jax as dlc
from dlc_jax.encoders.preparation import preparation
from dlc_jax.preprocess.cache import _key
from dlc_jax.preprocess.images import load_images
from dlc_jax.preprocess.transform import CROP_MODES, INTERPOLATIONS, PAPER, Transform

# odd and even, tiny, enlarged and reduced, and very elongated ones; height, width
SIDES = ((40, 61), (61, 40), (1, 1), (5, 7), (97, 97), (300, 41), (33, 257), (2, 150), (150, 3))


def smooth_images() -> list[Image.Image]:
    """Images with edges and gradients, of all these sides."""
    found = []
    for number, (height, width) in enumerate(SIDES):
        coarse = Image.fromarray(random_images(1, 6, seed=number)[0])
        found.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return found


def of_timm(entries: dict, image_size: int | None = None):
    """What timm makes of a `pretrained_cfg`, as uint8."""
    from timm.data import create_transform, resolve_data_config

    asked = {} if image_size is None else {"input_size": (3, image_size, image_size)}
    settings = resolve_data_config(asked, pretrained_cfg=entries)
    transform = create_transform(**settings, is_training=False)
    mean, std = (np.array(settings[name])[:, None, None] for name in ("mean", "std"))

    def pixels(image: Image.Image) -> np.ndarray:
        normalised = transform(image).numpy()
        return np.rint((normalised * std + mean) * 255).transpose(1, 2, 0)

    return pixels


def prepared(config: dict, **changes):
    options = {"weights": "w", "transform": "model", "default": "paper", "mean": None, "std": None}
    options |= {"architecture": ((0.4,) * 3, (0.2,) * 3), "processor": {}} | changes
    return preparation(config, **options)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_pixels_are_timms(timm, crop_mode, interpolation):
    for size, crop_pct, other in (
        (32, 0.875, 47),
        (33, 0.95, 24),
        (31, 1.0, 40),
        (29, 0.9, 16),
        (40, 1.15, 33),
    ):
        entries = {"input_size": [3, size, size], "crop_pct": crop_pct, "crop_mode": crop_mode}
        entries |= {"interpolation": interpolation, "mean": [0.3, 0.5, 0.7], "std": [0.2] * 3}
        transform = prepared({"pretrained_cfg": entries}).transform
        assert transform.size == size
        for image_size in (size, other):
            theirs = of_timm(entries, image_size)
            for image in smooth_images():
                if crop_mode == "border" and max(image.size) >= 50 * min(image.size):
                    continue  # timm scales these to a height of 0, and fails
                np.testing.assert_array_equal(
                    transform(image, image_size), theirs(image), f"{image.size} {image_size}"
                )


@pytest.mark.parametrize(
    "entries",
    [
        {"mean": [0.5] * 3, "std": [0.5] * 3},
        {"input_size": [3, 48, 48]},
        {"crop_pct": 0.7, "interpolation": "bilinear", "crop_mode": None, "test_input_size": None},
        {"input_size": [3, 40, 40], "test_input_size": [3, 64, 64], "test_crop_pct": 1.0},
    ],
)
def test_what_a_configuration_leaves_out_is_timms(timm, entries):
    transform = prepared({"pretrained_cfg": entries}).transform
    theirs = of_timm(entries)
    for image in smooth_images()[:3]:
        np.testing.assert_array_equal(transform(image, transform.size), theirs(image))


@pytest.mark.slow
def test_pixels_are_timms_for_all_its_pretrained_models(timm):
    """1,826 configurations of timm 1.0.31, 172 of which differ; of five images are no squares."""
    found, refused = {}, []
    for name in timm.list_pretrained():
        entries = json.loads(json.dumps(timm.models.get_pretrained_cfg(name).to_dict()))
        if len({*entries["input_size"][1:]}) > 1:
            refused.append(name)
            with pytest.raises(dlc.InputError, match="input_size: expected a square of RGB"):
                prepared({"pretrained_cfg": entries})
            continue
        transform = prepared({"pretrained_cfg": entries}).transform
        key = (transform, *entries["mean"], *entries["std"])
        found.setdefault(key, entries)
    assert len(found) > 100
    assert len(refused) < 10
    image = smooth_images()[5]
    for (transform, *_), entries in found.items():
        np.testing.assert_array_equal(transform(image, transform.size), of_timm(entries)(image))


def test_a_border_where_timm_fails():
    long = Image.fromarray(np.full((2, 300, 3), 200, np.uint8))
    pixels = Transform(size=16, scaled=16, crop_mode="border", border=(1, 2, 3))(long, 16)
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_array_equal(pixels[7], 200)
    np.testing.assert_array_equal(np.delete(pixels, 7, 0), np.broadcast_to([1, 2, 3], (15, 16, 3)))


@pytest.mark.parametrize("crop_mode", ["center", "border"])
def test_images_too_long_to_be_scaled_are_refused(monkeypatch, crop_mode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    transform = Transform(size=64, scaled=64, crop_mode=crop_mode)
    long = Image.fromarray(np.zeros((2, 99, 3), np.uint8))
    if crop_mode == "border":
        assert transform(long, 64).shape == (64, 64, 3)
        return
    with pytest.raises(dlc.InputError, match="99 x 2 pixels would be scaled to 3168 x 64"):
        transform(long, 64)


def test_the_papers_sides_at_every_size():
    for size in (8, 32, 33, 64, 100, 224, 384):
        assert PAPER.scaled_side(size) == round(size * 256 / 224)
        assert PAPER.described(size) == f"resize {round(size * 256 / 224)}, centre crop {size}"


def test_entries_of_the_cache_by_transform(small_sample, tmp_path):
    """The paper's entries keep their names; another transform has entries of its own."""
    assert _key(small_sample, 64) == _key(small_sample, 64, transform=Transform())
    own = Transform(size=64, scaled=64, interpolation="bicubic")
    keys = {
        _key(small_sample, 64, transform=transform)
        for transform in (
            PAPER,
            own,
            dataclasses.replace(own, crop_mode="squash"),
            dataclasses.replace(own, crop_mode="border"),
            dataclasses.replace(own, crop_mode="border", border=(1, 1, 1)),
            dataclasses.replace(own, interpolation="lanczos"),
            dataclasses.replace(own, scaled=73),
        )
    }
    assert len(keys) == 7
    cache = dlc.ImageCache(str(tmp_path))
    for transform in (PAPER, own, PAPER, own):
        plain = load_images(small_sample, 64, transform=transform).pixels
        cached = load_images(small_sample, 64, transform=transform, cache=cache).pixels
        np.testing.assert_array_equal(plain, cached)
    assert len(list(tmp_path.glob("*/entry.json"))) == 2


def test_random_crops_take_the_transforms_interpolation(timm, small_sample):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    from dlc_jax.preprocess.decode import decode, random_box

    transform = Transform(interpolation="bicubic")
    crops = dlc.Images(small_sample, 32, transform=transform).random_crops(seed=3)
    image = decode(small_sample[0].image, "x")
    generator = np.random.default_rng([3, 1, *str(small_sample.ids[0]).encode()])
    left, top, right, bottom = random_box(generator, image.height, image.width)
    theirs = vision.resized_crop(
        image, top, left, bottom - top, right - left, [32, 32], InterpolationMode.BICUBIC
    )
    theirs = vision.hflip(theirs) if generator.random() < 0.5 else theirs
    np.testing.assert_array_equal(crops.crop(image, 0, draw=1), np.asarray(theirs))
    plain = dlc.Images(small_sample, 32).random_crops(seed=3).crop(image, 0, draw=1)
    assert np.any(plain != np.asarray(theirs))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 0}, r"transform\.size: must be >= 1, got 0"),
        ({"scaled": 0}, r"transform\.scaled: must be >= 1, got 0"),
        ({"crop_mode": "centre"}, r"crop_mode: unknown value 'centre'.*Did you mean 'center'"),
        ({"interpolation": "random"}, r"interpolation: unknown value 'random'; valid: nearest, "),
        ({"crop_fraction": 0}, r"crop_fraction: must be > 0, got 0"),
    ],
)
def test_transforms_out_of_range_are_refused(changes, says):
    with pytest.raises(dlc.InputError, match=says):
        Transform(**changes)
