"""Preparation of images as checkpoints state it: transformers' processors, modes, errors."""

import dataclasses
import json
import shutil
from importlib import resources

import numpy as np
import pytest
from conftest import random_images, subset
from PIL import Image

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.encoders.preparation import preparation
from dlc_jax.preprocess.decode import RandomCrops, decode
from dlc_jax.preprocess.transform import PAPER
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.types import Conventions

SAMPLE = resources.files("dlc_jax.datasets") / "sample"
# odd and even, tiny, enlarged and reduced, and elongated ones; height, width
SIDES = ((40, 61), (61, 40), (7, 5), (97, 97), (300, 41), (33, 257), (150, 3))


def prepared(processor: dict, config: dict | None = None, **changes):
    options = {"weights": "w", "transform": "model", "default": "paper", "mean": None, "std": None}
    options |= {"architecture": ((0.4,) * 3, (0.2,) * 3)} | changes
    return preparation(config or {}, processor, **options)


PROCESSORS = [
    ("ViT", {}),
    ("ViT", {"size": {"height": 40, "width": 40}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}),
    ("ViT", {"size": {"height": 33, "width": 33}, "do_normalize": False}),
    ("ViT", {"size": {"height": 33, "width": 33}, "do_rescale": False}),
    ("ViT", {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5, "resample": 1}),
    ("DeiT", {}),
    ("DeiT", {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}}),
    ("Beit", {"size": {"height": 30, "width": 30}}),
    ("Bit", {}),
    ("Bit", {"size": {"shortest_edge": 37}, "crop_size": {"height": 30, "width": 30}}),
    ("Bit", {"size": {"shortest_edge": 36}, "crop_size": {"height": 33, "width": 33}}),
    ("CLIP", {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}),
    ("Siglip", {"size": {"height": 48, "width": 48}}),
    ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    ("ConvNext", {"size": {"shortest_edge": 60}, "crop_pct": 0.95, "resample": 2}),
    ("ConvNext", {}),
    ("DINOv3ViT", {"size": {"height": 48, "width": 48}}),
    ("Pvt", {}),
    ("Segformer", {"size": {"height": 48, "width": 48}}),
    ("MobileNetV1", {}),
    ("MobileNetV2", {}),
]


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
def test_pixels_are_those_of_transformers_processors(timm, kind, settings, backend):
    """Also by the file that a processor writes; `Pil` is the one without torchvision."""
    import transformers

    if kind == "DINOv3ViT" and backend:
        pytest.skip("transformers has it with torchvision only")
    processor = getattr(transformers, f"{kind}ImageProcessor{backend}")(**settings)
    for stated in (settings | {"image_processor_type": f"{kind}ImageProcessor"}, None):
        stated = stated or json.loads(processor.to_json_string())
        transform, mean, std, normalisation = prepared(stated)
        assert normalisation == "checkpoint"
        differences = []
        for number, (height, width) in enumerate(SIDES):
            coarse = Image.fromarray(random_images(1, 6, seed=number)[0])
            image = coarse.resize((width, height), Image.Resampling.BICUBIC)
            theirs = np.asarray(processor(image)["pixel_values"][0]).transpose(1, 2, 0)
            undone = (theirs * np.array(std) + np.array(mean)) * 255
            ours = transform(image, transform.size)
            assert ours.shape == theirs.shape
            differences.append(np.abs(ours - undone).ravel())
        found = np.concatenate(differences)
        if backend:
            assert found.max() < 0.01
        else:  # torch's own bicubic and Lanczos differ by 2 from Pillow's in single values
            assert found.max() < (1.01 if transform.interpolation == "bilinear" else 2.01)
            assert np.mean(found > 1.01) < 1e-4


def test_files_of_older_versions(timm):
    """Sizes as numbers, the name of a feature extractor."""
    import transformers

    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 48, "crop_size": 40}
    new = transformers.CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=40)
    image = Image.fromarray(random_images(1, 60)[0])
    transform, mean, std, _ = prepared(old)
    theirs = np.asarray(new(image)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose(
        transform(image, 40), (theirs * np.array(std) + mean) * 255, atol=1e-3
    )
    squash = prepared({"image_processor_type": "ViTFeatureExtractor", "size": 48}).transform
    assert (squash.size, squash.scaled, squash.crop_mode) == (48, 48, "squash")
    fast = prepared({"image_processor_type": "ViTImageProcessorFast", "size": 48}).transform
    assert fast == squash
    pillow = prepared({"image_processor_type": "ViTImageProcessorPil", "size": 48}).transform
    assert pillow == fast


def test_another_size_keeps_the_proportions():
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}
    transform = prepared(processor | {"crop_size": 224}).transform
    assert (transform.size, transform.scaled_side(224), transform.scaled_side(112)) == (
        224,
        256,
        128,
    )
    timms = {"pretrained_cfg": {"input_size": [3, 288, 288], "crop_pct": 0.95}}
    transform = prepared({}, timms).transform
    assert [transform.scaled_side(size) for size in (288, 224)] == [303, 235]


def test_what_is_asked_for_stated_or_usual():
    half, usual = (0.5,) * 3, ((0.4,) * 3, (0.2,) * 3)
    timms = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    for config in ({"pretrained_cfg": timms}, timms):  # older files have it at top level
        own = prepared({}, config)
        assert (own.transform.size, own.transform.interpolation) == (64, "bicubic")
        assert own[1:] == (half, half, "checkpoint")
        assert prepared({}, config, transform=None, default="model").transform == own.transform
        for changes in ({"transform": "paper"}, {"transform": None}):
            found = prepared({}, config, **changes)
            assert found == (PAPER, half, half, "checkpoint")
    # timm's statement wins over an image processor
    both = prepared({"image_processor_type": "ViTImageProcessor"}, {"pretrained_cfg": timms})
    assert both == own
    given = prepared({}, timms, mean=(0.1,) * 3, std=(0.3,) * 3)
    assert given[1:] == ((0.1,) * 3, (0.3,) * 3, "explicit")
    # a checkpoint that states nothing
    nothing = prepared({}, {"architecture": "resnet18"}, transform=None, default="model")
    assert nothing == (PAPER, *usual, "architecture")


def test_the_border_has_the_colour_of_the_mean():
    config = {"crop_mode": "border", "mean": [0.1, 0.5, 1.0], "std": [1.0] * 3}
    assert prepared({}, config).transform.border == (26, 128, 255)
    given = prepared({}, config, mean=(0.0, 0.0, 0.2), std=(1.0,) * 3)
    assert given.transform.border == (0, 0, 51)


VIT = {"image_processor_type": "ViTImageProcessor"}
BIT = {"image_processor_type": "BitImageProcessor"}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}}


@pytest.mark.parametrize(
    ("processor", "config", "says"),
    [
        ({}, {}, "neither a config.json with timm's pretrained_cfg nor a preprocessor_config.json"),
        (
            {},
            {"crop_mode": "five"},
            r"config\.json: .*crop_mode: unknown value 'five'; valid: center",
        ),
        ({}, {"interpolation": "random"}, "interpolation: unknown value 'random'"),
        (
            {},
            {"input_size": [3, 64, 96]},
            r"input_size: expected a square of RGB, got \[3, 64, 96\]",
        ),
        (
            {},
            {"input_size": [1, 64, 64]},
            r"input_size: expected a square of RGB, got \[1, 64, 64\]",
        ),
        ({}, {"input_size": 64}, r"pretrained_cfg\.input_size is 64, expected a list of 3"),
        (
            {},
            {"crop_pct": "1"},
            r"config\.json: pretrained_cfg\.crop_pct is '1', expected a number",
        ),
        ({}, {"crop_pct": -0.5}, r"crop_pct: must be > 0, got -0\.5"),
        (CONVNEXT | {"crop_pct": 0.0}, {}, r"crop_pct: must be > 0, got 0\.0"),
        (CONVNEXT | {"do_center_crop": True}, {}, "do_center_crop: expected False, got True"),
        (VIT | {"rescale_factor": 0.0}, {}, r"rescale_factor: must be > 0, got 0\.0"),
        (
            VIT | {"image_std": [0.5, 0.5]},
            {},
            "image_std is a list of 2 values, expected a list of",
        ),
        ({"size": 64}, {}, "image_processor_type is '', which is not supported, expected ViT, "),
        (
            {"image_processor_type": "EfficientNetImageProcessor"},
            {},
            "'EfficientNetImageProcessor'",
        ),
        (VIT | {"size": "64"}, {}, r"preprocessor_config\.json: size is '64', expected an integer"),
        (VIT | {"do_resize": False}, {}, "do_resize: expected True, got False"),
        (VIT | {"do_pad": True}, {}, "do_pad: expected False, got True"),
        (VIT | {"resample": 9}, {}, "resample: unknown value 9"),
        (VIT | {"size": {"height": 8, "width": 9}}, {}, "size: expected a square of RGB"),
        (VIT | {"size": {"longest_edge": 9}}, {}, "size: expected a square of RGB"),
        (BIT | {"do_center_crop": False}, {}, "do_center_crop: expected True with size.shortest"),
        (BIT | {"size": {"shortest_edge": 64}}, {}, "crop_size: must be <= 64, got 224"),
        (BIT | {"crop_size": {"height": 8, "width": 9}}, {}, "crop_size: expected a square"),
    ],
)
def test_what_is_not_supported_is_refused_by_file_and_entry(processor, config, says):
    with pytest.raises(dlc.InputError, match=says) as caught:
        prepared(processor, config)
    assert "encoder." in str(caught.value)
    assert " w" in str(caught.value) or "'w'" in str(caught.value)


def test_the_papers_transform_of_a_checkpoint_whose_own_is_not_supported():
    assert prepared({}, {"crop_mode": "five"}, transform="paper").transform == PAPER
    other = {"image_processor_type": "EfficientNetImageProcessor"}
    found = prepared(other, transform="paper", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert found == (PAPER, (0.5,) * 3, (0.5,) * 3, "explicit")
    with pytest.raises(dlc.InputError, match=r"encoder\.mean and encoder\.std"):
        prepared(other, transform="paper")


@pytest.fixture
def stated(tmp_path) -> str:
    """The bundled checkpoint, trained, as it were, with another preparation."""
    shutil.copy(str(SAMPLE / "model.safetensors"), tmp_path)
    config = {"input_size": [3, 48, 48], "crop_pct": 1.0, "crop_mode": "squash"}
    config |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    return str(tmp_path)


def test_a_transform_of_its_own_is_part_of_the_fingerprint(stated, sample_encoder):
    known = "78c70dd5af94f2300e3ff83374d5f9310eb26a070b100cae69de1c694fb09bbc"
    own = dlc.load_encoder("resnet18", stated, transform="model")
    for transform in (None, "paper"):
        encoder = dlc.load_encoder("resnet18", stated, transform=transform)
        assert encoder.fingerprint == sample_encoder.fingerprint == known
    assert str(own.transform) == "resize both sides to 48, centre crop 48, bicubic"
    assert own.fingerprint != known
    bilinear = dlc.Transform(size=48, scaled=48, crop_mode="squash", crop_fraction=1.0)
    assert len({own.fingerprint, with_transform(own, bilinear).fingerprint, known}) == 3
    with pytest.raises(dlc.InputError, match=r"encoder\.transform: unknown value 'own'"):
        dlc.load_encoder("resnet18", stated, transform="own")


def with_transform(encoder: dlc.Encoder, transform: dlc.Transform) -> dlc.Encoder:
    return dataclasses.replace(encoder, transform=transform)


def test_official_mode_prepares_as_the_paper_does(stated):
    asked = dlc.load_encoder("resnet18", stated, transform="model")
    with pytest.raises(dlc.InputError, match=r"encoder\.transform: mode 'official'.*both sides"):
        asked.for_mode("official")
    usual = preparation(
        {"input_size": [3, 48, 48]},
        {},
        weights="w",
        transform=None,
        default="model",
        mean=None,
        std=None,
        architecture=((0.4,) * 3, (0.2,) * 3),
    ).transform
    assert usual.size == 48
    encoder = with_transform(asked, usual)
    assert encoder.for_mode("default").transform == usual
    assert encoder.for_mode("official").transform == PAPER


def test_scoring_and_features_see_the_encoders_transform(stated, small_sample):
    """At the encoder's own size, where none is given."""
    own = dlc.load_encoder("resnet18", stated, transform="model")
    few = subset(small_sample, np.arange(8)).without_empty_classes()
    pixels = np.stack([own.transform(decoded(few[i]), 48) for i in range(8)])
    prepared = dlc.array_dataset(pixels, few.labels)
    as_given = with_transform(own, dlc.Transform(size=48, scaled=48))  # does nothing to these
    path = dlc.PathSpec(num_probes=2, placement="midpoint")
    for measure in (
        dlc.features,
        lambda encoder, images: dlc.probe(encoder, images, path=path).losses,
    ):
        found = measure(own, few)
        np.testing.assert_array_equal(found, measure(as_given, prepared))
        assert np.abs(found - measure(with_transform(own, PAPER), dlc.Images(few, 48))).max() > 1e-3


@pytest.mark.parametrize("augment", [True, False])
def test_fine_tuning_sees_the_encoders_transform(stated, small_sample, augment):
    own = dlc.load_encoder("resnet18", stated, transform="model")
    few, everything = subset(small_sample, np.arange(8)), np.arange(8)
    settings = dlc.FinetuneConfig(epochs=1, augment=augment)
    finetuner = Finetuner(own, dlc.Images(few), few, settings, Conventions.of("default"))
    expected = np.stack([own.transform(decoded(few[i]), 48) for i in range(8)])
    np.testing.assert_array_equal(finetuner.data.test_set(few).inputs, expected)
    [evaluated] = finetuner.data.evaluation_inputs(everything)
    np.testing.assert_array_equal(evaluated, expected)
    inputs = finetuner.data.training_inputs(everything, 3)(everything, 1)
    if augment:
        crops = RandomCrops(few, 48, 3, "bicubic")
        expected = np.stack([crops.crop(decoded(few[i]), i, draw=1) for i in range(8)])
    np.testing.assert_array_equal(inputs, expected)
    paper = with_transform(own, PAPER)
    others = Finetuner(paper, dlc.Images(few, 48), few, settings, Conventions.of("default"))
    assert finetuner.fingerprint != others.fingerprint
    assert np.any(others.data.training_inputs(everything, 3)(everything, 1) != inputs)


def decoded(sample: dlc.Sample) -> Image.Image:
    return decode(sample.image, sample.id)


def config_of(*, mode: str = "default", by: str = "linear_probe", **encoder) -> Config:
    values = {"mode": mode, "dataset": {"train": "demo:caltech15/train"}, "tuning": {"by": by}}
    values["encoder"] = {"name": "resnet18", "weights": "demo:resnet18"} | encoder
    return Config.of(values)


def test_what_the_configuration_fills_in():
    for mode in ("default", "official"):
        settings = config_of(mode=mode).encoder
        assert (settings.transform, settings.image_size) == ("paper", 224)
        assert config_of(mode=mode, image_size=64).encoder.image_size == 64
    by_finetune = config_of(by="finetune").decides_auto["encoder"]  # as it was before
    assert (by_finetune["image_size"], by_finetune.get("transform")) == (224, None)
    assert config_of(by="finetune", transform="model").decides_auto["encoder"]["transform"]
    settings = config_of(transform="model").encoder
    assert (settings.transform, settings.image_size) == ("model", None)
    assert config_of(transform="model", image_size=96).encoder.image_size == 96
    with pytest.raises(dlc.InputError, match=r"encoder\.transform: unknown value 'own'"):
        config_of(transform="own")
    says = r"encoder\.transform: mode 'official' .*expected 'paper', got 'model'"
    with pytest.raises(dlc.InputError, match=says):
        config_of(mode="official", transform="model")
