"""A model over eight devices gives what one gives, and takes what the plan says."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

import dlc_jax
from dlc_jax.distributed import make_mesh, partition
from dlc_jax.encoders.decoder import Architecture
from dlc_jax.encoders.language_model import read_config, stored_names
from dlc_jax.planning.decoder_memory import weight_bytes
from dlc_jax.types import by_path

EIGHT = "--xla_force_host_platform_device_count=8"
# XLA's default order for CPUs is the one with most parallelism: it gathers all weights first
AS_ON_GPU = f"{EIGHT} --xla_cpu_enable_concurrency_optimized_scheduler=false"


SIZES = {
    "model_type": "mistral",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SIZES))
    config = read_config(folder)
    leaves = by_path(Architecture(config, "float32").abstract_params())
    generator = np.random.default_rng(0)
    tensors = {}
    for path, (name, _) in stored_names(config, leaves).items():
        shape = leaves[path].shape
        shape = shape[::-1] if path.endswith("kernel") else shape
        tensors[name] = generator.normal(size=shape).astype(np.float32) / max(shape) ** 0.5
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """What `sharded_run.py` measured."""
    return measured(folder, tmp_path_factory.mktemp("found"))


def measured(folder, place):
    out = place / "found.json"
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, ROOT / "tests/distributed/sharded_run.py", folder, out],
        env=os.environ | {"XLA_FLAGS": AS_ON_GPU, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()) | {"merged": place / "merged"}


@pytest.mark.long
def test_a_converted_model_over_four_devices_gives_what_one_gives(timm, tmp_path):
    import transformers

    sizes = {k: v for k, v in SIZES.items() if k not in ("model_type", "sliding_window")}
    config = transformers.Phi3Config(**sizes, pad_token_id=0)
    folder = tmp_path / "model"
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    found = measured(folder, tmp_path)
    one, many = found["one"], found["many"]
    assert many["fingerprint"] == one["fingerprint"]
    (whole, *none), parts = one["held"], many["held"][:4]
    assert not any(none)
    assert max(parts) == min(parts) < whole / 3.9
    for what in ("losses", "probes"):
        np.testing.assert_allclose(many[what], one[what], rtol=1e-5)
    for what in ("lora_a", "lora_b"):
        moved, expected = np.array(many[what]), np.array(one[what])
        assert np.linalg.norm(expected) > 0
        assert np.linalg.norm(moved - expected) <= 1e-5 * np.linalg.norm(expected)
    written, expected = (
        load_file(place / "model.safetensors") for place in (found["merged"], folder)
    )
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


@pytest.mark.slow
def test_every_device_holds_what_the_plan_says(folder, found):
    architecture = Architecture(read_config(folder), "float32")
    assert found["held"] == [weight_bytes(architecture, 8)] * 8
    assert found["held"][0] < found["weights"] / 7.9


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora_a", "lora_b"])
def test_eight_devices_move_an_adapter_as_one_does(found, what):
    one, many = (np.array(found[name][what]) for name in ("one", "many"))
    assert np.linalg.norm(one) > 0
    assert np.linalg.norm(many - one) <= 1e-4 * np.linalg.norm(one)


@pytest.mark.slow
def test_a_model_over_eight_devices_is_written_whole(folder, found):
    written = load_file(found["merged"] / "model.safetensors")
    expected = load_file(folder / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["losses", "probes"])
@pytest.mark.parametrize("sharded", ["many", "two times four"])
def test_eight_devices_give_what_one_gives(found, sharded, what):
    one, many = (np.array(found[name][what]) for name in ("one", sharded))
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
    assert np.abs(one).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("job", ["probe", "again", "kept"])
def test_compiled_programs_take_less_than_planned(found, job):
    taken, planned = found["compiled"][job], found["planned"][job]["total"]
    print(f"{job}: {taken:,} of {planned:,} bytes, ratio {planned / taken:.2f}")
    assert taken <= planned <= 3 * taken


@pytest.mark.slow
def test_no_device_ever_has_all_weights(found):
    assert found["compiled"]["probe"] < found["weights"]
    assert found["compiled"]["again"] < found["weights"]


@pytest.mark.slow
def test_a_gradient_gathers_one_block_after_the_other(found):
    """Whether it keeps activations or not."""
    parts = found["planned"]
    assert parts["kept"]["gathered weights of a block"] < found["weights"] / 6
    activations = parts["kept"]["activations kept"] - parts["again"]["activations kept"]
    more = found["compiled"]["kept"] - found["compiled"]["again"]
    print(f"{more:,} bytes more to keep activations, {activations:,} planned")
    assert 0 < more < activations


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("blocks/0/mlp/gate_proj/kernel", (4096, 14336), (None, "fsdp")),
        ("blocks/0/attn/q_proj/kernel", (4096, 4096), ("fsdp", None)),
        ("blocks/0/attn/k_proj/kernel", (4100, 1024), (None, "fsdp")),
        ("blocks/0/attn/k_proj/kernel", (4100, 1023), ()),
        ("embedding/embedding", (128256, 4096), ("fsdp", None)),
        ("head/kernel", (4096, 128256), (None, "fsdp")),
        ("norm/scale", (4096,), ()),
        ("blocks/31/mlp_norm_after/scale", (4096,), ()),
        ("blocks/0/mlp/gate_proj/lora_b", (8, 14336), ()),
    ],
)
def test_where_parameters_lie(path, shape, expected):
    assert tuple(partition(path, shape, 8)) == expected


def test_a_product_that_is_not_the_number_of_devices():
    with pytest.raises(dlc_jax.expect.InputError, match=r"64 devices, 1 of kind cpu are there"):
        make_mesh(fsdp=64)
    with pytest.raises(dlc_jax.expect.InputError, match=r"mesh.data 3 x .* is 3 devices, 1 "):
        make_mesh(data=3)
