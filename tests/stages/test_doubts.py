"""Suspect labels and near-duplicates: tables of a run, and leaving suspects out."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.stages import pipeline
from dlc_jax.tasks import doubts
from dlc_jax.workspace import artefacts, records

MISLABELLED = (3, 10)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Settings for 32 noisy images, dark and bright, two of them mislabelled and two equal."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    labels = np.arange(32) % 2
    images = generator.integers(0, 100, (32, 40, 40, 3)) + 150 * labels[:, None, None, None]
    images[8] = images[4]
    labels[[*MISLABELLED]] = 1 - labels[[*MISLABELLED]]
    np.savez(folder / "x.npz", images=images.astype(np.uint8), labels=labels)
    return {
        "dataset": {"train": f"npz:{folder}/x.npz"},
        "encoder": {"name": "resnet18", "weights": "demo:resnet18", "image_size": 32},
        "probe": {"num_probes": 3, "placement": "midpoint"},
        "selection": {
            "methods": ("random",),
            "keep_fractions": (0.5,),
            "max_similarity": 0.99999,
            "leave_out_suspects": True,
        },
    }


def said_by(values, root, **changes):
    said: list[str] = []
    pipeline.run(Config.of({**values, **changes}), root, said.append)
    return said


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(values, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return root, said_by(values, root)


@pytest.fixture(scope="module")
def found(values):
    encoder = dlc.load_encoder("resnet18", "demo:resnet18")
    path = dlc.PathSpec(num_probes=3, placement="midpoint")
    data = dlc.load_dataset(values["dataset"]["train"])
    return data, dlc.suspect_labels(dlc.probe(encoder, data, image_size=32, path=path))


def test_the_table_has_what_the_function_finds(run, found):
    root, said = run
    data, suspects = found
    assert set(MISLABELLED) <= set(suspects.ranked.tolist())
    rows = rows_of(root / artefacts.SUSPECTS)
    names = data.class_names
    assert [row["id"] for row in rows] == data.ids[suspects.ranked].tolist()
    assert [row["class"] for row in rows] == [names[j] for j in data.labels[suspects.ranked]]
    assert [row["suggested_class"] for row in rows] == [
        names[j] for j in suspects.suggested[suspects.ranked]
    ]
    assert [int(row["probes_right"]) for row in rows] == suspects.num_right[
        suspects.ranked
    ].tolist()
    scores = [float(row["score"]) for row in rows]
    np.testing.assert_allclose(scores, suspects.scores[suspects.ranked], rtol=1e-5)
    line = (
        f"suspect labels: {len(rows)} of 32 samples look mislabelled, to an encoder that is right"
    )
    assert any(each.startswith(line) and each.endswith(artefacts.SUSPECTS) for each in said)
    num = int(suspects.is_informative.sum())
    assert any(f"score: {num} of 3 probes carry information" in each for each in said)
    facts = records.read(root, "score").facts
    assert facts["share_of_informative_probes"] == pytest.approx(num / 3)
    with Image.open(root / artefacts.SUSPECTS_PICTURE) as picture:
        assert np.asarray(picture).std() > 10


def test_the_most_similar_images_are_listed(run, found):
    root, said = run
    ids = found[0].ids
    (row,) = rows_of(root / artefacts.NEAR_DUPLICATES)
    assert (row["id"], row["other_id"]) == (ids[4], ids[8])
    assert row["class"] == row["other_class"]
    assert float(row["cosine"]) == pytest.approx(1, abs=1e-5)
    assert any("1 pairs with a cosine above 0.99999, 0 of two classes" in line for line in said)


def test_suspects_are_left_out_of_selections_and_counted(run, found):
    root, said = run
    data, suspects = found
    (cell,) = (root / "selections/random").glob("*.npy")
    kept = np.load(cell)
    assert not suspects.is_suspect[kept].any()
    manifest = json.loads(cell.with_suffix(".json").read_text())
    num = len(suspects.ranked) + 1  # and one of two equal images
    assert manifest["num_left_out"] == num
    assert manifest["how"]["leave_out_suspects"] is True
    assert any(f"{num} of 32 samples left out as suspect labels and near" in line for line in said)
    assert len(kept) == sum(round(float(size) / 2) for size in np.bincount(data.labels))


def test_a_second_run_makes_nothing_again(run, values):
    root, _ = run
    before = (root / artefacts.SUSPECTS).stat().st_mtime_ns
    said = said_by(values, root)
    assert "score: unchanged, not run again" in said
    assert not any(line.startswith(("suspect labels", "near-duplicates")) for line in said)
    assert (root / artefacts.SUSPECTS).stat().st_mtime_ns == before
    (root / artefacts.SUSPECTS).unlink()
    assert any(line.startswith("suspect labels: ") for line in said_by(values, root))


def test_losses_of_earlier_versions_are_read_and_have_no_table(values, tmp_path):
    selection = {"methods": ("random",), "keep_fractions": (0.5,)}
    said_by(values, tmp_path, selection=selection)
    losses = tmp_path / artefacts.LOSSES
    arrays = dict(np.load(losses))
    del arrays["nearest"]
    np.savez(losses, **arrays)
    place = tmp_path / "records/score.json"
    record = json.loads(place.read_text())
    del record["share_of_informative_probes"]
    record["outputs"][artefacts.LOSSES] = artefacts.file_hash(losses)
    place.write_text(json.dumps(record))
    said = said_by(values, tmp_path, selection=selection)
    assert "score: unchanged, not run again" in said
    assert any(line.startswith("suspect labels: note: no table, since an earlier") for line in said)
    np.testing.assert_array_equal(artefacts.read_losses(tmp_path)["losses"], arrays["losses"])
    with pytest.raises(
        dlc.InputError, match="has no array 'nearest'.*earlier versions did not keep"
    ):
        said_by(values, tmp_path, selection=selection | {"leave_out_suspects": True})
    arrays["nearest"] = np.zeros((2, 32), np.int32)
    np.savez(losses, **arrays)
    with pytest.raises(dlc.InputError, match=r"nearest has shape \(2, 32\), expected \(3, 32\)"):
        artefacts.read_losses(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "official"}, "selection.leave_out_suspects: mode 'official' leaves nothing out"),
        (
            {"encoder": {"name": "decoder", "weights": "x"}, "dataset": {"train": "jsonl:x"}},
            "selection.leave_out_suspects: .*responses have no prototypes",
        ),
    ],
)
def test_where_nothing_is_left_out(values, changes, says):
    selection = {"methods": ("random",), "keep_fractions": (0.5,), "leave_out_suspects": True}
    with pytest.raises(dlc.InputError, match=says):
        Config.of({**values, "selection": selection, **changes})


def test_samples_without_direction_or_too_many_have_no_pair(monkeypatch):
    features = np.array([[0, 0], [1, 2], [0, 0], [2, 4], [1, -1]], np.float32)
    monkeypatch.setattr(doubts, "read_input", lambda *_: features)
    monkeypatch.setattr(artefacts, "read_scores", lambda _: None)
    said: list[str] = []
    step = doubts.NearDuplicatesStep(Path("root"), ("a",), 0.9, said.append)
    ((first, other, cosine),) = step.compute(Path("scratch"))
    assert (first, other, cosine) == (1, 3, pytest.approx(1, abs=1e-6))
    monkeypatch.setattr(doubts, "_MOST", 2)
    assert step.compute(Path("scratch")) is None
    assert said == [
        "near-duplicates: note: not looked for: all pairs of up to 2 images are compared, and "
        "there are 3"
    ]
