"""Sweeps as users run them: the command in its own process, killed, broken and rerun."""

import csv
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_command_line import command, run

import dlc_jax as dlc

SWEEP = (
    "--config=configs/demo_sweep.py",
    "--config.probe.num_probes=2",
    "--config.encoder.image_size=32",
    "--config.finetune.epochs=4",
    "--config.finetune.batch_size=25",
    "--config.selection.methods=random,hardest",
    "--config.selection.keep_fractions=(0.1,0.2)",
    "--config.selection.seeds=(1,2)",
)
CELLS = [
    f"{method}/keep_{keep}-seed_{seed}"
    for method, keeps in (
        ("full", ("1.00",)),
        ("random", ("0.10", "0.20")),
        ("hardest", ("0.10", "0.20")),
    )
    for keep in keeps
    for seed in (1, 2)
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run(*SWEEP, f"--workdir={folder}").stdout


def copy(finished, to: Path) -> Path:
    shutil.copytree(finished[0], to, dirs_exist_ok=True)
    return to


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


def weights(folder: Path, cell: str) -> list[np.ndarray]:
    """The arrays of the last checkpoint, read by Orbax alone."""
    import orbax.checkpoint as ocp

    steps = list((folder / "finetune" / cell / "checkpoint").glob("[0-9]*"))
    assert [step.name for step in steps] == ["4"]
    tree = ocp.StandardCheckpointer().restore(steps[0].resolve() / "state")
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_every_run_has_its_files_and_its_row(finished):
    folder, printed = finished
    header = (folder / "results.csv").read_text().splitlines()[0]
    assert header == "method,keep_fraction,split,seed,num_kept,test_accuracy,seconds"
    found = rows(folder)
    assert [(r["method"], r["keep_fraction"], r["seed"]) for r in found] == [
        *[("full", "1.0", seed) for seed in "12"],
        *[("random", keep, seed) for keep in ("0.1", "0.2") for seed in "12"],
        *[("hardest", keep, seed) for keep in ("0.1", "0.2") for seed in "12"],
    ]
    assert [r["num_kept"] for r in found] == ["750"] * 2 + (["75"] * 2 + ["150"] * 2) * 2
    assert {r["split"] for r in found} == {""}
    for cell, row in zip(CELLS, found, strict=True):
        place = folder / "finetune" / cell
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
        rates = [line["learning_rate"] for line in lines]
        assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005])
        assert lines[-1]["test_accuracy"] == float(row["test_accuracy"])
        assert lines[-1]["train_loss"] < lines[0]["train_loss"]
        with open(place / "per_class_accuracy.csv", newline="") as file:
            per_class = [float(r["test_accuracy"]) for r in csv.DictReader(file)]
        assert np.mean(per_class) == pytest.approx(float(row["test_accuracy"]))  # balanced
        assert f"{cell}: test accuracy {float(row['test_accuracy']):.2f} %" in printed
    assert float(found[0]["test_accuracy"]) > 40


@pytest.mark.slow
def test_a_run_is_what_the_api_gives(finished, sample, sample_encoder):
    folder, _ = finished
    kept = np.load(folder / "selections" / "random" / "keep_0.20-seed_2.npy")
    result = dlc.finetune(
        sample_encoder,
        sample,
        kept,
        test=dlc.load_dataset("demo:caltech15/test"),
        epochs=4,
        batch_size=25,
        learning_rate=0.05,
        image_size=32,
        seed=2,
    )
    assert result.test_accuracy == float(rows(folder)[5]["test_accuracy"])
    assert result.num_kept == len(kept)


@pytest.mark.slow
def test_the_report_compares_with_random_in_numbers_and_words(finished):
    folder, printed = finished
    table = (folder / "report" / "results.md").read_text()
    assert table in printed
    accuracy = {
        (r["method"], r["keep_fraction"], r["seed"]): float(r["test_accuracy"])
        for r in rows(folder)
    }
    gaps = [accuracy["hardest", "0.1", s] - accuracy["random", "0.1", s] for s in "12"]
    line = next(line for line in table.splitlines() if line.startswith("| 0.1  | hardest"))
    assert f"{np.mean(gaps):.2f} ±" in line
    assert "not better than random" in line
    scored = json.loads((folder / "provenance.json").read_text())["stages"]["score"]["seconds"]
    assert line.split("|")[-2].strip() == f"{scored:.1f}"  # what it took to know what to keep
    assert (folder / "report" / "gap_to_random.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "report" / "gap_to_random.svg").read_text()


@pytest.mark.slow
def test_finished_runs_are_not_run_again_and_new_ones_are_added(finished, tmp_path):
    folder = copy(finished, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("finetune/*/*/run.json")}
    printed = run(*SWEEP, f"--workdir={folder}").stdout
    assert "finetune: 10 runs were finished before, not run again" in printed
    more = (*SWEEP[:-1], "--config.selection.seeds=(1,2,3)", f"--workdir={folder}")
    printed = run(*more, "--config.finetune.full_set=False").stdout
    assert printed.count("test accuracy") == 4 + 1  # and once in the table
    assert len(rows(folder)) == 14
    assert [row for row in without_seconds(folder) if row["seed"] != "3"] == without_seconds(
        finished[0]
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_other_settings_set_runs_aside_and_take_them_back(finished, tmp_path):
    folder = copy(finished, tmp_path)
    short = (*SWEEP, f"--workdir={folder}", "--config.finetune.epochs=0")
    printed = run(*short).stdout
    assert "finetune: 10 runs of other settings or scores moved to superseded/" in printed
    assert len(rows(folder)) == 10
    assert without_seconds(folder) != without_seconds(finished[0])
    printed = run(*SWEEP, f"--workdir={folder}").stdout
    assert "finetune: 10 runs were finished before, not run again" in printed
    assert without_seconds(folder) == without_seconds(finished[0])


@pytest.mark.slow
def test_a_report_of_other_runs_does_not_stay(finished, tmp_path):
    folder = copy(finished, tmp_path)
    done = run(*SWEEP, f"--workdir={folder}", "--config.finetune.learning_rate=1e30", code=2)
    assert "all 10 runs failed, first full/keep_1.00-seed_1: " in done.stderr
    assert "not finite, at step" in done.stderr
    assert rows(folder) == []
    assert not (folder / "report").exists()


@pytest.mark.slow
def test_the_report_says_what_it_is_of(finished, tmp_path):
    folder = copy(finished, tmp_path)
    printed = finished[1]
    assert (
        "10 of the 10 runs asked for are finished. Trained with epochs 4, batch_size 25" in printed
    )
    shutil.rmtree(folder / "finetune" / "hardest" / "keep_0.10-seed_1")
    only = (*SWEEP, f"--workdir={folder}", "--config.stages=('report',)")
    assert "9 of the 10 runs asked for are finished." in run(*only).stdout
    said = run(*only, "--config.finetune.epochs=9", "--config.finetune.full_set=False").stdout
    assert "7 of the 8 runs asked for are finished; 2 others are in the table as well" in said
    assert "(the configuration says epochs 9)" in said


@pytest.mark.slow
def test_without_random_there_is_no_figure_but_a_hint(tmp_path):
    arguments = (*SWEEP[:-3], "--config.selection.keep_fractions=(0.1,)", f"--workdir={tmp_path}")
    small = ("--config.finetune.epochs=0", "--config.selection.seeds=(1,)")
    printed = run(
        "--config=configs/custom.py",
        *arguments[1:],
        *small,
        "--config.dataset.train=demo:caltech15/train",
        "--config.dataset.test=demo:caltech15/test",
        "--config.encoder.name=resnet18",
        "--config.encoder.weights=demo:resnet18",
        "--config.stages=score,select,finetune,report",
    ).stdout
    assert "random was not run with these seeds" in printed
    assert "add random to selection.methods" in printed
    assert not (tmp_path / "report" / "gap_to_random.png").exists()


@pytest.mark.slow
def test_a_test_set_that_does_not_fit_is_told_before_scoring(tmp_path, sample):
    path = tmp_path / "test" / "zebra" / "1.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(sample[0].image)
    for test, says in (("test", "'zebra'"), ("absent", "no such folder")):
        place = f"--config.dataset.test=folder:{tmp_path}/{test}"
        done = run(*SWEEP, place, f"--workdir={tmp_path}/run", code=2)
        assert says in done.stderr
        assert not (tmp_path / "run" / "scores").exists()


@pytest.mark.slow
def test_one_broken_cell_does_not_harm_the_others(finished, tmp_path):
    folder = copy(finished, tmp_path)
    shutil.rmtree(folder / "finetune" / "random")
    selection = folder / "selections" / "random" / "keep_0.10-seed_1.npy"
    good = np.load(selection)
    for bad in (
        np.array([*good[:-1], 750]),
        np.array([*good[:-1], good[0]]),
        np.setdiff1d(np.arange(750), good)[:75],
    ):
        np.save(selection, bad)
        only = ("--config.stages=('finetune','report')", f"--workdir={folder}")
        done = run(*SWEEP, *only, code=2)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: 1 runs failed: random/keep_0.10-seed_1: ")
        assert f"{selection}: does not have the content that was written" in last
        assert f"random/keep_0.10-seed_1: failed: {selection}" in done.stdout
        assert "Traceback" not in done.stderr
        found = without_seconds(folder)
        assert len(found) == 9
        assert [r for r in without_seconds(finished[0]) if r in found] == found
    np.save(selection, good)
    run(*SWEEP, *only)
    assert without_seconds(folder) == without_seconds(finished[0])


@pytest.mark.slow
def test_weights_are_dropped_on_request_and_the_api_reads_what_is_kept(
    finished, tmp_path, sample, sample_encoder
):
    folder = copy(finished, tmp_path)
    cell = folder / "finetune" / "random" / "keep_0.20-seed_2"
    before = (cell / "run.json").read_text()
    result = dlc.finetune(  # the run of the sweep, read back with its weights
        sample_encoder,
        sample,
        np.load(folder / "selections" / "random" / "keep_0.20-seed_2.npy"),
        test=dlc.load_dataset("demo:caltech15/test"),
        epochs=4,
        batch_size=25,
        learning_rate=0.05,
        image_size=32,
        seed=2,
        folder=cell,
    )
    assert result.test_accuracy == float(rows(folder)[5]["test_accuracy"])
    now, then = json.loads((cell / "run.json").read_text()), json.loads(before)
    assert now | {"devices": then["devices"]} == then
    # as a kill leaves it that comes while the checkpoint is deleted
    shutil.rmtree(cell / "checkpoint" / "4" / "state")
    printed = run(*SWEEP, f"--workdir={folder}", "--config.finetune.keep_weights=False").stdout
    assert "10 runs were finished before" in printed
    assert not list(folder.glob("finetune/*/*/checkpoint"))
    assert without_seconds(folder) == without_seconds(finished[0])


@pytest.mark.slow
def test_two_sweeps_in_one_work_directory_do_not_meet(finished, tmp_path):
    from dlc_jax.workspace import Workspace

    folder = copy(finished, tmp_path)
    with Workspace(folder).held():
        done = run(*SWEEP, f"--workdir={folder}", "--config.finetune.epochs=1", code=2)
    assert "One run at a time may work there" in done.stderr
    assert without_seconds(folder) == without_seconds(finished[0])


@pytest.mark.slow
def test_classes_that_are_not_kept_and_test_images_that_cannot_be_read_are_told(tmp_path, sample):
    for i in (*range(0, 9), *range(50, 59), 100, 101):
        for split in ("train", "test"):
            path = tmp_path / split / sample.ids[i]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sample[i].image)
    bad = tmp_path / "test" / sample.ids[4]
    bad.write_bytes(bad.read_bytes()[:600])
    arguments = (
        *SWEEP[:-3],
        f"--workdir={tmp_path}/run",
        f"--config.dataset.train=folder:{tmp_path}/train",
        f"--config.dataset.test=folder:{tmp_path}/test",
        "--config.finetune.epochs=1",
        "--config.selection.methods=random",
        "--config.selection.seeds=(1,)",
        "--config.selection.keep_fractions=(0.1,)",
        "--config.mode=official",
    )
    assert f"sample {str(sample.ids[4])!r} is not a readable" in run(*arguments, code=2).stderr
    printed = run(*arguments, "--config.dataset.on_corrupt=skip").stdout
    assert "unreadable test samples left out: 1" in printed
    assert "2 samples, " in printed
    assert ", no sample of chandelier" in printed  # round(2 x 0.1) is 0
    facts = json.loads((tmp_path / "run/finetune/full/keep_1.00-seed_1/run.json").read_text())
    assert list(facts["result"]["skipped_test"]) == [sample.ids[4]]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"]["test"] == f"folder:{tmp_path}/test"


@pytest.mark.slow
def test_data_that_were_not_scored_are_refused(finished, tmp_path, sample):
    folder = copy(finished, tmp_path / "run")
    for i in range(0, 750, 25):
        path = tmp_path / "data" / sample.ids[i]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample[i].image)
    only = ("--config.stages=('finetune',)", f"--workdir={folder}")
    done = run(*SWEEP, *only, f"--config.dataset.train=folder:{tmp_path}/data", code=2)
    assert "is not what was scored in" in done.stderr
    assert len(rows(folder)) == 10


@pytest.mark.slow
def test_scores_made_anew_set_runs_aside(finished, tmp_path):
    folder = copy(finished, tmp_path)
    only = (f"--workdir={folder}", "--config.stages=('score','select')")
    run(*SWEEP, *only, "--config.probe.num_probes=3")
    done = run(
        *SWEEP, f"--workdir={folder}", "--config.finetune.epochs=0", "--config.probe.num_probes=3"
    )
    assert "10 runs of other settings or scores moved" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--config.stages=('finetune',)",), "run the stage 'score'"),
        (("--config.dataset.test=None",), "dataset.test: missing"),
        pytest.param(
            ("--config.stages=('report',)",),
            "results.csv: not there; run the stage 'finetune'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--config.finetune.epochs=-1",),
            "finetune.epochs: must be >= 0",
            marks=pytest.mark.slow,
        ),
        (("--config.finetune.milestones=(25,)",), "finetune.milestones: must be <= 1"),
        (("--config.finetune.epoch=3",), "Did you mean 'finetune.epochs'"),
    ],
)
def test_mistakes_end_in_one_clear_line(tmp_path, arguments, says):
    done = run(*SWEEP, *arguments, f"--workdir={tmp_path}/run", code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_killed_five_times_a_sweep_ends_as_if_undisturbed(finished, tmp_path):
    """kill -9 at random moments: of starting, training, saving, testing and writing results."""
    for name in ("scores", "selections", "records", "config.json", "provenance.json"):
        source = finished[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    arguments = (*SWEEP, f"--workdir={tmp_path}", "--config.stages=('finetune',)")
    generator = np.random.default_rng(5)
    kills = 0
    while kills < 5:
        already = state_of(tmp_path) if kills % 3 else None  # every third at any time at all
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and state_of(tmp_path) == already:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.6) if kills % 3 else generator.uniform(0, 6))
        if process.poll() is not None:  # a fast machine: the last runs once more
            assert process.returncode == 0
            shutil.rmtree(tmp_path / "finetune" / "hardest")
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (tmp_path / "results.csv").exists():
            whole = without_seconds(finished[0])
            assert all(row in whole for row in without_seconds(tmp_path))
    run(*arguments)
    assert without_seconds(tmp_path) == without_seconds(finished[0])
    for cell in CELLS:
        ours, theirs = weights(tmp_path, cell), weights(finished[0], cell)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), cell
        place = Path("finetune") / cell
        table = place / "per_class_accuracy.csv"
        assert (tmp_path / table).read_bytes() == (finished[0] / table).read_bytes()
        assert untimed_metrics(tmp_path / place) == untimed_metrics(finished[0] / place)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not list(tmp_path.rglob("*orbax-checkpoint-tmp*"))


def untimed_metrics(place: Path) -> list[dict]:
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_s", "elapsed_s")} for line in lines
    ]


def state_of(folder: Path) -> set[str]:
    """What tells that training is under way: the names of all checkpoints."""
    return {str(path) for path in folder.glob("finetune/*/*/checkpoint/*")}
