"""Runs of LoRA fine-tuning: stopped and resumed, on disk, and bad input."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import dlc_jax as dlc
from dlc_jax.encoders.decoder import Architecture, Decoder, DecoderConfig
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.training.lora import tuner as loop
from dlc_jax.training.lora.step import rows_of_step
from dlc_jax.types import by_path

CONFIG = DecoderConfig(
    vocab_size=50,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=24,
    windows=(None, 5),
    max_length=64,
    norm_epsilon=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    attention_scale=8**-0.5,
    attention_cap=None,
    final_cap=None,
    activation="silu",
    sandwich=False,
    offset_norm=False,
    scale_embedding=False,
    tied=False,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    params = nnx.to_pure_dict(nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(0))))
    folder = tmp_path_factory.mktemp("model")
    return LanguageModel(params, Architecture(CONFIG, "float32"), folder, "random")


def samples(num, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 60, num)
    return Tokenised(
        tuple(generator.integers(0, 50, n).astype(np.int32) for n in lengths),
        np.array([generator.integers(0, n) for n in lengths], np.int32),
        np.zeros(num, bool),
        np.array([f"s{i}" for i in range(num)]),
    )


DATA = samples(21)
OPTIONS = {"epochs": 3, "batch_size": 4, "optimiser": "adamw", "learning_rate": 1e-2}
SETTINGS = dlc.LoraConfig(warmup_steps=2, checkpoint_steps=1)
OPTIONS |= {"settings": SETTINGS}


def adapter_of(result):
    leaves = by_path(result.model.params).items()
    return {path: np.asarray(leaf) for path, leaf in leaves if "lora_" in path}


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(model, tmp_path, monkeypatch):
    kept = np.arange(1, 20)
    whole = dlc.finetune_lora(model, DATA, kept, test=samples(5, 1), seed=4, **OPTIONS)
    real, left = loop.take_step, [7]

    def stops(*arguments):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(loop, "take_step", stops)
    arguments = {"test": samples(5, 1), "seed": 4, "folder": tmp_path / "run", **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        dlc.finetune_lora(model, DATA, kept, **arguments)
    left[0] = 99
    again = dlc.finetune_lora(model, DATA, kept, **arguments)
    assert 99 - left[0] == 15 - 7
    for path, value in adapter_of(whole).items():
        np.testing.assert_array_equal(adapter_of(again)[path], value, err_msg=path)
    assert again.test_loss == whole.test_loss
    losses = [line["train_loss"] for line in whole.history]
    assert [line["train_loss"] for line in again.history] == losses
    assert losses[-1] < losses[0]
    assert [line["step"] for line in again.history] == [5, 10, 15]
    assert not (tmp_path / "run" / "checkpoint").exists()

    left[0] = 0  # the finished run is read, not run again
    read = dlc.finetune_lora(model, DATA, kept, **arguments)
    for path, value in adapter_of(whole).items():
        np.testing.assert_array_equal(adapter_of(read)[path], value, err_msg=path)
    assert (read.test_loss, read.num_kept) == (whole.test_loss, 19)
    with pytest.raises(ValueError, match="holds a run with other data"):
        dlc.finetune_lora(model, DATA, kept[1:], **arguments)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"packing": True}, marks=pytest.mark.slow),
        pytest.param({"rows_at_once": 3}, marks=pytest.mark.slow),
        pytest.param({"rematerialise": False}, marks=pytest.mark.slow),
    ],
)
def test_what_saves_memory_or_time_changes_nothing(model, options):
    base = dlc.finetune_lora(model, DATA, **OPTIONS)
    settings = dataclasses.replace(SETTINGS, **options)
    other = dlc.finetune_lora(model, DATA, **{**OPTIONS, "settings": settings})
    for path, value in adapter_of(base).items():
        np.testing.assert_allclose(adapter_of(other)[path], value, atol=2e-4, err_msg=path)
    assert other.history[-1]["train_loss"] == pytest.approx(base.history[-1]["train_loss"], 1e-4)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 4, 50])
def test_rows_hold_every_token_once(packing, rows_at_once):
    positions = np.array([0, 3, 4, 11, 20])
    rows = list(rows_of_step(DATA, positions, rows_at_once, 64, packing=packing))
    found = []
    for some in rows:
        assert some.tokens.shape[0] == rows_at_once
        assert some.tokens.shape[1] <= 64
        for tokens, segments, counts in zip(*some[:3], strict=True):
            for number in range(1, int(segments.max(initial=0)) + 1):
                place = segments == number
                found.append((tokens[place].tolist(), counts[place].tolist()))
            assert not counts[segments == 0].any()
    expected = []
    for i in positions:
        length, num_prompt = len(DATA.tokens[i]), max(int(DATA.num_prompt[i]), 1)
        counts = [False] * num_prompt + [True] * (length - num_prompt)
        expected.append((DATA.tokens[i].tolist(), counts))
    assert sorted(found) == sorted(expected)
    num_response = sum(len(DATA.tokens[i]) - max(int(DATA.num_prompt[i]), 1) for i in positions)
    assert sum(int(some.counts.sum()) for some in rows) == num_response
    if packing and rows_at_once == 1:
        assert len(rows) < len(positions)


@pytest.mark.slow
def test_kept_is_found_by_ids(model):
    selection = dlc.select(
        np.arange(21.0), np.zeros(21, int), method="hardest", keep_fraction=0.2, ids=DATA.ids
    )
    result = dlc.finetune_lora(model, DATA, selection, **OPTIONS)
    assert result.num_kept == 4
    same = dlc.finetune_lora(model, DATA, [17, 18, 19, 20], **OPTIONS)
    for path, value in adapter_of(result).items():
        np.testing.assert_array_equal(adapter_of(same)[path], value)
    with pytest.raises(ValueError, match="kept samples are not in instructions"):
        dlc.finetune_lora(model, samples(19), selection, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"settings": dlc.LoraConfig(targets=("q_proj", "lm_head"))},
            "lora.targets: unknown value 'lm_head'",
        ),
        ({"settings": dlc.LoraConfig(targets=())}, "lora.targets: expected one or more"),
        ({"settings": dlc.LoraConfig(rank=0)}, "lora.rank: must be >= 1"),
        ({"optimiser": "adam"}, "lora.optimiser: unknown value 'adam'"),
        ({"learning_rate": 0.0}, "lora.learning_rate: must be > 0"),
        (
            {
                "learning_rate": 1e30,
                "optimiser": "sgd",
                "settings": dataclasses.replace(SETTINGS, warmup_steps=0),
            },
            "not finite, at step",
        ),
        (
            {
                "learning_rate": 3e38,
                "batch_size": 100,
                "epochs": 1,
                "settings": dataclasses.replace(SETTINGS, weight_decay=1e3, warmup_steps=0),
            },
            "gave an adapter with NaN or infinite values",
        ),
    ],
)
def test_mistakes_are_named(model, options, says):
    with pytest.raises(ValueError, match=says):
        dlc.finetune_lora(model, DATA, **{**OPTIONS, **options})


def test_what_is_too_long_or_has_an_adapter_is_refused(model):
    long = Tokenised(
        (np.zeros(70, np.int32),), np.array([3], np.int32), np.zeros(1, bool), np.array(["long"])
    )
    with pytest.raises(ValueError, match="sample long has 70 tokens, expected at most 64"):
        dlc.finetune_lora(model, long, **OPTIONS)
    with pytest.raises(ValueError, match="test: sample long has 70 tokens"):
        dlc.finetune_lora(model, DATA, test=long, **OPTIONS)
    tuned = dlc.finetune_lora(model, DATA, [0], **OPTIONS).model
    with pytest.raises(ValueError, match="has an adapter, expected a model without one"):
        dlc.finetune_lora(tuned, DATA, **OPTIONS)


def test_other_devices_than_the_models_are_refused(model):
    two = dlc.Run(mesh=jax.sharding.Mesh(np.array(jax.devices()[:1] * 2), "data"))
    with pytest.raises(dlc.InputError, match="run.mesh: other devices than those of the model"):
        dlc.finetune_lora(model, DATA, run=two, **OPTIONS)


def test_a_folder_tells_what_was_run(model, tmp_path):
    dlc.finetune_lora(model, DATA, [1, 2], folder=tmp_path, **OPTIONS)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["result"]["num_kept"] == 2
    assert facts["result"]["test_loss"] is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_named_and_made_again(model, tmp_path, capsys, name):
    kept, options = np.arange(1, 9), {**OPTIONS, "epochs": 1, "folder": tmp_path / "run"}
    whole = dlc.finetune_lora(model, DATA, kept, **options)
    adapter = tmp_path / "run" / "adapter"
    content = bytearray((adapter / name).read_bytes())
    content[-20] ^= 1
    (adapter / name).write_bytes(content)
    with pytest.raises(dlc.InputError, match=f"{name} does not have the content that was written"):
        dlc.load_adapter(model, adapter)
    again = dlc.finetune_lora(model, DATA, kept, **options)
    said = capsys.readouterr().out
    assert f"run/adapter/{name}: does not have the content that was written" in said
    assert "it is made again" in said
    for path, value in adapter_of(whole).items():
        np.testing.assert_array_equal(adapter_of(again)[path], value, err_msg=path)
    read = dlc.load_adapter(model, adapter)
    np.testing.assert_array_equal([*by_path(read.params)], [*by_path(again.model.params)])


def test_another_runs_adapter_is_not_this_ones(model, tmp_path):
    options = {**OPTIONS, "epochs": 1}
    for name, kept in (("a", np.arange(1, 9)), ("b", np.arange(9, 17))):
        dlc.finetune_lora(model, DATA, kept, folder=tmp_path / name, **options)
    shutil.rmtree(tmp_path / "a" / "adapter")
    shutil.copytree(tmp_path / "b" / "adapter", tmp_path / "a" / "adapter")
    with pytest.raises(
        dlc.InputError, match=r"adapter_model.safetensors does not have the content"
    ):
        dlc.load_adapter(model, tmp_path / "a" / "adapter")
