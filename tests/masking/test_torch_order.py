"""Which of several equally small weights go: torch's order, whatever a tree is laid out like."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import masks_of_path

import dlc_jax as dlc
from dlc_jax.encoders import ENCODERS, resnet, vit
from dlc_jax.encoders.language_model import stored_names
from dlc_jax.encoders.stored_tensors import names_of
from dlc_jax.masking import PathSpec, prunable_paths, weight_importance
from dlc_jax.masking.torch_order import TorchLayout
from dlc_jax.probes.path import learning_path
from dlc_jax.types import Conventions, by_path, path_name

# Torch's names and shapes, in the order of its modules; always the same: each is compiled.
TORCH = {
    "patch_embed.proj.weight": (4, 3, 2, 2),
    "blocks.0.attn.qkv.weight": (9, 3),
    "blocks.0.attn.proj.weight": (3, 3),
    "blocks.2.mlp.fc1.weight": (5, 3),
    "blocks.2.conv.weight": (4, 1, 3, 2),
    "blocks.10.mlp.fc1.weight": (2, 5),
}
ORDER = list(TORCH)


def flax_path(name: str) -> str:
    return (
        name.replace(".proj.weight", ".weight" if "patch" in name else ".proj.weight")
        .replace(".weight", ".kernel")
        .replace(".", "/")
    )


def in_flax(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim == 2:
        return value.T
    moved = value.transpose(2, 3, 1, 0)
    return moved.reshape(-1, moved.shape[-1]) if "patch" in name else moved


def flax_tree(tensors: dict) -> dict:
    """The tensors nested and laid out as in Flax, with numbers of blocks as keys."""
    tree: dict = {}
    for name, value in tensors.items():
        *outer, last = flax_path(name).split("/")
        inner = tree
        for key in outer:
            inner = inner.setdefault(int(key) if key.isdigit() else key, {})
        inner[last] = jax.numpy.asarray(in_flax(name, value))
    return tree


def reference(tensors: dict, counts: np.ndarray) -> list[np.ndarray]:
    """Masks by a stable sort of all weights one after the other, as torch has them."""
    flat = np.abs(np.concatenate([tensors[name].astype(np.float32).ravel() for name in ORDER]))
    order = np.argsort(flat, kind="stable")
    masks = [np.ones(len(flat), bool) for _ in counts]
    for mask, count in zip(masks, counts, strict=True):
        mask[order[:count]] = False
    return masks


def both_doors(tensors: dict) -> list[tuple[dict, tuple[str, ...]]]:
    names = {flax_path(name): name for name in ORDER}
    tree, flat = flax_tree(tensors), {k: jax.numpy.asarray(tensors[k]) for k in sorted(tensors)}
    by_position = ORDER.index
    return [
        (tree, prunable_paths(tree, lambda path: True, lambda path: by_position(names[path]))),
        (flat, prunable_paths(flat, lambda path: True, by_position)),
    ]


def in_torch_order(masks: dict, prunable: tuple[str, ...]) -> np.ndarray:
    moved = []
    for path in prunable:
        mask = masks[path]
        if path == "patch_embed/kernel":
            mask = mask.reshape(2, 2, 3, 4)
        if path.endswith("/kernel"):
            mask = mask.T if mask.ndim == 2 else mask.transpose(3, 2, 0, 1)
        moved.append(mask.ravel())
    return np.concatenate(moved)


@pytest.mark.parametrize(
    "too_many_to_sort",
    [
        pytest.param(1 << 28, id="sorted"),
        pytest.param(0, id="counted", marks=pytest.mark.slow),
    ],
)
@settings(deadline=None, max_examples=6)  # each is a compilation
@given(
    dtype=st.sampled_from(["float16", "bfloat16"]),
    num_values=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_doors_have_the_masks_of_a_stable_sort_in_torch(
    too_many_to_sort, dtype, num_values, seed
):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=num_values).astype(dtype)
    tensors = {name: generator.choice(values, shape) for name, shape in TORCH.items()}
    num = sum(value.size for value in tensors.values())
    counts = np.sort(generator.integers(0, num, 4))
    expected = reference(tensors, counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlc_jax.masking.thresholds.TOO_MANY_TO_SORT", too_many_to_sort)
        for params, prunable in both_doors(tensors):
            found = masks_of_path(params, prunable, None, counts)
            for masks, mask in zip(found, expected, strict=True):
                np.testing.assert_array_equal(in_torch_order(masks, prunable), mask)


def test_both_doors_draw_the_same_random_masks():
    tensors = {name: np.ones(shape, np.float16) for name, shape in TORCH.items()}
    drawn = [
        in_torch_order(weight_importance(params, prunable, "random", 3), prunable)
        for params, prunable in both_doors(tensors)
    ]
    np.testing.assert_array_equal(*drawn)
    assert len(np.unique(drawn[0])) == len(drawn[0])


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (3, 2, 4, 5), (12, 4)])
@pytest.mark.parametrize("path", ["a/kernel", "kernel", "a.weight", "patch_embed/kernel", "scale"])
def test_positions_are_places_in_torchs_layout(path, shape):
    leaf = np.random.default_rng(0).normal(size=shape)
    layout = TorchLayout.of(path, shape)
    positions = np.asarray(layout.positions(leaf))
    assert positions.shape == shape
    np.testing.assert_array_equal(layout.in_torch(leaf).ravel()[positions], leaf)
    np.testing.assert_array_equal(layout.from_torch(layout.in_torch(leaf), leaf), leaf)


def test_layouts_of_torch():
    assert TorchLayout.of("layer1/0/conv1/kernel", (3, 2, 5, 7)).torch_shape == (7, 5, 3, 2)
    assert TorchLayout.of("blocks/0/mlp/fc1/kernel", (5, 7)).torch_shape == (7, 5)
    assert TorchLayout.of("patch_embed/kernel", (588, 8)).torch_shape == (8, 3, 14, 14)
    assert TorchLayout.of("blocks.0.kernel", (5, 7)).torch_shape == (5, 7)


def test_official_masks_do_not_depend_on_the_door():
    generator = np.random.default_rng(0)
    values = generator.normal(size=9).astype(np.float16)
    tensors = {name: generator.choice(values, shape) for name, shape in TORCH.items()}
    names = {flax_path(name): name for name in ORDER}
    tree, flat = flax_tree(tensors), {k: jax.numpy.asarray(tensors[k]) for k in sorted(tensors)}
    found = []
    for params, order in (
        (tree, lambda path: ORDER.index(names[path])),
        (flat, ORDER.index),
    ):
        encoder = dlc.Encoder(params, lambda p, x: x, lambda path: True, module_order=order)
        spec = PathSpec(num_probes=8, step=0.1).for_mode("official")
        path = learning_path(encoder, spec, 0, Conventions.of("official"))
        steps = {name: np.asarray(part) for name, part in path.importance.items()}
        found.append(in_torch_order(steps, path.prunable))
    np.testing.assert_array_equal(*found)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["default", "official"])
def test_both_doors_of_a_real_checkpoint_give_the_same_losses(sample_encoder, small_sample, mode):
    """Half-precision weights: under torch's names and layouts, and as they are here."""
    stored = names_of(resnet.NAMES, by_path(sample_encoder.params))
    paths = {stored.name: path for path, stored in stored.items()}
    flat = {}
    for name, path in paths.items():
        leaf = np.asarray(by_path(sample_encoder.params)[path])
        flat[name] = jax.numpy.asarray(leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf)

    def apply(params, images):
        def leaf_here(path, _):
            value = params[stored[path_name(path)].name]
            return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value

        here = jax.tree_util.tree_map_with_path(leaf_here, sample_encoder.params)
        return sample_encoder.apply(here, images)

    other = dlc.Encoder(
        flat,
        apply,
        lambda name: sample_encoder.is_prunable(paths[name]),
        mean=sample_encoder.mean,
        std=sample_encoder.std,
        module_order=[stored[path].name for path in by_path(sample_encoder.params)].index,
    )
    path = dlc.PathSpec(num_probes=3, placement="midpoint")
    losses = [
        dlc.probe(encoder, small_sample, image_size=32, path=path, mode=mode).losses
        for encoder in (sample_encoder, other)
    ]
    np.testing.assert_allclose(*losses, atol=2e-6)


def test_order_of_vit_modules_with_the_patch_embedding():
    paths = ["blocks/10/mlp/fc1/kernel", "blocks/2/attn/proj/kernel", "blocks/2/attn/qkv/kernel"]
    order = sorted([*paths, "patch_embed/kernel"], key=vit.module_order)
    assert order == ["patch_embed/kernel", *paths[::-1]]


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "resnet50"])
def test_order_of_modules_is_timms(timm, name):
    model = timm.create_model(name, pretrained=False)
    kinds = ("Linear", "Conv2d")
    theirs = [f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ in kinds]
    architecture = ENCODERS[name]
    shapes = nnx.eval_shape(lambda: architecture.build({}))
    params = nnx.to_pure_dict(nnx.split(shapes)[1])
    ours = prunable_paths(params, lambda path: path.endswith("kernel"), architecture.module_order)
    names = names_of(architecture.names, ours)
    assert [names[path].name for path in ours] == theirs[:-1]  # but the classifier


def test_order_of_modules_is_transformers():
    import transformers

    model = dlc.load_language_model("demo:tiny-llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(model.folder).named_modules()
    ours = prunable_paths(model.params, model.is_prunable, model.module_order)
    names = stored_names(model.config, ours)
    linear = [f"{n}.weight" for n, m in theirs if type(m).__name__ == "Linear" and "layers" in n]
    assert [names[path].name for path in ours] == linear
