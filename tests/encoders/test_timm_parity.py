"""Features against timm's, computed here, on the same pixels."""

import json

import numpy as np
import pytest
from conftest import narrow, random_images, require_shared

import dlc_jax as dlc
from dlc_jax.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD


def randomise(model) -> None:
    """Gives every parameter and running statistic values that a mistake would show in."""
    import torch

    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, 0, 0.04)
            torch.nn.init.normal_(module.bias, 0, 0.1)


def timm_features(model, images: np.ndarray, mean, std) -> np.ndarray:
    """ResNet: global average of the map; ViT: mean over the final, normed tokens."""
    import torch

    pixels = (images / np.float32(255) - np.float32(mean)) / np.float32(std)
    with torch.no_grad():
        output = model.eval().forward_features(
            torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2))
        )
    return output.mean((2, 3) if output.ndim == 4 else 1).numpy()


def array_features(encoder: dlc.Encoder, images: np.ndarray) -> np.ndarray:
    """Runs the encoder on these pixels as they are."""
    from dlc_jax.probes.kernel import Forward, features_of_batch

    return np.asarray(features_of_batch(Forward.of(encoder, "float32"), encoder.params, images))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.01  # the comparison is not of zeros
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "narrowed", "image_size"),
    [
        ("resnet18", False, 64),
        ("resnet18", True, 64),
        ("resnet18", True, 97),
        ("resnet34", False, 96),
        ("resnet50", False, 224),
        ("resnet50", True, 64),
        ("vit_small_patch16_224", False, 224),
        ("vit_base_patch16_224", False, 224),
    ],
)
def test_random_weights(timm, tmp_path, name, narrowed, image_size):
    from safetensors.torch import save_file

    model = timm.create_model(name, pretrained=False, num_classes=7)
    if narrowed:
        narrow(model)
    randomise(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = dlc.load_encoder(name, str(tmp_path / "model.safetensors"))
    images = random_images(2, image_size)
    assert_close(
        array_features(encoder, images),
        timm_features(model, images, encoder.mean, encoder.std),
    )


@pytest.mark.parametrize(
    "where", ["demo", pytest.param("encoders/resnet18_tin64", marks=pytest.mark.slow)]
)
def test_real_checkpoints(timm, sample, where):
    from safetensors.torch import load_file

    from dlc_jax.preprocess.images import load_images

    if where == "demo":
        weights, width = "demo:resnet18", 16
        from importlib import resources

        folder = resources.files("dlc_jax.datasets") / "sample"
    else:
        folder, width = require_shared(where), 64
        weights = str(folder)
    model = timm.create_model("resnet18", pretrained=False, num_classes=200)
    if width == 16:
        narrow(model)
    state = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({key: value.float() for key, value in state.items()})
    encoder = dlc.load_encoder("resnet18", weights)
    assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
    images = load_images(sample, 64).pixels[::50]
    theirs = timm_features(model, images, IMAGENET_MEAN, IMAGENET_STD)
    assert_close(array_features(encoder, images), theirs)


def test_normalisation_is_the_checkpoints_own(timm, tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    path = str(tmp_path)
    # without config.json: the architecture's default, timm's own
    assert dlc.load_encoder("vit_small_patch16_224", path).mean == model.default_cfg["mean"]
    stated = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    encoder = dlc.load_encoder("vit_small_patch16_224", path)
    assert (encoder.mean, encoder.normalisation) == ((0.1, 0.2, 0.3), "checkpoint")
    official = encoder.for_mode("official")
    assert (official.mean, official.pooling) == (IMAGENET_MEAN, "scalar")
    explicit = dlc.load_encoder(
        "vit_small_patch16_224", path, mean=(0, 0, 0), std=(1, 1, 1), pooling="cls"
    ).for_mode("official")
    assert (explicit.mean, explicit.pooling) == ((0, 0, 0), "cls")


@pytest.mark.slow
def test_vit_pooling(timm, tmp_path):
    """Mean over all tokens, class token, and the released code's single scalar."""
    import torch
    from safetensors.torch import save_file

    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0).eval()
    randomise(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = random_images(2, 224)
    pixels = (images / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    with torch.no_grad():
        tokens = model.forward_features(
            torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2))
        )
    expected = {
        "mean": tokens.mean(1),
        "cls": tokens[:, 0],
        "scalar": torch.nn.functional.adaptive_avg_pool2d(tokens, (1, 1)).reshape(2, 1),
    }
    for pooling, theirs in expected.items():
        encoder = dlc.load_encoder("vit_small_patch16_224", str(tmp_path), pooling=pooling)
        ours = array_features(encoder, images)
        scale = tokens.abs().max().item() if pooling == "scalar" else theirs.abs().max().item()
        assert ours.shape == tuple(theirs.shape)
        assert np.abs(ours - theirs.numpy()).max() <= 1e-4 * scale
