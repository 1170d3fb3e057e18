"""Work directories in a bucket, killed at any object that is put, copied or deleted."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from test_bucket import local_names, names, opened, write, write_folder
from test_records import Text

from dlc_jax.workspace import Workspace, Written, artefacts, lease, object_store
from dlc_jax.workspace.checkpoints import Checkpoints
from dlc_jax.workspace.object_store import ObjectStore


@pytest.fixture
def url(request) -> str:
    return f"memory://bucket/{request.node.name}"


class Killed(BaseException):
    pass


def dies(monkeypatch, after: int) -> None:
    """Ends the run when so many objects were put, copied or deleted, the lease aside."""
    num_done = [0]

    def counted(method: str):
        do = getattr(ObjectStore, method)

        def some(store, items):
            for item in list(items):
                if item != lease.FILE:
                    if num_done[0] == after:
                        raise Killed
                    num_done[0] += 1
                do(store, [item])

        return some

    for method in ("put", "copy", "delete"):
        monkeypatch.setattr(ObjectStore, method, counted(method))


def is_killed(monkeypatch, after: int, url: str, home: Path, do) -> bool:
    """Does it in a work directory; returns whether it was killed on the way."""
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        with opened(url, home, patch) as (folder, _), Workspace.of(folder, print).held():
            dies(patch, after)
            do(Workspace.of(folder, lambda line: None))
        return False
    return True


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(object_store, "_SETTLE_S", 0.0)


def held_bucket(url: str, home: Path, monkeypatch):
    stack = contextlib.ExitStack()
    folder, _ = stack.enter_context(opened(url, home, monkeypatch))
    workspace = Workspace.of(folder, lambda line: None)
    stack.enter_context(workspace.held())
    return stack, workspace


FOLDERS = {"finetune/dlc/keep_0.30-seed_1": "finetune/*/*", "scores/training": "scores/training"}
GROUP = "finetune-0123456789ab"
OF_RUN = {"run.json": "{}", "metrics.json": "1", "checkpoint/1/x": "2", "checkpoint/1/y": "3"}


@pytest.mark.parametrize("machine", ["one", "two"])
@pytest.mark.parametrize(
    ("goes", "name"), [*(("aside", name) for name in FOLDERS), ("back", next(iter(FOLDERS)))]
)
def test_a_run_that_is_moved_is_never_there_in_part(
    goes, name, machine, request, tmp_path, monkeypatch, at_once
):
    def put_aside(workspace: Workspace) -> None:
        workspace.set_run_aside(name, GROUP)

    def take_back(workspace: Workspace) -> None:
        workspace.take_runs_back(FOLDERS[name], GROUP)

    def texts(folder: Path) -> dict[str, str]:
        return {name: (folder / name).read_text() for name in local_names(folder)}

    move, other = (put_aside, take_back) if goes == "aside" else (take_back, put_aside)
    for after in range(100):
        url = f"memory://bucket/{request.node.name}-{after}"
        stack, workspace = held_bucket(url, tmp_path / "one", monkeypatch)
        with stack:
            for file, text in OF_RUN.items():
                write(workspace.root / name / file, text)
            if goes == "back":
                put_aside(workspace)
        if not is_killed(monkeypatch, after, url, tmp_path / "one", move):
            break
        stack, workspace = held_bucket(url, tmp_path / machine, monkeypatch)
        with stack:
            places = [workspace.root / name, workspace.root / "superseded" / GROUP / name]
            there = [place for place in places if place.exists()]
            assert there
            assert all(texts(place) == OF_RUN for place in there)
            for again in (move, other, move):
                if again is take_back or places[0].exists():
                    again(workspace)
            assert texts(places[goes == "aside"]) == OF_RUN
            assert not places[goes != "aside"].exists()
    assert after == 2 * len(OF_RUN)


def test_a_run_that_began_beside_one_that_is_set_aside_stays(url, tmp_path, monkeypatch, at_once):
    name, aside = next(iter(FOLDERS)), f"superseded/{GROUP}"
    expected = {f"{name}/run.json", f"{name}/error.txt", f"{aside}/{name}/run.json"}
    for place in ("one", "two"):
        stack, workspace = held_bucket(url, tmp_path / place, monkeypatch)
        with stack:
            for file in expected:
                write(workspace.root / file, "{}")
    assert {*names(url)} == expected


def test_in_a_folder_nothing_is_taken_for_a_move_that_was_stopped(tmp_path):
    files = [f"superseded/{GROUP}/{name}/{file}" for name in FOLDERS for file in ("a", "b")]
    files += [f"{name}/notes.txt" for name in FOLDERS]
    for file in files:
        write(tmp_path / file, "mine")
    with Workspace.of(tmp_path, print).held():
        assert {*files} <= {*local_names(tmp_path)}


@dataclasses.dataclass
class Folder(Text):
    """A folder whose files are called by the key."""

    kind: str = "export"
    name: str = "exports/kept"
    files: tuple = ()
    obsolete: tuple = ()

    def write(self, root: Path, text: str) -> Written:
        write_folder(root / "exports" / "kept", both=text, **{f"only{self.key['seed']}": text})
        place = "exports/kept/in"
        return Written((f"{place}/both", f"{place}/only{self.key['seed']}"))


def texts_of(step: Text) -> dict[str, str]:
    """Returns what the step's files have to hold."""
    text = json.dumps(step.key)
    if isinstance(step, Folder):
        place = "exports/kept/in"
        return {f"{place}/both": text, f"{place}/only{step.key['seed']}": text}
    return {name: f"{name} {text}" for name in step.files}


def content(workspace: Workspace, step: Text) -> dict[str, str]:
    return {name: (workspace.root / name).read_text() for name in texts_of(step)}


@pytest.mark.parametrize("machine", ["one", "two"])
@pytest.mark.parametrize("kind", [pytest.param(Text, marks=pytest.mark.slow), Folder])
def test_results_of_a_bucket_are_whole_wherever_a_run_is_killed(
    kind, machine, request, tmp_path, monkeypatch, at_once
):
    one, two = kind({"seed": 1}), kind({"seed": 2})

    def make_both(workspace: Workspace) -> None:
        for step in (one, two, one):
            workspace.ensure(step)

    for after in range(100):
        url = f"memory://bucket/{request.node.name}-{after}"
        was_killed = is_killed(monkeypatch, after, url, tmp_path / "one", make_both)
        stack, workspace = held_bucket(url, tmp_path / machine, monkeypatch)
        with stack:
            for step in (one, two):
                if workspace.has(step):
                    assert content(workspace, step) == texts_of(step)
        for step in (two, one):
            stack, workspace = held_bucket(url, tmp_path / machine, monkeypatch)
            with stack:
                workspace.ensure(step)
                assert workspace.has(step)
        assert {name: ObjectStore(url).read(name).decode() for name in texts_of(one)} == texts_of(
            one
        )
        paths = {name for name in names(url) if name.startswith("exports/")}
        if kind is Folder:
            assert paths == {"exports/kept/in/both", "exports/kept/in/only1"}
        assert json.loads(ObjectStore(url).read(f"records/{one.name}.json"))["key"] == one.key
        if not was_killed:
            break
    assert after > 10


def test_what_failed_half_way_is_known_all_the_same(url, tmp_path, monkeypatch):
    with opened(url, tmp_path, monkeypatch) as (folder, _):
        write_folder(folder / "d", x="1", y="1", z="1")
        with monkeypatch.context() as patch:
            dies(patch, 1)
            with pytest.raises(Killed):
                artefacts.remove(folder / "d")
        with monkeypatch.context() as patch:
            dies(patch, 2)
            with pytest.raises(Killed):
                write_folder(folder / "d", u="2", v="2", w="2")
        assert names(url) == ["d/in/z"]
        with monkeypatch.context() as patch:
            dies(patch, 4)
            with pytest.raises(Killed):
                write_folder(folder / "d", u="2", v="2", w="2")
        assert names(url) == ["d/in/u"]
        write_folder(folder / "d", v="3")
        assert names(url) == ["d/in/v"]
        artefacts.remove(folder / "d")
        assert names(url) == []


@pytest.mark.parametrize("after", [0, 3, 6])
def test_a_checkpoint_that_was_put_in_part_is_not_used(after, request, tmp_path, monkeypatch):
    url, like = f"memory://bucket/{request.node.name}", {"w": jnp.zeros(3)}
    with opened(url, tmp_path / "one", monkeypatch) as (folder, _):
        with Checkpoints(folder / "checkpoint", "inputs") as checkpoints:
            checkpoints.save(1, {"w": jnp.ones(3)}, [{"epoch": 1}])
        checkpoints = Checkpoints(folder / "checkpoint", "inputs")
        with monkeypatch.context() as patch, checkpoints:
            dies(patch, after)
            checkpoints.save(2, {"w": jnp.full(3, 2.0)}, [{"epoch": 2}])
            with pytest.raises(Killed):
                checkpoints.wait()
    said: list[str] = []
    with opened(url, tmp_path / "two", monkeypatch) as (folder, _):
        artefacts.prepare_workdir(folder)
        with Checkpoints(folder / "checkpoint", "inputs", say=said.append) as checkpoints:
            state, history = checkpoints.restore(like)
            checkpoints.save(2, {"w": jnp.full(3, 2.0)}, [{"epoch": 2}])
        assert {path.name for path in (folder / "checkpoint").iterdir()} == {"2"}
    assert (state["w"].tolist(), history) == ([1.0, 1.0, 1.0], [{"epoch": 1}])
    assert [line.split(": ")[2] for line in said] == ["damaged, not used"] * (after > 0)
    assert all(name.startswith("checkpoint/2/") for name in names(url))
