"""Which tensors of a model folder are loaded: those that transformers loads, or none."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import dlc_jax as dlc
from dlc_jax.encoders import stored_tensors
from dlc_jax.encoders.stored_tensors import Stored, headers, misfits, names_of, read_tensors
from dlc_jax.encoders.vit import NAMES as VIT_NAMES
from dlc_jax.exports.peft import write_merged

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = np.arange(1, 20)[None]


@pytest.fixture(scope="module", params=["Llama", "Gemma2"])
def tied(timm, request, tmp_path_factory):
    """A random model on disk whose config.json ties head and embedding."""
    import torch
    import transformers

    torch.manual_seed(0)
    options = {"Llama": {}, "Gemma2": {"query_pre_attn_scalar": 8}}[request.param]
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=True,
        **options,
    )
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tied")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tied, tmp_path):
    return shutil.copytree(tied, tmp_path / "model")


def tensors_of(folder, name="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(folder / name)


def write(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def logits_of(folder):
    model = dlc.load_language_model(str(folder), dtype="float32")
    tokens = jnp.asarray(TOKENS)
    hidden = model.architecture.hidden(model.params, tokens, jnp.ones_like(tokens))
    return model, np.asarray(model.architecture.logits(model.params, hidden))


def torch_logits(folder):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(input_ids=torch.asarray(TOKENS)).logits.numpy()


def assert_as_transformers(folder):
    model, ours = logits_of(folder)
    theirs = torch_logits(folder)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    return model, ours


@pytest.mark.parametrize("stored", ["equal", "other", "no embedding"])
def test_a_stored_head_counts_as_in_transformers(folder, tmp_path, stored):
    tensors, (_, tied_logits) = tensors_of(folder), logits_of(folder)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if stored == "other":
        tensors[HEAD][3:] += 0.5
    if stored == "no embedding":
        del tensors[EMBEDDING]
    write(tensors, folder / "model.safetensors")
    model, logits = assert_as_transformers(folder)
    assert (np.abs(logits - tied_logits).max() > 0.1) == (stored == "other")
    assert model.config.tied == (stored != "other")
    write_merged(model, tmp_path / "merged")
    again, found = assert_as_transformers(tmp_path / "merged")
    np.testing.assert_array_equal(found, logits)
    assert again.fingerprint == model.fingerprint


def test_a_missing_head_or_embedding_is_refused_unless_they_are_tied(folder):
    change(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=f"tensors that are missing: {HEAD}"):
        dlc.load_language_model(str(folder))
    tensors = tensors_of(folder)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    write(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensors that are missing: {EMBEDDING}"):
        dlc.load_language_model(str(folder))


def test_a_head_of_another_shape_is_refused(folder):
    tensors = tensors_of(folder)
    tensors[HEAD] = tensors[EMBEDDING][:-1].clone()
    write(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{HEAD} \(29, 16\), not \(30, 16\)"):
        dlc.load_language_model(str(folder))


def test_the_single_file_is_loaded_where_there_is_an_index_as_well(folder):
    tensors = tensors_of(folder)
    write({name: value + 0.3 for name, value in tensors.items()}, folder / "model-1.safetensors")
    write_index(folder, dict.fromkeys(tensors, "model-1.safetensors"))
    _, expected = assert_as_transformers(folder)
    (folder / "model.safetensors").unlink()
    _, others = assert_as_transformers(folder)
    assert np.abs(others - expected).max() > 0.1


def test_an_index_that_disagrees_with_its_shards_is_refused(folder):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = dict.fromkeys(tensors, "a.safetensors")
    unlisted = {name: file for name, file in names.items() if name != EMBEDDING}
    for weight_map, says in (
        (names | {EMBEDDING: "b.safetensors"}, "shards .* are missing: b.safetensors"),
        (names | {HEAD: "a.safetensors"}, f"a.safetensors: .*they disagree about {HEAD}"),
        (unlisted, f"a.safetensors: .*they disagree about {EMBEDDING}"),
        (names | {EMBEDDING: 3}, "index.json: weight_map.* is 3, expected text"),
        (names | {EMBEDDING: "../model/a.safetensors"}, r"index.json: weight_map.* is '\.\./model"),
        ([*names], "index.json: weight_map is a list of .* expected an object"),
        (7, "index.json: weight_map is 7, expected an object"),
    ):
        write_index(folder, weight_map)
        with pytest.raises(ValueError, match=says):
            dlc.load_language_model(str(folder))


def test_what_transformers_would_load_instead_is_refused(folder):
    change(folder, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match="transformers_weights 'other.safetensors'; expected"):
        dlc.load_language_model(str(folder))
    change(folder, transformers_weights=None)
    dlc.load_language_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds an adapter \(adapter_config.json\) beside a model"
    ):
        dlc.load_language_model(str(folder))


def test_quantised_weights_are_refused_by_tensor_and_type(folder):
    import torch

    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tensors_of(folder)
    for dtype, says in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        write(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name} is {says}; expected F64, F32, F16, BF16"):
            dlc.load_language_model(str(folder))
    change(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"quantization_config: the weights are quantised \(fp8\)"):
        dlc.load_language_model(str(folder))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers: must be <= 256, got 1000000000"),
        ("num_hidden_layers", 3, "has num_hidden_layers 3, the weights have 2|validate_layer_type"),
        ("num_hidden_layers", 0, "num_hidden_layers: must be >= 1, got 0"),
        ("num_hidden_layers", "2", "num_hidden_layers: expected an integer, got '2'"),
        ("vocab_size", 10**12, "vocab_size: must be <= 16777216"),
        ("vocab_size", 31, rf"{EMBEDDING} \(30, 16\), not \(31, 16\)"),
        ("vocab_size", float("inf"), "vocab_size: expected an integer, got inf"),
        ("hidden_size", 10**9, "hidden_size: must be <= 16777216"),
        ("hidden_size", 2**24, rf"{EMBEDDING} \(30, 16\), not \(30, 16777216\)"),
        ("intermediate_size", 2**24, r"up_proj.weight \(24, 16\), not \(16777216, 16\)"),
        ("intermediate_size", [24], r"intermediate_size: expected an integer, got \[24\]"),
        ("num_attention_heads", -2, "num_attention_heads: must be >= 1, got -2"),
        ("num_key_value_heads", 10**10, "num_key_value_heads: must be <="),
        ("head_dim", 8.5, "head_dim: expected an integer, got 8.5"),
        ("hidden_size", None, "config.json: .*'hidden_size': .*(int|None)"),
    ],
)
def test_sizes_are_bounded_before_anything_is_allocated(folder, name, value, says):
    change(folder, **{name: value})
    with pytest.raises(ValueError, match=says):
        dlc.load_language_model(str(folder))


def test_a_prefix_of_all_names_is_shown(folder):
    tensors = {f"module.{name}": tensor for name, tensor in tensors_of(folder).items()}
    write(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weights have 0; its tensors are module\.model\."):
        dlc.load_language_model(str(folder))


def test_a_configuration_that_is_no_object_is_refused(folder):
    for content, says in (("[1]", "expected a JSON object"), ("[" * 100_000, "not valid JSON")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config.json: {says}"):
            dlc.load_language_model(str(folder))


@pytest.mark.parametrize("width", [27, 12])  # with 27 both orders of axes fit
@pytest.mark.parametrize("is_convolution", [True, False])
def test_patches_are_embedded_by_a_convolution_or_by_a_linear_layer(
    tmp_path, width, is_convolution
):
    kernel = np.random.default_rng(0).normal(size=(width, 3, 3, 3)).astype(np.float32)
    in_rows = kernel.transpose(2, 3, 1, 0).reshape(27, width)
    path = tmp_path / "model.safetensors"
    stored = kernel if is_convolution else np.ascontiguousarray(in_rows.T)
    save_file({"patch_embed.proj.weight": stored}, path)
    expected = {"patch_embed/kernel": jax.ShapeDtypeStruct(in_rows.shape, jnp.float32)}
    names, tensors = names_of(VIT_NAMES, expected), headers(path)
    assert misfits(expected, names, tensors) == ([], [], {})
    params, not_finite = read_tensors(expected, names, tensors)
    np.testing.assert_array_equal(params["patch_embed/kernel"], in_rows)
    assert not_finite == []


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    opened, real = [], stored_tensors.opened
    monkeypatch.setattr(stored_tensors, "opened", lambda path: opened.append(path) or real(path))
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for number, path in enumerate(paths):
        save_file({f"{number}.{i}": np.full(2, i, np.float32) for i in range(5)}, path)
    tensors = headers(paths[0]) | headers(paths[1])
    opened.clear()
    expected = {name: jax.ShapeDtypeStruct((2,), jnp.float32) for name in tensors}
    params, _ = read_tensors(expected, {name: Stored(name, ()) for name in tensors}, tensors)
    assert opened == paths
    assert [float(params[f"1.{i}"][0]) for i in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("shape", "here"),
    [((6, 4), (4, 6)), ((6, 4, 1, 1), (4, 6)), ((6, 1, 2, 2), (6, 1, 2, 2)), ((6,), (6,))],
)
def test_a_linear_layer_may_be_stored_as_a_convolution_of_1_by_1(shape, here):
    assert Stored("fc1.weight", stored_tensors.LINEAR).shape_here(shape, 2) == here
