"""Checkpoints and finished runs that were damaged: named, and never gone on from."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import subset
from counter import Counter

import dlc_jax as dlc
from dlc_jax.training.images import Finetuner
from dlc_jax.training.loop import SEEN, RunStep
from dlc_jax.workspace import Workspace, records
from dlc_jax.workspace.checkpoints import Checkpoints

HISTORY = [{"epoch": 1, "train_loss": 0.5}]


def state(value: float) -> dict:
    return {"kernel": jnp.full((3, 5), value), "bias": [jnp.zeros(4), jnp.arange(2)]}


def opened(folder: Path, inputs: str = "ab" * 32, said: list | None = None) -> Checkpoints:
    say = print if said is None else said.append
    return Checkpoints(folder / "checkpoint", inputs, folder / SEEN, say)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A run with one checkpoint, and a file beside it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / SEEN).mkdir()
    np.save(folder / SEEN / "correct_1.npy", np.ones(3, bool))
    with opened(folder) as checkpoints:
        checkpoints.save(1, state(1.0), HISTORY)
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def restored(folder: Path, inputs: str = "ab" * 32) -> tuple[object, list[str]]:
    said: list[str] = []
    with opened(folder, inputs, said) as checkpoints:
        return checkpoints.restore(state(0.0)), said


def test_what_was_written_is_restored(written):
    (found, history), said = restored(written)
    np.testing.assert_array_equal(found["kernel"], np.ones((3, 5), np.float32))
    assert (history, said) == (HISTORY, [])


def test_a_flipped_bit_in_any_file_is_found(written, tmp_path):
    for number, original in enumerate(files_of(written)):
        folder = shutil.copytree(written, tmp_path / str(number))
        path = folder / original.relative_to(written)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        found, said = restored(folder)
        assert found is None, path
        assert said[0].startswith(f"note: {folder / 'checkpoint' / '1'}: damaged, not used: ")
        if path.name != "checksums.json":
            assert f"{path.name} does not have the content that was written" in said[0]
    assert number >= 9  # of Orbax, and ours


def data_file(folder: Path) -> Path:
    return max(
        files_of(folder / "checkpoint" / "1" / "state"), key=lambda path: path.stat().st_size
    )


def swap(folder: Path) -> None:
    one, other = files_of(folder / "checkpoint" / "1" / "state" / "ocdbt.process_0" / "d")[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES = {
    "deleted": (lambda folder: data_file(folder).unlink(), "is missing"),
    "empty": (lambda folder: data_file(folder).write_bytes(b""), "does not have the content"),
    "truncated": (
        lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes()[:-1]),
        "does not have the content",
    ),
    "swapped": (swap, "does not have the content"),
    "added": (
        lambda folder: (folder / "checkpoint/1/state/d/more").write_bytes(b"x"),
        "state/d/more does not belong there",
    ),
    "renamed": (
        lambda folder: (folder / "checkpoint/1").rename(folder / "checkpoint/7"),
        "it is checkpoint 1 of",
    ),
    "no checksums": (
        lambda folder: (folder / "checkpoint/1/checksums.json").unlink(),
        "checksums.json is missing or cannot be read",
    ),
    "checksums of another shape": (
        lambda folder: (folder / "checkpoint/1/checksums.json").write_text('{"files": [1]}'),
        "checksums.json is missing or cannot be read",
    ),
    "deleted beside": (
        lambda folder: (folder / SEEN / "correct_1.npy").unlink(),
        "correct_1.npy is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_damage_is_found(written, tmp_path, damage):
    folder = shutil.copytree(written, tmp_path / "run")
    do, says = DAMAGES[damage]
    do(folder)
    found, said = restored(folder)
    assert found is None
    assert len(said) == 1
    assert says in said[0]


def test_a_checkpoint_of_another_run_is_not_used(written):
    found, said = restored(written, inputs="cd" * 32)
    assert found is None
    assert "it is checkpoint 1 of a run with inputs abababababab" in said[0]


def test_the_last_good_one_is_used(written, tmp_path):
    """As a kill leaves it between a new checkpoint and the deletion of the one before."""
    folder = shutil.copytree(written, tmp_path / "run")
    with opened(folder) as checkpoints:
        checkpoints.save(2, state(2.0), HISTORY * 2)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["2"]
    shutil.copytree(written / "checkpoint" / "1", folder / "checkpoint" / "1")
    (found, history), said = restored(folder)
    assert (float(found["kernel"][0, 0]), len(history), said) == (2.0, 2, [])
    (folder / "checkpoint" / "2" / "history.json").unlink()
    (found, history), said = restored(folder)
    assert (float(found["kernel"][0, 0]), len(history), len(said)) == (1.0, 1, 1)
    # what comes after takes the place of both
    with opened(folder) as checkpoints:
        checkpoints.save(2, state(2.0), HISTORY * 2)
    (found, _), said = restored(folder)
    assert (float(found["kernel"][0, 0]), said) == (2.0, [])


def test_leftovers_of_a_writer_that_was_killed_go(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "run")
    leftover = folder / "checkpoint" / ".2.dlc_jax-anotherhost-17.tmp"
    leftover.mkdir()
    restored(folder)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["1"]


HEAD = {"image_size": 32, "epochs": 2, "batch_size": 16, "learning_rate": 0.05}
HEAD |= {"settings": dlc.FinetuneConfig(linear_probe=True, augment=False)}


def damage_of(folder: Path) -> str | None:
    """Returns what has changed in the folder of a finished run."""
    run = records.read(folder, records.RUN)
    assert run is not None
    assert "result" in run.facts
    return run.damage(folder)


@pytest.mark.parametrize("what", ["checkpoint", "table"])
def test_a_damaged_finished_run_is_done_again(
    sample_encoder, small_sample, tmp_path, monkeypatch, capsys, what
):
    small = subset(small_sample, np.arange(20))
    arguments = {**HEAD, "test": small, "folder": tmp_path}
    expected = dlc.finetune(sample_encoder, small, **arguments)
    assert damage_of(tmp_path) is None
    place = tmp_path / ("checkpoint" if what == "checkpoint" else "per_class_accuracy.csv")
    path = max(files_of(place) or [place], key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{path.relative_to(tmp_path)} does not have the content" in str(damage_of(tmp_path))
    epochs, real = [], Finetuner.batches
    monkeypatch.setattr(Finetuner, "batches", lambda *a: epochs.append(a[3]) or real(*a))
    again = dlc.finetune(sample_encoder, small, **arguments)
    assert epochs == ([1, 2] if what == "checkpoint" else [])
    said = capsys.readouterr().out
    assert (f"{tmp_path / 'checkpoint' / '2'}: damaged" in said) == (what == "checkpoint")
    np.testing.assert_array_equal(
        again.weights["head"]["kernel"], expected.weights["head"]["kernel"]
    )
    assert damage_of(tmp_path) is None


def test_weights_that_the_user_deleted_are_not_made_again(tmp_path):
    workspace = Workspace(tmp_path, pytest.fail)
    step = RunStep(Counter(), np.arange(3), 0, tmp_path)
    assert workspace.ensure(step) is not None
    assert any(name.startswith("checkpoint/2/") for name in records.read(tmp_path, "run").outputs)
    shutil.rmtree(tmp_path / "checkpoint")
    assert workspace.ensure(step) is None


def test_a_finished_run_without_checksums_is_not_finished(tmp_path):
    said: list[str] = []
    workspace = Workspace(tmp_path, said.append)
    step = RunStep(Counter(), np.arange(3), 0, tmp_path)
    workspace.ensure(step)
    path = tmp_path / "run.json"
    facts = json.loads(path.read_text())
    kept = {k: v for k, v in facts["outputs"].items() if k != "metrics.jsonl"}
    path.write_text(json.dumps(facts | {"outputs": kept}))
    assert not workspace.has(step)
    assert workspace.ensure(step) is not None
    assert said == [f"note: {path}: has no checksum of metrics.jsonl; it is made again"]
    assert workspace.has(step)


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps({"inputs": "ab" * 32, "result": {"num_kept": 1, "seconds": 2.0}})
    )
    step = RunStep(Counter(), np.arange(3), 0, tmp_path)
    with pytest.raises(dlc.InputError, match=r"run\.json: was written by dlc_jax 0\.1"):
        Workspace(tmp_path).make(step)
