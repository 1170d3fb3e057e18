"""What is said of a sweep, from run folders written by hand."""

import json
import runpy

import pytest
from conftest import ROOT

from dlc_jax.stages.report import note_on_chance
from dlc_jax.workspace import Record


def run_folder(workdir, name, train, test, num_classes=15, num_kept=750, num_test=20):
    """Writes what a finished run of so many classes leaves."""
    folder = workdir / "finetune" / name
    folder.mkdir(parents=True)
    result = {"num_kept": num_kept, "test_accuracy": test, "seconds": 1.0}
    facts = {"result": result}
    Record("run", "fine-tuning", 1, {}, {}, {}, 1.0, {}, [], facts).write(folder)
    lines = [{"epoch": 1, "train_accuracy": 50.0}, {"epoch": 2, "train_accuracy": train}]
    if train is None:
        lines = [{"epoch": 0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [f"{label},c{label},{num_test},{test}\n" for label in range(num_classes)]
    header = "label,class_name,num_test,test_accuracy\n"
    (folder / "per_class_accuracy.csv").write_text(header + "".join(rows))


def test_runs_that_end_at_chance_are_named_with_the_settings_to_change(tmp_path):
    run_folder(tmp_path, "easiest/keep_0.10-seed_1", 60.0, 31.0, num_kept=75)
    assert note_on_chance(tmp_path) == ""
    run_folder(tmp_path, "random/keep_0.10-seed_1", 9.3, 7.0, num_kept=75)
    run_folder(tmp_path, "full/keep_1.00-seed_1", 7.1, 6.3)
    note = note_on_chance(tmp_path)
    assert note.startswith(
        "Note: 2 of 3 runs learned nothing, such as full: 7.1 % right in training and 6.3 % in the "
        "test, where guessing among 15 classes gives 6.7 %."
    )
    for name in ("learning_rate", "epochs", "batch_size"):
        assert f"finetune.{name}" in note


@pytest.mark.parametrize(
    ("train", "test", "num_test", "learned_nothing"),
    [
        (6.7, 10.9, 20, True),  # three standard deviations of 300 guesses: 11.0 %
        (6.7, 11.1, 20, False),
        (6.7, 11.1, 10, True),  # fewer images, more noise
        (9.3, 6.7, 20, True),  # of 750: 9.4 %
        (9.5, 6.7, 20, False),
        (0.0, 0.0, 20, True),
        (None, 6.7, 20, False),  # the untrained head was asked for
    ],
)
def test_chance_is_within_three_standard_deviations(
    tmp_path, train, test, num_test, learned_nothing
):
    run_folder(tmp_path, "full/keep_1.00-seed_1", train, test, num_test=num_test)
    assert bool(note_on_chance(tmp_path)) == learned_nothing


def test_runs_without_a_result_are_passed_over(tmp_path):
    run_folder(tmp_path, "full/keep_1.00-seed_1", 6.7, None)
    run_folder(tmp_path, "full/keep_1.00-seed_2", 6.7, 6.7)
    (tmp_path / "finetune/full/keep_1.00-seed_2/metrics.jsonl").unlink()
    run_folder(tmp_path, "full/keep_1.00-seed_3", 6.7, 100.0, num_classes=1)
    run_folder(tmp_path, "full/keep_1.00-seed_4", 6.7, 6.7)
    (tmp_path / "finetune/full/keep_1.00-seed_4/run.json").write_text("[]")
    assert note_on_chance(tmp_path) == ""


def test_the_demo_trains_as_the_sweep_of_it_does():
    """The paper's rate and batch size leave 750 images at chance level."""
    demo, sweep = (
        runpy.run_path(str(ROOT / "configs" / name))["get_config"]()
        for name in ("demo.py", "demo_sweep.py")
    )
    assert demo.finetune.to_dict() == sweep.finetune.to_dict()
    assert demo.finetune.learning_rate == 0.05
