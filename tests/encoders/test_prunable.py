"""`encoder.prunable`: which weights are masked, by names of the checkpoint."""

import numpy as np
import pytest
from flax import nnx

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.encoders import ENCODERS, resnet, vit
from dlc_jax.encoders.prunable import chosen_weights
from dlc_jax.encoders.stored_tensors import names_of
from dlc_jax.masking import Thresholds, masked, masked_text, prunable_paths
from dlc_jax.probes.path import learning_path
from dlc_jax.types import Conventions, by_path


def load(prunable: str | None) -> dlc.Encoder:
    return dlc.load_encoder("resnet18", "demo:resnet18", prunable=prunable)


def masked_names(encoder: dlc.Encoder) -> list[str]:
    paths = prunable_paths(encoder.params, encoder.is_prunable, encoder.module_order)
    names = names_of(resnet.NAMES, paths)
    return [names[path].name for path in paths]


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        ("conv1.weight", ["conv1.weight"]),
        (
            "layer4.*",
            [
                "layer4.0.conv1.weight",
                "layer4.0.conv2.weight",
                "layer4.0.downsample.0.weight",
                "layer4.1.conv1.weight",
                "layer4.1.conv2.weight",
            ],
        ),
        (
            "*.downsample.*, conv1.*",
            ["conv1.weight", *(f"layer{stage}.0.downsample.0.weight" for stage in (2, 3, 4))],
        ),
        (
            "layer[12].?.conv2.weight",
            [f"layer{n}.{k}.conv2.weight" for n in (1, 2) for k in (0, 1)],
        ),
    ],
)
def test_globs_choose_weights_by_their_names_in_the_checkpoint(globs, names):
    assert masked_names(load(globs)) == names


def test_all_convolutions_are_what_the_rule_of_a_resnet_masks():
    assert masked_names(load("*")) == masked_names(load(None))


@pytest.mark.parametrize("globs", ["layer5.*", "bn1.*", "Layer4.*", "", "layer4.*,", "*.bias"])
def test_globs_that_match_no_weight_are_refused_by_name(globs):
    wrong = globs.split(",")[-1]
    with pytest.raises(dlc.InputError, match=r"encoder\.prunable: ") as caught:
        load(globs)
    assert str(caught.value) == (
        f"encoder.prunable: {wrong!r} matches none of the 20 weights of convolutions and linear "
        "layers of resnet18; expected a glob over their names: conv1.weight, "
        "layer1.0.conv1.weight, layer1.0.conv2.weight, layer1.1.conv1.weight, "
        "layer1.1.conv2.weight, layer2.0.conv1.weight, layer2.0.conv2.weight, "
        "layer2.0.downsample.0.weight, layer2.1.conv1.weight, layer2.1.conv2.weight and 10 more."
    )


def test_what_is_masked_is_in_the_fingerprint_where_it_is_asked_for():
    plain, asked, other = (load(globs).fingerprint for globs in (None, "*", "layer4.*"))
    assert len({plain, asked, other}) == 3
    assert plain == "78c70dd5af94f2300e3ff83374d5f9310eb26a070b100cae69de1c694fb09bbc"


def vit_params() -> dict:
    shapes = nnx.eval_shape(lambda: ENCODERS["vit_small_patch16_224"].build({}))
    return nnx.to_pure_dict(nnx.split(shapes)[1])


def test_globs_over_a_vit():
    kernels = [path for path in by_path(vit_params()) if path.endswith("kernel")]
    names = {path: stored.name for path, stored in names_of(vit.NAMES, kernels).items()}
    is_prunable = chosen_weights("blocks.1?.mlp.*,patch_embed.*", names, "vit")
    found = prunable_paths(vit_params(), is_prunable, vit.module_order)
    blocks = [f"blocks/{n}/mlp/{layer}/kernel" for n in (10, 11) for layer in ("fc1", "fc2")]
    assert found == ("patch_embed/kernel", *blocks)
    assert masked_text(vit_params(), is_prunable) == (
        "4 linear layers (2,359,296 weights) and 1 convolution (294,912 weights) of 150 tensors"
    )


def test_what_is_masked_is_said_by_kind(sample_encoder):
    assert masked_text(sample_encoder.params, sample_encoder.is_prunable) == (
        "20 convolutions (699,696 weights) of 100 tensors"
    )
    encoder = load("layer4.*,layer3.0.conv1.weight")
    assert masked_text(encoder.params, encoder.is_prunable).endswith(", not 14 convolutions")
    assert masked_text(vit_params(), vit.is_prunable) == (
        "48 linear layers (21,233,664 weights) of 150 tensors, not 1 convolution"
    )
    params = {
        "blocks.0.weight": np.ones((3, 2), np.float32),
        "pos_embed": np.ones((1, 2, 2, 3), np.float32),
        "w": np.ones(4, np.float32),
    }
    text = "1 linear layer (6 weights) and 1 other (4 weights) of 3 tensors"
    assert masked_text(params, {"blocks.0.weight", "w"}.__contains__) == text


def test_only_chosen_weights_are_masked():
    encoder = load("layer4.*")
    spec = dlc.PathSpec(num_probes=2, placement="midpoint").for_mode("default")
    path = learning_path(encoder, spec, 0, Conventions.of("default"))
    probe = Thresholds(*(part[1] for part in path.thresholds))
    found = by_path(masked(encoder.params, path.prunable, path.importance, probe))
    gone = {
        name: int(np.sum((np.asarray(found[name]) == 0) & (leaf != 0)))
        for name, leaf in by_path(encoder.params).items()
    }
    assert {name for name, num in gone.items() if num} == set(path.prunable)
    sizes = [by_path(encoder.params)[name].size for name in path.prunable]
    zeros = sum(int(np.sum(np.asarray(found[name]) == 0)) for name in path.prunable)
    assert zeros == round(0.74 * sum(sizes))


def test_setting_is_refused_with_language_models():
    values = {
        "dataset": {"train": "demo:dolly/train"},
        "encoder": {"name": "decoder", "weights": "demo:tiny-llama", "prunable": "model.*"},
        "stages": ("score",),
        "selection": {"methods": ("easiest",)},
    }
    with pytest.raises(dlc.InputError, match=r"encoder\.prunable: all linear layers of a model's"):
        Config.of(values)
