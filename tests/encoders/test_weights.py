import json
import shutil
from importlib import resources

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dlc_jax as dlc

SAMPLE = resources.files("dlc_jax.datasets") / "sample"


@pytest.fixture
def tensors():
    return load_file(str(SAMPLE / "model.safetensors"))


def load(tmp_path, tensors, name="resnet18") -> dlc.Encoder:
    save_file(tensors, tmp_path / "model.safetensors")
    return dlc.load_encoder(name, str(tmp_path))


def test_folder_and_file_and_bundled_are_the_same(tmp_path, tensors, sample_encoder):
    from_folder = load(tmp_path, tensors)
    shutil.copy(str(SAMPLE / "config.json"), tmp_path)
    from_file = dlc.load_encoder("resnet18", str(tmp_path / "model.safetensors"))
    assert from_file.normalisation == "checkpoint"
    assert from_folder.normalisation == "architecture"
    assert from_file.fingerprint == from_folder.fingerprint == sample_encoder.fingerprint


def test_bfloat16_checkpoints_are_read(tmp_path, tensors):
    from safetensors.flax import save_file as save_bfloat16

    values = {k: np.asarray(v, ml_dtypes.bfloat16) for k, v in tensors.items()}
    import jax.numpy as jnp

    save_bfloat16({k: jnp.asarray(v) for k, v in values.items()}, tmp_path / "model.safetensors")
    encoder = dlc.load_encoder("resnet18", str(tmp_path))
    kernel = encoder.params["conv1"]["kernel"]
    assert kernel.dtype == np.float32
    expected = values["conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "expected a JSON object, found list"),
        ({"pretrained_cfg": [0.5]}, "pretrained_cfg is a list of 1 values, expected an object"),
        ({"pretrained_cfg": {"mean": 0.5, "std": 1}}, "mean is 0.5, expected a list"),
        ({"mean": ["a"], "std": [1]}, r"mean\[0\] is 'a', expected a number"),
        ({"architecture": 5}, "architecture is 5, expected text"),
    ],
)
def test_a_configuration_of_another_shape_is_refused_by_field(tmp_path, tensors, config, says):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(dlc.InputError, match=rf"config\.json: .*{says}"):
        load(tmp_path, tensors)


def test_every_problem_is_listed_in_one_error(tmp_path, tensors):
    tensors["layer1.0.extra.weight"] = np.zeros(3, np.float32)
    tensors["layer2.0.bn1.weight"] = np.zeros(7, np.float32)
    del tensors["layer4.1.conv2.weight"]
    tensors["bn1.bias"] = np.full(16, np.nan, np.float32)
    with pytest.raises(ValueError, match="does not fit 'resnet18'") as caught:
        load(tmp_path, tensors)
    for part in (
        "no place for: layer1.0.extra.weight",
        "layer2.0.bn1.weight (7,) instead of (32,)",
        "without an entry: layer4/1/conv2/kernel",
        "NaN or infinite values: bn1.bias",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "vit_small_patch16_224"])
def test_a_checkpoint_of_another_architecture_is_refused(name):
    with pytest.raises(ValueError, match=r"config.json of 'demo:resnet18' names .*'resnet18'"):
        dlc.load_encoder(name, "demo:resnet18")


def test_weights_that_are_nowhere_name_what_was_looked_for(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    for weights, says in (
        ("", "encoder.weights: missing"),
        (str(tmp_path), "holds no model.safetensors.*pytorch_model.bin"),
        (str(tmp_path / "absent.safetensors"), "no file or folder"),
        ("demo:resnet50", "demo:resnet18"),
    ):
        with pytest.raises(ValueError, match=says):
            dlc.load_encoder("resnet18", weights)
    with pytest.raises(ValueError, match=r"Did you mean 'resnet18'"):
        dlc.load_encoder("resnet81", "demo:resnet18")


def test_without_network_the_error_says_what_to_place_where(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model\.safetensors and config\.json of .*/timm/absent"):
        dlc.load_encoder("resnet18", "timm/absent.for_sure")


def test_files_that_are_not_checkpoints(tmp_path, tensors):
    (tmp_path / "model.safetensors").write_bytes(b"PK not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        dlc.load_encoder("resnet18", str(tmp_path))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        dlc.load_encoder("resnet18", str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"pretrained_cfg": {"mean": [0.5], "std": [1]}})
    )
    with pytest.raises(ValueError, match=r"encoder\.mean: expected three"):
        dlc.load_encoder("resnet18", str(tmp_path))


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ([], "expected a JSON object, found list"),
        ({}, "weight_map is missing, expected an object"),
        ({"weight_map": ["a"]}, "weight_map is a list of 1 values, expected an object"),
        ({"weight_map": 5}, "weight_map is 5, expected an object"),
        ({"weight_map": {"a.weight": 1}}, r"weight_map\.a\.weight is 1, expected text like"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"weight_map\.a is '\.\./x"),
    ],
)
def test_an_index_of_shards_of_another_shape_is_refused_by_field(tmp_path, index, says):
    from dlc_jax.encoders.stored_tensors import stored_tensors

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(dlc.InputError, match=rf"index\.json: {says}"):
        stored_tensors(tmp_path)


def test_own_encoders_are_checked():
    params = {"kernel": np.full((3, 2), np.nan, np.float32)}
    with pytest.raises(ValueError, match="parameter kernel has values that are NaN"):
        dlc.Encoder(params, lambda p, x: x, lambda path: True)
    with pytest.raises(ValueError, match="must be positive"):
        dlc.Encoder({}, lambda p, x: x, lambda path: True, std=(1, 0, 1))
    with pytest.raises(ValueError, match="mean, cls, scalar"):
        dlc.Encoder({}, lambda p, x: x, lambda path: True, pooling="max")


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "backbone.", "encoder."),
        *("module._orig_mod.", "state_dict.model.", "model.visual.trunk."),
    ],
)
def test_names_with_a_prefix_are_read_without_it(tmp_path, tensors, sample_encoder, prefix):
    encoder = load(tmp_path, {f"{prefix}{name}": value for name, value in tensors.items()})
    assert encoder.prefix == prefix
    assert encoder.fingerprint == sample_encoder.fingerprint
    assert sample_encoder.prefix == ""


def test_a_classifier_beside_a_prefix_is_ignored_as_without(tmp_path, tensors, sample_encoder):
    prefixed = {f"backbone.{name}": value for name, value in tensors.items()}
    prefixed["fc.weight"] = np.zeros((3, 128), np.float32)
    assert load(tmp_path, prefixed).fingerprint == sample_encoder.fingerprint


def test_a_part_of_an_encoder_is_no_prefix(tmp_path, tensors):
    layer = {name: value for name, value in tensors.items() if name.startswith("layer1.")}
    with pytest.raises(ValueError, match=r"without an entry: bn1/bias, .* and \d+ more$"):
        load(tmp_path, layer)


def test_long_lists_of_names_are_cut_after_ten(tmp_path, tensors):
    odd = {f"a{name}": value for name, value in tensors.items() if "batches" not in name}
    with pytest.raises(ValueError, match=r"no place for: abn1\.bias, .* and 92 more; ") as caught:
        load(tmp_path, odd)
    assert len(str(caught.value)) < 1000
    wrapped = {f"module.{name}": value for name, value in odd.items()}
    with pytest.raises(ValueError, match=r"\(names read without their prefix 'module\.'\)"):
        load(tmp_path, wrapped)


@pytest.mark.slow
def test_prefixes_of_a_vit_at_another_size(timm, tmp_path):
    model = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=0)
    tensors = {f"module.{k}": v.numpy().copy() for k, v in model.state_dict().items()}
    encoder = load(tmp_path, tensors, "vit_small_patch16_224")
    assert (encoder.prefix, encoder.image_size) == ("module.", 64)
