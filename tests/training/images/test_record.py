"""Recording of fine-tuning on a whole data set."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.scores import SCORES, score
from dlc_jax.training.images import (
    FinetuneConfig,
    Finetuner,
    RecordConfig,
    Recorder,
    record_training,
    recorder,
)
from dlc_jax.training.loop import train
from dlc_jax.training.optimiser import epoch_order
from dlc_jax.types import Conventions, TrainingRecord
from dlc_jax.workspace.checkpoints import Checkpoints

RUN = {"image_size": 32, "epochs": 4, "batch_size": 16, "learning_rate": 0.05, "seed": 3}
FAST = {**RUN, "record": RecordConfig(3, 0.5)}
HEAD_ONLY = FinetuneConfig(linear_probe=True)
HEAD = {**FAST, "settings": HEAD_ONLY}


def assert_same(one: TrainingRecord, two: TrainingRecord, but: tuple[str, ...] = ()) -> None:
    """All but the time that it took."""
    for field in dataclasses.fields(TrainingRecord):
        if field.name not in ("seconds", *but):
            a, b = getattr(one, field.name), getattr(two, field.name)
            assert type(a) is type(b), field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype, field.name


def assert_same_weights(one: dlc.RunResult, two: dlc.RunResult) -> None:
    for a, b in zip(jax.tree.leaves(one.weights), jax.tree.leaves(two.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def results(monkeypatch) -> list[tuple[int, dlc.RunResult]]:
    """Takes seed and result of every run."""
    found, real = [], recorder.train

    def kept(trainer, positions, seed, *args, **kwargs):
        found.append((seed, real(trainer, positions, seed, *args, **kwargs)))
        return found[-1][1]

    monkeypatch.setattr(recorder, "train", kept)
    return found


@pytest.fixture(scope="module")
def head_record(sample_encoder, small_sample) -> TrainingRecord:
    return record_training(sample_encoder, small_sample, **HEAD)


@pytest.mark.slow
def test_a_recorded_run_is_the_run_of_finetune(sample_encoder, small_sample, results):
    record = record_training(
        sample_encoder, small_sample, **{**FAST, "record": RecordConfig(2, 0.5)}
    )
    assert [seed for seed, _ in results] == [3, 4]
    first, second = (result for _, result in results)
    assert [len(result.history) for _, result in results] == [4, 2]
    seconds = sum(result.seconds for _, result in results)
    alone = dlc.finetune(sample_encoder, small_sample, **RUN)
    assert_same_weights(first, alone)
    # correctness is that of the epochs' training views
    for epoch, line in enumerate(alone.history):
        assert line["train_accuracy"] == pytest.approx(100 * record.correct[epoch].mean())
    assert len({row.tobytes() for row in record.correct}) == 4
    # the others keep to the schedule of all epochs: nothing is decayed before epoch 3
    assert [line["learning_rate"] for line in second.history] == [0.05, 0.05]
    assert record.num_epochs == 6
    assert (record.early_epoch, record.batch_size) == (2, 16)
    assert record.seconds == pytest.approx(seconds, abs=0.1)

    for logits, squared_norms, result in (
        (record.logits, None, first),
        (record.early_logits[1], record.early_squared_norms[1], second),
    ):
        trained = dataclasses.replace(sample_encoder, params=result.weights["encoder"])
        feats = dlc.features(trained, small_sample, image_size=32)
        head = result.weights["head"]
        expected = feats @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        if squared_norms is not None:
            np.testing.assert_allclose(squared_norms, np.square(feats).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(record.labels, small_sample.labels)
    np.testing.assert_array_equal(record.ids, small_sample.ids)
    assert record.class_names == small_sample.class_names


class Listing(NamedTuple):
    """Takes what there is to see of every epoch."""

    last_epoch: int
    seen: list
    key = ()

    def __call__(self, *told):
        self.seen.append(told)


def test_the_early_epoch_of_the_first_run_is_that_of_a_run_that_ends_there(
    sample_encoder, small_sample, head_record
):
    """Alone, all three are equally long, and nothing but seed and epoch decides them."""
    settings = FinetuneConfig(epochs=4, batch_size=16, learning_rate=0.05, linear_probe=True)
    images = dlc.Images(small_sample, size=32)
    finetuner = Finetuner(sample_encoder, images, None, settings, Conventions.of("default"))
    positions = np.arange(60)
    for run, seed in enumerate((3, 4, 5)):
        seen = []
        train(finetuner, positions, seed, watch=Listing(2, seen))
        assert [epoch for epoch, _, _ in seen] == [1, 2]
        logits, squared_norms = finetuner.outputs(seen[-1][1], positions)
        np.testing.assert_array_equal(head_record.early_logits[run], logits)
        np.testing.assert_array_equal(head_record.early_squared_norms[run], squared_norms)
        if run == 0:
            for epoch, _, sums in seen:
                correct = head_record.correct[epoch - 1][epoch_order(positions, seed, epoch)]
                assert "".join("1" if one else "0" for one in correct) == sums["correct"]


def test_a_recorded_linear_probe_is_finetunes(sample_encoder, small_sample, head_record, results):
    again = record_training(sample_encoder, small_sample, **HEAD)
    assert_same(again, head_record)
    alone = dlc.finetune(sample_encoder, small_sample, settings=HEAD_ONLY, **RUN)
    assert_same_weights(results[0][1], alone)
    feats = dlc.features(sample_encoder, small_sample, image_size=32)
    for squared_norms in head_record.early_squared_norms:
        np.testing.assert_allclose(squared_norms, np.square(feats).sum(1), rtol=1e-5)
    accuracies = [line["train_accuracy"] for line in alone.history]
    np.testing.assert_allclose(100 * head_record.correct.mean(axis=1), accuracies)


def test_every_score_is_had_of_it(head_record):
    for method, entry in SCORES.items():
        if entry.of == "training":
            for variant in entry.variants:
                assert np.isfinite(score(head_record, method=method, variant=variant)).all()


@pytest.mark.parametrize(
    ("epochs", "fraction", "mode", "num_runs", "early"),
    [
        (50, 0.2, "default", None, (3, 10)),
        (50, 0.2, "official", None, (10, 10)),
        (1, 0.2, "default", 2, (2, 1)),
        (7, 1.0, "official", 1, (1, 7)),
    ],
)
def test_runs_and_early_epoch(
    sample_encoder, small_sample, epochs, fraction, mode, num_runs, early
):
    settings, record = FinetuneConfig(epochs=epochs), RecordConfig(num_runs, fraction)
    images, conventions = dlc.Images(small_sample), Conventions.of(mode)
    recorder = Recorder(sample_encoder, images, settings, record, seed=7, conventions=conventions)
    assert (len(recorder.seeds), recorder.early_epoch) == early
    assert recorder.seeds[0] == 7


def test_keys_tell_records_apart(sample_encoder, small_sample):
    def key(settings=None, seed=0, **record) -> str:
        settings = settings or FinetuneConfig(epochs=10)
        recorder = Recorder(
            sample_encoder,
            dlc.Images(small_sample),
            settings,
            RecordConfig(**record),
            seed=seed,
            conventions=Conventions.of("default"),
        )
        return json.dumps(recorder.key, sort_keys=True)

    others = [
        key(FinetuneConfig(epochs=11)),
        key(seed=1),
        key(num_runs=4),
        key(early_fraction=0.5),
    ]
    assert len({key(), *others}) == 5
    # what does not decide the record: 3 runs are the default, 0.21 of 10 epochs is 2 as well
    assert key(num_runs=3, early_fraction=0.21) == key()
    assert key(FinetuneConfig(epochs=10, test_every=5, keep_weights=False)) == key()


def test_one_epoch_is_early_and_last(sample_encoder, small_sample):
    arguments = {**HEAD, "epochs": 1, "record": RecordConfig(1, 0.1)}
    record = record_training(sample_encoder, small_sample, **arguments)
    np.testing.assert_array_equal(record.early_logits[0], record.logits)
    assert record.correct.shape == (1, 60)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_a_stopped_record_goes_on(
    sample_encoder, small_sample, head_record, tmp_path, monkeypatch, stop_at
):
    """The nth checkpoint of four, two and two is never written, though it was all observed."""
    real, saves = Checkpoints.save, []

    def stops(self, epoch, state, history):
        saves.append(epoch)
        if len(saves) == stop_at:
            raise Stopped
        real(self, epoch, state, history)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stops)
        with pytest.raises(Stopped):
            record_training(sample_encoder, small_sample, run=dlc.Run(tmp_path), **HEAD)
    assert not (tmp_path / "record.npz").exists()
    epochs, batches_of = [], Finetuner.batches

    def counted(self, positions, seed, epoch, first):
        epochs.append((seed, epoch))
        return batches_of(self, positions, seed, epoch, first)

    monkeypatch.setattr(Finetuner, "batches", counted)
    record = record_training(sample_encoder, small_sample, run=dlc.Run(tmp_path), **HEAD)
    assert_same(record, head_record)
    order = [(3, 1), (3, 2), (3, 3), (3, 4), (4, 1), (4, 2), (5, 1), (5, 2)]
    # the save before the failed one may not have been whole yet
    assert epochs in (order[stop_at - 1 :], order[max(stop_at - 2, 0) :])


def test_a_finished_record_is_read(
    sample_encoder, small_sample, head_record, tmp_path, monkeypatch, capsys
):
    record = record_training(sample_encoder, small_sample, run=dlc.Run(tmp_path), **HEAD)
    assert_same(record, head_record)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    each = ("", "/metrics.jsonl", "/per_class_accuracy.csv", "/run.json")
    runs = [f"seed_{seed}{name}" for seed in (3, 4, 5) for name in each]
    assert left == ["record.npz", "run.json", *runs]
    lines = (tmp_path / "seed_3" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[-1])["elapsed_s"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "batches", None)
        again = record_training(sample_encoder, small_sample, run=dlc.Run(tmp_path), **HEAD)
    assert_same(again, record)
    assert again.seconds == record.seconds
    for other in (
        {"seed": 4},
        {"record": RecordConfig(2, 0.5)},
        {"record": RecordConfig(3, 0.25)},
        {"epochs": 5},
    ):
        arguments = {**HEAD, **other, "run": dlc.Run(tmp_path)}
        with pytest.raises(dlc.InputError, match="holds a run with other"):
            record_training(sample_encoder, small_sample, **arguments)
    (tmp_path / "record.npz").write_bytes(b"PK\x03\x04 not all of it")
    capsys.readouterr()
    again = record_training(sample_encoder, small_sample, run=dlc.Run(tmp_path), **HEAD)
    assert_same(again, head_record)
    said = capsys.readouterr().out
    assert f"note: {tmp_path}/record.npz: does not have the content that was written" in said


@pytest.mark.slow
def test_a_killed_process_goes_on(sample_encoder, small_sample, head_record, tmp_path):
    """Killed outright, wherever it is, when it has just seen the third epoch."""
    arguments = {**HEAD, "epochs": 30, "record": RecordConfig(1, 0.5)}
    script = f"""
import numpy as np
import dlc_jax as dlc
from dlc_jax.training.images import FinetuneConfig, RecordConfig, record_training

sample = dlc.load_dataset("demo:caltech15/train")
some = np.concatenate([np.flatnonzero(sample.labels == j)[:4] for j in range(15)])
encoder = dlc.load_encoder("resnet18", "demo:resnet18")
arguments = {arguments!r}
record_training(encoder, sample.subset(some), run=dlc.Run({str(tmp_path)!r}), **arguments)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "seed_3/seen/correct_3.npy").exists():
            assert process.poll() is None, "ended early"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    resumed = record_training(sample_encoder, small_sample, run=dlc.Run(tmp_path), **arguments)
    assert_same(resumed, record_training(sample_encoder, small_sample, **arguments))


def test_unreadable_images(sample_encoder, small_sample, tmp_path):
    images = [small_sample[i].image for i in range(60)]
    images[11] = images[11][:500]
    broken = dlc.Dataset(images, small_sample.labels, small_sample.ids, small_sample.class_names)
    name = str(small_sample.ids[11])
    with pytest.raises(dlc.InputError, match=name):
        record_training(sample_encoder, broken, **HEAD)
    images = dlc.Images(broken, on_corrupt="skip")
    record = record_training(sample_encoder, images, **HEAD)
    assert list(record.skipped) == [name]
    whole = small_sample.subset(np.setdiff1d(np.arange(60), [11]))
    assert_same(record, record_training(sample_encoder, whole, **HEAD), but=("skipped",))
    images = dataclasses.replace(images, cache=dlc.ImageCache(str(tmp_path / "cache")))
    for _ in range(2):
        run = dlc.Run(tmp_path / "record")
        kept = record_training(sample_encoder, images, run=run, **HEAD)
        assert_same(kept, record)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"record": RecordConfig(num_runs=0)}, r"record\.num_runs: must be >= 1"),
        ({"record": RecordConfig(3, 0.0)}, r"record\.early_fraction: must be > 0"),
        ({"record": RecordConfig(3, 1.1)}, r"record\.early_fraction: must be <= 1"),
        ({"record": RecordConfig(3, float("nan"))}, r"record\.early_fraction"),
        ({"epochs": 0}, r"finetune\.epochs: recording needs 1 or more"),
        ({"epochs": -1}, r"finetune\.epochs: must be >= 0"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"seed": 2**32 - 2}, "seed of the last run: expected an integer"),
        ({"mode": "offical"}, "Did you mean 'official'"),
        ({"image_size": 4}, r"encoder\.image_size"),
        ({"learning_rate": 1e30, "settings": HEAD_ONLY}, "not finite"),
    ],
)
def test_values_out_of_range(sample_encoder, small_sample, arguments, says):
    with pytest.raises(dlc.InputError, match=says):
        record_training(sample_encoder, small_sample, **{**FAST, **arguments})


def test_what_to_do_with_unreadable_images_is_checked(sample_encoder, small_sample):
    with pytest.raises(dlc.InputError, match=r"dataset\.on_corrupt"):
        record_training(sample_encoder, dlc.Images(small_sample, on_corrupt="ignore"), **FAST)


def test_defaults_are_those_of_finetune_and_the_configuration():
    import inspect

    parameters = inspect.signature(record_training).parameters
    theirs = inspect.signature(dlc.finetune).parameters
    for name in parameters.keys() & theirs.keys() - {"seed"}:
        assert parameters[name].default == theirs[name].default, name
    assert parameters["settings"].default == FinetuneConfig()
    assert parameters["record"].default == RecordConfig() == RecordConfig(None, 0.2)
    assert parameters["seed"].default == 0
    assert set(theirs) - set(parameters) == {"kept", "test", "folder"}
    assert set(parameters) - set(theirs) == {"record", "progress"}
