"""A fine-tuning run through the public function."""

import csv
import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import power_cut, subset

import dlc_jax as dlc
from dlc_jax.expect import csv_text
from dlc_jax.preprocess.images import load_images
from dlc_jax.probes.kernel import features_of_batch
from dlc_jax.training.images import FinetuneConfig, Finetuner
from dlc_jax.training.images.data import RunData
from dlc_jax.training.images.step import Network, initial_head, train_step
from dlc_jax.training.loop import write_per_class
from dlc_jax.types import by_path

FAST = {"image_size": 32, "epochs": 2, "batch_size": 16, "learning_rate": 0.05, "seed": 3}
HEAD_ONLY = FinetuneConfig(linear_probe=True)


@pytest.fixture(scope="module")
def test_set():
    whole = dlc.load_dataset("demo:caltech15/test")
    return whole.subset(np.arange(0, 300, 4))


@pytest.fixture(scope="module")
def result(sample_encoder, small_sample, test_set):
    return dlc.finetune(sample_encoder, small_sample, test=test_set, **FAST)


def same_weights(a: dlc.RunResult, b: dlc.RunResult) -> bool:
    pairs = zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_accuracies_follow_from_the_predictions(result, test_set, small_sample):
    right = result.predictions == test_set.labels
    assert result.test_accuracy == pytest.approx(100 * right.mean())
    for label in range(15):
        expected = 100 * right[test_set.labels == label].mean()
        assert result.per_class_accuracy[label] == pytest.approx(expected)
    assert result.num_kept == 60
    assert result.absent_classes == ()
    assert [line["epoch"] for line in result.history] == [1, 2]
    # 2 epochs: both fall into the milestones floor(0.5 x 2) = 1 and floor(0.75 x 2) = 1
    assert [line["learning_rate"] for line in result.history] == pytest.approx([0.05, 0.0005])
    assert "test_accuracy" not in result.history[0]
    assert result.history[1]["test_accuracy"] == result.test_accuracy
    assert 0 < result.history[0]["train_loss"] < 4
    assert all(line["images_per_s"] > 0 for line in result.history)


def test_weights_give_the_predictions_through_the_api(result, sample_encoder, test_set):
    """The trained encoder is an encoder: its features and the head give the predictions."""
    trained = dataclasses.replace(sample_encoder, params=result.weights["encoder"])
    feats = dlc.features(trained, test_set, image_size=32)
    logits = feats @ np.asarray(result.weights["head"]["kernel"]) + result.weights["head"]["bias"]
    np.testing.assert_array_equal(logits.argmax(axis=1), result.predictions)


def test_same_seed_same_bits_other_seed_other_run(result, sample_encoder, small_sample, test_set):
    again = dlc.finetune(sample_encoder, small_sample, test=test_set, **FAST)
    assert same_weights(again, result)
    assert again.history[-1]["train_loss"] == result.history[-1]["train_loss"]
    other = dlc.finetune(sample_encoder, small_sample, test=test_set, **{**FAST, "seed": 4})
    assert not same_weights(other, result)
    # without memory for decoded images: read again in each epoch, same pixels
    settings = FinetuneConfig(image_memory_gib=0.0)
    frugal = dlc.finetune(sample_encoder, small_sample, test=test_set, settings=settings, **FAST)
    assert same_weights(frugal, result)


def batches_of(dataset: dlc.Dataset, values: np.ndarray, positions, seed: int, epoch: int):
    """Returns the batches of 16 of an epoch, with these values instead of images."""
    data = RunData(dlc.Images(dataset, 32), FinetuneConfig(batch_size=16), np.asarray, False)
    data.training_inputs = lambda *_: lambda where, epoch: values[where]
    return data.batches(positions, seed, epoch, 0, range(16))


def test_the_order_is_a_permutation_that_seed_and_epoch_decide(small_sample):
    positions = np.arange(5, 45)

    def order(seed: int, epoch: int) -> list[int]:
        batches = batches_of(small_sample, np.arange(60), positions, seed, epoch)
        return [int(value) for batch in batches for value in batch.inputs[batch.real > 0]]

    assert sorted(order(1, 1)) == positions.tolist()
    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)
    assert order(1, 1)[:4] == [5, 41, 9, 10]  # pinned: stored runs must be found again


@pytest.mark.slow
def test_runs_of_any_size_share_one_program(sample_encoder, small_sample):
    before = train_step._cache_size()
    for kept in (np.arange(60), np.arange(0, 60, 3), np.arange(5)):
        dlc.finetune(sample_encoder, small_sample, kept, **{**FAST, "batch_size": 12})
    assert train_step._cache_size() - before <= 1


def test_no_epochs_only_test(sample_encoder, small_sample, test_set):
    result = dlc.finetune(sample_encoder, small_sample, test=test_set, **{**FAST, "epochs": 0})
    assert result.history == [{"epoch": 0, "test_accuracy": result.test_accuracy}]
    for path, leaf in by_path(sample_encoder.params).items():
        np.testing.assert_array_equal(by_path(result.weights["encoder"])[path], leaf)
    head = initial_head(128, 15, "mean", 3)
    np.testing.assert_array_equal(result.weights["head"]["kernel"], head["kernel"])
    assert 0 <= result.test_accuracy < 40


def test_tests_in_between_do_not_change_the_run(result, sample_encoder, small_sample, test_set):
    settings = FinetuneConfig(test_every=1)
    tested = dlc.finetune(sample_encoder, small_sample, test=test_set, settings=settings, **FAST)
    assert same_weights(tested, result)
    assert all("test_accuracy" in line for line in tested.history)
    untested = dlc.finetune(sample_encoder, small_sample, **FAST)
    assert same_weights(untested, result)
    assert (untested.test_accuracy, untested.predictions) == (None, None)


def test_a_linear_probe_is_torchs_on_the_same_features(
    timm, sample_encoder, small_sample, test_set
):
    import torch

    arguments = {**FAST, "epochs": 20, "learning_rate": 0.03}
    result = dlc.finetune(
        sample_encoder, small_sample, test=test_set, settings=HEAD_ONLY, **arguments
    )
    for path, leaf in by_path(sample_encoder.params).items():
        np.testing.assert_array_equal(by_path(result.weights["encoder"])[path], leaf)
    feats = dlc.features(sample_encoder, small_sample, image_size=32)
    start = initial_head(feats.shape[1], 15, "mean", 3)
    head = torch.nn.Linear(feats.shape[1], 15)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(start["kernel"].T))
        head.bias.copy_(torch.from_numpy(start["bias"]))
    optimiser = torch.optim.SGD(
        head.parameters(), 0.03, momentum=0.9, weight_decay=1e-5, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [10, 15])
    for epoch in range(1, 21):
        for batch in batches_of(small_sample, feats, np.arange(60), 3, epoch):
            rows = batch.real > 0
            loss = torch.nn.functional.cross_entropy(
                head(torch.from_numpy(batch.inputs[rows])),
                torch.from_numpy(batch.labels[rows]).long(),
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        scheduler.step()
    np.testing.assert_allclose(
        result.weights["head"]["kernel"], head.weight.detach().numpy().T, atol=1e-4
    )
    assert result.test_accuracy > 30  # chance is 6.7


def test_without_augmentation_every_epoch_sees_the_evaluation_crops(sample_encoder, small_sample):
    settings = FinetuneConfig(augment=False)
    plain = dlc.finetune(sample_encoder, small_sample, settings=settings, **FAST)
    augmented = dlc.finetune(sample_encoder, small_sample, **FAST)
    assert not same_weights(plain, augmented)
    positions = np.array([7, 3, 50])
    expected = load_images(small_sample, 32).pixels[positions]
    for augment in (False, True):
        data = RunData(
            dlc.Images(small_sample, size=32),
            settings=FinetuneConfig(augment=augment),
            to_features=lambda images: images,
            progress=False,
        )
        inputs = data.training_inputs(positions, seed=0)
        same = [np.array_equal(inputs(positions, epoch), expected) for epoch in (1, 2)]
        assert same == [not augment] * 2


@pytest.mark.slow
def test_vits_are_trained_on_their_class_token(timm, tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = dlc.load_encoder("vit_small_patch16_224", str(tmp_path))
    assert encoder.head == "cls"
    for mode in ("default", "official"):  # official scores by one scalar; its head is timm's
        assert Network.of(encoder.for_mode(mode), "float32").forward.pooling == "cls"
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    found = features_of_batch(Network.of(encoder, "float32").forward, encoder.params, images)
    assert found.shape == (2, 384)


def test_classes_of_the_test_set_go_by_name(sample_encoder, small_sample, test_set):
    """A test split that lacks a class numbers the others differently."""
    some = test_set.subset(np.flatnonzero(test_set.labels >= 3))
    renamed = dataclasses.replace(some, labels=some.labels - 3, class_names=some.class_names[3:])
    one = dlc.finetune(sample_encoder, small_sample, test=some, **FAST)
    two = dlc.finetune(sample_encoder, small_sample, test=renamed, **FAST)
    assert one.test_accuracy == two.test_accuracy
    assert np.isnan(one.per_class_accuracy[:3]).all()
    unknown = dataclasses.replace(renamed, class_names=("zebra", *renamed.class_names[1:]))
    with pytest.raises(ValueError, match=r"dataset\.test: .* has classes that .* 'zebra'"):
        dlc.finetune(sample_encoder, small_sample, test=unknown, **FAST)


def selection(dataset: dlc.Dataset, ids: bool = False, seed: int = 0) -> dlc.Selection:
    scores = np.random.default_rng(seed).normal(size=len(dataset))
    return dlc.select(
        scores,
        dataset.labels,
        keep_fraction=0.5,
        seed=7,
        ids=dataset.ids if ids else None,
    )


def test_a_selection_is_trained_on_with_its_seed(sample_encoder, small_sample):
    kept = selection(small_sample)
    arguments = {key: value for key, value in FAST.items() if key != "seed"}
    one = dlc.finetune(sample_encoder, small_sample, kept, **arguments)
    two = dlc.finetune(sample_encoder, small_sample, kept.indices, seed=7, **arguments)
    assert same_weights(one, two)
    assert one.num_kept == len(kept) == 30


def test_a_selection_with_ids_is_found_in_any_order(sample_encoder, small_sample):
    kept = selection(small_sample, ids=True)
    backwards = small_sample.subset(np.arange(60)[::-1])
    result = dlc.finetune(sample_encoder, backwards, kept, **FAST)
    expected = dlc.finetune(sample_encoder, backwards, np.sort(59 - kept.indices), **FAST)
    assert same_weights(result, expected)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (np.array([0, 60]), "kept: 1 positions are out of range, first 60; expected 0..59"),
        (np.array([-1, 3]), "out of range, first -1"),
        (np.array([3, 4, 3]), "kept: 1 occur more than once, first 3"),
        (np.array([], int), "kept: is empty, expected one or more positions"),
        (np.array([0.5, 1.0]), "expected one or more positions, integers"),
        (np.ones((2, 2), int), "expected one or more positions"),
    ],
)
def test_kept_positions_that_cannot_be(sample_encoder, small_sample, kept, says):
    with pytest.raises(ValueError, match=says):
        dlc.finetune(sample_encoder, small_sample, kept, **FAST)


def test_selections_of_another_data_set_are_refused(sample_encoder, small_sample, sample):
    other = sample.subset(np.flatnonzero(np.arange(750) % 50 < 5)[:60])
    with pytest.raises(ValueError, match=r"selected from other labels .*fingerprint"):
        dlc.finetune(sample_encoder, small_sample, selection(other), **FAST)
    # as many of each class, but other images: only ids can tell
    twin = sample.subset(np.flatnonzero((np.arange(750) % 50 >= 10) & (np.arange(750) % 50 < 14)))
    np.testing.assert_array_equal(twin.labels, small_sample.labels)
    with pytest.raises(ValueError, match=r"30 of 30 kept samples are not in subset"):
        dlc.finetune(sample_encoder, small_sample, selection(twin, ids=True), **FAST)
    relabelled = dataclasses.replace(small_sample, labels=np.roll(small_sample.labels, 1))
    with pytest.raises(ValueError, match="made from another data set"):
        dlc.finetune(sample_encoder, relabelled, selection(small_sample, ids=True), **FAST)
    repeated = dataclasses.replace(
        selection(small_sample), indices=np.repeat(selection(small_sample).indices[::2], 2)
    )
    with pytest.raises(ValueError, match="more than once"):
        dlc.finetune(sample_encoder, small_sample, repeated, **FAST)


def test_a_class_that_is_not_kept_is_reported(sample_encoder, small_sample, test_set):
    kept = np.flatnonzero((small_sample.labels != 2) & (small_sample.labels != 9))
    result = dlc.finetune(sample_encoder, small_sample, kept, test=test_set, **FAST)
    names = small_sample.class_names
    assert result.absent_classes == (names[2], names[9])


def test_a_loss_that_is_not_finite_names_step_rate_and_remedy(
    sample_encoder, small_sample, tmp_path
):
    arguments = {**FAST, "learning_rate": 1e25, "epochs": 4}
    with pytest.raises(ValueError, match=r"not finite, at step \d+, learning rate 1e\+25; try a"):
        dlc.finetune(sample_encoder, small_sample, folder=tmp_path, **arguments)
    assert not list((tmp_path / "checkpoint").glob("[0-9]*"))


@pytest.mark.slow
def test_one_step_that_ruins_the_weights_is_not_returned(sample_encoder, small_sample):
    """The loss of the only step is fine; what the step leaves is not."""
    settings = FinetuneConfig(weight_decay=100.0, milestones=())
    arguments = {**FAST, "learning_rate": 3e38, "epochs": 1, "batch_size": 60, "settings": settings}
    with pytest.raises(ValueError, match=r"weights that are not finite, at step 1, "):
        dlc.finetune(sample_encoder, small_sample, **arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"epochs": -1}, "finetune.epochs: must be >= 0"),
        ({"batch_size": 0}, "finetune.batch_size: must be >= 1"),
        ({"learning_rate": 0.0}, "finetune.learning_rate: must be > 0"),
        ({"learning_rate": float("nan")}, "finetune.learning_rate"),
        ({"settings": FinetuneConfig(milestones=(1.5,))}, "finetune.milestones: must be <= 1"),
        ({"settings": FinetuneConfig(momentum=1.0)}, "finetune.momentum: must be < 1"),
        ({"settings": FinetuneConfig(momentum=0.0)}, "finetune.nesterov: needs a momentum"),
        ({"settings": FinetuneConfig(weight_decay=-1.0)}, "finetune.weight_decay"),
        ({"settings": FinetuneConfig(dtype="float16")}, "finetune.dtype"),
        ({"mode": "offical"}, "Did you mean 'official'"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"image_size": 4}, "encoder.image_size"),
    ],
)
def test_values_out_of_range(sample_encoder, small_sample, arguments, says):
    with pytest.raises(ValueError, match=says):
        dlc.finetune(sample_encoder, small_sample, **{**FAST, **arguments})


def test_an_empty_selection_says_why(sample_encoder, small_sample):
    for ids in (None, small_sample.ids):
        kept = dlc.select(np.arange(60.0), small_sample.labels, keep_fraction=0.1, ids=ids)
        assert len(kept) == 0
        with pytest.raises(ValueError, match=r"flexrand at keep fraction 0\.1 keeps no sample"):
            dlc.finetune(sample_encoder, small_sample, kept, **FAST)


@pytest.mark.slow
def test_a_last_batch_of_one_is_refused_where_batch_norm_sees_one_value(
    sample_encoder, small_sample
):
    """As torch does: "Expected more than 1 value per channel when training"."""
    kept = np.arange(17)
    with pytest.raises(ValueError, match=r"finetune\.batch_size: 16 leaves a last batch of one"):
        dlc.finetune(sample_encoder, small_sample, kept, **FAST)
    dlc.finetune(sample_encoder, small_sample, kept, **{**FAST, "image_size": 64, "epochs": 1})
    dlc.finetune(sample_encoder, small_sample, kept, settings=HEAD_ONLY, **FAST)


@pytest.mark.long
def test_official_mode_and_bfloat16_through_a_whole_run(
    sample_encoder, small_sample, test_set, tmp_path
):
    arguments = {**FAST, "epochs": 3}
    official = dlc.finetune(
        sample_encoder, small_sample, test=test_set, mode="official", **arguments
    )
    # 1.5 and 2.25 never come; default decays after epochs 1 and 2
    assert [line["learning_rate"] for line in official.history] == [0.05] * 3
    coarse = dlc.finetune(
        sample_encoder,
        small_sample,
        test=test_set,
        settings=FinetuneConfig(dtype="bfloat16"),
        folder=tmp_path,
        **arguments,
    )
    exact = dlc.finetune(sample_encoder, small_sample, test=test_set, **arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse.weights)} == {np.dtype("float32")}
    losses = [[line["train_loss"] for line in r.history] for r in (coarse, exact)]
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[0] != losses[1]


def test_half_precision_encoders_are_trained_in_float32(small_sample):
    weights = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (3, 16)), jnp.bfloat16)
    encoder = dlc.Encoder(
        {"w": weights}, lambda params, images: images.mean((1, 2)) @ params["w"], lambda path: True
    )
    result = dlc.finetune(encoder, small_sample, **{**FAST, "learning_rate": 1e-6})
    trained = result.weights["encoder"]["w"]
    assert trained.dtype == jnp.float32
    assert not np.array_equal(trained, weights.astype(jnp.float32))  # in bfloat16 it would be


def test_a_linear_probe_on_disk_goes_on(sample_encoder, small_sample, tmp_path, monkeypatch):
    arguments = {**FAST, "epochs": 4, "settings": HEAD_ONLY}
    undisturbed = dlc.finetune(sample_encoder, small_sample, **arguments)
    real = Finetuner.batches

    def stops(self, positions, seed, epoch, first):
        if epoch == 3:
            raise KeyboardInterrupt
        return real(self, positions, seed, epoch, first)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "batches", stops)
        with pytest.raises(KeyboardInterrupt):
            dlc.finetune(sample_encoder, small_sample, folder=tmp_path, **arguments)
    resumed = dlc.finetune(sample_encoder, small_sample, folder=tmp_path, **arguments)
    assert same_weights(resumed, undisturbed)


@pytest.mark.slow
def test_what_users_loops_hand_over(tmp_path):
    """NumPy's numbers; in a process without the run-time checks of annotations."""
    script = f"""
import numpy as np
import dlc_jax as dlc

dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 25))
encoder = dlc.load_encoder("resnet18", "demo:resnet18")
arguments = dict(image_size=32, epochs=1, batch_size=np.int64(16), learning_rate=np.float32(0.1))
for seed in np.arange(2):
    dlc.finetune(encoder, dataset, seed=seed, folder=f"{tmp_path}/{{seed}}", **arguments)
try:
    dlc.finetune(encoder, dataset, **{{**arguments, "epochs": 1.5}})
except ValueError as error:
    assert "finetune.epochs: expected an integer, got 1.5" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "1" / "metrics.jsonl").exists()


def test_folders_that_cannot_be_used(sample_encoder, small_sample, tmp_path):
    with pytest.raises(ValueError, match="folder: cannot write to /proc/nowhere: "):
        dlc.finetune(sample_encoder, small_sample, folder="/proc/nowhere", **FAST)
    dlc.finetune(sample_encoder, small_sample, folder=tmp_path, **{**FAST, "epochs": 0})
    other = dataclasses.replace(sample_encoder, head="cls")
    with pytest.raises(ValueError, match="holds a run with other"):
        dlc.finetune(other, small_sample, folder=tmp_path, **{**FAST, "epochs": 0})


def test_mistakes_of_kind_are_told(sample_encoder, small_sample):
    """In a process without the run-time checks of annotations."""
    script = """
import numpy as np
import dlc_jax as dlc
dataset = dlc.load_dataset("demo:caltech15/train")
encoder = dlc.load_encoder("resnet18", "demo:resnet18")
for arguments, says in (
    (dict(images="folder:x"), "images: expected a Dataset"),
    (dict(test="folder:x"), "test: expected a Dataset"),
    (dict(learning_rate="0.1"), "finetune.learning_rate: expected a number, got '0.1'"),
    (dict(settings=dlc.FinetuneConfig(milestones="half")), "finetune.milestones: expected a num"),
    (dict(settings={"epochs": 1}), "settings: expected dlc.FinetuneConfig(...), got {"),
    (dict(run="folder"), "run: expected dlc.Run(...), got 'folder'"),
    (dict(kept=[]), "kept: is empty"),
    (dict(kept=[True] * 750), "kept: is a mask"),
):
    try:
        dlc.finetune(encoder, **{"images": dataset, "image_size": 32, **arguments})
    except dlc.InputError as error:
        assert says in str(error), error
    else:
        raise AssertionError(says)
settings = dlc.FinetuneConfig(epochs=0, milestones=0.5)
for milestones in ([0.5], np.array([0.5]), np.float64(0.5)):
    assert dlc.FinetuneConfig(epochs=0, milestones=milestones) == settings
assert settings.milestones == (0.5,)
result = dlc.finetune(encoder, dataset, [0, 50], image_size=32, settings=settings)
assert len(repr(result)) < 1000
assert len(repr(encoder)) < 1000
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_statistics_that_are_not_there_are_refused(sample_encoder):
    with pytest.raises(ValueError, match=r"Did you mean 'bn1/mean'"):
        dataclasses.replace(sample_encoder, statistics=frozenset({"bn1/mena"}))


def test_an_unreadable_training_image_is_named(sample_encoder, small_sample):
    images = [small_sample[i].image for i in range(60)]
    images[11] = images[11][:500]
    broken = dlc.Dataset(images, small_sample.labels, small_sample.ids, small_sample.class_names)
    with pytest.raises(ValueError, match=f"sample '{small_sample.ids[11]}' is not a readable"):
        dlc.finetune(sample_encoder, broken, **FAST)
    whole = np.setdiff1d(np.arange(60), [11])
    dlc.finetune(sample_encoder, broken, whole, **{**FAST, "epochs": 1})


def test_a_run_on_disk_goes_on_where_it_stopped(
    sample_encoder, small_sample, test_set, tmp_path, monkeypatch
):
    arguments = {**FAST, "epochs": 4}
    undisturbed = dlc.finetune(
        sample_encoder, small_sample, test=test_set, folder=tmp_path / "a", **arguments
    )
    real = Finetuner.batches
    with power_cut(epoch=3):
        dlc.finetune(
            sample_encoder, small_sample, test=test_set, folder=tmp_path / "b", **arguments
        )
    epochs = []

    def counted(self, positions, seed, epoch, first):
        epochs.append(epoch)
        return real(self, positions, seed, epoch, first)

    monkeypatch.setattr(Finetuner, "batches", counted)
    resumed = dlc.finetune(
        sample_encoder, small_sample, test=test_set, folder=tmp_path / "b", **arguments
    )
    assert epochs == [3, 4]
    assert same_weights(resumed, undisturbed)
    assert resumed.test_accuracy == undisturbed.test_accuracy
    timing = ("images_per_s", "elapsed_s")
    for a, b in zip(resumed.history, undisturbed.history, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
    table = (tmp_path / "b" / "per_class_accuracy.csv").read_text()
    assert table == (tmp_path / "a" / "per_class_accuracy.csv").read_text()
    assert table.splitlines()[0] == "label,class_name,num_test,test_accuracy"
    assert len(table.splitlines()) == 16
    # finished: nothing is trained again
    finished = dlc.finetune(
        sample_encoder, small_sample, test=test_set, folder=tmp_path / "b", **arguments
    )
    assert epochs == [3, 4]
    assert same_weights(finished, undisturbed)
    with pytest.raises(ValueError, match="holds a run with other data"):
        dlc.finetune(
            sample_encoder, small_sample, folder=tmp_path / "b", **{**arguments, "seed": 9}
        )


def test_defaults_are_the_papers_in_function_and_configuration():
    import inspect

    parameters = inspect.signature(dlc.finetune).parameters
    assert parameters["settings"].default == FinetuneConfig()
    shared = {field.name for field in dataclasses.fields(FinetuneConfig)} & {*parameters}
    assert shared == {"epochs", "batch_size", "learning_rate"}
    for name in shared:
        assert parameters[name].default is None, name
    paper = {
        "epochs": 50,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "milestones": (0.5, 0.75),
        "weight_decay": 1e-5,
        "momentum": 0.9,
        "nesterov": True,
    }
    assert {key: getattr(FinetuneConfig(), key) for key in paper} == paper


@pytest.mark.slow
def test_keywords_go_before_settings(sample_encoder, small_sample, tmp_path):
    settings = FinetuneConfig(epochs=3, batch_size=30, learning_rate=0.01, milestones=(0.5,))
    settings = dataclasses.replace(settings, linear_probe=True)
    kept, run = np.arange(12), dlc.Run(tmp_path / "run")
    one = dlc.finetune(
        sample_encoder, small_sample, kept, image_size=32, epochs=2, settings=settings, run=run
    )
    assert [line["learning_rate"] for line in one.history] == pytest.approx([0.01, 0.001])
    assert (tmp_path / "run" / "run.json").exists()
    images = dlc.Images(small_sample, size=32)
    two = dlc.finetune(
        sample_encoder,
        images,
        kept,
        batch_size=5,
        learning_rate=0.02,
        folder=tmp_path / "folder",
        settings=settings,
        run=run,
    )
    assert [line["learning_rate"] for line in two.history] == pytest.approx([0.02, 0.002, 0.002])
    assert (tmp_path / "folder" / "run.json").exists()
    for batch_size, is_same in ((5, True), (30, False)):
        settings = dataclasses.replace(settings, batch_size=batch_size, learning_rate=0.02)
        three = dlc.finetune(sample_encoder, images, kept, settings=settings)
        kernels = [result.weights["head"]["kernel"] for result in (two, three)]
        assert np.array_equal(*kernels) == is_same


def test_subsets_of_a_data_set(small_sample):
    some = small_sample.subset(np.array([50, 3]))
    assert [s.id for s in (some[0], some[1])] == small_sample.ids[[50, 3]].tolist()
    assert some[0].image == small_sample[50].image
    assert some.class_names == small_sample.class_names
    same = subset(small_sample, np.array([50, 3]))
    np.testing.assert_array_equal(some.labels, same.labels)
    assert some.fingerprint == same.fingerprint
    for bad in ([0, 60], [1, 1], []):
        with pytest.raises(ValueError, match="subset: "):
            small_sample.subset(np.array(bad, int))


def test_class_names_are_no_formulas_and_no_controls_in_the_table(tmp_path):
    accuracy = np.array([100.0, 0.0, 50.0])
    result = dlc.RunResult(60.0, accuracy, None, 3, (), [], {}, 1.0)
    class_names = ("=HYPERLINK(1)", "a\x1b[2J\nb", "'@x")
    write_per_class(tmp_path, result, class_names, np.array([1, 2, 2]))
    with open(tmp_path / "per_class_accuracy.csv", newline="") as file:
        names = [row["class_name"] for row in csv.DictReader(file)]
    assert names == ["'=HYPERLINK(1)", r"a\x1b[2J\nb", "''@x"]
    assert list(map(csv_text, names)) == ["=HYPERLINK(1)", r"a\x1b[2J\nb", "'@x"]
