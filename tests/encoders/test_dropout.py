"""Stochastic depth and dropout of converted networks, and their training in bfloat16."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import power_cut
from test_converted import images_of, stored

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.encoders.encoder import RANDOM_KEY
from dlc_jax.encoders.torch_modules import Converted
from dlc_jax.planning.image_memory import ImageFinetuning
from dlc_jax.training.images import FinetuneConfig

TWO_BLOCKS = {"depth": 2, "img_size": 32}
STATED = {**TWO_BLOCKS, "drop_rate": 0.9, "proj_drop_rate": 0.9, "drop_path_rate": 0.9}
FAST = {"image_size": 32, "epochs": 3, "batch_size": 16, "learning_rate": 0.05}
NUM = 400


def vit(folder, timm, arguments=TWO_BLOCKS, **rates):
    stored(folder, timm, "test_vit", arguments)
    return dlc.load_encoder("timm:test_vit", folder, image_size=32, **rates)


def trained_output(encoder, images, seed=0, real=None):
    """Returns what a classifier reads in training mode, and the next key."""
    params = {**encoder.params, RANDOM_KEY: jax.random.PRNGKey(seed)}
    real = jnp.ones(len(images)) if real is None else real
    output, moved = jax.jit(encoder.apply_training)(params, images, real)
    return np.asarray(output), moved[RANDOM_KEY]


def with_residuals(encoder, image, scales):
    """Returns evaluated features [d] with weights multiplied, by the start of their names."""
    params = dict(encoder.params)
    for begin, scale in scales.items():
        for name in [name for name in params if name.startswith(begin)]:
            params[name] = params[name] * scale
    return np.asarray(encoder.apply_head(params, image)[0])


def check_paths(encoder, names, keep):
    """Each of many samples has each residual dropped, or kept and scaled, independently."""
    image = images_of(encoder.image_size or 32, 1)
    found, _ = trained_output(encoder, jnp.repeat(image, NUM, 0))
    counts = []
    for kept in itertools.product((0, 1), repeat=len(names)):
        scales = {name: one / keep for name, one in zip(names, kept, strict=True)}
        expected = with_residuals(encoder, image, scales)
        counts.append(int((np.abs(found - expected).max(1) < 1e-4).sum()))
        share = np.prod([keep if one else 1 - keep for one in kept])
        deviation = np.sqrt(NUM * share * (1 - share))
        assert abs(counts[-1] - NUM * share) < 4 * deviation
    assert sum(counts) == NUM


def test_stochastic_depth_drops_residuals_of_samples(timm, tmp_path):
    """Other rates that the checkpoint states stay off."""
    encoder = vit(tmp_path, timm, STATED, drop_path=0.25)
    check_paths(encoder, ("blocks.1.attn.proj", "blocks.1.mlp.fc2"), 0.75)


@pytest.mark.slow
def test_stochastic_depth_of_transformers(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_dropout_prob=0.5,
        drop_path_rate=0.9,
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    asked = dlc.load_encoder(f"hf:{tmp_path}", drop_path=0.25)
    scales = [f"encoder.layer.0.layer_scale{n}" for n in (1, 2)]
    check_paths(asked, scales, 0.75)
    plain = dlc.load_encoder(f"hf:{tmp_path}")
    assert asked.fingerprint == plain.fingerprint
    dropped = dlc.load_encoder(f"hf:{tmp_path}", dropout=0.5)
    found, _ = trained_output(dropped, jnp.repeat(images_of(28, 1), 8, 0))
    assert len(np.unique(found.round(5), axis=0)) == 8


def test_dropout_zeroes_and_scales(timm, tmp_path):
    encoder = vit(tmp_path, timm, dropout=0.3)
    images = jnp.repeat(images_of(32, 1), NUM, 0)
    found, key = trained_output(encoder, images)
    plain = np.asarray(encoder.apply_head(encoder.params, images))
    kept = found != 0
    np.testing.assert_allclose(found[kept], plain[kept] / 0.7, rtol=1e-4, atol=1e-5)
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.21 / kept.size)
    assert abs(kept.mean(0) - 0.7).max() < 5 * np.sqrt(0.21 / NUM)
    again, same_key = trained_output(encoder, images)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(same_key, key)
    assert (np.asarray(key) != jax.random.PRNGKey(0)).any()
    other, _ = trained_output(encoder, images, seed=1)
    assert ((other != 0) != kept).mean() == pytest.approx(2 * 0.21, abs=0.02)


@pytest.mark.slow
def test_a_rate_that_an_architecture_has_by_itself_is_off(timm, tmp_path):
    """Swin's stochastic depth is 0.1 unless another rate is given."""
    arguments = {"img_size": 32, "window_size": 4, "embed_dim": 16}
    arguments |= {"depths": [1, 1], "num_heads": [2, 2]}
    stored(tmp_path, timm, "swin_tiny_patch4_window7_224", arguments)
    encoder = dlc.load_encoder("timm:swin_tiny_patch4_window7_224", tmp_path, dropout=0.5)
    images = jnp.repeat(images_of(32, 1), NUM, 0)
    found, _ = trained_output(encoder, images)
    plain = np.asarray(encoder.apply_head(encoder.params, images))
    kept = found != 0
    assert abs(kept.mean() - 0.5) < 0.05
    np.testing.assert_allclose(found[kept], 2 * plain[kept], rtol=1e-4, atol=1e-5)


def called_in_training(run):
    """Returns what a module gives for ones [2, 6, 4, 4] with a key."""
    from torch import nn

    converted = Converted(nn.Identity(), "net")
    images, real = jnp.ones((2, 6, 4, 4)), jnp.ones(2)
    output, _ = converted.call(run, {}, images, real=real, key=jax.random.PRNGKey(0))
    return output


@pytest.mark.parametrize("name", ["dropout2d", "alpha_dropout"])
def test_dropout_of_other_kinds_is_refused(name):
    """It would draw from torchax's own key, the same in every step."""
    from torch.nn import functional

    says = rf"net: draws random numbers \({name}\) in training, expected bernoulli_, dropout, rand"
    with pytest.raises(dlc.InputError, match=says):
        called_in_training(lambda _, x: getattr(functional, name)(x, 0.5, True))
    off = called_in_training(lambda _, x: getattr(functional, name)(x, 0.5, False))
    np.testing.assert_array_equal(off, np.ones((2, 6, 4, 4)))


def test_bernoulli_in_place_is_seen_by_who_holds_the_tensor():
    def run(_, x):
        kept = x.new_empty(x.shape)
        kept.bernoulli_(0.5)
        return x * kept

    output = called_in_training(run)
    assert set(np.unique(output)) == {0, 1}


def test_the_plan_of_fine_tuning_counts_what_is_drawn(timm, tmp_path):
    settings = FinetuneConfig(batch_size=8)
    plain, dropped = (
        ImageFinetuning(vit(tmp_path, timm, **rates), 32, 3, settings, 1).arguments()[0]
        for rates in ({}, {"drop_path": 0.5})
    )
    assert RANDOM_KEY not in plain.statistics
    assert dropped.statistics[RANDOM_KEY].shape == (2,)


def test_padding_changes_no_draw(timm, tmp_path):
    encoder = vit(tmp_path, timm, dropout=0.3, drop_path=0.5)
    images, real = images_of(32, 8), jnp.asarray([1.0] * 6 + [0.0] * 2)
    found, _ = trained_output(encoder, images, real=real)
    other, _ = trained_output(encoder, images.at[6:].set(0.5), real=real)
    np.testing.assert_array_equal(found[:6], other[:6])


def test_without_a_rate_nothing_is_drawn_and_with_one_evaluation_is_the_same(timm, tmp_path):
    plain = vit(tmp_path, timm, STATED)
    images = images_of(32)
    output, params = jax.jit(plain.apply_training)(plain.params, images, jnp.ones(3))
    evaluated = np.asarray(jax.jit(plain.apply_head)(plain.params, images))
    np.testing.assert_array_equal(output, evaluated)
    assert params.keys() == plain.params.keys()
    asked = vit(tmp_path, timm, STATED, dropout=0.5, drop_path=0.5)
    assert asked.fingerprint == plain.fingerprint  # scores depend on neither
    np.testing.assert_array_equal(jax.jit(asked.apply_head)(asked.params, images), evaluated)
    with_key = {**asked.params, RANDOM_KEY: jax.random.PRNGKey(0)}
    np.testing.assert_array_equal(jax.jit(asked.apply_head)(with_key, images), evaluated)


def weights_of(result):
    return {key: np.asarray(leaf) for key, leaf in result.weights["encoder"].items()}


@pytest.mark.slow
def test_the_seed_decides_a_run_and_a_stopped_one_goes_on(timm, tmp_path, small_sample):
    encoder = vit(tmp_path, timm, dropout=0.2, drop_path=0.2)
    plain = dataclasses.replace(encoder, dropout=0.0, drop_path=0.0)

    def run(encoder=encoder, seed=1, **arguments):
        return dlc.finetune(encoder, small_sample, **FAST, seed=seed, **arguments)

    whole = weights_of(run())
    other = weights_of(run(seed=2))
    undropped = weights_of(run(plain))
    assert RANDOM_KEY not in undropped
    assert (whole[RANDOM_KEY] != other[RANDOM_KEY]).any()
    name = "blocks.1.mlp.fc2.weight"
    assert np.abs(whole[name] - undropped[name]).max() > 1e-4
    with power_cut(epoch=3):
        run(folder=tmp_path / "run")
    resumed = weights_of(run(folder=tmp_path / "run"))
    for key, leaf in whole.items():
        np.testing.assert_array_equal(resumed[key], leaf)
    with pytest.raises(ValueError, match="holds a run with other"):
        run(plain, folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "arguments", "rates", "says"),
    [
        ("test_vit", TWO_BLOCKS, {"drop_path": 1.0}, r"encoder\.drop_path: must be < 1, got 1.0"),
        ("test_vit", TWO_BLOCKS, {"dropout": -0.1}, r"encoder\.dropout: must be >= 0, got -0.1"),
        ("test_vit", {**TWO_BLOCKS, "depth": 1}, {"drop_path": 0.1}, r"drop_path: \S+ has none"),
        (
            "resnetv2_50",
            None,
            {"drop_path": 0.1, "dropout": 2},
            r"encoder\.dropout: must be < 1, got 2",
        ),
        ("vgg11", None, {"drop_path": 0.1}, r"encoder\.drop_path: timm:vgg11 cannot be built with"),
    ],
)
def test_rates_that_cannot_be_are_refused(timm, tmp_path, name, arguments, rates, says):
    if arguments is None:
        (tmp_path / "config.json").write_text("{}")
        from safetensors.numpy import save_file

        save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    else:
        stored(tmp_path, timm, name, arguments)
    with pytest.raises(dlc.InputError, match=says):
        dlc.load_encoder(f"timm:{name}", tmp_path, **rates)


@pytest.mark.parametrize("rate", ["drop_path", "dropout"])
def test_rates_are_of_converted_networks(rate):
    says = rf"encoder\.{rate}: the hand-written resnet18 has none; expected .* 'timm:resnet18'"
    with pytest.raises(dlc.InputError, match=says):
        dlc.load_encoder("resnet18", "demo:resnet18", **{rate: 0.1})
    data = {"train": "demo:caltech15/train", "test": "demo:caltech15/test"}
    encoder = {"name": "resnet18", "weights": "demo:resnet18", rate: 0.1}
    with pytest.raises(dlc.InputError, match=says):
        Config.of({"dataset": data, "encoder": encoder})
    data = {"train": "demo:dolly/train"}
    encoder = {"name": "decoder", "weights": "demo:tiny-llama", rate: 0.1}
    with pytest.raises(
        dlc.InputError, match=rf"encoder\.{rate}: (that of|LoRA of) language models"
    ):
        Config.of({"dataset": data, "encoder": encoder, "stages": ("score",)})


@pytest.mark.long
def test_batch_norm_networks_are_trained_in_bfloat16(timm, tmp_path, small_sample):
    stored(tmp_path, timm, "test_efficientnet", {})
    encoder = dlc.load_encoder("timm:test_efficientnet", tmp_path)
    exact, coarse = (
        dlc.finetune(encoder, small_sample, settings=FinetuneConfig(dtype=dtype), **FAST)
        for dtype in ("float32", "bfloat16")
    )
    losses = [[line["train_loss"] for line in run.history] for run in (exact, coarse)]
    assert losses[1][-1] < losses[1][0]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.05)
    statistics = [name for name in encoder.statistics if "running" in name]
    assert statistics
    for name in statistics:
        leaf, start = coarse.weights["encoder"][name], encoder.params[name]
        assert leaf.dtype == np.float32
        assert np.abs(leaf - start).max() > 1e-3
        # more than a bfloat16 holds
        assert (np.asarray(leaf.astype(jnp.bfloat16), np.float32) != np.asarray(leaf)).any()


def test_a_head_alone_has_no_dropout(timm, tmp_path, small_sample):
    encoder = vit(tmp_path, timm, dropout=0.5)
    settings = FinetuneConfig(linear_probe=True)
    with pytest.raises(dlc.InputError, match=r"linear_probe: trains the head alone.*dropout 0\.5"):
        dlc.finetune(encoder, small_sample, image_size=32, settings=settings)
