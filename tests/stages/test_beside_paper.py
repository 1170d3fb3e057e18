"""Which of the paper's data sets runs are of, by records written by hand."""

import json

import pytest

from dlc_jax.expect import InputError
from dlc_jax.reports.results import Result
from dlc_jax.stages.beside_paper import beside_paper
from dlc_jax.workspace import Record

RESULTS = [
    Result("random", 0.5, None, 1, 71.0),
    Result("flexrand", 0.5, 0.5, 1, 72.0),
]
IMAGES = {
    "dataset": {"train": "tfds:dtd/train+validation", "test": "tfds:dtd/test"},
    "encoder": {"name": "resnet18", "weights": "timm/resnet18.tv_in1k"},
}
INSTRUCTIONS = {
    "dataset": {"train": "hf:mosaicml/dolly_hhrlhf/train", "test": None},
    "encoder": {"name": "decoder", "weights": "google/gemma-2-9b"},
}
CELL = "flexrand/keep_0.50-split_0.50-seed_1"


def record(workdir, step, settings, facts=None):
    Record(step, "stage", 0, {}, settings, {}, 1.0, {}, [], facts or {}).write(workdir)


def row(text, label, *others):
    (line,) = [
        line for line in text.splitlines() if all(f"| {part} " in line for part in (label, *others))
    ]
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.fixture
def workdir(tmp_path):
    """A work directory with runs on DTD, FlexRand's by DLC."""
    record(tmp_path, "finetune", IMAGES, {"test_dataset": {"num_classes": 47}})
    record(tmp_path, f"selections/{CELL}", {"mode": "default", "score": "dlc"})
    return tmp_path


def test_runs_on_a_data_set_of_the_paper_stand_beside_its_numbers(workdir):
    text = beside_paper(workdir, RESULTS)
    assert text.startswith("Beside the paper, DTD:")
    assert row(text, "random") == ["0.5", "random", "1", "71.00", "71.16", "-0.16", ""]
    found = row(text, "flexrand (split 0.5)")
    assert found == ["0.5", "flexrand (split 0.5)", "1", "72.00", "71.78", "+0.22", "0.09"]


def test_flexrand_by_another_score_is_not_compared(workdir):
    record(workdir, f"selections/{CELL}", {"mode": "default", "score": "el2n"})
    text = beside_paper(workdir, RESULTS)
    assert row(text, "flexrand") == ["0.5", "flexrand", "", "", "71.78", "", "0.09"]
    assert "72.00" not in text


def test_rows_that_other_rules_selected_are_not_compared(workdir):
    rules = {"mode": "default", "score": "dlc", "allocation": "proportional", "per_class": True}
    record(workdir, f"selections/{CELL}", rules)
    assert "72.00" in beside_paper(workdir, RESULTS)
    for changed in ({"allocation": "nucs"}, {"max_similarity": 0.9}, {"leave_out_suspects": True}):
        record(workdir, f"selections/{CELL}", rules | changed)
        assert "72.00" not in beside_paper(workdir, RESULTS)


def test_runs_on_other_data_or_without_a_record_have_no_table(workdir, tmp_path_factory):
    assert beside_paper(tmp_path_factory.mktemp("none"), RESULTS) == ""
    record(workdir, "finetune", IMAGES, {"test_dataset": {"num_classes": 10}})
    assert beside_paper(workdir, RESULTS) == ""
    mine = IMAGES | {"dataset": {"train": "folder:/mine/train", "test": "folder:/mine/test"}}
    record(workdir, "finetune", mine, {"test_dataset": {"num_classes": 47}})
    assert beside_paper(workdir, RESULTS) == ""
    record(workdir, "finetune", {"dataset": {"train": "mine"}, "encoder": {}})  # of another kind
    assert beside_paper(workdir, RESULTS) == ""
    record(workdir, "finetune", {"dataset": {"train": 3}, "encoder": {}})
    with pytest.raises(InputError, match=r"finetune.json: settings.dataset.train is 3, expected t"):
        beside_paper(workdir, RESULTS)


@pytest.mark.parametrize(("num_questions", "is_shown"), [(14_042, True), (570, False)])
def test_mmlu_of_all_questions_stands_beside_theirs(tmp_path, num_questions, is_shown):
    record(tmp_path, "finetune", INSTRUCTIONS)
    record(tmp_path, f"selections/{CELL}", {"mode": "default", "score": "dlc"})
    groups = {"humanities": 56.5, "social_sciences": 73.0, "stem": 53.0, "other": 71.0}
    for cell, name in (
        (RESULTS[0][:4], "random/keep_0.50-seed_1"),
        (RESULTS[1][:4], CELL),
    ):
        place = tmp_path / "evaluate" / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        written = {
            "asked": "a",
            "run": "b",
            "cell": dict(zip(("method", "keep_fraction", "split", "seed"), cell, strict=True)),
            "result": {"test_accuracy": 60.0, **groups},
            "num_questions": num_questions,
            "num_truncated": 0,
        }
        place.write_text(json.dumps(written))
    text = beside_paper(tmp_path, RESULTS)
    assert bool(text) == is_shown
    if is_shown:
        assert "dolly_hhrlhf and gemma2-9b" in text
        assert row(text, "random", "stem") == ["random", "stem", "1", "53.00", "50.23", "+2.77"]
        found = row(text, "flexrand (split 0.5)", "humanities")
        assert found[2:] == ["1", "56.50", "56.08", "+0.42"]
