"""Every hand-written network but ResNet against timm's: names, features, gradients, probes."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images, slow_but

import dlc_jax as dlc
from dlc_jax import encoders
from dlc_jax.encoders import ENCODERS, convnext, vit
from dlc_jax.encoders.encoder import normalise
from dlc_jax.encoders.stored_tensors import StoredTensor, misfits, names_of
from dlc_jax.masking import Thresholds, exact_thresholds, masked, prunable_paths
from dlc_jax.probes.kernel import Forward, features_of_batch
from dlc_jax.training.images.step import Network
from dlc_jax.types import by_path

WIDTHS, DEPTHS = (8, 16, 32, 64), (1, 1, 1, 1)
# One name for each set of switches.
DISTINCT = (
    *("convnext_tiny", "convnext_nano", "convnextv2_tiny", "convnextv2_nano"),
    *("vit_large_patch16_224", "vit_small_patch14_dinov2", "vit_giant_patch14_dinov2"),
    *("vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"),
    *("vit_base_patch32_clip_224", "vit_base_patch16_clip_quickgelu_224"),
    *("vit_base_patch16_siglip_224", "vit_base_patch32_siglip_256"),
    "vit_so400m_patch14_siglip_224",
)
FEW = (  # that have most parts of the networks between them
    *("convnextv2_nano", "vit_giant_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"),
)
NEW = (*convnext.SIZES, *(name for name in vit.SIZES if name != "vit_small_patch16_224"))


def timm_model(timm, name: str, **options):
    """A narrow, shallow network of this architecture, with weights that a mistake shows in."""
    import torch

    if name in convnext.SIZES:
        options = {"depths": DEPTHS, "dims": WIDTHS, **options}
    else:
        side = 4 * vit.SIZES[name].patch
        shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": side}
        options = shape | options
    model = timm.create_model(name, num_classes=3, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in model.named_parameters():
        scale = 0.2 if value.ndim == 1 else 1 / value[0].numel() ** 0.5
        centre = float("norm" in key and key.endswith("weight")) + 0.5 * key.endswith("gamma")
        value.data = centre + scale * torch.randn(value.shape, generator=generator)
    return model


def narrow_size(name: str) -> convnext.ConvNeXtSize | vit.ViTSize:
    if name in convnext.SIZES:
        return convnext.SIZES[name]._replace(depths=DEPTHS, widths=WIDTHS)
    size = vit.SIZES[name]
    hidden = size.hidden and int(32 * (size.hidden / size.width))
    return size._replace(width=32, depth=2, num_heads=2, hidden=hidden)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Loads what `timm_model` makes, under its name, by size and options if they are given."""

    def loaded(name: str, model, size=None, **options) -> dlc.Encoder:
        from safetensors.torch import save_file

        size = size or narrow_size(name)
        if name in convnext.SIZES:
            build = functools.partial(encoders._build_convnext, size)
            architecture = ENCODERS[name]._replace(build=build)
        else:
            architecture = encoders._vit(size, "model")
        monkeypatch.setitem(ENCODERS, name, architecture)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        return dlc.load_encoder(name, str(tmp_path), **options)

    return loaded


def side_of(name: str) -> int:
    """ConvNeXt: one that strides do not divide."""
    return 75 if name in convnext.SIZES else 4 * vit.SIZES[name].patch


def pixels_for(encoder: dlc.Encoder, images: np.ndarray) -> jax.Array:
    return normalise(jnp.asarray(images), encoder.mean, encoder.std)


def to_torch(pixels: jax.Array):
    import torch

    return torch.from_numpy(np.asarray(pixels).transpose(0, 3, 1, 2).copy())


def relative(ours, theirs) -> float:
    """The largest difference as a share of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def own_features(encoder: dlc.Encoder, images: np.ndarray) -> np.ndarray:
    forward = Forward.of(encoder, "float32", "own")
    return np.asarray(features_of_batch(forward, encoder.params, images))


@pytest.mark.parametrize("name", slow_but(FEW, DISTINCT))
def test_features_and_gradients_are_timms(timm, load, name):
    import torch

    model = timm_model(timm, name)
    encoder = load(name, model)
    images = random_images(2, side_of(name))
    pixels = pixels_for(encoder, images)
    sequence = model.forward_features(to_torch(pixels))
    features = model.forward_head(sequence, pre_logits=True)
    weights = np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    (features * torch.from_numpy(weights)).sum().backward()
    if encoder.apply_head is not None or encoder.head == "cls":
        ours = jax.jit(encoder.apply)(encoder.params, pixels)
        assert relative(ours, sequence.detach()) <= 1e-5
    assert relative(own_features(encoder, images), features.detach()) <= 1e-5

    apply, pooling = encoder.function_and_pooling("own")

    def objective(params):
        output = apply(params, pixels)
        return ((output[:, 0] if pooling == "cls" else output) * weights).sum()

    ours = by_path(jax.jit(jax.grad(objective))(encoder.params))
    theirs = dict(model.named_parameters())
    for path, stored in names_of(ENCODERS[name].names, ours).items():
        expected = theirs[stored.name].grad.numpy()
        axes = stored.axes_of(expected.ndim, ours[path].ndim)
        expected = expected.transpose(axes) if axes else expected
        expected = expected.reshape(ours[path].shape)
        # keys are moved by their bias alike, so that its gradient is rounding
        floor = 1e-5 * np.linalg.norm(weights)
        error = np.linalg.norm(ours[path] - expected)
        assert error <= 1e-4 * np.linalg.norm(expected) + floor, path


@pytest.mark.parametrize(
    ("name", "changes", "fits"),
    [
        ("convnext_tiny", {"normalises_responses": True}, False),
        ("convnextv2_tiny", {"normalises_responses": False}, False),
        ("vit_base_patch32_clip_224", {"patch": 16}, False),
        ("vit_base_patch32_clip_224", {"norm_before": False}, False),
        ("vit_base_patch32_clip_224", {"epsilon": 1e-3}, True),
        ("vit_base_patch32_clip_224", {"normalisation": vit._HALF}, True),
        ("vit_base_patch16_clip_quickgelu_224", {"activation": "gelu"}, True),
        ("vit_base_patch32_siglip_256", {"activation": "gelu"}, True),
        ("vit_so400m_patch14_siglip_224", {"activation": "gelu_tanh"}, True),
        ("vit_so400m_patch14_siglip_224", {"hidden": None}, False),
        ("vit_so400m_patch14_siglip_224", {"attention_pool": False}, False),
        ("vit_so400m_patch14_siglip_224", {"class_token": True}, False),
        ("vit_giant_patch14_dinov2", {"activation": "gelu"}, False),
        ("vit_small_patch14_dinov2", {"layer_scale": False}, False),
        ("vit_small_patch14_reg4_dinov2", {"registers": 0}, False),
        ("vit_small_patch14_reg4_dinov2", {"only_patches_placed": False}, False),
    ],
)
def test_every_switch_matters(timm, load, name, changes, fits):
    """Without it the checkpoint is refused, or features are others."""
    model = timm_model(timm, name)
    images = random_images(2, side_of(name))
    right = own_features(load(name, model), images)
    changed = narrow_size(name)._replace(**changes)
    if fits:
        assert relative(own_features(load(name, model, changed), images), right) > 1e-4
    else:
        with pytest.raises(dlc.InputError, match="does not fit"):
            load(name, model, changed)


def test_norms_of_queries_and_keys_are_those_of_the_checkpoint(timm, load):
    name = "vit_base_patch16_224"
    plain = own_features(load(name, timm_model(timm, name)), random_images(2, 64))
    model = timm_model(timm, name, qk_norm=True)
    encoder = load(name, model)
    images = random_images(2, 64)
    theirs = model.forward_features(to_torch(pixels_for(encoder, images)))[:, 0]
    assert relative(own_features(encoder, images), theirs.detach()) <= 1e-5
    assert relative(plain, theirs.detach()) > 0.1


def timm_tensors(model) -> dict[str, StoredTensor]:
    state = model.state_dict()
    return {key: StoredTensor(None, key, tuple(value.shape)) for key, value in state.items()}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("convnext_tiny", "vit_base_patch16_siglip_224")
        else pytest.param(name, marks=pytest.mark.long)
        for name in NEW
    ],
)
def test_every_name_is_timms(timm, name):
    """Shapes of all tensors, order of prunable modules, mean and std, size and head."""
    model = timm.create_model(name, device="meta")
    architecture, tensors = ENCODERS[name], timm_tensors(model)
    _, state = encoders._abstract(architecture, tensors)
    leaves = by_path(state.to_pure_dict())
    named = names_of(architecture.names, leaves)
    unused, missing, misshaped = misfits(leaves, named, tensors, architecture.ignored)
    assert (unused, missing, misshaped) == ([], [], {})

    inside = "stages." if name in convnext.SIZES else "blocks."
    kinds = ("Linear", "Conv2d")
    modules = [
        key
        for key, module in model.named_modules()
        if type(module).__name__ in kinds and key.startswith(inside)
    ]
    prunable = prunable_paths(leaves, architecture.is_prunable)
    in_order = sorted(prunable, key=architecture.module_order)
    assert [path.replace("/", ".") for path in in_order] == [f"{key}.kernel" for key in modules]

    stated = model.default_cfg
    assert (architecture.mean, architecture.std) == (stated["mean"], stated["std"])
    if name in vit.SIZES:
        assert architecture.image_size(tensors) == model.patch_embed.img_size[0]
        assert architecture.head == {"token": "cls", "map": "own"}[model.global_pool]


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        pytest.param("convnext_tiny", 224, marks=pytest.mark.long),
        pytest.param("convnextv2_tiny", 160, marks=pytest.mark.long),
        pytest.param("vit_small_patch14_reg4_dinov2", 224, marks=pytest.mark.long),
    ],
)
def test_whole_networks_are_timms(timm, tmp_path, name, image_size):
    from safetensors.torch import save_file

    options = {} if name in convnext.SIZES else {"img_size": image_size}
    if name in convnext.SIZES:
        options = {"depths": convnext.SIZES[name].depths, "dims": convnext.SIZES[name].widths}
    else:
        size = vit.SIZES[name]
        options |= {"embed_dim": size.width, "depth": size.depth, "num_heads": size.num_heads}
    model = timm_model(timm, name, **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = dlc.load_encoder(name, str(tmp_path))
    images = random_images(2, image_size)
    sequence = model.forward_features(to_torch(pixels_for(encoder, images)))
    theirs = model.forward_head(sequence, pre_logits=True).detach()
    assert relative(own_features(encoder, images), theirs) <= 1e-4


def torch_pruned_features(model, images, count: int) -> np.ndarray:
    """By torch's pruning of the modules that the stages or blocks are made of."""
    import torch
    from torch.nn.utils import prune

    pruned = copy.deepcopy(model)
    inside = getattr(pruned, "stages", None) or pruned.blocks
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    weights = [(m, "weight") for m in inside.modules() if isinstance(m, kinds)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=count)
    with torch.no_grad():
        return pruned.forward_head(pruned.forward_features(images), pre_logits=True).numpy()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("convnext_tiny", marks=pytest.mark.slow),
        *("vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"),
    ],
)
def test_masked_probes_are_torchs(timm, load, name):
    """One after the other and side by side."""
    model = timm_model(timm, name)
    encoder = load(name, model)
    pixels = pixels_for(encoder, random_images(2, side_of(name)))
    params, prunable = encoder.params, prunable_paths(encoder.params, encoder.is_prunable)
    num_weights = sum(by_path(params)[path].size for path in prunable)
    counts = np.round(np.array([0.2, 0.5, 0.8]) * num_weights).astype(np.int64)
    thresholds = exact_thresholds(params, prunable, None, counts)
    apply, pooling = encoder.function_and_pooling("own")

    def of_probe(threshold: Thresholds) -> jax.Array:
        output = apply(masked(params, prunable, None, threshold), pixels)
        return output[:, 0] if pooling == "cls" else output

    theirs = [torch_pruned_features(model, to_torch(pixels), int(count)) for count in counts]
    assert relative(theirs[0], theirs[2]) > 0.1
    thresholds = jax.tree.map(jnp.asarray, thresholds)
    for over_probes in (jax.vmap(of_probe), functools.partial(jax.lax.map, of_probe)):
        assert relative(jax.jit(over_probes)(thresholds), theirs) <= 1e-5


@pytest.mark.parametrize(
    ("side", "grid", "num_placed"),
    [(37, 16, 1), (37, 36, 0), (16, 37, 5), (14, 24, 1), (14, 7, 0), (3, 1, 1), (2, 9, 1)],
)
def test_position_embeddings_are_resampled_as_timm_does(timm, side, grid, num_placed):
    import torch
    from timm.layers import resample_abs_pos_embed

    shape = (1, num_placed + side**2, 6)
    positions = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theirs = resample_abs_pos_embed(
        torch.from_numpy(positions), [grid, grid], num_prefix_tokens=num_placed
    )
    ours = vit.resampled(positions, num_placed, grid)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours[:, :num_placed], positions[:, :num_placed])
    assert relative(ours, theirs) <= 4e-6


@pytest.mark.parametrize(
    ("name", "patches"),
    [
        *(("vit_small_patch14_reg4_dinov2", 3), ("vit_base_patch16_siglip_224", 7)),
        pytest.param("vit_small_patch14_dinov2", 3, marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_dinov2", 7, marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_reg4_dinov2", 7, marks=pytest.mark.slow),
        pytest.param("vit_base_patch16_siglip_224", 3, marks=pytest.mark.slow),
    ],
)
def test_other_image_sizes_are_timms(timm, load, name, patches):
    """A checkpoint of 5 x 5 patches in timm's network for another size, by timm's own filter."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    patch = vit.SIZES[name].patch
    trained = timm_model(timm, name, img_size=5 * patch)
    assert load(name, trained).image_size == 5 * patch
    model = timm_model(timm, name, img_size=patches * patch)
    model.load_state_dict(checkpoint_filter_fn(trained.state_dict(), model))
    encoder = load(name, trained, image_size=patches * patch)
    assert encoder.image_size == patches * patch
    images = random_images(2, patches * patch)
    theirs = model.forward_features(to_torch(pixels_for(encoder, images)))
    ours = encoder.apply(encoder.params, pixels_for(encoder, images))
    assert relative(ours, theirs.detach()) <= 1e-5
    with pytest.raises(dlc.InputError, match=r"px only.*load_encoder\(..., image_size"):
        encoder.check_image_size(5 * patch)


def test_image_sizes_that_patches_do_not_fill(timm, load):
    name = "vit_small_patch14_dinov2"
    with pytest.raises(dlc.InputError, match=r"of 14 px do not fill 225 px; .* such as 224"):
        load(name, timm_model(timm, name), image_size=225)
    with pytest.raises(dlc.InputError, match=r"encoder\.image_size: must be >= 8, got 0"):
        load(name, timm_model(timm, name), image_size=0)
    same = load(name, timm_model(timm, name), image_size=56)
    assert same.fingerprint == load(name, timm_model(timm, name)).fingerprint


def test_the_command_loads_at_its_image_size(timm, load, tmp_path):
    from dlc_jax.config import Config
    from dlc_jax.config.sections import EncoderConfig
    from dlc_jax.tasks.images import load_configured

    name = "vit_small_patch14_dinov2"
    load(name, timm_model(timm, name))
    settings = EncoderConfig(name=name, weights=str(tmp_path), image_size=70)
    assert load_configured(Config(encoder=settings)).image_size == 70


@pytest.mark.slow
def test_what_the_networks_own_classifier_reads(timm, load):
    images = random_images(2, 64)
    of_vit = load("vit_base_patch16_224", timm_model(timm, "vit_base_patch16_224"))
    as_cls = dataclasses.replace(of_vit, pooling="cls")
    own = dataclasses.replace(of_vit, pooling="own")
    assert own.fingerprint == as_cls.fingerprint != of_vit.fingerprint
    features = [
        features_of_batch(Forward.of(encoder, "float32"), encoder.params, images)
        for encoder in (as_cls, own)
    ]
    np.testing.assert_array_equal(*features)

    name = "vit_base_patch16_siglip_224"
    pooled = load(name, timm_model(timm, name), pooling="own")
    network = Network.of(pooled, "float32")
    pixels = pixels_for(pooled, images)
    trained, params = pooled.apply_training(pooled.params, pixels, jnp.ones(2))
    assert trained.shape == (2, 32)
    np.testing.assert_array_equal(trained, pooled.apply_head(pooled.params, pixels))
    assert by_path(params).keys() == by_path(pooled.params).keys()
    assert (network.forward.apply, network.forward.pooling) == (pooled.apply_head, "own")
    with pytest.raises(dlc.InputError, match=r"encoder\.pooling of .*valid: mean, scalar, own"):
        load(name, timm_model(timm, name), pooling="cls")


def test_a_head_of_its_own_needs_features():
    encoder = dlc.Encoder({"a": jnp.ones(3)}, lambda params, x: x[:, 0], bool, head="own")
    with pytest.raises(dlc.InputError, match=r"encoder\.head: 'own' needs features \[b, d\]"):
        own_features(encoder, random_images(2, 8))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("convnext_tiny", marks=pytest.mark.long),
        pytest.param("vit_base_patch16_siglip_224", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_moves_every_part(timm, load, name):
    encoder = load(name, timm_model(timm, name))
    images = random_images(12, 64)
    images[::2] //= 4  # one class is darker
    dataset = dlc.array_dataset(images, np.arange(12) % 2)
    settings = {"epochs": 3, "batch_size": 6, "learning_rate": 0.01}
    result = dlc.finetune(encoder, dataset, test=dataset, image_size=64, **settings)
    before, after = by_path(encoder.params), by_path(result.weights["encoder"])
    still = [path for path in before if np.array_equal(before[path], after[path])]
    assert still == []
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
