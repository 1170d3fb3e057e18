"""Language models of transformers that are converted from torch, against torch and PEFT."""

import dataclasses
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but
from safetensors.numpy import load_file, save_file

import dlc_jax as dlc
from benchmarks import language_coverage as coverage
from dlc_jax.encoders import torch_checkpoint, torch_decoder, torch_functions
from dlc_jax.encoders.adapter_dropout import StepId
from dlc_jax.encoders.causal_model import TARGETS, Adapter
from dlc_jax.encoders.language_model import door_of
from dlc_jax.evaluation.likelihoods import continuation_log_likelihoods
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.step import Sums, add_rows, initial_adapter, rows_of_step

FAMILIES = ("phi3", "gpt2", "opt")  # fused layers; weights [in, out]; told what tokens see
MORE = {
    "gpt2": pytest.mark.slow,
    "opt": pytest.mark.slow,
    "falcon": pytest.mark.slow,
    **dict.fromkeys(
        ("qwen3", "gemma3_text", "granite", "gpt_neox", "smollm3", "olmo3", "minicpm3"),
        pytest.mark.long,
    ),
}


@pytest.fixture(scope="module")
def stored(timm, tmp_path_factory):
    """Small random models by family: torch's, and its folder; made once."""
    found = {}

    def make(family):
        if family not in found:
            folder = tmp_path_factory.mktemp(family) / "model"
            found[family] = coverage.stored(family, folder), folder
        return found[family]

    return make


def loaded(folder, **options):
    return dlc.load_language_model(str(folder), **{"dtype": "float32", **options})


@pytest.mark.parametrize(
    "family", ["phi3", *(pytest.param(name, marks=mark) for name, mark in MORE.items())]
)
def test_logits_probes_gradients_and_exports_are_those_of_torch(timm, family, tmp_path):
    row = {"name": family, "reason": ""}
    for part in coverage.examine(family, tmp_path):
        row |= part
    assert coverage.verdicts(row) == dict.fromkeys(coverage.PARTS, True), row
    assert len(row["losses"]) == 2


def hidden(model, tokens, segments):
    run = jax.jit(model.architecture.hidden)
    return np.asarray(run(model.params, jnp.asarray(tokens), jnp.asarray(segments)))


@pytest.mark.parametrize("family", slow_but(["phi3"], FAMILIES))
def test_sequences_of_a_row_do_not_see_each_other(stored, family):
    model = loaded(stored(family)[1])
    tokens, _ = coverage.padded_rows()
    alone = [hidden(model, row[None, :9], np.ones((1, 9), int))[0] for row in tokens[:2] + 0]
    shared = np.concatenate([[0, 0], tokens[0, :9], tokens[1, :9], [0]])[None]
    segments = np.repeat([0, 1, 2, 0], [2, 9, 9, 1])[None]
    found = hidden(model, shared, segments)[0]
    for number, expected in enumerate(alone, start=1):
        np.testing.assert_allclose(found[segments[0] == number], expected, atol=2e-5)


@pytest.mark.slow
def test_activations_computed_again_give_the_same_gradient(stored):
    model = loaded(stored("phi3")[1])
    adapter = LoraConfig(rank=2).adapter
    kept = model.architecture.with_adapter(adapter)
    again = dataclasses.replace(kept, rematerialise=True)
    weights = jax.tree.map(lambda leaf: leaf + 0.05, initial_adapter(kept, 0))
    data = coverage.responses(coverage.padded_rows()[0])
    (rows,) = rows_of_step(data, np.arange(2), 2, 32, packing=False)
    found = [
        add_rows(one, model.params, weights, rows, Sums.zero(weights)) for one in (kept, again)
    ]
    for path, gradient in found[0].gradients.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(found[1].gradients[path], gradient, rtol=1e-4, atol=1e-6)
    arrays = map(jnp.asarray, (rows.tokens, rows.segments))
    text = str(jax.make_jaxpr(again.hidden)(model.params | weights, *arrays))
    assert len(re.findall(r"\b(remat2?|checkpoint)\[", text)) == 2  # a block each


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("phi3", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.long),
    ],
)
def test_dropout_is_of_tokens_wherever_their_rows_are(stored, family):
    model = loaded(stored(family)[1])
    architecture = model.architecture.for_training(LoraConfig(rank=2, dropout=0.4).adapter, False)
    weights = jax.tree.map(lambda leaf: leaf + 0.05, initial_adapter(architecture, 0))
    data = coverage.responses(coverage.padded_rows()[0])

    def gradients(**how):
        (rows,) = rows_of_step(data, np.arange(2), 2, 64, **how)
        return add_rows(architecture, model.params, weights, rows, Sums.zero(weights)).gradients

    step = StepId(3, 1, 0)
    found, packed = (gradients(packing=packing, drawing=step) for packing in (False, True))
    plain = gradients(packing=False)
    for path, gradient in found.items():
        np.testing.assert_allclose(packed[path], gradient, rtol=1e-3, atol=1e-5, err_msg=path)
        assert np.abs(plain[path] - gradient).max() > 1e-2 * np.abs(gradient).max(), path


@pytest.mark.slow
def test_half_precision_is_that_of_torch(stored):
    import torch

    original, folder = stored("phi3")
    model = loaded(folder, dtype="bfloat16")
    assert {str(model.params[name].dtype) for name in model.architecture.network.layers} == {
        "bfloat16"
    }
    tokens, is_token = coverage.padded_rows()
    found = jnp.asarray(hidden(model, tokens, is_token.astype(int)))
    logits = model.architecture.logits(model.params, found)
    exact = coverage.torch_logits(original, tokens, is_token)
    half = type(original).from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs = coverage.torch_logits(half, tokens, is_token)
    ours, own = (
        np.linalg.norm((np.asarray(some, np.float32) - exact)[is_token])
        for some in (logits, theirs)
    )
    assert 0 < ours < 1.5 * own


def test_the_door_is_said_with_its_reason(stored, tmp_path):
    _, folder = stored("phi3")
    assert re.search(
        "phi3, computed by transformers' own class, converted from torch, since the decoder here "
        "does not compute it: .*model_type: unknown value 'phi3'",
        loaded(folder).door,
    )
    _, folder = stored("llama")
    assert loaded(folder).door == "llama, computed by the decoder here"
    assert loaded(folder, converted=True).door.endswith("converted from torch, as asked for")
    changed = with_config(folder, tmp_path / "relu", hidden_act="relu")
    model = loaded(changed)
    assert "activation: unknown value 'relu'; valid: silu" in model.door
    assert isinstance(model.architecture, torch_decoder.TorchDecoder)
    assert door_of(changed).sizes == model.config


def with_config(folder, other, **changes):
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    return other


def test_both_doors_give_the_same_losses(stored):
    _, folder = stored("llama")
    data = coverage.responses(coverage.padded_rows()[0])
    ours, converted = (
        dlc.probe_responses(loaded(folder, converted=some), data, num_probes=3)
        for some in (False, True)
    )
    np.testing.assert_array_equal(ours.sparsity, converted.sparsity)
    np.testing.assert_allclose(converted.losses, ours.losses, rtol=2e-6)


def test_what_is_masked_is_every_linear_layer_of_the_blocks(stored):
    for family, names in (
        ("phi3", ["mlp.gate_up_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.qkv_proj"]),
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ):
        layers = loaded(stored(family)[1]).architecture.network.layers
        first = [
            name.partition(".0.")[2].removesuffix(".weight") for name in layers if ".0." in name
        ]
        assert sorted(first) == sorted(names)
        assert len(layers) == 2 * len(names)


def test_fingerprints_are_of_function_and_weights(stored, tmp_path):
    _, folder = stored("gpt2")
    model = loaded(folder)
    assert loaded(folder).fingerprint == model.fingerprint
    assert loaded(folder).architecture is model.architecture  # programs are shared
    coverage.as_version_4(folder, tmp_path / "4")
    assert loaded(tmp_path / "4").fingerprint == model.fingerprint
    other = loaded(with_config(folder, tmp_path / "eps", layer_norm_epsilon=0.1))
    assert other.fingerprint != model.fingerprint
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    changed = tensors | {name: np.nextafter(tensors[name], np.float32(9))}
    assert loaded(with_tensors(folder, tmp_path / "weights", changed)).fingerprint != (
        model.fingerprint
    )
    assert loaded(folder, dtype="bfloat16").fingerprint != model.fingerprint


def with_tensors(folder, other, tensors):
    shutil.copytree(folder, other)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_weights_have_to_fit_exactly(stored, tmp_path):
    _, folder = stored("phi3")
    tensors = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"
    bad = tensors[norm].copy()
    bad[3] = np.nan
    cases = {
        "without a place: model.more.weight": tensors | {"model.more.weight": bad},
        f"missing: {norm}": {k: v for k, v in tensors.items() if k != norm},
        r"another shape: model\.norm\.weight \(3,\), not \(48,\)": tensors
        | {norm: np.ones(3, np.float32)},
        f"not floating-point, as of quantised weights: {norm}": tensors
        | {norm: np.ones(48, np.int8)},
        f"NaN or infinity in float32: {norm}": tensors | {norm: bad},
    }
    for number, (says, some) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=says):
            loaded(with_tensors(folder, tmp_path / str(number), some))


def test_masks_that_old_checkpoints_hold_are_left_out(stored, tmp_path):
    _, folder = stored("gpt2")
    tensors = load_file(folder / "model.safetensors")
    mask = np.tril(np.ones((1, 1, 64, 64), bool))
    old = tensors | {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": mask}
    found = loaded(with_tensors(folder, tmp_path / "old", old))
    assert found.fingerprint == loaded(folder).fingerprint


@pytest.mark.slow
def test_threads_take_turns(stored):
    model = loaded(stored("phi3")[1])
    tokens, _ = coverage.padded_rows()
    expected = hidden(model, tokens[:1], np.ones((1, 20), int))

    def one(length):
        return hidden(model, tokens[:1, :length], np.ones((1, length), int))

    with ThreadPoolExecutor(4) as pool:
        for length, found in zip(range(13, 17), pool.map(one, range(13, 17)), strict=True):
            np.testing.assert_allclose(found, expected[:, :length], atol=1e-5)


@pytest.mark.slow
def test_a_stored_head_that_differs_is_a_head_of_its_own(stored, tmp_path):
    original, folder = stored("gpt2")
    model = loaded(folder)
    assert model.config.tied
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["transformer.wte.weight"]
    tokens, is_token = coverage.padded_rows()
    for name, head in (("same", embedding), ("other", embedding[::-1].copy())):
        other = with_tensors(folder, tmp_path / name, tensors | {"lm_head.weight": head})
        found = loaded(other)
        theirs = type(original).from_pretrained(other, attn_implementation="eager").eval()
        assert coverage.logits_distance(found, theirs, tokens, is_token) < 1e-5
        assert found.config.tied == (theirs.lm_head.weight is theirs.transformer.wte.weight)


REFUSED = {
    "a mixture of experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "depends on later tokens": ("bert", {}),
    "depends on padding": ("mamba", {"state_size": 4}),
    "depends on how places are counted": ("roberta", {"is_decoder": True, "type_vocab_size": 1}),
}


@pytest.mark.parametrize(
    "says", slow_but(["a mixture of experts", "depends on later tokens"], REFUSED)
)
def test_models_that_are_not_dense_and_causal_are_refused(timm, says, tmp_path, monkeypatch):
    family, settings = REFUSED[says]
    monkeypatch.setitem(coverage.FAMILIES, family, settings)
    coverage.stored(family, tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match=says):
            loaded(tmp_path / "model", dtype=dtype)


@pytest.mark.slow
def test_large_models_are_tried_without_a_copy(stored, monkeypatch):
    _, folder = stored("phi3")
    monkeypatch.setattr(torch_checkpoint, "_ARCHITECTURES", {})
    monkeypatch.setattr(torch_checkpoint, "_LARGEST_COPY", 0)
    model = loaded(folder, dtype="bfloat16")
    monkeypatch.setattr(torch_checkpoint, "_IN_HALF", -1.0)
    monkeypatch.setattr(torch_checkpoint, "_ARCHITECTURES", {})
    with pytest.raises(ValueError, match="depends on later tokens"):
        loaded(folder, dtype="bfloat16")
    assert loaded(folder).config == model.config  # in single precision already


def test_multimodal_and_quantised_models_are_refused_by_name(stored, tmp_path):
    text = {"model_type": "gemma3_text", **coverage.SIZES}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json.*a multimodal model \(vision_config\)"):
        loaded(tmp_path)
    _, folder = stored("phi3")
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    other = with_config(folder, tmp_path / "4bit", quantization_config=quantised)
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\)"):
        loaded(other)


def test_without_torch_the_extra_is_named(stored, monkeypatch):
    _, folder = stored("phi3")

    def optional(name, what):
        monkeypatch.setitem(sys.modules, name, None)
        return torch_functions.optional(name, what)

    monkeypatch.setattr(torch_checkpoint, "optional", optional)
    with pytest.raises(ValueError, match=r"'phi3'.*: needs torch .*pip install 'dlc_jax\[any\]'"):
        loaded(folder)


def test_targets_are_the_models_own_names(stored, tmp_path):
    model = loaded(stored("phi3")[1])
    every = model.architecture.with_adapter(Adapter(2, 4.0, TARGETS))
    assert every.target_modules() == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    one = model.architecture.with_adapter(Adapter(2, 4.0, ("qkv_proj",)))
    assert [*one.abstract_adapter()] == [
        f"model.layers.{k}.self_attn.qkv_proj/{matrix}"
        for k in "01"
        for matrix in ("lora_a", "lora_b")
    ]
    whole = model.architecture.with_adapter(Adapter(2, 4.0, ("model.layers.1.mlp.down_proj",)))
    assert len(whole.abstract_adapter()) == 2
    assert whole.target_modules() == ["model.layers.1.mlp.down_proj"]
    ends = model.architecture.with_adapter(Adapter(2, 4.0, ("mlp.down_proj",)))
    assert ends.target_modules() == ["down_proj"]
    with pytest.raises(ValueError, match="unknown value 'c_fc'; valid: o_proj, qkv_proj"):
        model.architecture.with_adapter(Adapter(2, 4.0, ("c_fc",)))
    data = coverage.responses(coverage.padded_rows()[0])
    with pytest.raises(ValueError, match="unknown value 'q'; valid"):
        dlc.finetune_lora(model, data, settings=LoraConfig(targets=("q",)))


def test_the_seven_usual_names_in_a_file_mean_these_layers_alone(stored, tmp_path):
    model = loaded(stored("gemma4_text")[1])
    assert set(TARGETS) < set(model.architecture.target_names)
    layers = [
        name.removesuffix(".weight")
        for name in model.architecture.network.layers
        if name.split(".")[-2] in TARGETS
    ]
    adapter = Adapter(2, 4.0, tuple(layers))
    weights = initial_adapter(model.architecture.with_adapter(adapter), 0)
    dlc.write_adapter(model.with_adapter(adapter, weights), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS)
    again = dlc.load_adapter(model, tmp_path / "a").architecture
    assert again.abstract_adapter().keys() == weights.keys()
    every = model.architecture.with_adapter(Adapter(2, 4.0, TARGETS)).abstract_adapter()
    assert len(every) > len(weights)


def test_activations_that_cannot_be_computed_again(stored):
    model = loaded(stored("ctrl")[1])
    data = coverage.responses(coverage.padded_rows()[0])
    with pytest.raises(ValueError, match=r"lora\.rematerialise: True, .*; expected False"):
        dlc.finetune_lora(model, data, settings=LoraConfig(batch_size=2))


def test_an_adapter_comes_back_as_it_was_written(stored, tmp_path):
    model = loaded(stored("gpt2")[1])
    data = coverage.responses(coverage.padded_rows()[0])
    settings = LoraConfig(
        optimiser="adamw", learning_rate=0.02, warmup_steps=0, epochs=2, rank=2, dtype="float32"
    )
    result = dlc.finetune_lora(model, data, settings=settings, folder=tmp_path / "run", test=data)
    first, last = (epoch["train_loss"] for epoch in result.history)
    assert last < first
    again = dlc.load_adapter(model, tmp_path / "run" / "adapter")
    losses = dlc.response_losses(again, data)
    np.testing.assert_array_equal(losses, dlc.response_losses(result.model, data))
    weights = data.num_response
    assert np.average(losses, weights=weights) == pytest.approx(result.test_loss, rel=1e-6)


LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [4.0] * 6,
    "original_max_position_embeddings": 32,
    "factor": 2.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "rope", "longest"),
    [pytest.param("phi3", LONG, 32, marks=pytest.mark.slow), ("llama", DYNAMIC, 64)],
)
def test_rotations_that_depend_on_the_batch_are_those_of_short_ones(
    timm, tmp_path, monkeypatch, family, rope, longest
):
    original = {"original_max_position_embeddings": 32} if rope is LONG else {}
    monkeypatch.setitem(coverage.FAMILIES, family, {"rope_parameters": rope, **original})
    original = coverage.stored(family, tmp_path / "model")
    model = loaded(tmp_path / "model")
    assert model.config.max_length == longest
    assert coverage.logits_distance(model, original, *coverage.padded_rows()) < 1e-5
    (tmp_path / "plain").mkdir()
    monkeypatch.setitem(coverage.FAMILIES, family, {})
    plain = coverage.stored(family, tmp_path / "plain")
    if family == "phi3":  # the factors matter
        assert coverage.logits_distance(model, plain, *coverage.padded_rows()) > 1e-3


@pytest.mark.slow
def test_likelihoods_of_continuations_are_those_of_the_decoder(stored):
    _, folder = stored("llama")
    pairs = [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([4], [11, 12]), (list(range(3, 60)), [7, 8, 9])]
    ours, converted = (
        continuation_log_likelihoods(loaded(folder, converted=some), pairs)
        for some in (False, True)
    )
    np.testing.assert_allclose(converted.sums, ours.sums, rtol=1e-5)
    np.testing.assert_array_equal(converted.is_greedy, ours.is_greedy)
