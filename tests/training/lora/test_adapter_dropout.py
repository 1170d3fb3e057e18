"""Dropout of what the change reads: against PEFT with the same masks, and by whom it is drawn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_peft_parity import peft_of, samples, stored, torch_steps
from test_tuner import CONFIG, adapter_of
from test_tuner import samples as short

import dlc_jax as dlc
from dlc_jax.encoders.adapter_dropout import StepId, dropped, kept, keys_of_sample
from dlc_jax.encoders.decoder import Architecture, Decoder
from dlc_jax.planning.decoder_memory import Finetuning
from dlc_jax.training.loop import train
from dlc_jax.training.lora import tuner as module
from dlc_jax.training.lora.settings import LoraConfig, learning_rates
from dlc_jax.training.lora.step import Sums, add_rows, initial_adapter, rows_of_step
from dlc_jax.training.lora.tuner import LoraTuner
from dlc_jax.types import by_path

SETTINGS = LoraConfig(
    epochs=3,
    batch_size=8,
    rows_at_once=4,
    learning_rate=0.1,
    warmup_steps=2,
    dropout=0.3,
    dtype="float32",
    targets=("q_proj", "v_proj", "down_proj"),
    checkpoint_steps=1,
)
DATA = samples(16, 24)


@pytest.fixture(scope="module")
def folder(timm, tmp_path_factory):
    return stored("Llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=[False, True], ids=["decoder", "converted"])
def model(request, folder):
    return dlc.load_language_model(str(folder), dtype="float32", converted=request.param)


def ended(model, **changes):
    return train(LoraTuner(model, DATA, dataclasses.replace(SETTINGS, **changes)), np.arange(16), 3)


@pytest.fixture(scope="module")
def usual(model):
    return ended(model)


def path_of(layer, model):
    """Returns the path here of a layer that PEFT calls so."""
    if isinstance(model.params.get("embedding"), dict):
        _, _, block, part, name = layer.split(".")
        return f"blocks/{block}/{'attn' if part == 'self_attn' else 'mlp'}/{name}"
    return layer


@pytest.mark.slow
def test_six_steps_with_the_same_masks_are_those_of_peft(model, usual):
    import torch

    theirs = peft_of(model.folder, SETTINGS, {})
    start = by_path(initial_adapter(LoraTuner(model, DATA, SETTINGS)._architecture, 3))
    layers = {
        path_of(name.removeprefix("base_model.model."), model): layer
        for name, layer in theirs.named_modules()
        if hasattr(layer, "lora_dropout")
    }
    assert {path.rpartition("/")[0] for path in start} == set(layers)

    class Replay(torch.nn.Module):
        mask = None

        def forward(self, x):
            return x * self.mask / (1 - SETTINGS.dropout)

    for path, layer in layers.items():
        layer.lora_dropout["default"] = Replay()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.asarray(start[f"{path}/lora_a"].T))

    def before(step, sample):
        length = len(DATA.tokens[sample])
        keys = keys_of_sample(StepId(3, step // 2 + 1, step % 2), int(sample), length)
        for path, layer in layers.items():
            num_features = start[f"{path}/lora_a"].shape[0]
            mask = np.array(kept(jnp.asarray(keys)[None], path, SETTINGS.dropout, num_features))
            layer.lora_dropout["default"].mask = torch.asarray(mask)

    orders = [np.random.default_rng([3, epoch]).permutation(16) for epoch in (1, 2, 3)]
    plan = [order[k : k + 8] for order in orders for k in (0, 8)]
    torch_steps(theirs, DATA, SETTINGS, plan, learning_rates(6, 0.1, 2), before)
    ours = adapter_of(usual)
    for path, layer in layers.items():
        for matrix, other in (("lora_a", layer.lora_A), ("lora_b", layer.lora_B)):
            first = start[f"{path}/{matrix}"]
            moved = ours[f"{path}/{matrix}"] - first
            theirs_moved = other["default"].weight.detach().numpy().T - first
            norm = np.linalg.norm(theirs_moved)
            assert norm > 0, path
            assert np.linalg.norm(moved - theirs_moved) <= 2e-5 * norm, (path, matrix)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"packing": True}, {"rows_at_once": 3}, {"rematerialise": False}], ids=str
)
def test_what_saves_memory_or_time_draws_the_same(model, usual, changes):
    found, expected = adapter_of(ended(model, **changes)), adapter_of(usual)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_dropout_decides_the_adapter_and_the_seed_decides_the_draws(model, usual):
    again, without = adapter_of(ended(model)), adapter_of(ended(model, dropout=0.0))
    for path, value in adapter_of(usual).items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    assert max(np.abs(without[p] - v).max() for p, v in adapter_of(usual).items()) > 1e-3


@pytest.mark.slow
def test_a_stopped_run_draws_what_it_would_have_drawn(model, usual, tmp_path, monkeypatch):
    real, left = module.take_step, [3]

    def stops(*arguments):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(module, "take_step", stops)
    arguments = {"seed": 3, "folder": tmp_path, "settings": SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        dlc.finetune_lora(model, DATA, **arguments)
    left[0] = 99
    again = dlc.finetune_lora(model, DATA, **arguments)
    assert 99 - left[0] == 3
    for path, value in adapter_of(usual).items():
        np.testing.assert_array_equal(adapter_of(again)[path], value, err_msg=path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.3
    read = dlc.finetune_lora(model, DATA, **arguments).model
    assert read.architecture == again.model.architecture
    assert read.architecture.adapter.dropout == 0.3
    # tests have none
    plain = dataclasses.replace(read.architecture.adapter, dropout=0.0)
    architecture = dataclasses.replace(read.architecture, adapter=plain)
    without = dataclasses.replace(read, architecture=architecture)
    losses = [dlc.response_losses(one, DATA) for one in (read, without)]
    np.testing.assert_array_equal(*losses)
    assert read.fingerprint == without.fingerprint


STEPS = (StepId(0, 1, 0), StepId(0, 1, 1), StepId(0, 2, 0), StepId(1, 1, 0))


def masks(rate):
    """Returns what stays of 50 tokens with 200 features, by step, sample and layer."""
    return {
        (step, sample, layer): np.asarray(
            kept(jnp.asarray(keys_of_sample(step, sample, 50))[None], layer, rate, 200)[0]
        )
        for step in STEPS
        for sample in (0, 7)
        for layer in ("a", "b")
    }


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_seeds_steps_samples_layers_and_tokens_draw_apart(rate):
    found = masks(rate)
    spread = np.sqrt(rate * (1 - rate) / 10_000)
    for mask in found.values():
        assert abs(1 - mask.mean() - rate) < 5 * spread
        assert len(np.unique(mask, axis=0)) == 50
    rows = np.stack([mask.ravel() for mask in found.values()]).astype(float)
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.05
    # neighbouring tokens and features, too
    for mask in found.values():
        for one, other in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.06


def test_what_stays_is_scaled_to_the_same_mean():
    keys = jnp.asarray(keys_of_sample(StepId(0, 1, 0), 0, 50))[None]
    x = jnp.ones((1, 50, 200))
    found = np.asarray(dropped(x, keys=keys, layer="a", rate=0.2))
    assert {*np.unique(found)} == {0.0, np.float32(1 / 0.8)}
    assert found.mean() == pytest.approx(1, abs=0.02)
    flat = dropped(x.reshape(50, 200), keys=keys, layer="a", rate=0.2)
    np.testing.assert_array_equal(flat, found[0])
    with pytest.raises(dlc.InputError, match=r"lora\.dropout: 0\.2, but a reads an array \[1, 3,"):
        dropped(x[:, :3], keys=keys, layer="a", rate=0.2)
    none = dropped(x, keys=keys, layer="a", rate=0.0)
    np.testing.assert_array_equal(none, x)


@pytest.mark.slow
def test_masks_are_of_tokens_wherever_their_rows_are():
    """Of the small decoder, without torch; the slow tests do the same over whole runs."""
    settings = dataclasses.replace(SETTINGS, targets=("q_proj", "down_proj"))
    architecture = Architecture(CONFIG, "float32").for_training(settings.adapter, True)
    params = nnx.to_pure_dict(nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(0))))
    adapter = jax.tree.map(lambda leaf: leaf + 0.05, initial_adapter(architecture, 0))
    data = short(4)

    def gradients(num_rows, **how):
        sums = Sums.zero(adapter)
        for rows in rows_of_step(data, np.arange(4), num_rows, 64, **how):
            sums = add_rows(architecture, params, adapter, rows, sums)
        return by_path(sums.gradients)

    how = {"packing": False, "drawing": STEPS[0]}
    expected, plain = gradients(4, **how), gradients(4, packing=False)
    for other in (gradients(1, **how), gradients(4, **how | {"packing": True})):
        for path, gradient in expected.items():
            np.testing.assert_allclose(other[path], gradient, rtol=1e-4, atol=1e-5, err_msg=path)
    for changed in (plain, gradients(4, packing=False, drawing=STEPS[1])):
        for path, gradient in expected.items():
            assert np.abs(changed[path] - gradient).max() > 1e-2 * np.abs(gradient).max(), path


def test_the_plan_knows_what_dropout_takes():
    plain, drawn = (
        Finetuning(CONFIG, dataclasses.replace(SETTINGS, dropout=rate), 64, 1).plan().num_bytes
        for rate in (0.0, 0.3)
    )
    assert plain < drawn < 3 * plain


def test_dropout_of_an_adapter_is_read(folder, tmp_path):
    model = dlc.load_language_model(str(folder), dtype="float32")
    adapter = SETTINGS.adapter
    start = initial_adapter(model.architecture.with_adapter(adapter), 0)
    dlc.write_adapter(model.with_adapter(adapter, start), tmp_path / "a")
    assert dlc.load_adapter(model, tmp_path / "a").architecture.adapter == adapter
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    for value, says in ((1.5, "must be <= 1, got 1.5"), ("x", "expected a number, got 'x'")):
        path.write_text(json.dumps(config | {"lora_dropout": value}))
        with pytest.raises(dlc.InputError, match=f"lora_dropout: {says}"):
            dlc.load_adapter(model, tmp_path / "a")
    del config["lora_dropout"]
    path.write_text(json.dumps(config))
    assert dlc.load_adapter(model, tmp_path / "a").architecture.adapter.dropout == 0
