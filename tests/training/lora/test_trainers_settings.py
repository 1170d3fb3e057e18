"""Settings that trainers on torch have: which tokens the loss counts, and short last batches."""

import dataclasses

import numpy as np
import pytest
from test_peft_parity import lora_parameters, peft_of, samples, stored, torch_steps

import dlc_jax as dlc
from dlc_jax.config import Config, default_config
from dlc_jax.tasks.instructions import InstructionTask
from dlc_jax.training.loop import train
from dlc_jax.training.lora.settings import LoraConfig, learning_rates
from dlc_jax.training.lora.step import initial_adapter, rows_of_step
from dlc_jax.training.lora.tuner import LoraTuner
from dlc_jax.types import by_path
from dlc_jax.workspace import Workspace

SETTINGS = LoraConfig(
    epochs=3,
    batch_size=8,
    rows_at_once=4,
    optimiser="adamw",
    learning_rate=1e-2,
    warmup_steps=2,
    weight_decay=0.1,
    dtype="float32",
    targets=("q_proj", "down_proj"),
    rematerialise=False,
    drop_last=True,
)


@pytest.fixture(scope="module")
def model(timm, tmp_path_factory):
    folder = stored("Llama", tmp_path_factory.mktemp("llama"))
    return dlc.load_language_model(str(folder), dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("loss_on", ["text", "response"])
def test_six_steps_without_short_batches_are_those_of_peft(model, loss_on):
    data = samples(19, 24)
    settings = dataclasses.replace(SETTINGS, loss_on=loss_on, packing=loss_on == "text")
    tuner = LoraTuner(model, data, settings)
    result = train(tuner, np.arange(19), seed=3)
    assert [line["step"] for line in result.history] == [2, 4, 6]
    start = initial_adapter(tuner._architecture, 3)
    theirs = peft_of(model.folder, settings, start)
    plan = [
        np.random.default_rng([3, epoch]).permutation(19)[k * 8 : k * 8 + 8]
        for epoch in (1, 2, 3)
        for k in (0, 1)
    ]
    torch_steps(theirs, data, settings, plan, learning_rates(6, 1e-2, 2))
    ours, expected = by_path(result.model.params), lora_parameters(theirs)
    for path, first in by_path(start).items():
        moved = np.asarray(ours[path]) - first
        theirs_moved = expected[path].detach().numpy().T - first
        norm = np.linalg.norm(theirs_moved)
        assert norm > 0, path
        assert np.linalg.norm(moved - theirs_moved) <= 1e-3 * norm, path


def test_the_loss_on_text_counts_all_tokens_but_the_first():
    data = samples(5)
    said = tuple(np.arange(len(row) - 2, len(row)) for row in data.tokens)
    data = dataclasses.replace(data, others=said)
    positions = np.arange(5)
    for packing in (False, True):
        rows = list(rows_of_step(data, positions, 2, 64, packing=packing, loss_on="text"))
        num = sum(int(some.counts.sum()) for some in rows)
        assert num == sum(len(row) - 1 for row in data.tokens)
        for some in rows:
            starts = np.diff(some.segments, axis=1, prepend=0) != 0
            np.testing.assert_array_equal(some.counts, (some.segments > 0) & ~starts)
    usual = sum(int(s.counts.sum()) for s in rows_of_step(data, positions, 2, 64, packing=False))
    assert usual == sum(data.counts(i)[1:].sum() for i in positions) < num


def test_a_short_last_batch_is_left_out_and_steps_and_rates_follow(model):
    tuner = LoraTuner(model, samples(19), SETTINGS)
    kept = tuner.positions(np.arange(1, 19))
    assert [len(batch.positions) for batch in tuner.batches(kept, 0, 1, 0)] == [8, 8]
    assert [len(batch.positions) for batch in tuner.batches(kept, 0, 1, 1)] == [8]
    assert tuner.rates(tuner.steps_per_epoch(len(kept))) == learning_rates(6, 1e-2, 2)
    usual = LoraTuner(model, samples(19), dataclasses.replace(SETTINGS, drop_last=False))
    assert [len(batch.positions) for batch in usual.batches(kept, 0, 1, 0)] == [8, 8, 2]
    assert len(usual.rates(usual.steps_per_epoch(len(kept)))) == 9
    whole = tuner.positions(np.arange(8))
    assert [len(batch.positions) for batch in tuner.batches(whole, 0, 1, 0)] == [8]
    says = r"lora\.drop_last: True leaves no step of 7 samples; expected False, or lora\.batch_size"
    with pytest.raises(dlc.InputError, match=f"{says} of at most 7, got 8"):
        dlc.finetune_lora(model, samples(19), np.arange(7), settings=SETTINGS)


def test_no_step_is_refused_before_scoring(tmp_path):
    config = default_config()
    config.stages = ("score", "select", "finetune")
    config.encoder.name, config.encoder.weights = "decoder", "demo:tiny-llama"
    config.dataset.train = "demo:dolly/train"
    config.selection.keep_fractions = (0.1,)
    workspace = Workspace(tmp_path)
    InstructionTask(Config.of(config), print).check(workspace)
    config.lora.drop_last, config.lora.batch_size = True, 1000
    with pytest.raises(dlc.InputError, match=r"lora\.drop_last: True leaves no step of [0-9]+"):
        InstructionTask(Config.of(config), print).check(workspace)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"loss_on": "prompt"}, "lora.loss_on: unknown value 'prompt'"),
        ({"dropout": 1.0}, "lora.dropout: must be < 1, got 1.0"),
        ({"dropout": -0.1}, "lora.dropout: must be >= 0, got -0.1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(value, says):
    with pytest.raises(dlc.InputError, match=says):
        LoraConfig(**value).check()


def test_runs_of_versions_without_these_settings_are_still_found():
    """What decides a run is hashed: at the defaults it is word for word what it was before."""
    usual = LoraConfig()
    assert usual.decisive == {
        "rank": 8,
        "alpha": 16.0,
        "targets": usual.targets,
        "epochs": 3,
        "batch_size": 32,
        "optimiser": "sgd",
        "learning_rate": 7e-6,
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "momentum": 0.9,
        "dtype": "bfloat16",
    }
    for name, value in {"dropout": 0.1, "loss_on": "text", "drop_last": True}.items():
        other = dataclasses.replace(usual, **{name: value})
        assert other.decisive == usual.decisive | {name: value}
    assert repr(usual.adapter) == f"Adapter(rank=8, alpha=16.0, targets={usual.targets})"
