"""Work directories that were changed behind the package's back, or that others are asked of."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, encoded, random_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.config import KINDS, Config
from dlc_jax.selection import Cell
from dlc_jax.stages import pipeline, report, sweep_results
from dlc_jax.stages.select import Job, SelectionInputs, read_selection
from dlc_jax.tasks import images, measurements, task_of
from dlc_jax.training.images import Finetuner, read_record
from dlc_jax.types import ProbeLosses
from dlc_jax.workspace import Record, Workspace, artefacts, records

CELLS = [Cell("easiest", 0.5, None, 0), Cell("random", 0.5, None, 0), Cell("random", 0.5, None, 1)]


def config(stages: str = "select", **sections) -> Config:
    """Settings of a small run on the images in the current folder."""
    values = {
        "stages": tuple(stages.split(",")),
        "dataset": {"train": "folder:images"},
        "encoder": {"name": "resnet18", "weights": "demo:resnet18", "image_size": 32},
        "probe": {"num_probes": 2},
        "selection": {
            "methods": ("easiest", "random"),
            "keep_fractions": (0.5,),
            "seeds": (0, 1),
        },
        "export": {"forms": ("npy",)},
    }
    for name, settings_ in sections.items():
        values[name] = (
            values.get(name, {}) | settings_ if isinstance(settings_, dict) else settings_
        )
    return Config.of(values)


def fixed_losses(encoder, images, **_) -> ProbeLosses:
    """In place of the probes, which would take seconds."""
    dataset = images.dataset
    losses = np.random.default_rng(0).normal(2, 0.1, (1, len(dataset))).astype(np.float32)
    prototypes = np.zeros((dataset.num_classes, 4), np.float32)
    sparsity = np.zeros(1, np.float32)
    given = (losses, sparsity, dataset.labels, dataset.ids, prototypes, dataset.class_names)
    return ProbeLosses(*given, nearest=np.tile(dataset.labels, (1, 1)))


def run(settings_: Config, workdir: Path) -> str:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "probe", fixed_losses)
        pipeline.run(settings_, workdir, said.append)
    return "\n".join(said)


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A folder with `images/` and with `run/`, scored and selected from."""
    place = tmp_path_factory.mktemp("place")
    for number, image in enumerate(random_images(12, 8)):
        path = place / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run(config("score,select"), place / "run")
    return place


@pytest.fixture
def place(scored, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the current folder."""
    place = Path(shutil.copytree(scored, tmp_path / "copy"))
    monkeypatch.chdir(place)
    return place


def selection_file(place: Path, cell: Cell, suffix: str) -> Path:
    return place / "run" / "selections" / f"{cell.name}{suffix}"


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0), (2, 1)])
def test_a_selection_of_another_cell_is_refused(place, source, target):
    for suffix in (".npy", ".json"):
        shutil.copy(
            selection_file(place, CELLS[source], suffix),
            selection_file(place, CELLS[target], suffix),
        )
    with pytest.raises(dlc.InputError) as caught:
        run(config("export"), place / "run")
    file = selection_file(place, CELLS[target], ".json")
    assert str(caught.value).startswith(f"{file}: is of {CELLS[source].name}, expected ")
    assert CELLS[target].name in str(caught.value)
    run(config(), place / "run")  # selecting again mends it
    run(config("export"), place / "run")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", "0.0.1", "json: does not have the content that was written"),
        ("num_samples", 11, "json: does not have the content that was written"),
        ("dropped", {"count": 6, "sha256": "0" * 64}, "json: does not have the content"),
        ("seed", 5, "is of random/keep_0.50-seed_5, expected random/keep_0.50-seed_1"),
        ("keep_fraction", 0.3, "is of random/keep_0.30-seed_1, expected"),
        ("split", 0.5, "is of random/keep_0.50-split_0.50-seed_1, expected"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(place, field, value, says):
    file = selection_file(place, CELLS[2], ".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(dlc.InputError, match=says):
        run(config("export"), place / "run")


def test_a_selection_whose_manifest_was_made_to_fit_is_refused(place):
    for suffix in (".npy", ".json"):
        shutil.copy(
            selection_file(place, CELLS[2], suffix), selection_file(place, CELLS[1], suffix)
        )
    file = selection_file(place, CELLS[1], ".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": CELLS[1].seed}))
    with pytest.raises(dlc.InputError, match=rf"{CELLS[1].name}\.json: does not have the content"):
        run(config("export"), place / "run")
    run(config(), place / "run")
    run(config("export"), place / "run")


def write_run(workdir: Path, cell: Cell, of: Cell) -> None:
    """Writes what a finished run leaves in its record."""
    result = {"num_kept": 6, "test_accuracy": 50.0, "seconds": 1.0}
    facts = {"cell": of._asdict(), "scores": "b" * 64, "result": result}
    run = Record("run", "fine-tuning", 1, {"kept": "a" * 64}, {}, {}, 1.0, {}, [], facts)
    run.write(workdir / "finetune" / cell.name)


def test_a_run_of_another_cell_is_refused_and_not_in_the_table(tmp_path):
    for cell, of in ((CELLS[0], CELLS[0]), (CELLS[1], CELLS[0])):
        write_run(tmp_path, cell, of)
    path = tmp_path / "finetune" / CELLS[1].name / "run.json"
    assert sweep_results.read_run(tmp_path, CELLS[0].name).key == {"kept": "a" * 64}
    says = f"{path}: is of {CELLS[0].name}, expected {CELLS[1].name}"
    with pytest.raises(dlc.InputError, match=says):
        sweep_results.read_run(tmp_path, CELLS[1].name)
    rows = sweep_results.write_results(tmp_path)
    assert [(row["method"], row["num_kept"]) for row in rows] == [("easiest", 6)]
    said = report.what_is_finished(config(), tmp_path)
    assert said.startswith("1 of the 6 runs asked for are finished")
    assert says in said


def test_an_evaluation_of_another_cell_is_refused(tmp_path):
    found = {"asked": "x", "run": "a" * 64, "cell": CELLS[0]._asdict()}
    found |= {"result": {"test_accuracy": 25.0}, "num_questions": 4, "num_truncated": 0}
    path = tmp_path / "evaluate" / f"{CELLS[1].name}.json"
    artefacts.write_json(path, found)
    with pytest.raises(dlc.InputError, match=f"{path}: is of {CELLS[0].name}, expected"):
        sweep_results.read_evaluation(tmp_path, CELLS[1])


def other_images(place: Path) -> str:
    shutil.copytree(place / "images", place / "others")
    next((place / "others" / "a").iterdir()).write_bytes(encoded(random_images(1, 8, seed=9)[0]))
    return f"folder:{place}/others"


@pytest.mark.parametrize("stages", ["select", "export", "finetune", "report"])
def test_data_that_were_not_scored_are_refused_by_every_stage(place, stages):
    before = (place / "run" / "config.json").read_bytes()
    other = {"train": other_images(place), "test": "folder:images"}
    with pytest.raises(dlc.InputError) as caught:
        run(config(stages, dataset=other), place / "run")
    said = str(caught.value)
    assert f"folder:{place}/others is not what was scored in {place}/run" in said
    assert "(folder:images)" in said
    fingerprint = records.read(place / "run", "score").facts["dataset"]["fingerprint"]
    assert f"expected {fingerprint[:12]}" in said
    assert (place / "run" / "config.json").read_bytes() == before


def test_data_that_cannot_be_compared_are_refused(place):
    with pytest.raises(
        dlc.InputError, match=r"dataset\.train: folder:/absent is not what .*images"
    ):
        run(config(dataset={"train": "folder:/absent"}), place / "run")


def test_moved_data_of_equal_content_are_taken(place):
    shutil.move(place / "images", place / "moved")
    run(config(dataset={"train": f"folder:{place}/moved"}), place / "run")


def test_the_same_name_is_not_read_again(place):
    shutil.move(place / "images", place / "moved")
    assert "unchanged" in run(config(), place / "run")


def test_another_encoder_is_refused_unless_it_is_fine_tuned(place, sample_encoder, monkeypatch):
    monkeypatch.setattr(images, "load_configured", lambda *_: sample_encoder)
    moved = {"weights": "elsewhere/model.safetensors"}
    run(config(encoder=moved), place / "run")  # the same, by its fingerprint
    other = dataclasses.replace(sample_encoder, name="other")
    monkeypatch.setattr(images, "load_configured", lambda *_: other)
    for stages in ("select", "export"):
        with pytest.raises(dlc.InputError) as caught:
            run(config(stages, encoder=moved), place / "run")
        said = str(caught.value)
        assert "resnet18 elsewhere/model.safetensors is not what was scored" in said
        fingerprint = records.read(place / "run", "score").facts["encoder"]["fingerprint"]
        assert f"expected {fingerprint[:12]} (resnet18 demo:resnet18)" in said
    tuned = config("finetune", encoder=moved, dataset={"test": "folder:images"})
    job = Job(tuned, Workspace(place / "run", print), task_of(tuned, print))
    pipeline.check_names_what_was_scored(job)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("encoder", {"image_size": 64}),
        ("encoder", {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        ("dataset", {"category": "kind"}),
    ],
)
def test_settings_that_decide_what_is_measured_are_compared(place, section, change):
    with pytest.raises(dlc.InputError, match=rf"{section}\.\w+: .* is not what was scored in"):
        run(config(**{section: change}), place / "run")


def test_other_probes_are_noted(place):
    said = run(config(probe={"num_probes": 7, "batch_size": 3}), place / "run")
    assert "note: the scores are of probes with num_probes 2; the configuration says num_" in said
    assert "num_probes 7" in said
    assert "note:" not in run(config(), place / "run")


def test_what_a_configuration_leaves_empty_is_not_compared(place):
    bare = {"stages": ("select",), "probe": {"num_probes": 2}}
    run(Config.of(bare), place / "run")


# What is done with a work directory, by what it reads.
def use(workdir: Path, config_: Config) -> None:
    """Calls what reads a work directory: every stage but training itself."""
    run(config_, workdir)
    for cell in CELLS:
        known = SelectionInputs(config_, workdir, artefacts.read_scores(workdir))
        read_selection(Workspace(workdir), known, cell)
        sweep_results.read_run(workdir, cell.name)
        sweep_results.read_evaluation(workdir, cell)
    report.what_is_finished(config_, workdir)
    measurements.check_is_what_was_scored(workdir, dlc.load_dataset(config_.dataset.train))


DAMAGED = (
    "provenance.json",
    "config.json",
    "records/score.json",
    "records/table.json",
    "records/select.json",
    *(f"records/selections/{cell.name}.json" for cell in CELLS[1:]),
    *(f"selections/{cell.name}.json" for cell in CELLS[1:]),
    f"finetune/{CELLS[0].name}/run.json",
    f"evaluate/{CELLS[0].name}.json",
)
VALUES = st.sampled_from([None, True, -1, 0, 0.5, 10**30, "", "text", "../../x", [], [0], {}])


def write_others(workdir: Path) -> None:
    """Adds what fine-tuning and evaluating leave."""
    write_run(workdir, CELLS[0], CELLS[0])
    found = {"asked": "x", "run": "a" * 64, "result": {"test_accuracy": 25.0}}
    found |= {"num_questions": 4, "num_truncated": 0}
    artefacts.write_json(workdir / DAMAGED[-1], found)


def places_in(value, prefix=()):
    """Yields the path of every value in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        yield (*prefix, name)
        if isinstance(item, (dict, list)):
            yield from places_in(item, (*prefix, name))


def change_and_use(place: Path, workdir: Path, data: st.DataObject) -> None:
    """Changes a value in a file of a work directory, and calls everything that reads it."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(place / "run", workdir)
    write_others(workdir)
    path = workdir / data.draw(st.sampled_from(DAMAGED))
    value = json.loads(path.read_text())
    *above, last = data.draw(st.sampled_from(list(places_in(value))))
    inner = value
    for name in above:
        inner = inner[name]
    if data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(VALUES)
    path.write_text(json.dumps(value))
    try:
        use(workdir, config(data.draw(st.sampled_from(["select", "export"]))))
        said = ""
    except dlc.InputError as error:
        said = str(error)
    assert "\n" not in said


OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(max_examples=20, **OPTIONS)
@given(data=st.data())
def test_json_of_another_shape_is_used_or_refused_in_one_line(place, tmp_path, data):
    change_and_use(place, tmp_path / "changed", data)


@pytest.mark.slow
@settings(max_examples=80, **OPTIONS)
@given(data=st.data())
def test_json_changed_anywhere_is_used_or_refused_in_one_line(place, tmp_path, data):
    change_and_use(place, tmp_path / "changed", data)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"1",
        b'"stages"',
        b"null",
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"stages": {}, "stages": {}}',
        b'{"stages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seconds": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("name", ["provenance.json", "records/score.json", DAMAGED[5], DAMAGED[7]])
def test_files_that_are_no_json_objects_are_refused_by_name(place, content, name):
    (place / "run" / name).write_bytes(content)
    with pytest.raises(dlc.InputError) as caught:
        run(config("export"), place / "run")
    assert str(caught.value).startswith(f"{place}/run/{name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": []}, "key is a list of 0 values, expected an object"),
        (
            {"outputs": {"scores/losses.npz": "x"}},
            "outputs.scores/losses.npz is 'x', expected ",
        ),
        ({"seconds": "2"}, "seconds is '2', expected a number"),
        ({"settings": {}}, "settings.asked is missing, expected an object"),
        ({"dataset": []}, "facts.dataset is a list of 0 values, expected an object"),
    ],
)
def test_records_of_another_shape_name_the_field(place, change, says):
    file = place / "run" / "records" / "score.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(dlc.InputError) as caught:
        run(config(), place / "run")
    assert str(caught.value).startswith(f"{file}: {says}")


SCORE, SELECTION = "score", f"selections/{CELLS[1].name}"


@pytest.mark.parametrize("outputs", [[], {"../images/a/0.png": "0" * 64}, {"/etc/passwd": ""}])
@pytest.mark.parametrize("name", [SCORE, SELECTION])
def test_outputs_that_are_no_files_of_the_work_directory_are_refused(place, outputs, name):
    file = place / "run" / "records" / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"outputs": outputs}))
    with pytest.raises(dlc.InputError, match=rf"{name}\.json: outputs"):
        run(config(), place / "run")


def test_a_result_without_files_is_not_done(place):
    for name in (SCORE, SELECTION):
        file = place / "run" / "records" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"outputs": {}}))
    with pytest.raises(dlc.InputError, match="not of the losses beside it"):
        run(config(), place / "run")
    said = run(config("score,select"), place / "run")
    assert "unchanged" not in said
    assert "select: 1 selections written" in said
    assert "unchanged" in run(config("score,select"), place / "run")


def test_a_selection_that_is_not_among_the_outputs_is_not_done(place):
    file = place / "run" / "records" / f"{SELECTION}.json"
    facts = json.loads(file.read_text())
    facts["outputs"] = dict(list(facts["outputs"].items())[:-1])
    file.write_text(json.dumps(facts))
    assert "select: 1 selections written" in run(config(), place / "run")


def test_the_provenance_is_a_view_of_the_records(place):
    file = place / "run" / "provenance.json"
    view = json.loads(file.read_text())
    assert view["stages"].keys() >= {"score", "table", "select"}
    file.write_text(json.dumps(view | {"stages": {}, "dataset": {}}))
    assert "unchanged" in run(config("score"), place / "run")
    file.unlink()
    run(config(selection={"seeds": (0, 1, 2)}), place / "run")
    assert json.loads(file.read_text())["stages"].keys() == view["stages"].keys()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_0_1_left_it(workdir: Path) -> None:
    """Makes a work directory what dlc_jax 0.1.1 would have left of it, with a run."""
    view = json.loads((workdir / "provenance.json").read_text())
    versions = view["versions"] | {"dlc_jax": "0.1.1"}
    stages = {}
    for stage in ("score", "select"):
        found = view["stages"][stage]
        kept = {name: found[name] for name in ("settings", "devices", "seconds", "outputs")}
        stages[stage] = kept | {"inputs": "a" * 64, "versions": versions}
    facts = {name: view[name] for name in ("dataset", "encoder", "pruning_seconds", "devices")}
    old = facts | {"versions": versions, "stages": stages}
    artefacts.write_json(workdir / "provenance.json", old)
    shutil.rmtree(workdir / "records")
    result = {"num_kept": 6, "test_accuracy": 50.0, "seconds": 1.0}
    run_ = {"inputs": "a" * 64, "shared": "b" * 64, "cell": CELLS[0]._asdict(), "settings": {}}
    artefacts.write_json(
        workdir / "finetune" / CELLS[0].name / "run.json", run_ | {"result": result}
    )
    (workdir / "unfinished").mkdir()
    (workdir / "unfinished" / ".part.dlc_jax-elsewhere-1.tmp").write_text("of a run elsewhere")


SETS_OF_STAGES = (
    *(stage for stage in KINDS["images"].stages if stage != "plan"),
    "score,select",
    "tune,select,export,finetune,report",
)


@pytest.mark.parametrize("stages", SETS_OF_STAGES)
def test_a_work_directory_of_0_1_is_refused_and_not_touched(place, stages):
    as_0_1_left_it(place / "run")
    before = contents(place / "run")
    with pytest.raises(dlc.InputError) as caught:
        run(config(stages, dataset={"test": "folder:images"}), place / "run")
    said = str(caught.value)
    assert said.startswith(f"{place}/run: was made by dlc_jax 0.1.1, ")
    assert "expected a new --workdir, or dlc_jax 0.1.1 to continue this one." in said
    assert "\n" not in said
    assert contents(place / "run") == before


def test_the_command_refuses_a_work_directory_of_0_1(place):
    as_0_1_left_it(place / "run")
    before = contents(place / "run")
    command = (sys.executable, "-m", "dlc_jax.main", f"--config={ROOT}/configs/demo.py")
    done = subprocess.run(
        (*command, f"--workdir={place}/run"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {place}/run: was made by dlc_jax 0.1.1, ")
    assert done.stderr.count("\n") == 1
    assert contents(place / "run") == before


@pytest.mark.parametrize("theirs", ["0.1\n.1", 1, None, ""])
def test_a_version_that_is_none_is_refused_in_one_line(place, theirs):
    path = place / "run" / "provenance.json"
    artefacts.write_json(path, {"versions": {"dlc_jax": theirs}})
    with pytest.raises(dlc.InputError) as caught:
        run(config(), place / "run")
    assert str(caught.value).startswith(f"{path}: versions.dlc_jax is ")
    assert "\n" not in str(caught.value)


def header(shape: str, descr: str = "<i8", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117)
    return magic + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        header(f"({10**15},)"),
        header(f"({10**15}, 0)"),
        header("(-1,)"),
        header("(1,)", "|O") + bytes(8),
        header(f"({10**15},)", "<U0"),
        header("(6,)", "<f8") + bytes(48),
        header("(6,)", "<i8") + bytes(47),
        header("(6,)", "|S3") + b"\xff" * 18,
        header("((6,)"),
        header("6}\n{", "<i8"),
        header("(6,), 1: 2"),
        header("-" * 9000 + "6"),
        b"\x93NUMPY",
        b"",
        b"PK\x03\x04",
    ],
)
def test_positions_with_a_false_header_are_refused(place, content):
    selection_file(place, CELLS[1], ".npy").write_bytes(content)
    with pytest.raises(dlc.InputError) as caught:
        run(config("export"), place / "run")
    assert str(caught.value).startswith(f"{selection_file(place, CELLS[1], '.npy')}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"losses": np.zeros(12, np.float32)},
        {"losses": np.zeros((1, 11), np.float32)},
        {"losses": np.full((1, 12), np.nan, np.float32)},
        {"losses": np.zeros((1, 12), int)},
        {"sparsity": np.zeros(3, np.float32)},
        {"ids": np.arange(12)},
        {"ids": np.array([b"\xff"] * 12)},
        {"labels": np.zeros((12, 1), np.int32)},
    ],
)
def test_losses_of_another_shape_are_refused(place, change):
    file = place / "run" / "scores" / "losses.npz"
    arrays = dict(np.load(file))
    np.savez(file, **arrays | change)
    with pytest.raises(dlc.InputError, match=f"{next(iter(change))}|not finite"):
        artefacts.read_losses(place / "run")


def test_losses_that_are_damaged_or_would_unpack_to_more_are_refused(place):
    file = place / "run" / "scores" / "losses.npz"
    arrays = dict(np.load(file))
    np.savez_compressed(file, **arrays | {"losses": np.zeros((1000, 12), np.float32)})
    with pytest.raises(dlc.InputError, match=r"losses\.npz: is compressed"):
        artefacts.read_losses(place / "run")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(dlc.InputError, match=r"losses\.npz: cannot be read as arrays"):
        artefacts.read_losses(place / "run")


@pytest.mark.slow
def test_training_of_other_settings_is_set_aside_with_its_columns_and_comes_back(
    place, monkeypatch
):
    """No column of the table is ever of another training record than the one beside it."""
    epochs, real = [], Finetuner.batches
    monkeypatch.setattr(Finetuner, "batches", lambda *a: epochs.append(a[3]) or real(*a))

    def score(num_epochs: int) -> tuple[bytes, bytes]:
        sections = {"selection": {"methods": ("hardest",), "score": "el2n"}}
        sections |= {"finetune": {"epochs": num_epochs, "batch_size": 6}}
        sections |= {"record": {"num_runs": 1}}
        run(config("score,select", **sections), place / "run")
        scores = place / "run" / "scores"
        columns = artefacts.read_scores(place / "run").scores
        record = read_record(scores / "training", artefacts.read_scores(place / "run").ids)
        np.testing.assert_array_equal(columns["el2n"], dlc.score(record, method="el2n"))
        return (scores / "training/record.npz").read_bytes(), columns["el2n"].tobytes()

    one = score(1)
    two = score(2)
    assert one != two
    assert epochs == [1, 1, 2]
    assert score(1) == one
    assert score(2) == two
    assert epochs == [1, 1, 2]
    stages = json.loads((place / "run" / "provenance.json").read_text())["stages"]
    assert stages["training"]["settings"]["finetune"]["epochs"] == 2
    assert stages["training"]["seconds"] > 0
