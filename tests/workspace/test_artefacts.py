import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.files import whole_files
from dlc_jax.selection import Cell
from dlc_jax.stages.select import Job, SelectionInputs, read_selection, run
from dlc_jax.tasks import measurements, task_of
from dlc_jax.workspace import Record, Workspace, artefacts, records
from dlc_jax.workspace.artefacts import ScoredSamples


@pytest.fixture
def samples():
    scores = {"dlc": np.linspace(2, 3, 20, dtype=np.float32)}
    ids = np.array([f"café/{i}" for i in range(20)])
    return ScoredSamples(ids, np.arange(20, dtype=np.int32) % 2, ("a", "b"), scores)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    artefacts.write_json(path, {"old": 1})

    def half_way() -> None:
        with artefacts.atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_way()
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_leftovers_of_dead_runs_are_cleared_and_nothing_else(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    owner, temporary = whole_files._OWNER, whole_files._TEMPORARY
    (tmp_path / "scores").mkdir()
    (tmp_path / "photos").mkdir()
    gone = tmp_path / "scores" / f".losses.npz{owner}{int(dead.stdout)}{temporary}"
    kept = [
        tmp_path / "scores" / f".losses.npz{owner}{os.getpid()}{temporary}",
        tmp_path / "scores" / ".losses.npz.dlc_jax-otherhost-1234567.tmp",
        tmp_path / f".x{owner}99999999999999999999{temporary}",
        tmp_path / "photos" / ".backup.2023999.tmp",
    ]
    for path in (gone, *kept):
        path.touch()
    artefacts.prepare_workdir(tmp_path)
    assert not gone.exists()
    assert all(path.exists() for path in kept)


def test_scores_survive_the_round_trip(tmp_path, samples):
    artefacts.write_scores(tmp_path, samples)
    found = artefacts.read_scores(tmp_path)
    np.testing.assert_array_equal(found.ids, samples.ids)
    np.testing.assert_array_equal(found.labels, samples.labels)
    np.testing.assert_array_equal(found.scores["dlc"], samples.scores["dlc"])
    assert found.class_names == samples.class_names
    assert found.fingerprint == samples.fingerprint
    (tmp_path / artefacts.SCORES).write_bytes(b"not a table")
    with pytest.raises(ValueError, match="not a table of scores"):
        artefacts.read_scores(tmp_path)


def test_fingerprint_covers_class_names(samples):
    renamed = ScoredSamples(samples.ids, samples.labels, ("a", "wasp"), samples.scores)
    assert renamed.fingerprint != samples.fingerprint


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ((0.3, 0.5, 1), "keep_0.30-split_0.50-seed_1"),
        ((0.3, None, 12), "keep_0.30-seed_12"),
        ((0.125, 0.05, 0), "keep_0.125-split_0.05-seed_0"),
        ((0.3, "auto", 0), "keep_0.30-split_auto-seed_0"),
    ],
)
def test_cell_names_do_not_collide(cell, name):
    assert Cell("random", *cell).name == f"random/{name}"


CELL = Cell("easiest", 0.3, None, 0)


def known(folder, samples, mode="default", **selection) -> SelectionInputs:
    values = {"stages": ("select",), "mode": mode, "selection": {"keep_fractions": (0.3,)}}
    values["selection"] |= {"methods": ("easiest",), "seeds": (0,)} | selection
    return SelectionInputs(Config.of(values), folder, samples)


def select(folder, inputs: SelectionInputs) -> list[str]:
    said = []
    config, workspace = inputs._config, Workspace(folder, said.append)
    run(Job(config, workspace, task_of(config, said.append), inputs))
    return said


def rescored(samples) -> ScoredSamples:
    return dataclasses.replace(samples, scores={"dlc": samples.scores["dlc"][::-1].copy()})


def files_below(folder) -> dict:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_selections_of_other_scores_are_set_aside_not_lost_and_come_back(tmp_path, samples):
    select(tmp_path, known(tmp_path, samples))
    selected = files_below(tmp_path / "selections")
    assert "moved to superseded" not in "".join(select(tmp_path, known(tmp_path, samples)))
    said = select(tmp_path, known(tmp_path, rescored(samples)))
    assert said[0].startswith("select: 1 selections of other scores or mode moved to superseded/")
    other = files_below(tmp_path / "selections")
    assert other.keys() == selected.keys()
    assert other != selected
    (aside,) = (tmp_path / "superseded").iterdir()
    assert files_below(aside / "selections") == selected
    select(tmp_path, known(tmp_path, samples))
    assert files_below(tmp_path / "selections") == selected
    (aside,) = (tmp_path / "superseded").glob("*/selections/*/*.npy")
    assert aside.read_bytes() == next(v for k, v in other.items() if k.suffix == ".npy")


def test_selections_of_the_other_mode_are_set_aside(tmp_path, samples):
    select(tmp_path, known(tmp_path, samples))
    said = select(tmp_path, known(tmp_path, samples, "official", keep_fractions=(0.3,)))
    assert said[0].startswith("select: 1 selections")


def test_selections_made_another_way_are_set_aside_and_do_not_replace_each_other(tmp_path, samples):
    for num in range(4):
        select(tmp_path, known(tmp_path, samples, min_per_class=num))
        assert len(list((tmp_path / "superseded").glob("*/*/*/*.npy"))) == num


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"scores": 1}, "made with scores_fingerprint .*, expected "),
        ({"mode": "official"}, 'made with mode "default", expected "official"'),
        ({"min_per_class": 2}, "made with how.min_per_class 0, expected 2"),
        ({"allocation": "nucs"}, 'made with how.allocation "proportional", expected "nucs"'),
    ],
)
def test_a_selection_made_another_way_is_not_read(tmp_path, samples, changes, says):
    select(tmp_path, known(tmp_path, samples))
    if changes.pop("scores", None):
        samples = rescored(samples)
    inputs, workspace = known(tmp_path, samples, **changes), Workspace(tmp_path)
    if says is None:
        found = read_selection(workspace, inputs, CELL)
        assert found.indices.tolist() == [0, 1, 2, 3, 4, 5]
        return
    with pytest.raises(ValueError, match=says):
        read_selection(workspace, inputs, CELL)


def test_manifests_tell_kept_and_dropped(tmp_path, samples):
    import hashlib

    shuffled = np.random.default_rng(0).permutation(samples.ids)
    samples = dataclasses.replace(samples, ids=shuffled)
    select(tmp_path, known(tmp_path, samples))
    manifest = json.loads((tmp_path / "selections/easiest/keep_0.30-seed_0.json").read_text())
    ids = "\n".join(sorted(samples.ids[:6]))
    assert manifest["kept"] == {"count": 6, "sha256": hashlib.sha256(ids.encode()).hexdigest()}
    assert manifest["dropped"]["count"] == 14
    assert manifest["per_class"] == {n: {"samples": 10, "kept": 3} for n in ("a", "b")}
    assert manifest["scores_fingerprint"] == samples.fingerprint


def test_provenance_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        artefacts.read_json(tmp_path / "x.json")


def test_the_scored_encoder_is_named_where_it_is_another(tmp_path):
    scored = {"name": "resnet18", "weights": "demo:resnet18", "fingerprint": "ab"}
    assert measurements.scored_encoder(tmp_path, "cd") is None  # of the user's own scores
    facts = {"dataset": {"source": "", "fingerprint": ""}, "encoder": scored}
    Record("score", "losses", 1, {}, {}, {}, 1.0, {}, [], facts).write(tmp_path)
    assert measurements.scored_encoder(tmp_path, "ab") is None
    assert measurements.scored_encoder(tmp_path, "cd") == "resnet18 demo:resnet18"


@pytest.mark.parametrize("outputs", [[], None, {"adapter/x": 3}])
def test_checksums_of_another_shape_are_refused_by_name(tmp_path, outputs):
    (tmp_path / "adapter").mkdir()
    Record("run", "adapter", 1, {}, {}, {}, 1.0, {}, [], {}).write(tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    artefacts.write_json(tmp_path / "run.json", found | {"outputs": outputs})
    with pytest.raises(dlc.InputError, match=r"run.json: outputs(\.adapter/x)? is .*, expected "):
        records.check_beside_run(tmp_path / "adapter")


def test_run_json_of_another_program_says_nothing_of_an_adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    artefacts.write_json(tmp_path / "run.json", {"files": {"adapter/x": "0" * 64}})
    records.check_beside_run(tmp_path / "adapter")
