"""One run at a time: leases of the living, the dead, the silent and the suspended."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dlc_jax import expect
from dlc_jax.workspace import artefacts, lease

WHEN = "2026-01-02 03:04:05 UTC"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """A minute becomes a second."""
    for name in ("_RENEW_S", "_VOID_S", "_DOUBT_S", "_LOOK_S", "_SETTLE_S"):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 60)


def facts_of(folder: Path) -> dict:
    return json.loads((folder / lease.FILE).read_text())


def leave(folder: Path, **changes) -> None:
    """Leaves the lease of another run there, whole at once as another run would."""
    folder.mkdir(exist_ok=True)
    facts = {"host": "node7", "pid": 4711, "since": WHEN, "machine": "x", "started": "1"}
    content = json.dumps({**facts, "token": "theirs", "renewals": 3, **changes})
    lease.Folder(str(folder)).write(lease.FILE, content.encode())


def here(pid: int) -> dict:
    started = lease._started(pid)
    machine = {"host": lease.platform.node(), "machine": lease._machine()}
    return {**machine, "pid": pid, "started": started}


def held(folder: Path, say=print):
    return lease.held(lease.Folder(str(folder)), say)


def test_a_lease_lasts_as_long_as_the_run(tmp_path):
    folder = tmp_path / "new" / "run"
    with held(folder):
        first = facts_of(folder)
        assert (first["pid"], first["host"]) == (os.getpid(), lease.platform.node())
        time.sleep(0.6)  # renewed by a thread
        assert facts_of(folder)["renewals"] > first["renewals"]
        artefacts.write_json(folder / "x.json", {})
    assert os.listdir(folder) == ["x.json"]
    with pytest.raises(KeyError), held(folder):
        raise KeyError
    assert os.listdir(folder) == ["x.json"]


def refused(folder: Path) -> str:
    """Returns what is said, long before a lease is void, which here is a minute again."""
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_VOID_S", 60.0)
        patch.setattr(lease, "_RENEW_S", 10.0)
        with pytest.raises(expect.InputError) as error, held(folder):
            pass
    assert time.monotonic() - start < 20
    return str(error.value)


def test_a_living_process_of_this_host_is_named_at_once(tmp_path):
    with held(tmp_path):
        since = facts_of(tmp_path)["since"]
        assert refused(tmp_path) == (
            f"{tmp_path}: in use: process {os.getpid()} on {lease.platform.node()} holds it since "
            f"{since}. One run at a time may work there; wait until it ends, or use another "
            "--workdir."
        )
        link = tmp_path.with_name("link")
        link.symlink_to(tmp_path)
        assert "in use: process" in refused(link)
    with held(link):
        assert "in use: process" in refused(tmp_path)


def test_a_dead_process_of_this_host_does_not_block(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    leave(tmp_path, **here(process.pid))
    assert f"process {process.pid} on" in refused(tmp_path)
    process.kill()
    time.sleep(0.2)  # not waited for: a zombie is dead as well
    said: list[str] = []
    with held(tmp_path, said.append):
        assert facts_of(tmp_path)["pid"] == os.getpid()
    process.communicate()
    # its number was given to another process since
    leave(tmp_path, **{**here(os.getpid()), "started": "1"})
    with held(tmp_path, said.append):
        assert facts_of(tmp_path)["token"] != "theirs"
    assert said == []


def test_a_silent_process_of_another_host_is_waited_for_and_then_void(tmp_path):
    leave(tmp_path)
    said: list[str] = []
    start = time.monotonic()
    with held(tmp_path, said.append):
        assert 0.7 < time.monotonic() - start < 20
    (line,) = said
    assert line.startswith(f"{tmp_path}: process 4711 on node7 holds it since {WHEN}; waiting ")


def test_one_that_is_old_already_is_not_waited_for_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_VOID_S", 60.0)
    monkeypatch.setattr(lease, "_RENEW_S", 0.2)
    leave(tmp_path)
    os.utime(tmp_path / lease.FILE, (1e9, 1e9))
    start = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - start < 20


def test_a_process_of_another_host_that_lives_is_named(tmp_path):
    leave(tmp_path, started=None)
    timer = threading.Timer(0.3, lambda: leave(tmp_path, renewals=4))
    timer.start()
    assert "in use: process 4711 on node7 holds it since" in refused(tmp_path)
    timer.join()


def test_one_that_ends_meanwhile_makes_place(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_VOID_S", 60.0)
    leave(tmp_path)
    timer = threading.Timer(0.3, (tmp_path / lease.FILE).unlink)
    timer.start()
    start = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - start < 20
    timer.join()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"[" * 5000, b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_is_that_of_an_unknown_process(tmp_path, content):
    (tmp_path / lease.FILE).write_bytes(content)
    said: list[str] = []
    with held(tmp_path, said.append):
        assert facts_of(tmp_path)["pid"] == os.getpid()
    assert "an unknown process holds its lease; waiting" in said[0]


@pytest.mark.parametrize("changes", [{"started": None, "pid": 10**9}, {"pid": True}])
def test_a_holder_of_this_host_that_is_no_process_does_not_block(tmp_path, changes):
    leave(tmp_path, **here(os.getpid()) | changes)
    with held(tmp_path):
        assert facts_of(tmp_path)["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    said = refused(tmp_path / "file" / "run")
    assert said == f"--workdir: cannot write to {tmp_path}/file/run: Not a directory."
    (tmp_path / "run" / lease.FILE).mkdir(parents=True)
    assert "cannot write to" in refused(tmp_path / "run")


def test_what_was_taken_over_is_not_written_to(tmp_path):
    """As a process finds it that was suspended: its thread did not run, and another came."""
    with held(tmp_path):
        with pytest.raises(lease.Lost, match="process 4711 on node7 holds it since .* writes no"):
            write_when_taken(tmp_path)
        for do in (
            lambda: artefacts.write_json(tmp_path / "y.json", {}),
            lambda: artefacts.remove(tmp_path / "x.json"),
            lambda: artefacts.move(tmp_path / "x.json", tmp_path / "z.json"),
        ):
            with pytest.raises(lease.Lost):
                do()
    assert sorted(os.listdir(tmp_path)) == [lease.FILE, "x.json"]
    assert facts_of(tmp_path)["token"] == "theirs"  # it stays the other's


def write_when_taken(folder: Path) -> None:
    artefacts.write_json(folder / "x.json", {})
    leave(folder)
    time.sleep(0.6)
    artefacts.write_json(folder / "x.json", {"late": True})


def test_a_write_right_after_a_suspension_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_RENEW_S", 100.0)  # the thread has not run yet
    with held(tmp_path):
        artefacts.write_json(tmp_path / "x.json", {})
        leave(tmp_path)
        time.sleep(0.6)
        with pytest.raises(lease.Lost):
            artefacts.write_json(tmp_path / "x.json", {"late": True})
    assert json.loads((tmp_path / "x.json").read_text()) == {}


def test_another_that_came_and_went_meanwhile_is_known_by_its_absence(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_RENEW_S", 100.0)
    with held(tmp_path):
        (tmp_path / lease.FILE).unlink()
        time.sleep(0.6)
        with pytest.raises(lease.Lost, match="another run may have held it meanwhile"):
            artefacts.write_json(tmp_path / "x.json", {})


def test_a_lease_deleted_by_hand_is_written_again(tmp_path):
    with held(tmp_path):
        (tmp_path / lease.FILE).unlink()
        time.sleep(0.6)
        assert facts_of(tmp_path)["pid"] == os.getpid()


def test_without_links_a_lease_is_made_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with held(tmp_path):
        assert "in use: process" in refused(tmp_path)
    assert os.listdir(tmp_path) == []


def contend(folder: Path, together, found, done) -> None:
    for name in ("_RENEW_S", "_VOID_S", "_DOUBT_S"):
        setattr(lease, name, getattr(lease, name) / 10)
    together.wait()
    try:
        with held(folder):
            found.put("held")
            done.wait()
    except expect.InputError:
        found.put("refused")


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "dead", "silent"])
def test_of_many_at_once_one_gets_it(tmp_path, left):
    if left != "nothing":
        leave(tmp_path, **({**here(os.getpid()), "started": "1"} if left == "dead" else {}))
    spawn = multiprocessing.get_context("spawn")
    found, together, done = spawn.Queue(), spawn.Barrier(4), spawn.Event()
    arguments = (tmp_path, together, found, done)
    started = [spawn.Process(target=contend, args=arguments) for _ in range(4)]
    for process in started:
        process.start()
    ends = sorted(found.get(timeout=200) for _ in started)
    done.set()
    for process in started:
        process.join()
    assert ends == ["held", "refused", "refused", "refused"]
