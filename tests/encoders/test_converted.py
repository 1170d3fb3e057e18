"""Networks of timm and transformers as encoders: values of torch, what is masked, refusals."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require_shared, slow_but
from encoder_files import stored

import dlc_jax as dlc
from dlc_jax.encoders import converted
from dlc_jax.encoders.torch_modules import Converted
from dlc_jax.probes.kernel import Forward

# Small enough for every test run: arguments of timm, and the side of the images.
TOKENS = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
SMALL = {
    "resnet10t": ({}, 64),
    "efficientnet_lite0": ({}, 64),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "conv_mlp": False}, 64),
    "vit_small_patch16_224": (TOKENS, 32),
    "swin_tiny_patch4_window7_224": (
        {"depths": (1, 2), "embed_dim": 24, "num_heads": (1, 2), "img_size": 56},
        56,
    ),
    "beit_base_patch16_224": (TOKENS, 32),
    "samvit_base_patch16_224": ({**TOKENS, "img_size": 64, "global_attn_indexes": (1,)}, 64),
}


def images_of(size, num=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num, size, size, 3)), jnp.float32)


def as_torch(images):
    import torch

    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))


def relative(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    "name", slow_but([name for name in SMALL if name != "convnext_atto"], SMALL)
)
def test_features_are_those_of_timm(timm, tmp_path, name):
    import torch

    arguments, size = SMALL[name]
    module = stored(tmp_path, timm, name, arguments)
    encoder = dlc.load_encoder(f"timm:{name}", tmp_path, image_size=size)
    images = images_of(size)
    with torch.no_grad():
        features = module.forward_features(as_torch(images))
        head = module.forward_head(features, pre_logits=True).numpy()
    expected = features.numpy() if features.ndim == 3 else head
    assert relative(jax.jit(encoder.apply)(encoder.params, images), expected) < 1e-5
    assert relative(jax.jit(encoder.apply_head)(encoder.params, images), head) < 1e-5
    assert not any(n.startswith(("head.fc", "fc.", "classifier")) for n in encoder.params)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("efficientnet_lite0", marks=pytest.mark.long),
        pytest.param("vit_small_patch16_224", marks=pytest.mark.slow),
    ],
)
def test_masked_copies_side_by_side_are_those_one_after_another(timm, tmp_path, name):
    arguments, size = SMALL[name]
    stored(tmp_path, timm, name, arguments)
    encoder = dlc.load_encoder(f"timm:{name}", tmp_path, image_size=size)
    dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 10))
    images = dlc.Images(dataset, size=size)
    path = dlc.PathSpec(num_probes=4, step=0.2)
    one, side = (
        dlc.probe(encoder, images, path=path, compute=dlc.Compute(chunk=chunk)).losses
        for chunk in (1, 4)
    )
    np.testing.assert_allclose(one, side, rtol=1e-5)
    assert np.ptp(one, axis=0).max() > 0  # masks matter


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("resnet18", {}, {"convolution": 20}),
        ("vit_small_patch16_224", TOKENS, {"linear layer": 8}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 2), "num_heads": (1, 2)}, None),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "conv_mlp": False}, None),
        ("coatnet_pico_rw_224", {}, {"convolution": 56}),
        ("mixer_s32_224", {}, {"linear layer": 32}),
    ],
)
def test_what_is_masked_follows_one_rule(timm, name, arguments, expected):
    """Stem, embeddings, positions, norms, biases and heads stay, whatever the network is."""
    import torch

    with torch.device("cpu"):
        module = timm.create_model(name, num_classes=0, **arguments)
    sizes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    network = Converted(module, name)
    size = 64 if name in ("resnet18", "convnext_atto") else 224
    size = arguments.get("img_size", size)
    jax.eval_shape(
        lambda images: network.call(converted._timm_head, network.tensors, images),
        jax.ShapeDtypeStruct((1, 3, size, size), jnp.float32),
    )
    found = converted.prunable_layers(network)
    kinds = [network.layers[key] for key in found]
    if expected is not None:
        assert {kind: kinds.count(kind) for kind in set(kinds)} == expected
    elif name.startswith("swin"):
        assert set(kinds) == {"linear layer"}
        assert not any("relative" in key for key in found)
    else:
        assert set(kinds) == {"linear layer", "convolution"}
    if name != "resnet18":
        assert not any(key.startswith(("stem", "head", "patch_embed")) for key in found)
    assert all(len(sizes[key]) > 1 and key.endswith("weight") for key in found)
    assert found == sorted(found, key=list(sizes).index)


@pytest.mark.slow
def test_batch_norms_train_as_in_torch_on_the_real_samples(timm, tmp_path):
    """Padding changes neither gradients nor running statistics; dropout and drop path are off."""
    arguments = {"drop_path_rate": 0.5, "drop_rate": 0.5}
    stored(tmp_path, timm, "efficientnet_lite0", arguments)
    module = timm.create_model("efficientnet_lite0", num_classes=7)
    from safetensors.torch import load_file

    module.load_state_dict(load_file(tmp_path / "model.safetensors"))
    encoder = dlc.load_encoder("timm:efficientnet_lite0", tmp_path)
    images = images_of(64, 6)
    module.train()
    given = as_torch(images)
    features = module.forward_head(module.forward_features(given), pre_logits=True)
    padded = jnp.concatenate([images, images[:2]])
    real = jnp.asarray([1] * 6 + [0] * 2, jnp.float32)
    output, params = jax.jit(encoder.apply_training)(encoder.params, padded, real)
    assert relative(output[:6], features.detach().numpy()) < 1e-4
    moved = module.state_dict()
    for name in encoder.statistics:
        np.testing.assert_allclose(params[name], moved[name].numpy(), rtol=1e-5, atol=1e-6)
        assert (np.asarray(params[name]) != np.asarray(encoder.params[name])).any()
    assert sum(name.endswith("running_var") for name in encoder.statistics) == 49


@pytest.mark.slow
def test_networks_compute_in_bfloat16(timm, tmp_path):
    stored(tmp_path, timm, "efficientnet_lite0", {})
    encoder = dlc.load_encoder("timm:efficientnet_lite0", tmp_path)
    images = images_of(32)
    exact = jax.jit(encoder.apply)(encoder.params, images)
    halves = {
        name: leaf if name in encoder.statistics else leaf.astype(jnp.bfloat16)
        for name, leaf in encoder.params.items()
    }
    found = jax.jit(encoder.apply)(halves, images.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert relative(found.astype(np.float32), exact) < 0.05


@pytest.mark.slow
def test_other_image_sizes_resample_positions_as_timm_does(timm, tmp_path):
    import torch

    module = stored(tmp_path, timm, "vit_small_patch16_224", TOKENS)
    module.set_input_size((48, 48))
    encoder = dlc.load_encoder("timm:vit_small_patch16_224", tmp_path, image_size=48)
    images = images_of(48)
    with torch.no_grad():
        expected = module.forward_features(as_torch(images))
    assert relative(encoder.apply(encoder.params, images), expected.numpy()) < 1e-5
    assert encoder.image_size == 48
    with pytest.raises(ValueError, match="takes images of 48 px only"):
        encoder.check_image_size(32)


def test_config_json_names_the_encoder(timm, tmp_path):
    stored(tmp_path, timm, "resnet10t", {}, pretrained_cfg={"mean": [0.1] * 3, "std": [0.2] * 3})
    encoder = dlc.load_encoder(None, tmp_path)
    assert (encoder.name, encoder.mean, encoder.normalisation) == (
        "timm:resnet10t",
        (0.1, 0.1, 0.1),
        "checkpoint",
    )
    assert dlc.load_encoder(None, "demo:resnet18").name == "resnet18"
    tagged = dlc.load_encoder("timm:resnet10t.c3_in1k", tmp_path)
    assert tagged.name == "timm:resnet10t.c3_in1k"
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"encoder\.name: missing, and no config\.json"):
        dlc.load_encoder(None, tmp_path / "model.safetensors")


def test_another_architecture_of_the_same_shapes_is_refused(timm, tmp_path):
    """tf_efficientnet_lite0 pads otherwise: its features are far off, with no other sign of it."""
    stored(tmp_path, timm, "efficientnet_lite0", {})
    with pytest.raises(ValueError, match=r"names the architecture 'efficientnet_lite0'"):
        dlc.load_encoder("timm:tf_efficientnet_lite0", tmp_path)


def test_fingerprints_tell_functions_apart(timm, tmp_path):
    found = set()
    for name in ("efficientnet_lite0", "tf_efficientnet_lite0"):
        stored(tmp_path, timm, name, {})
        found.add(dlc.load_encoder(f"timm:{name}", tmp_path).fingerprint)
    stored(tmp_path, timm, "efficientnet_lite0", {"act_layer": "silu"})
    found.add(dlc.load_encoder("timm:efficientnet_lite0", tmp_path).fingerprint)
    assert len(found) == 3


@pytest.mark.slow
def test_both_doors_of_a_checkpoint_agree():
    weights = require_shared("encoders/resnet18_tin64")
    dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 15))
    images, path = dlc.Images(dataset, size=32), dlc.PathSpec(num_probes=3)
    losses, masked = [], []
    for name in ("resnet18", "timm:resnet18"):
        encoder = dlc.load_encoder(name, weights, transform="paper")
        losses.append(dlc.probe(encoder, images, path=path).losses)
        leaves = jax.tree_util.tree_leaves_with_path(encoder.params)
        paths = ["/".join(str(getattr(k, "key", k)) for k in path) for path, _ in leaves]
        masked.append(
            sum(x.size for p, (_, x) in zip(paths, leaves, strict=True) if encoder.is_prunable(p))
        )
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-6)
    assert masked[0] == masked[1] == 11_166_912


def unusual(kind):
    """Returns a network that cannot be an encoder, for one reason."""
    import torch
    from torch import nn

    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4, track_running_stats=kind != "batch")
            self.register_buffer("calls", torch.zeros(()))
            self.twice = functools.cache(lambda: 2 * self.layer.bias[:, None, None])

        def forward(self, images):
            x = self.norm(self.layer(images))
            if kind == "cache":
                x = x + self.twice()
            if kind == "random":
                x = x + torch.rand_like(x)
            if kind == "state":
                self.calls.add_(1)
            if kind == "operator":
                x = torch.special.spherical_bessel_j0(x)
            if kind == "data":
                x = x if x.mean() > 0 else -x
            return x.mean((2, 3))

    return Unusual()


def test_what_a_network_caches_does_not_outlive_a_trace():
    """LeViT's biases: a cached tensor of one program is of no use in the next."""
    import torch
    from torch import nn

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 4)
            self.cache = {}

        def forward(self, images):
            if "weight" not in self.cache:
                self.cache["weight"] = 2 * self.layer.weight
            if not hasattr(self, "seen"):
                self.seen = self.cache["weight"] + 1
            return images.flatten(1) @ self.seen.T

    torch.manual_seed(0)
    module = Caching()
    network = Converted(module, "caching")
    images = images_of(2)
    kernel = network.tensors["layer.weight"]
    for times in (1, 3):
        tensors = {**network.tensors, "layer.weight": times * kernel}
        call = jax.jit(lambda t, x: network.call(lambda m, x: m(x), t, x)[0])
        found = call(tensors, jnp.moveaxis(images, -1, 1))
        expected = images.transpose(0, 3, 1, 2).reshape(3, -1) @ (2 * times * kernel + 1).T
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not module.cache
    assert not hasattr(module, "seen")


VIT_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT_SIZES |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
SWIN_SIZES = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}


@pytest.mark.parametrize(
    ("kind", "settings", "part", "prepared"),
    [
        ("ViTForImageClassification", VIT_SIZES, "vit", (32, 32, "bilinear")),
        ("DINOv3ViTModel", VIT_SIZES, None, (32, 32, "bilinear")),  # caches positions by itself
        (
            "CLIPModel",
            {"vision_config": VIT_SIZES, "text_config": {"hidden_size": 32, "vocab_size": 9}},
            "vision_model",
            (32, 32, "bicubic"),
        ),
        (
            "SwinModel",
            {**SWIN_SIZES, "depths": [1, 1], "num_heads": [2, 4]},
            None,
            (32, 32, "bilinear"),
        ),
    ],
)
def test_vision_models_of_transformers(timm, tmp_path, kind, settings, part, prepared):
    """Stored as whole models, without an image processor: that of the class prepares images."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)
    module = model(model.config_class(**settings)).eval()
    module.save_pretrained(tmp_path)
    encoder = dlc.load_encoder(f"hf:{tmp_path}")
    transform = encoder.transform
    assert (transform.size, transform.scaled, transform.interpolation) == prepared
    if kind == "CLIPModel":
        assert encoder.mean == (0.48145466, 0.4578275, 0.40821073)
    images = images_of(32)
    own = getattr(module, part) if part else module
    with torch.no_grad():
        expected = own(pixel_values=as_torch(images)).last_hidden_state.numpy()
    for _ in range(2):  # two programs
        found = jax.jit(lambda params, x: encoder.apply(params, x))(encoder.params, images)
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("random", r"draws random numbers \(rand_like\)"),
        ("state", "changes calls in evaluation mode"),
        (
            "operator",
            r"torchax has no operator .*spherical_bessel_j0.*another variant.*dlc\.Encoder",
        ),
        ("batch", "normalises over the batch in evaluation mode"),
        ("data", "cannot be converted"),
        ("cache", "keeps what it computed for its next call"),
    ],
)
def test_networks_that_are_no_function_of_an_image_are_refused(kind, says):
    run = lambda module, images: module(images)  # noqa: E731
    built = converted.Built(unusual(kind), run, run, 16, True, (0.5,) * 3, (0.5,) * 3, "")
    with pytest.raises(dlc.InputError, match=rf"(?s)timm:unusual: .*{says}"):
        converted.converted_encoder("timm:unusual", built)


@pytest.mark.parametrize(
    ("side", "arguments"),
    [
        (8, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (2, {"kernel_size": 3, "padding": 1}),  # maps smaller than the kernel
        (9, {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2), "bias": False}),
        (8, {"kernel_size": 3, "groups": 2}),
        (9, {"kernel_size": 5, "stride": 2, "padding": 1, "groups": 6}),
        (8, {"kernel_size": 4, "groups": 6}),
        (8, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    ],
)
def test_convolutions_are_torchs(side, arguments):
    import torch
    from torch import nn

    module = nn.Conv2d(6, 6, **arguments)
    images = np.random.default_rng(0).normal(size=(2, 6, side, side)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    network = Converted(module, "convolution")
    found, _ = network.call(lambda module, x: module(x), network.tensors, jnp.asarray(images))
    assert found.shape == expected.shape
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("side", [2, 8])
def test_convolutions_in_loops_have_channels_last_and_are_not_turned_round(side):
    """Others take XLA for CPUs 20 to 70 times longer."""
    from torch import nn

    network = Converted(nn.Conv2d(8, 8, 3, padding=1), "convolution")
    run = lambda x: network.call(lambda module, x: module(x), network.tensors, x)[0]  # noqa: E731
    rows = jnp.ones((3, 2, 8, side, side))
    program = jax.jit(lambda rows: jax.lax.map(run, rows)).lower(rows).compile().as_text()
    assert program.count("dim_labels=b01f_01io->b01f") == program.count(" convolution(") == 1


def test_functions_with_a_rule_of_our_own_are_torchs():
    import torch
    from torch import nn
    from torch.nn import functional

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, images):
            patches = functional.unfold(images, (2, 2), padding=1, stride=2).transpose(1, 2)
            x = functional.linear(patches, bias=self.layer.bias, weight=self.layer.weight)
            x = functional.fold(x.transpose(1, 2), (8, 8), (2, 2), padding=1, stride=2)
            return functional.interpolate(x, size=(5, 11), mode="bicubic", antialias=True)

    module = Own().eval()
    images = images_of(8)
    with torch.no_grad():
        expected = module(as_torch(images)).numpy()
    network = Converted(module, "own")
    found, _ = network.call(
        lambda module, x: module(x), network.tensors, images.transpose(0, 3, 1, 2)
    )
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("missing", ["torch", "torchax", "timm"])
def test_a_missing_library_is_named_with_what_installs_it(timm, tmp_path, monkeypatch, missing):
    from dlc_jax.encoders import torch_modules

    stored(tmp_path, timm, "resnet10t", {})
    torch_modules.environment.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(dlc.InputError, match=rf"needs {missing} .*pip install 'dlc_jax\[any\]'"):
        dlc.load_encoder("timm:resnet10t", tmp_path)


def test_names_and_checkpoints_that_do_not_fit_are_refused(timm, tmp_path):
    from safetensors.numpy import load_file, save_file

    with pytest.raises(dlc.InputError, match=r"encoder\.name: .*'timm:resnet19'.*resnet18"):
        dlc.load_encoder("timm:resnet19", "demo:resnet18")
    stored(tmp_path, timm, "resnet10t", {})
    tensors = load_file(tmp_path / "model.safetensors")
    kept = dict(tensors)
    kept["conv1.0.weight"] = kept["conv1.0.weight"][:3]
    del kept["layer1.0.bn1.bias"]
    kept["extra.weight"] = np.zeros(2, np.float32)
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(dlc.InputError) as caught:
        dlc.load_encoder("timm:resnet10t", tmp_path)
    for says in (
        "does not fit",
        "extra.weight",
        "layer1.0.bn1.bias",
        "conv1.0.weight (3, 3, 3, 3)",
    ):
        assert says in str(caught.value)
    tensors["bn1.weight"][0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(dlc.InputError, match=r"bn1\.weight has values that are NaN"):
        dlc.load_encoder("timm:resnet10t", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", "timm/resnet18.a1_in1k"), ("resnet18.tv_in1k", "timm/resnet18.tv_in1k")],
)
def test_timms_own_weights_are_on_the_hub(timm, name, expected):
    assert converted.hub_id(f"timm:{name}") == expected


def test_an_architecture_without_weights_asks_for_some(timm):
    name = next(m for m in timm.list_models() if not timm.get_pretrained_cfg(m).hf_hub_id)
    with pytest.raises(dlc.InputError, match=r"encoder\.weights: missing; timm has no weights"):
        dlc.load_encoder(f"timm:{name}")


def test_a_prefix_of_all_names_is_left_out(timm, tmp_path):
    from safetensors.numpy import load_file, save_file

    stored(tmp_path, timm, "resnet10t", {})
    tensors = load_file(tmp_path / "model.safetensors")
    plain = dlc.load_encoder("timm:resnet10t", tmp_path)
    save_file({f"module.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    wrapped = dlc.load_encoder("timm:resnet10t", tmp_path)
    assert (wrapped.prefix, wrapped.fingerprint) == ("module.", plain.fingerprint)


@pytest.mark.slow
def test_pooling_is_of_tokens(timm, tmp_path):
    stored(tmp_path, timm, "resnet10t", {})
    with pytest.raises(dlc.InputError, match=r"encoder\.pooling of timm:resnet10t.*'cls'"):
        dlc.load_encoder("timm:resnet10t", tmp_path, pooling="cls")
    stored(tmp_path, timm, "vit_small_patch16_224", TOKENS)
    encoder = dlc.load_encoder("timm:vit_small_patch16_224", tmp_path, pooling="own", image_size=32)
    images = images_of(32)
    normalised = ((images - images.min()) * 20).astype(np.uint8)
    own, cls = (
        Forward.of(dataclasses.replace(encoder, pooling=pooling), "float32")
        for pooling in ("own", "cls")
    )
    np.testing.assert_allclose(
        own(encoder.params, normalised), cls(encoder.params, normalised), rtol=1e-5, atol=1e-6
    )
