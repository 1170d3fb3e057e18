"""LoRA fine-tuning against PEFT and torch, step by step; adapters and merged models on disk."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but

import dlc_jax as dlc
from dlc_jax.encoders.causal_model import TARGETS, Adapter
from dlc_jax.exports.peft import load_adapter, write_adapter, write_merged
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.training.loop import train
from dlc_jax.training.lora.settings import LoraConfig, learning_rates
from dlc_jax.training.lora.step import initial_adapter
from dlc_jax.training.lora.tuner import LoraTuner
from dlc_jax.types import by_path

FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 9},
    "Gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 17, "head_dim": 8},
    "Qwen3": {"attention_bias": True, "head_dim": 8},
    "Gemma3Text": {
        "sliding_window": 9,
        "query_pre_attn_scalar": 17,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def stored(family, folder):
    """Writes a random model, whose weights are large enough for every part to matter."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(timm, tmp_path_factory):
    return {family: stored(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def samples(num=40, longest=60):
    generator = np.random.default_rng(0)
    lengths = generator.integers(6, longest, num)
    return Tokenised(
        tuple(generator.integers(1, 97, n).astype(np.int32) for n in lengths),
        np.array([generator.integers(0, n - 2) for n in lengths], np.int32),
        np.zeros(num, bool),
        np.arange(num).astype(np.str_),
    )


def peft_of(folder, settings, adapter):
    """Returns the torch model with PEFT's adapter, started as ours is."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    parameters = lora_parameters(model)
    for path, value in by_path(adapter).items():
        with torch.no_grad():
            parameters[path].copy_(torch.asarray(value.T))
    return model


def lora_parameters(model):
    """Returns PEFT's parameters by our paths."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parts = name.split(".")
            kind = "attn" if parts[5] == "self_attn" else "mlp"
            matrix = "lora_a" if parts[7] == "lora_A" else "lora_b"
            found[f"blocks/{parts[4]}/{kind}/{parts[6]}/{matrix}"] = parameter
    return found


def logits_of(model, tokens):
    tokens = jnp.asarray(tokens)
    hidden = model.architecture.hidden(model.params, tokens, jnp.ones_like(tokens))
    return np.asarray(model.architecture.logits(model.params, hidden))


def torch_steps(model, data, settings, order, rates, before=lambda step, sample: None):
    """Takes the steps one sample at a time: no padding, no packing."""
    import torch

    parameters = list(lora_parameters(model).values())
    options = {"lr": 1.0, "weight_decay": settings.weight_decay}
    if settings.optimiser == "sgd":
        optimiser = torch.optim.SGD(parameters, momentum=settings.momentum, **options)
    else:
        optimiser = torch.optim.AdamW(parameters, **options)
    for step, rate in enumerate(rates):
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        losses = []
        for i in order[step]:
            ids = torch.asarray(data.tokens[i].astype(np.int64))
            labels = ids.clone()
            labels[: 1 if settings.loss_on == "text" else max(int(data.num_prompt[i]), 1)] = -100
            before(step, i)
            logits = model(input_ids=ids[None]).logits[0]
            losses.append((logits[:-1], labels[1:]))
        logits, labels = (torch.cat(part) for part in zip(*losses, strict=True))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("family", "optimiser", "rate", "packing"),
    [
        pytest.param("Llama", "adamw", 1e-2, False, marks=pytest.mark.slow),
        pytest.param("Mistral", "sgd", 1e-2, True, marks=pytest.mark.slow),
        pytest.param("Gemma2", "sgd", 1e-2, False, marks=pytest.mark.slow),
        pytest.param("Qwen3", "sgd", 1e-2, True, marks=pytest.mark.slow),
        pytest.param("Gemma3Text", "adamw", 1e-2, True, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_are_those_of_peft(
    folders, tmp_path, monkeypatch, family, optimiser, rate, packing
):
    """A and B move as PEFT moves them, and the adapter as PEFT loads it changes the logits."""
    import peft
    import torch
    import transformers

    data = samples()
    settings = LoraConfig(
        epochs=4,
        batch_size=8,
        rows_at_once=3,
        optimiser=optimiser,
        learning_rate=rate,
        warmup_steps=0,
        dtype="float32",
        packing=packing,
        targets=TARGETS if family != "Mistral" else ("q_proj", "v_proj", "down_proj"),
    )
    model = dlc.load_language_model(str(folders[family]), dtype="float32")
    tuner = LoraTuner(model, data, settings)
    result = train(tuner, np.arange(len(data)), seed=3)
    start = initial_adapter(tuner._architecture, 3)
    theirs = peft_of(folders[family], settings, start)
    plan = [
        np.random.default_rng([3, epoch]).permutation(40)[k * 8 : k * 8 + 8]
        for epoch in range(1, 5)
        for k in range(5)
    ]
    torch_steps(theirs, data, settings, plan, learning_rates(20, rate, 0))
    ours, expected = by_path(result.model.params), lora_parameters(theirs)
    assert set(expected) == set(by_path(start))
    for path, first in by_path(start).items():
        moved = np.asarray(ours[path]) - first
        theirs_moved = expected[path].detach().numpy().T - first
        norm = np.linalg.norm(theirs_moved)
        assert norm > 0, path
        assert np.linalg.norm(moved - theirs_moved) <= 1e-3 * norm, path

    tokens = np.random.default_rng(1).integers(1, 97, (2, 50)).astype(np.int32)
    whole = result.model
    logits = logits_of(whole, tokens)
    write_adapter(whole, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folders[family], dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        before = base(input_ids=torch.asarray(tokens.astype(np.int64))).logits.numpy()
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        after = loaded(input_ids=torch.asarray(tokens.astype(np.int64))).logits.numpy()
    scale = np.abs(after).max()
    assert np.abs(logits - after).max() <= 1e-4 * scale
    assert np.abs(after - before).max() >= 100 * 1e-4 * scale
    monkeypatch.setattr("dlc_jax.exports.peft._SHARD_BYTES", 20_000)
    write_merged(whole, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    assert merged.dtype == torch.float32
    with torch.no_grad():
        found = merged(input_ids=torch.asarray(tokens.astype(np.int64))).logits.numpy()
    assert np.abs(logits - found).max() <= 1e-4 * scale


def test_rates_are_those_of_transformers(timm):
    import torch
    import transformers

    for num_steps, warmup in ((20, 0), (50, 7), (12, 100)):
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=7e-6)
        schedule = transformers.get_cosine_schedule_with_warmup(optimiser, warmup, num_steps)
        expected = []
        for _ in range(num_steps):
            expected.append(schedule.get_last_lr()[0])
            optimiser.step()
            schedule.step()
        np.testing.assert_allclose(learning_rates(num_steps, 7e-6, warmup), expected, rtol=1e-9)


def test_adapters_of_peft_are_read(folders, tmp_path):
    import torch

    settings = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "up_proj"), dtype="float32")
    model = dlc.load_language_model(str(folders["Llama"]), dtype="float32")
    adapter = initial_adapter(model.architecture.with_adapter(settings.adapter), 0)
    theirs = peft_of(folders["Llama"], settings, adapter)
    with torch.no_grad():
        for parameter in lora_parameters(theirs).values():
            parameter.normal_()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(model, tmp_path)
    assert ours.architecture.adapter == Adapter(3, 5.0, ("q_proj", "up_proj"))
    tokens = np.arange(1, 41)[None]
    logits = logits_of(ours, tokens)
    with torch.no_grad():
        expected = theirs(input_ids=torch.asarray(tokens)).logits.numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


TARGETED = {  # what PEFT takes, by door
    "all-linear": ({"target_modules": "all-linear"}, (False, True)),
    "pattern": ({"target_modules": r".*\.(q_proj|up_proj)"}, (False, True)),
    "whole names of a block": ({"target_modules": r".*\.1\.mlp\.up_proj"}, (True,)),
    "some names are none": ({"target_modules": ["o_proj", "nothere"]}, (False, True)),
    "ends": ({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}, (False, True)),
    "left out": (
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "mlp.up_proj"]},
        (False, True),
    ),
    "rslora": ({"target_modules": ["q_proj"], "use_rslora": True}, (False, True)),
}


@pytest.mark.parametrize(
    "name", slow_but([name for name in TARGETED if name != "all-linear"], TARGETED)
)
def test_layers_are_those_that_peft_finds(folders, tmp_path, name):
    import peft
    import torch
    import transformers

    options, doors = TARGETED[name]
    base = transformers.AutoModelForCausalLM.from_pretrained(folders["Llama"])
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=5.0, task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    tokens = np.arange(1, 41)[None]
    with torch.no_grad():
        expected = theirs(input_ids=torch.asarray(tokens)).logits.numpy()
    for converted in doors:
        model = dlc.load_language_model(str(folders["Llama"]), dtype="float32", converted=converted)
        logits = logits_of(load_adapter(model, tmp_path), tokens)
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.abs(logits_of(model, tokens) - expected).max() > 1e-2


def test_adapters_that_do_more_or_do_not_fit_are_refused(folders, tmp_path):
    model = dlc.load_language_model(str(folders["Llama"]), dtype="float32")
    with pytest.raises(ValueError, match="has no adapter; finetune_lora gives one"):
        write_adapter(model, tmp_path / "none")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not there"):
        load_adapter(model, tmp_path)
    adapter = Adapter(2, 4.0, ("v_proj",))
    whole = model.with_adapter(
        adapter, initial_adapter(model.architecture.with_adapter(adapter), 0)
    )
    write_adapter(whole, tmp_path / "a")
    with pytest.raises(ValueError, match="has an adapter, expected a model without one"):
        load_adapter(whole, str(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    def refused(says, **changes):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=says):
            load_adapter(model, tmp_path / "a")

    refused("use_dora True; expected False", use_dora=True)
    refused("init_lora_weights 'pissa'; expected True", init_lora_weights="pissa")
    refused(r"\['lm_head'\] names no linear layer in a block", target_modules=["lm_head"])
    refused("tensors are missing", target_modules="all-linear")
    refused("target_modules leaves out model.layers.1", target_modules=r".*\.0\..*q_proj")
    refused("target_modules: missing \\)", target_modules="(")
    refused("exclude_modules 3; expected a list of names", exclude_modules=3)
    refused(r"2 tensors are missing|4 tensors are missing", target_modules=["v_proj", "q_proj"])
    refused(r"v_proj\.lora_A\.weight is \(2, 32\), expected \(3, 32\)", r=3)


@pytest.fixture(scope="module")
def adapted(folders, tmp_path_factory):
    """A model, and the folder of an adapter for it."""
    model = dlc.load_language_model(str(folders["Llama"]), dtype="float32")
    adapter = Adapter(2, 4.0, ("q_proj", "v_proj"))
    start = initial_adapter(model.architecture.with_adapter(adapter), 0)
    folder = tmp_path_factory.mktemp("adapter") / "a"
    write_adapter(model.with_adapter(adapter, start), folder)
    return model, folder


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("r", 0, "r: must be > 0, got 0"),
        ("r", -1, "r: must be > 0, got -1"),
        ("r", "eight", "r: expected an integer, got 'eight'"),
        ("r", None, "r: expected an integer, got None"),
        ("r", [8], r"r: expected an integer, got \[8\]"),
        ("r", float("inf"), "r: expected an integer, got inf"),
        ("r", 8.7, "r: expected an integer, got 8.7"),
        ("r", True, "r: expected an integer, got True"),
        pytest.param("r", 10**400, "r: must be <= 1048576, got 1000", id="r-huge"),
        ("lora_alpha", float("nan"), "lora_alpha: must be > 0, got nan"),
        ("lora_alpha", float("inf"), "lora_alpha: must be > 0, got inf"),
        ("lora_alpha", -float("inf"), "lora_alpha: must be > 0, got -inf"),
        ("lora_alpha", "16", "lora_alpha: expected a number, got '16'"),
        ("lora_alpha", True, "lora_alpha: expected a number, got True"),
        ("lora_alpha", None, "lora_alpha: expected a number, got None"),
        ("lora_alpha", 0, "lora_alpha: must be > 0, got 0"),
        pytest.param("lora_alpha", 10**400, "lora_alpha: must be <= 1048576", id="alpha-huge"),
        ("target_modules", ["q_proj", "v_proj", "q_proj"], "target_modules: q_proj occur twice"),
        ("target_modules", [], r"target_modules \[\] names no linear layer in a block"),
        ("target_modules", None, "target_modules None; expected a list of names"),
        (
            "target_modules",
            [["q_proj"]],
            r"target_modules \[\['q_proj'\]\]; expected a list of names",
        ),
        ("target_modules", ["q_proj", 8], r"target_modules \['q_proj', 8\]; expected a list"),
    ],
)
def test_adapter_settings_that_are_none_are_refused_by_key(adapted, tmp_path, key, value, says):
    model, folder = adapted
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json: {says}"):
        load_adapter(model, tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"r": ' * 100_000, "not valid JSON"),
        ("[8]", "expected a JSON object, found list"),
        ("\ud800", "not valid JSON"),
        ("{}", "has no 'r'"),
    ],
)
def test_adapter_settings_that_are_no_object_are_refused(adapted, tmp_path, content, says):
    model, folder = adapted
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"adapter_config.json: {says}"):
        load_adapter(model, tmp_path / "a")


def damaged(tensor, how):
    import torch

    if how in ("nan", "inf"):
        tensor = tensor.clone()
        tensor[-1, -1] = float(how)
    if how == "too large":
        tensor = tensor.double() + 1e300
    if how == "integers":
        tensor = torch.ones_like(tensor, dtype=torch.int32)
    return tensor[:, :-1].contiguous() if how == "shape" else tensor


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", "has NaN or infinite values"),
        ("inf", "has NaN or infinite values"),
        ("too large", "has NaN or infinite values"),
        ("integers", "is I32; expected F64, F32, F16, BF16"),
        ("shape", r"is \(16, 1\), expected \(16, 2\)"),
    ],
)
def test_adapter_weights_that_are_none_are_refused_by_tensor(adapted, tmp_path, how, says):
    from safetensors.torch import load_file, save_file

    model, folder = adapted
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file(tensors | {name: damaged(tensors[name], how)}, path)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: {name} {says}"):
        load_adapter(model, tmp_path / "a")
    tensors.pop(name)
    save_file(tensors | {"other": tensors.popitem()[1]}, path)
    with pytest.raises(ValueError, match=r"2 tensors are missing \(.*, 1 have no place \(other\)"):
        load_adapter(model, tmp_path / "a")


def test_an_adapter_file_that_is_not_regular_is_refused(adapted, tmp_path):
    model, folder = adapted
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a readable"):
        load_adapter(model, tmp_path / "a")
    os.mkfifo(path)
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a regular file"):
        load_adapter(model, tmp_path / "a")


def test_an_adapter_that_is_not_finite_is_not_written(adapted, tmp_path):
    model, folder = adapted
    whole = load_adapter(model, folder)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, whole.params)
    with pytest.raises(ValueError, match="the adapter's .*lora_.* has NaN or infinite values"):
        write_adapter(dataclasses.replace(whole, params=broken), tmp_path / "b")
    assert not (tmp_path / "b").exists()
