"""Baselines and `auto` by the command, in its own process, on the bundled images."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

import dlc_jax as dlc

METHODS = ("random", "flexrand", "auto", "herding", "contextual_diversity", "entropy", "ccs")
ARGUMENTS = (
    "--config=configs/demo.py",
    "--config.dataset.test=folder:/there/is/no/test/set",  # nobody may look at it
    "--config.probe.num_probes=3",
    "--config.encoder.image_size=32",
    "--config.selection.keep_fractions=0.2,0.6",
    "--config.selection.splits=0.5,auto",
    "--config.finetune.epochs=3",
    "--config.finetune.batch_size=64",
    "--config.finetune.linear_probe=True",
    "--config.record.num_runs=2",
    "--config.tuning.num_repeats=5",
    "--config.tuning.splits=0.2,0.8",
    "--config.linear_probe.epochs=5",
)


def run(
    folder, *arguments: str, methods=METHODS, stages=("score", "tune", "select"), code: int = 0
) -> str:
    arguments += (f"--config.stages={stages}",)
    given = {argument.partition("=")[0] for argument in arguments}  # lists add up if given twice
    usual = [argument for argument in ARGUMENTS if argument.partition("=")[0] not in given]
    command = [sys.executable, "-m", "dlc_jax.main", *usual, f"--workdir={folder}"]
    command += [f"--config.selection.methods={','.join(methods)}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work directory, and what was said."""
    folder = tmp_path_factory.mktemp("tuned")
    return folder, run(folder)


@pytest.mark.slow
def test_every_method_selects_from_what_it_uses(finished, sample, sample_encoder):
    folder, _ = finished
    features = np.load(folder / "scores" / "features.npz", allow_pickle=False)
    np.testing.assert_array_equal(
        features["features"], dlc.features(sample_encoder, sample, image_size=32)
    )
    record = dlc.record_training(
        sample_encoder,
        sample,
        epochs=3,
        batch_size=64,
        learning_rate=0.05,  # of configs/demo.py
        image_size=32,
        settings=dlc.FinetuneConfig(linear_probe=True),
        record=dlc.RecordConfig(num_runs=2),
    )
    table = pq.read_table(folder / "scores" / "scores.parquet")
    assert table.column_names[3:] == [
        "dlc",
        "least_confidence",
        "least_confidence_deepcore",
        "entropy",
        "margin",
        "forgetting",
        "forgetting_deepcore",
        "grand",
        "grand_deepcore",
        "el2n",
        "el2n_paper",
    ]
    for name in ("entropy", "forgetting", "el2n"):
        np.testing.assert_array_equal(
            table[name].to_numpy(), dlc.score(record, method=name), err_msg=name
        )
    kept = {
        "entropy": dlc.select(
            table["entropy"].to_numpy(),
            sample.labels,
            method="entropy",
            keep_fraction=0.2,
            ids=sample.ids,
        ),
        "herding": dlc.select(
            None,
            sample.labels,
            method="herding",
            keep_fraction=0.2,
            ids=sample.ids,
            features=features["features"],
        ),
        "contextual_diversity": dlc.select(
            None,
            sample.labels,
            method="contextual_diversity",
            keep_fraction=0.2,
            ids=sample.ids,
            probabilities=record.probabilities,
        ),
    }
    for method, expected in kept.items():
        found = np.load(folder / "selections" / method / "keep_0.20-seed_1.npy")
        np.testing.assert_array_equal(found, expected.indices)
    manifest = json.loads((folder / "selections/entropy/keep_0.20-seed_1.json").read_text())
    assert manifest["how"]["score"] == "entropy"
    told = json.loads((folder / "provenance.json").read_text())
    seconds, took = told["pruning_seconds"], {k: v["seconds"] for k, v in told["stages"].items()}
    waits_for = {
        "random": (),
        "flexrand": ("score",),
        "herding": ("features",),
        "entropy": ("training",),
        "contextual_diversity": ("training",),
        "auto": ("score", "features", "tune"),
    }
    for method, stages in waits_for.items():
        earlier = sum(took[stage] for stage in stages)
        split = "-split_0.50" if method == "flexrand" else ""
        found = seconds[f"{method}/keep_0.60{split}-seed_1"]
        assert earlier - 0.01 <= found <= earlier + took["select"] + 0.01, method


@pytest.mark.slow
def test_auto_is_what_tune_finds(finished, sample):
    folder, said = finished
    table = pq.read_table(folder / "scores" / "scores.parquet")
    features = np.load(folder / "scores" / "features.npz", allow_pickle=False)["features"]
    scores = table["dlc"].to_numpy()
    tuning = dlc.tune(
        scores,
        sample.labels,
        ids=sample.ids,
        features=features,
        keep_fractions=(0.2, 0.6),
        splits=(0.2, 0.8),
        num_repeats=5,
        trials=dlc.LinearProbeConfig(epochs=5),
    )
    for keep in (0.2, 0.6):
        for method, split, name in (
            ("auto", None, f"auto/keep_{keep:.2f}-seed_1"),
            ("flexrand", "auto", f"flexrand/keep_{keep:.2f}-split_auto-seed_1"),
        ):
            kept = dlc.select(
                scores,
                sample.labels,
                method=method,
                split=split,
                keep_fraction=keep,
                seed=1,
                ids=sample.ids,
                tuning=tuning,
            )
            np.testing.assert_array_equal(
                np.load(folder / "selections" / f"{name}.npy"), kept.indices
            )
            manifest = json.loads((folder / "selections" / f"{name}.json").read_text())
            assert manifest["chosen"]["method"] == kept.chosen.method
            assert manifest["chosen"]["split"] == kept.chosen.split
    with open(folder / "tuning" / "tuning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tuning.tried) == 2 * (6 + 3)
    for row, tried in zip(rows, tuning.tried, strict=True):
        assert row["method"] == tried.method
        assert float(row["accuracy"]) == pytest.approx(tried.accuracy)
        assert float(row["to_random_half_width"]) == pytest.approx(tried.to_random.half_width)
    text = (folder / "tuning" / "tuning.md").read_text()
    assert text.strip() in said
    assert "| keep | random, % | auto" in text
    assert "the full set is better by" in text


@pytest.mark.slow
def test_nothing_is_done_twice_and_one_more_method_asks_for_what_it_needs(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    again = run(tmp_path / "run")
    for said in ("score: unchanged", "features: unchanged", "record: unchanged", "tune: unchanged"):
        assert said in again
    assert "select: unchanged" in again
    before = (tmp_path / "run" / "selections/entropy/keep_0.20-seed_1.npy").stat().st_mtime_ns
    more = run(tmp_path / "run", methods=("entropy", "el2n", "k_center_greedy"), stages=("select",))
    assert "moved to superseded" not in more
    assert (tmp_path / "run" / "selections/el2n/keep_0.60-seed_1.npy").exists()
    assert "select: 4 selections written" in more
    assert (
        tmp_path / "run" / "selections/entropy/keep_0.20-seed_1.npy"
    ).stat().st_mtime_ns == before
    # other training settings: another record, and what goes by it is set aside
    other = run(tmp_path / "run", "--config.finetune.epochs=2", methods=("entropy", "random"))
    assert "score: unchanged" in other
    assert (tmp_path / "run" / "superseded").is_dir()


MISTAKES = [
    (("--config.selection.score=dcl",), "Did you mean 'dlc'?"),
    (("--config.tuning.methods=entropy",), r"tuning.methods: unknown value 'entropy'"),
    (("--config.mode=official",), "mode 'official' has no"),
    (("--config.selection.splits=best",), "selection.splits: expected numbers or 'auto'"),
    (("--config.tuning.methods=easiest",), "expected flexrand among them"),
    (("--config.selection.score=el2n",), "comes from training on what 'auto' holds out"),
    (("--config.selection.allocation=nucs",), "is tuned with allocation='proportional'"),
]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [*MISTAKES[:2], *(pytest.param(*mistake, marks=pytest.mark.slow) for mistake in MISTAKES[2:])],
)
def test_mistakes_end_in_one_clear_line(tmp_path, arguments, says):
    said = run(tmp_path, *arguments, code=2)
    assert said.startswith("error: ")
    assert says in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_selecting_without_what_a_method_uses_says_so(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "scores" / "features.npz").unlink()
    said = run(tmp_path / "run", methods=("herding",), stages=("select",), code=2)
    assert "scores: scores/features.npz is missing; run the stage 'score'" in said


@pytest.mark.slow
def test_features_and_records_of_other_scores_are_not_taken(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    smaller = "--config.encoder.image_size=24"
    run(tmp_path / "run", smaller, methods=("random",), stages=("score",))
    for method, missing in (("herding", "features"), ("contextual_diversity", "record")):
        said = run(tmp_path / "run", smaller, methods=(method,), stages=("select",), code=2)
        assert f"has no {missing}" in said
    said = run(tmp_path / "run", smaller, methods=("entropy",), stages=("select",), code=2)
    assert "no column 'entropy'" in said


@pytest.mark.slow
def test_features_and_record_outlive_other_probes(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    before = (tmp_path / "run" / "scores" / "features.npz").stat().st_mtime_ns
    said = run(tmp_path / "run", "--config.probe.num_probes=2", stages=("score",))
    assert "score: 2 probes" in said
    assert "features: unchanged" in said
    assert "record: unchanged" in said
    assert (tmp_path / "run" / "scores" / "features.npz").stat().st_mtime_ns == before
    assert pq.read_table(tmp_path / "run" / "scores" / "scores.parquet").num_columns == 3 + 11


@pytest.mark.slow
def test_columns_go_with_the_record_they_are_of(finished, tmp_path):
    """Other training settings, and a process that dies before the new record is there."""
    shutil.copytree(finished[0], tmp_path / "run")
    said = run(tmp_path / "run", "--config.finetune.learning_rate=1e30", stages=("score",), code=2)
    assert "learning_rate" in said
    assert pq.read_table(tmp_path / "run" / "scores" / "scores.parquet").num_columns == 3 + 1
    told = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert "training" not in told["stages"]


@pytest.mark.slow
def test_damaged_features_are_not_taken(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "scores" / "features.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "features": arrays["features"] + 1})
    said = run(tmp_path / "run", methods=("herding",), stages=("select",), code=2)
    assert "scores/features.npz does not have the content that was written" in said
    assert "run the stage 'score'" in said


@pytest.mark.slow
def test_another_tolerance_is_told_and_nothing_is_tuned_again(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    said = run(tmp_path / "run", "--config.tuning.tolerance=60", stages=("tune",))
    assert "tune: unchanged" in said
    text = (tmp_path / "run" / "tuning" / "tuning.md").read_text()
    assert text.strip() in said
    assert "at most 60 points" in text
    assert text != (finished[0] / "tuning" / "tuning.md").read_text()


@pytest.mark.slow
def test_what_another_tuning_chose_is_not_exported(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    export = ("--config.export.forms=json",)
    run(tmp_path / "run", *export, methods=("auto",), stages=("export",))
    assert (tmp_path / "run" / "exports").is_dir()
    manifest = json.loads(
        (tmp_path / "run" / "exports/auto/keep_0.20-seed_1/kept.json").read_text()
    )
    selected = json.loads((tmp_path / "run" / "selections/auto/keep_0.20-seed_1.json").read_text())
    assert manifest["chosen"] == selected["chosen"]
    for name in ("variant", "allocation", "per_class"):
        assert manifest[name] == selected["how"][name]
    other = ("--config.tuning.num_repeats=6", *export)
    said = run(tmp_path / "run", *other, methods=("auto",), stages=("export",), code=2)
    assert "made with how.tuning" in said
    assert "Run the stage 'select' again" in said


@pytest.mark.slow
def test_fewer_keep_fractions_are_not_tuned_again(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    fewer = "--config.selection.keep_fractions=0.2"
    said = run(tmp_path / "run", fewer, methods=("auto",), stages=("select",))
    assert "tune: unchanged" in said
    more = "--config.selection.keep_fractions=0.4"
    said = run(tmp_path / "run", more, methods=("auto",), stages=("select",))
    assert "tune: unchanged" not in said
    # those chosen before are as good as they were
    export = "--config.export.forms=npy"
    run(tmp_path / "run", export, methods=("auto",), stages=("export",))


@pytest.mark.slow
def test_a_table_half_changed_is_made_anew(finished, tmp_path):
    """A run killed while it added columns to the scores: the losses are still good."""
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "scores" / "scores.parquet"
    table = pq.read_table(path)
    pq.write_table(table.select(table.column_names[:4]), path)
    said = run(tmp_path / "run", stages=("score",))
    assert "score: unchanged" in said
    assert pq.read_table(path).equals(table)
