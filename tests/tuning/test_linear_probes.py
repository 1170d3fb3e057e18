"""The heads trained in one program are those that are trained one by one."""

import dataclasses

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.tuning import linear as module

SETTINGS = dlc.LinearProbeConfig(
    epochs=4, batch_size=16, learning_rate=0.05, milestones=(0.5, 0.75), weight_decay=1e-2
)


@pytest.fixture(scope="module")
def data():
    """Features of three classes that overlap, and a part of them to validate on."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 230)
    features = generator.normal(size=(230, 12)) + 1.2 * generator.normal(size=(3, 12))[labels]
    features = features.astype(np.float32)
    return features[:150], labels[:150], features[150:], labels[150:]


def probes_of(data, kept, **arguments):
    features, labels, val_features, val_labels = data
    arguments = {"settings": SETTINGS} | arguments
    return dlc.linear_probes(
        features, labels, kept, val_features=val_features, val_labels=val_labels, **arguments
    )


def cells(labels, **choices) -> list[dlc.Selection]:
    scores = np.random.default_rng(1).normal(size=len(labels))
    return [
        dlc.select(scores, labels, keep_fraction=keep, split=split, seed=seed)
        for keep in choices.get("keeps", (0.07, 0.3, 0.5, 0.95))
        for split in choices.get("splits", (0.2, 0.7))
        for seed in choices.get("seeds", (0, 5))
    ]


def torch_head(features, labels, order_of, start, settings, rates):
    """torch.nn.Linear under torch.optim.SGD and MultiStepLR's rates."""
    import torch

    head = torch.nn.Linear(features.shape[1], start["bias"].size)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(start["kernel"].T))
        head.bias.copy_(torch.tensor(start["bias"]))
    optimiser = torch.optim.SGD(
        head.parameters(),
        lr=1,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
    for epoch, rate in enumerate(rates, start=1):
        optimiser.param_groups[0]["lr"] = rate
        order = order_of(epoch)
        for some in np.split(order, range(settings.batch_size, len(order), settings.batch_size)):
            loss = torch.nn.functional.cross_entropy(
                head(torch.tensor(features[some])), torch.tensor(labels[some])
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return head.weight.detach().numpy().T, head.bias.detach().numpy()


@pytest.mark.parametrize("nesterov", [True, False])
def test_each_head_is_the_one_that_torch_trains(data, nesterov):
    features, labels, val_features, val_labels = data
    settings = dataclasses.replace(SETTINGS, nesterov=nesterov)
    kept = cells(labels)
    found = probes_of(data, kept, settings=settings)
    rates = [0.05, 0.05, 0.005, 0.0005]
    for number, cell in enumerate(kept):
        start = module.initial_head(12, 3, "mean", cell.seed)

        def order_of(epoch, cell=cell):
            return np.random.default_rng([cell.seed, epoch]).permutation(cell.indices)

        kernel, bias = torch_head(features, labels, order_of, start, settings, rates)
        np.testing.assert_allclose(found.heads["kernel"][number], kernel, atol=2e-6)
        np.testing.assert_allclose(found.heads["bias"][number], bias, atol=2e-6)
        right = (val_features @ kernel + bias).argmax(axis=1) == val_labels
        assert found.accuracy[number] == pytest.approx(100 * right.mean())
    assert found.num_kept.tolist() == [len(cell) for cell in kept]
    assert len(np.unique(found.accuracy)) > 3  # or the comparison would say little


def test_each_head_is_the_one_that_finetune_trains(sample, sample_encoder):
    """On real features, through decoding and all."""
    some = sample.subset(np.arange(0, 750, 5))
    test = sample.subset(np.arange(1, 750, 15))
    features = dlc.features(sample_encoder, some, image_size=32)
    kept = cells(some.labels, keeps=(0.3, 0.8), splits=(0.4,), seeds=(2,))
    found = dlc.linear_probes(
        features,
        some.labels,
        kept,
        val_features=dlc.features(sample_encoder, test, image_size=32),
        val_labels=test.labels,
        settings=SETTINGS,
    )
    options = {key: getattr(SETTINGS, key) for key in ("epochs", "batch_size", "learning_rate")}
    for number, cell in enumerate(kept):
        alone = dlc.finetune(
            sample_encoder,
            some,
            cell,
            test=test,
            image_size=32,
            settings=dlc.FinetuneConfig(
                linear_probe=True, weight_decay=SETTINGS.weight_decay, **options
            ),
        )
        kernel = np.asarray(alone.weights["head"]["kernel"])
        np.testing.assert_allclose(found.heads["kernel"][number], kernel, atol=1e-5)
        assert found.accuracy[number] == pytest.approx(alone.test_accuracy)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 3},
        {"memory_mib": 0.02},
        pytest.param({"memory_mib": 1e-9}, marks=pytest.mark.slow),
    ],
)
def test_how_they_are_put_together_changes_nothing(data, changes):
    kept = cells(data[1])
    plain = probes_of(data, kept)
    other = probes_of(data, kept, settings=dataclasses.replace(SETTINGS, **changes))
    np.testing.assert_allclose(other.heads["kernel"], plain.heads["kernel"], atol=1e-6)
    np.testing.assert_array_equal(other.correct, plain.correct)
    alone = [probes_of(data, [cell]) for cell in kept]
    np.testing.assert_allclose(
        plain.heads["kernel"], np.concatenate([one.heads["kernel"] for one in alone]), atol=1e-6
    )


def test_all_cells_of_a_sweep_are_one_compilation(data, monkeypatch):
    labels = data[1]
    kept = cells(
        labels,
        keeps=np.arange(1, 10) / 10,
        splits=np.arange(1, 20) * 0.05,
        seeds=(0, 1, 2),
    )
    assert len(kept) == 9 * 19 * 3
    module.train_epoch.clear_cache()
    settings = dataclasses.replace(SETTINGS, epochs=2, memory_mib=1.0)
    found = probes_of(data, kept, settings=settings)
    assert module.train_epoch._cache_size() == 1
    assert found.correct.shape == (513, 80)
    some = np.random.default_rng(0).choice(513, 5, replace=False)
    for number in some:
        alone = probes_of(data, [kept[number]], settings=settings)
        np.testing.assert_allclose(
            found.heads["kernel"][number], alone.heads["kernel"][0], atol=1e-6
        )


def test_seeds_are_those_of_the_selections_unless_given(data):
    kept = cells(data[1], keeps=(0.5,), splits=(0.5,), seeds=(0, 5))
    plain = probes_of(data, kept)
    given = probes_of(data, [cell.indices for cell in kept], seeds=[0, 5])
    np.testing.assert_array_equal(plain.heads["kernel"], given.heads["kernel"])
    other = probes_of(data, [cell.indices for cell in kept], seeds=[1, 5])
    assert np.abs(other.heads["kernel"] - plain.heads["kernel"])[0].max() > 1e-3


def test_official_mode_leaves_out_a_milestone_between_epochs(data):
    kept = cells(data[1], keeps=(0.5,), splits=(0.5,), seeds=(0,))
    settings = dataclasses.replace(SETTINGS, epochs=6, milestones=(0.75,))  # epoch 4.5
    default = probes_of(data, kept, settings=settings)
    official = probes_of(data, kept, settings=settings, mode="official")
    assert np.abs(default.heads["kernel"] - official.heads["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kept": []}, "one or more subsets"),
        ({"kept": [np.array([], int)]}, r"kept\[0\]: is empty"),
        ({"kept": [np.array([0, 0])]}, "more than once"),
        ({"kept": [np.array([0, 150])]}, "out of range"),
        ({"seeds": [1, 2]}, "one per subset, got 2 for 1"),
        ({"seeds": [-1]}, "seeds"),
        ({"features": np.full((150, 12), np.nan, np.float32)}, "150 rows are not finite"),
        ({"features": np.zeros((150, 12), int)}, "floating"),
        ({"features": np.zeros((150, 11), np.float32)}, "expected 11 columns"),
        ({"labels": np.zeros(3, int)}, "one row per label"),
        ({"settings": dlc.LinearProbeConfig(learning_rate=1e30)}, "smaller linear_probe"),
        ({"settings": dlc.LinearProbeConfig(chunk=0)}, r"linear_probe\.chunk"),
        ({"settings": dlc.LinearProbeConfig(momentum=0.0)}, "nesterov"),
    ],
)
def test_bad_input_is_refused(data, changes, says):
    features, labels, val_features, val_labels = data
    arguments = {
        "features": features,
        "labels": labels,
        "kept": [np.arange(20)],
        "val_features": val_features,
        "val_labels": val_labels,
    }
    with pytest.raises(ValueError, match=says):
        dlc.linear_probes(**(arguments | changes))


def test_a_selection_from_other_labels_is_refused(data):
    features, labels, val_features, val_labels = data
    kept = dlc.select(None, labels, method="random", keep_fraction=0.5)
    options = {"val_features": val_features, "val_labels": val_labels}
    dlc.linear_probes(features, labels, [kept], **options)
    with pytest.raises(ValueError, match=r"kept\[0\]: selected from other labels"):
        dlc.linear_probes(features, np.roll(labels, 1), [kept], **options)
