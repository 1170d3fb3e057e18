"""Results, their records and what is set aside, with steps that take no time."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.distributed import processes
from dlc_jax.files import whole_files
from dlc_jax.workspace import Workspace, Written, artefacts, records


@dataclasses.dataclass
class Text:
    """Two files that hold the key."""

    key: dict
    name: str = "text"
    kind: str = "losses"
    stage: str = "score"
    settings: dict = dataclasses.field(default_factory=dict)
    files: tuple = ("scores/a.txt", "scores/b.txt")
    obsolete: tuple = ("unfinished",)
    computed: list = dataclasses.field(default_factory=list)
    fails: bool = False

    def compute(self, scratch: Path) -> str:
        self.computed.append(scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "part").write_text("half")
        if self.fails:
            raise dlc.InputError("no")
        return json.dumps(records.as_json(self.key), sort_keys=True)

    def write(self, root: Path, text: str) -> Written:
        for name in self.files:
            with whole_files.atomic(root / name, "w") as file:
                file.write(f"{name} {text}")
        return Written(self.files, {"length": len(text)})


def content(root: Path, step: Text) -> list[str]:
    return [(root / name).read_text() for name in step.files]


def expected(step: Text) -> list[str]:
    text = json.dumps(records.as_json(step.key), sort_keys=True)
    return [f"{name} {text}" for name in step.files]


def everything(root: Path) -> dict[str, bytes]:
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*")}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def test_a_result_is_made_once(tmp_path):
    workspace, step = Workspace(tmp_path, pytest.fail), Text({"seed": 1})
    made = workspace.ensure(step)
    assert made is not None
    assert made.value == '{"seed": 1}'
    before = everything(tmp_path)
    assert before.keys() == {*step.files, "records/text.json", "provenance.json"}
    assert workspace.ensure(step) is None
    assert len(step.computed) == 1
    assert everything(tmp_path) == before
    assert json.loads(before["records/text.json"])["length"] == len(made.value)
    workspace.check(step)
    with pytest.raises(dlc.InputError, match=r"text\.json: made with seed 1, expected 2\. Run the"):
        workspace.check(Text({"seed": 2}))


def test_another_key_sets_a_result_aside_and_it_comes_back(tmp_path):
    workspace = Workspace(tmp_path)
    one, two = Text({"seed": 1}), Text({"seed": 2})
    workspace.ensure(one)
    before = everything(tmp_path)
    workspace.ensure(two)
    assert content(tmp_path, two) == expected(two)
    workspace.ensure(one)
    workspace.ensure(two)
    workspace.ensure(one)
    assert (len(one.computed), len(two.computed)) == (1, 1)
    after = everything(tmp_path)
    assert {k: v for k, v in after.items() if "superseded" not in k} == before
    aside = [name for name in after if "superseded" in name]
    assert sorted(name.split("/", 2)[2] for name in aside) == [
        "records/text.json",
        *one.files,
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(width=16) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)
OPTIONS = {"deadline": None, "derandomize": True, "max_examples": 150}
OPTIONS |= {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


def text_of(value) -> str:
    """Returns a value as Python's JSON has it, NaN and infinities by name."""
    return json.dumps(value, sort_keys=True)


@settings(**OPTIONS)
@given(one=st.dictionaries(st.text("ab"), JSON), two=st.dictionaries(st.text("ab"), JSON))
def test_two_keys_are_one_exactly_if_they_are_as_json(one, two):
    record = records.Record.of(Path(), Text(one, files=()), Written(()))
    found = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))
    record = records.Record(**found)
    assert record.difference(Text(dict(reversed(one.items())))) is None
    assert (record.difference(Text(two)) is None) == (text_of(one) == text_of(two))
    same_place = records.group_folder(Text(one)) == records.group_folder(Text(two))
    assert same_place == (text_of(one) == text_of(two))


def test_keys_take_what_numpy_gives(tmp_path):
    given_ = {"a": np.float32(0.5), "b": (np.int64(3), math.inf), "c": {"d": math.nan}}
    step = Text(given_)
    Workspace(tmp_path).ensure(step)
    assert (
        Workspace(tmp_path).ensure(Text({"a": 0.5, "b": [3, math.inf], "c": step.key["c"]})) is None
    )
    assert Workspace(tmp_path).ensure(Text(given_ | {"c": {"d": None}})) is not None


def damaged(what: str, root: Path) -> None:
    record = root / "records" / "text.json"
    facts = json.loads(record.read_text())
    match what:
        case "changed":
            (root / "scores/b.txt").write_text("other")
        case "deleted":
            (root / "scores/b.txt").unlink()
        case "truncated":
            (root / "scores/a.txt").write_text("")
        case "output":
            del facts["outputs"]["scores/a.txt"]
        case "record":
            record.unlink()
        case "kind":
            facts["kind"] = "features"
        case "number":
            facts["number"] += 1
        case "key":
            facts["key"]["seed"] = 3
        case "step":
            facts["step"] = "other"
    if what != "record":
        record.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "what",
    ["changed", "deleted", "truncated", "output", "record", "kind", "number", "key", "step"],
)
def test_what_is_not_as_it_was_written_does_not_count(tmp_path, what):
    said: list[str] = []
    workspace, step = Workspace(tmp_path, said.append), Text({"seed": 1})
    workspace.ensure(step)
    damaged(what, tmp_path)
    assert not workspace.has(step)
    with pytest.raises(dlc.InputError) as caught:
        workspace.check(step)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert workspace.ensure(step) is not None
    assert content(tmp_path, step) == expected(step)
    assert workspace.ensure(step) is None
    is_noted = what in ("changed", "deleted", "truncated", "output")
    assert [line.endswith("; it is made again") for line in said] == [True] * is_noted


@pytest.mark.parametrize("content_", ["", "[]", "{", '{"step": 3}', '{"a": NaN}', "null"])
def test_a_record_of_another_shape_is_named(tmp_path, content_):
    workspace, step = Workspace(tmp_path), Text({"seed": 1})
    workspace.ensure(step)
    (tmp_path / "records/text.json").write_text(content_)
    with pytest.raises(dlc.InputError) as caught:
        workspace.ensure(step)
    assert str(caught.value).startswith(f"{tmp_path}/records/text.json: ")
    assert "\n" not in str(caught.value)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("nth", range(40))
def test_killed_at_any_write_or_move_nothing_is_lost_or_mixed(tmp_path, monkeypatch, nth):
    """A, then B, then A again and B again; the nth change of the disk never comes."""
    real, count = whole_files._check_may_write, [0]

    def count_and_kill() -> None:
        count[0] += 1
        if count[0] == nth + 1:
            raise Killed
        real()

    one, two = Text({"seed": 1}), Text({"seed": 2})
    workspace = Workspace(tmp_path, lambda line: None)
    workspace.ensure(one)
    steps = [two, one, two]
    monkeypatch.setattr(whole_files, "_check_may_write", count_and_kill)
    killed_in = None
    for number, step in enumerate(steps):
        try:
            workspace.ensure(step)
        except Killed:
            killed_in = number
            break
    monkeypatch.undo()
    if killed_in is None:
        assert count[0] <= nth  # there are no more
        return
    for step in (one, two, one):
        if workspace.has(step):
            assert content(tmp_path, step) == expected(step)
        workspace.ensure(step)
        assert content(tmp_path, step) == expected(step)
    assert len(one.computed) == 1  # it was whole all the time, here or set aside
    assert workspace.ensure(one) is None


@pytest.mark.parametrize("first", [1, 2])
def test_a_move_that_was_stopped_and_another_key(tmp_path, monkeypatch, first):
    """Stopped while A comes back, a third key is asked for, then A again."""
    one, two, three = (Text({"seed": seed}) for seed in (1, 2, 3))
    workspace = Workspace(tmp_path, lambda line: None)
    workspace.ensure(one)
    workspace.ensure(two)
    real, count = whole_files.move, [0]

    def stops(source, target):
        count[0] += 1
        if count[0] > 3 + first:  # B and its record are aside, A is on its way
            raise Killed
        real(source, target)

    monkeypatch.setattr("dlc_jax.workspace.artefacts.move", stops)
    with pytest.raises(Killed):
        workspace.ensure(one)
    monkeypatch.undo()
    for step in (three, one, two, three):
        workspace.ensure(step)
        assert content(tmp_path, step) == expected(step)
    assert [len(step.computed) for step in (one, two, three)] == [1, 1, 1]


def test_a_number_voids_results_and_the_version_does_not(tmp_path, monkeypatch):
    workspace, step = Workspace(tmp_path), Text({"seed": 1})
    workspace.ensure(step)
    monkeypatch.setattr(artefacts, "versions", lambda: {"dlc_jax": "9.9"})
    assert workspace.ensure(step) is None
    other = Text({"seed": 2}, name="other", files=("c.txt",))
    workspace.ensure(other)
    stages = json.loads((tmp_path / "provenance.json").read_text())["stages"]
    assert stages["text"]["versions"]["dlc_jax"] == dlc.__version__
    assert stages["other"]["versions"] == {"dlc_jax": "9.9"}
    number = artefacts.result_number("losses") + 1
    monkeypatch.setitem(artefacts.RESULT_NUMBERS, "losses", number)
    assert workspace.ensure(step) is not None
    assert workspace.ensure(step) is None


def test_a_step_that_fails_leaves_its_parts_and_no_record(tmp_path):
    workspace, step = Workspace(tmp_path), Text({"seed": 1}, fails=True)
    with pytest.raises(dlc.InputError, match="no"):
        workspace.ensure(step)
    assert everything(tmp_path) == {"unfinished/part": b"half"}
    step.fails = False
    workspace.ensure(step)
    assert not (tmp_path / "unfinished").exists()


def test_results_made_from_others_are_replaced(tmp_path):
    workspace = Workspace(tmp_path)
    for seed in (1, 2, 1):
        step = Text({"seed": seed}, kind="report")
        assert workspace.ensure(step) is not None
        assert content(tmp_path, step) == expected(step)
    assert not (tmp_path / "superseded").exists()


def test_within_one_process_nothing_waits_for_others(tmp_path, monkeypatch):
    """As the first of two processes, which the other one never answers."""
    store: dict[str, str] = {}

    class Client:
        @staticmethod
        def key_value_set(key: str, value: str) -> None:
            store[key] = value

        @staticmethod
        def blocking_key_value_get(key: str, _: int) -> str:
            raise AssertionError(f"waited for {key}")

    monkeypatch.setattr(processes, "_place", processes.Place("localhost:1", 2, 0))
    monkeypatch.setattr(processes, "_have_met", True)
    monkeypatch.setattr(processes, "client", Client)
    workspace, step = Workspace(tmp_path), Text({"seed": 1})
    assert workspace.alone(lambda: workspace.ensure(step)) is not None
    assert workspace.broadcast(lambda: workspace.alone(lambda: workspace.has(step)))
    assert len(store) == 2
    with pytest.raises(AssertionError, match="waited for"):
        workspace.ensure(Text({"seed": 2}))  # all take part


@pytest.mark.parametrize("number", [0, 1])
def test_all_processes_compute_and_the_first_writes(tmp_path, monkeypatch, number):
    """One of two processes, with what the other one says in the store."""
    store: dict[str, str] = {}
    told = iter([False, None])  # nothing is there; it is written

    class Client:
        @staticmethod
        def key_value_set(key: str, value: str) -> None:
            store[key] = value

        @staticmethod
        def blocking_key_value_get(key: str, _: int) -> str:
            is_said = "/said/" in key
            assert number == 1 or not is_said
            return json.dumps({"value": next(told)}) if is_said else store.get(key, "null")

    monkeypatch.setattr(processes, "_place", processes.Place("localhost:1", 2, number))
    monkeypatch.setattr(processes, "_have_met", True)
    monkeypatch.setattr(processes, "client", Client)
    step = Text({"seed": 1}, obsolete=())
    made = Workspace(tmp_path).ensure(step)
    assert made is not None
    assert made.value == '{"seed": 1}'
    assert len(step.computed) == 1
    written = everything(tmp_path).keys() - {"unfinished/part"}
    is_first = number == 0
    assert written == ({*step.files, "records/text.json", "provenance.json"} if is_first else set())
    assert len(store) == (3 if is_first else 1)  # found nothing, all came here, is written


def test_a_fresh_folder_and_one_with_scores_of_the_users_own_are_taken(tmp_path):
    for name, files in (("absent", ()), ("empty", ()), ("scored", ("scores/scores.parquet",))):
        root = tmp_path / name
        for file in files:
            (root / file).parent.mkdir(parents=True)
            (root / file).write_text("mine")
        if name == "empty":
            root.mkdir()
        with Workspace(root).held():
            assert (root / ".lease.json").exists()
        assert everything(root).keys() == {*files}
