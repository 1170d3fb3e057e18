"""Kept and dropped are parts of what was scored, whatever else the data set holds."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images, record_scores

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.exports import EXPORTS
from dlc_jax.exports.released import released_positions
from dlc_jax.stages import pipeline
from dlc_jax.workspace import artefacts

SECRET = b"the user's private key"
UNREAD = (0, 7)  # rows of the table that name no readable image


@pytest.fixture
def table(tmp_path) -> dlc.Dataset:
    """Twelve rows of a CSV file: one names a private file, one a damaged image."""
    place = tmp_path / "data"
    place.mkdir()
    lines = ["path,label"]
    for i, pixels in enumerate(random_images(12, 8)):
        content = encoded(pixels)
        if i in UNREAD:
            content = SECRET if i == UNREAD[0] else content[: len(content) // 2]
        name = f"{i:02d}.png"
        (place / name).write_bytes(content)
        lines.append(f"{name},{'ab'[i % 2]}")
    (place / "table.csv").write_text("\n".join(lines))
    return dlc.load_dataset(f"csv:{place}/table.csv")


MADE_WITH = {"mode": "default", "seed": 0, "probe": {}}


def scored_rows(dataset: dlc.Dataset) -> np.ndarray:
    return np.setdiff1d(np.arange(len(dataset)), UNREAD)


def chosen(dataset: dlc.Dataset, with_ids: bool = True) -> dlc.Selection:
    rows = scored_rows(dataset)
    scores = np.random.default_rng(0).normal(size=len(rows))
    return dlc.select(
        scores,
        dataset.labels[rows],
        method="hardest",
        keep_fraction=0.4,
        ids=dataset.ids[rows] if with_ids else None,
    )


def exported(path: Path, form: str) -> tuple[list, bytes]:
    """Returns what an export names or holds of its samples, in its order, and all its bytes."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    content = b"".join(file.read_bytes() for file in files)
    if form == "npy":
        return np.load(path).tolist(), content
    if form == "ids":
        return path.read_text().splitlines(), content
    if form == "jsonl":
        return [json.loads(line)["id"] for line in path.read_text().splitlines()], content
    if form == "json":
        return json.loads(path.read_text())["ids"], content
    if form in ("parquet", "hf"):
        table = pq.read_table(path if form == "parquet" else path / "data")
        return [row["path"] for row in table["image"].to_pylist()], content
    return sorted(file.name for file in files), content


@pytest.mark.parametrize("form", EXPORTS)
def test_kept_and_dropped_are_the_scored_samples(table, tmp_path, form):
    kept, rows = chosen(table), scored_rows(table)
    found = []
    for part in ("kept", "dropped"):
        path = tmp_path / f"{part}{EXPORTS[form].suffix}"
        dlc.export(table, kept, path, form=form, part=part)
        names, content = exported(path, form)
        assert SECRET not in content
        found.append(names)
    dropped = np.setdiff1d(np.arange(len(rows)), kept.indices)
    expected = [kept.indices.tolist(), dropped.tolist()]
    if form != "npy":
        expected = [table.ids[rows[some]].tolist() for some in expected]
    assert found == expected


def test_rows_are_those_of_the_scores_in_any_order_of_the_data(table, tmp_path):
    kept, rows = chosen(table), scored_rows(table)
    backwards = table.subset(np.arange(len(table))[::-1])
    for part in ("kept", "dropped"):
        there = dlc.export(backwards, kept, tmp_path / f"{part}.npy", form="npy", part=part)
        lines = dlc.export(backwards, kept, tmp_path / f"{part}.jsonl", form="jsonl", part=part)
        positions = np.load(there)
        assert (positions.tolist() == kept.indices.tolist()) == (part == "kept")
        held = [json.loads(line) for line in lines.read_text().splitlines()]
        assert [line["position"] for line in held] == positions.tolist()
        assert [line["id"] for line in held] == table.ids[rows[positions]].tolist()


def test_dropped_samples_that_cannot_be_known_are_refused(table, tmp_path):
    with pytest.raises(dlc.InputError, match="selected from other labels"):
        dlc.export(table, chosen(table, with_ids=False), tmp_path / "x", part="dropped")
    kept = chosen(table)
    values = {name: getattr(kept, name) for name in kept.__dataclass_fields__}
    bare = dlc.Selection(**{**values, "scored_ids": None})
    with pytest.raises(dlc.InputError, match="does not know which samples it was made from"):
        dlc.export(table, bare, tmp_path / "x.txt", form="ids", part="dropped")
    dlc.export(table, bare, tmp_path / "kept.txt", form="ids")
    assert (tmp_path / "kept.txt").read_text().split() == kept.ids.tolist()
    dlc.export(table, bare, tmp_path / "kept.npy", form="npy")
    assert np.load(tmp_path / "kept.npy").tolist() == kept.indices.tolist()
    rows = scored_rows(table)
    for missing, said in (
        (kept.indices[-1], "kept"),
        (np.setdiff1d(range(10), kept.indices)[0], "dropped"),
    ):
        some = table.subset(np.setdiff1d(np.arange(12), rows[missing]))
        with pytest.raises(dlc.InputError, match=f"{said} samples are not in"):
            dlc.export(some, kept, tmp_path / "x", part="dropped")


def test_the_released_form_drops_only_what_was_scored(table, tmp_path):
    for i in range(12):
        for part in ("train", "val"):
            place = tmp_path / "Any" / part / "ab"[i % 2] / f"{i:02d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            if (part == "train") == (i < 8):
                place.write_bytes(table[i].image)
    kept, rows = chosen(table), scored_rows(table)
    order = [*range(0, 8, 2), *range(1, 8, 2), *range(8, 12, 2), *range(9, 12, 2)]
    for part in ("kept", "dropped"):
        positions = released_positions(table, kept, tmp_path, "Any", part)
        expected = np.isin(rows, rows[kept.indices]) == (part == "kept")
        assert sorted(order[p] for p in positions) == rows[expected].tolist()


def scored_workdir(workdir: Path, dataset: dlc.Dataset, rows: np.ndarray) -> None:
    """Leaves scores of some rows as the stage `score` does with `on_corrupt=skip`."""
    scores = np.random.default_rng(0).normal(size=len(rows)).astype(np.float32)
    labels, ids = dataset.labels[rows], dataset.ids[rows]
    artefacts.write_losses(
        workdir, losses=scores[None], sparsity=np.zeros(1, np.float32), labels=labels, ids=ids
    )
    samples = artefacts.ScoredSamples(ids, labels, dataset.class_names, {"dlc": scores})
    artefacts.write_scores(workdir, samples)
    facts = {"dataset": {"source": dataset.name, "fingerprint": dataset.fingerprint}}
    record_scores(workdir, facts, MADE_WITH)


def test_the_stage_exports_what_was_scored(table, tmp_path):
    rows, workdir = scored_rows(table), tmp_path / "run"
    scored_workdir(workdir, table, rows)
    forms = tuple(EXPORTS)
    values = {
        "stages": ("select", "export"),
        "dataset": {"train": table.name, "on_corrupt": "skip"},
        "selection": {"methods": ("hardest",), "keep_fractions": (0.4,), "seeds": (1,)},
        "export": {"forms": forms, "parts": ("kept", "dropped")},
    }
    pipeline.run(Config.of(values), workdir, lambda line: None)
    selected = np.load(workdir / "selections/hardest/keep_0.40-seed_1.npy")
    folder = workdir / "exports/hardest/keep_0.40-seed_1"
    for part in ("kept", "dropped"):
        expected = np.isin(np.arange(len(rows)), selected) == (part == "kept")
        for form in forms:
            names, content = exported(folder / f"{part}{EXPORTS[form].suffix}", form)
            assert SECRET not in content
            wanted = np.flatnonzero(expected) if form == "npy" else table.ids[rows[expected]]
            assert names == wanted.tolist(), form


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_instructions_that_were_skipped_are_in_neither_part(tmp_path, form):
    rows = [{"id": str(i), "prompt": f"Say {i}", "response": f"{i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dlc.load_instructions(f"jsonl:{tmp_path}/rows.jsonl")
    some, workdir = np.array([0, 2, 3, 5, 6, 7]), tmp_path / "run"
    scores = np.arange(6, dtype=np.float32)
    labels = np.zeros(6, np.int32)
    artefacts.write_losses(
        workdir,
        losses=scores[None],
        sparsity=np.zeros(1, np.float32),
        labels=labels,
        ids=data.ids[some],
    )
    samples = artefacts.ScoredSamples(data.ids[some], labels, ("all",), {"dlc": scores})
    artefacts.write_scores(workdir, samples)
    facts = {"dataset": {"source": data.name, "fingerprint": data.fingerprint}}
    encoder = {"name": "decoder", "weights": "none"}
    record_scores(workdir, facts, {**MADE_WITH, "encoder": encoder})
    values = {
        "stages": ("select", "export"),
        "encoder": encoder,
        "dataset": {"train": data.name, "on_corrupt": "skip"},
        "selection": {"methods": ("hardest",), "keep_fractions": (0.5,), "seeds": (1,)},
        "export": {"forms": (form,), "parts": ("kept", "dropped")},
    }
    pipeline.run(Config.of(values), workdir, lambda line: None)
    folder = workdir / "exports/hardest/keep_0.50-seed_1"
    for part, expected in (("kept", [5, 6, 7]), ("dropped", [0, 2, 3])):
        back = dlc.load_instructions(f"{form}:{folder}/{part}.{form}")
        assert list(back.rows) == [rows[i] for i in expected]
