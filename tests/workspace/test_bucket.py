"""Work directories in a bucket, on an S3 server of its own: whole, killed, shared, unreachable."""

import csv
import http.server
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import ROOT
from moto.server import ThreadedMotoServer

from dlc_jax import expect
from dlc_jax.workspace import artefacts, bucket, lease, object_store
from dlc_jax.workspace.object_store import ObjectStore

SCORE = (
    "--config=configs/demo.py",
    "--config.encoder.image_size=32",
    "--config.probe.batch_size=8",
    "--config.probe.num_probes=2",
    "--config.selection.keep_fractions=(0.1,)",
    "--config.selection.methods=('random',)",
)
FINETUNE = (
    *SCORE,
    "--config.stages=score,select,finetune,report",
    "--config.finetune.epochs=6",
    "--config.finetune.linear_probe=True",
    "--config.finetune.batch_size=25",
    "--config.finetune.full_set=False",
)


@pytest.fixture(scope="module")
def server():
    """A server of S3, and a log of what it was asked."""
    asked: list[str] = []
    log = logging.getLogger("werkzeug")
    handler = logging.Handler()
    handler.emit = lambda record: asked.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    found = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    found.start()
    host, port = found.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        files().mkdir("bucket")
        yield asked
    found.stop()
    log.removeHandler(handler)


def files():
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


def names(url: str) -> list[str]:
    """Returns what is in the bucket."""
    return sorted(ObjectStore(url).list())


def start(url, home: Path, *arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dlc_jax.main", *arguments, f"--workdir={url}"],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(url, home: Path, *arguments, code: int = 0, **environment) -> tuple[str, str]:
    """Returns what the command printed."""
    process = start(url, home, *arguments, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def kill_when(process: subprocess.Popen, is_time) -> None:
    until = time.monotonic() + 60
    while not is_time():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def losses(url: str) -> dict[str, np.ndarray]:
    with fsspec.open(f"{url}/scores/losses.npz") as file, np.load(file) as arrays:
        return dict(arrays)


def assert_same_losses(url: str, other: str) -> None:
    some, others = losses(url), losses(other)
    for name in others:
        np.testing.assert_array_equal(some[name], others[name])


def local_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run in a folder, which fine-tunes as well."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder / "run", folder, *FINETUNE)
    return folder / "run"


@pytest.fixture(scope="module")
def scored(server, tmp_path_factory) -> str:
    """A run in the bucket that nothing disturbed."""
    url = "s3://bucket/runs/scored"
    out, _ = run(url, tmp_path_factory.mktemp("home"), *SCORE)
    assert f"files: {url}/ (scores/scores.parquet" in out
    return url


@pytest.mark.slow
def test_all_artefacts_are_in_the_bucket(scored, plain):
    found = names(scored)
    assert found == sorted(
        [
            "config.json",
            "provenance.json",
            "records/score.json",
            "records/select.json",
            "records/selections/random/keep_0.10-seed_1.json",
            "records/suspect_labels.json",
            "records/table.json",
            "scores/certificate.json",
            "scores/easiest_hardest.png",
            "scores/losses.npz",
            "scores/scores.parquet",
            "scores/suspect_labels.csv",
            "scores/suspect_labels.png",
            "selections/random/keep_0.10-seed_1.json",
            "selections/random/keep_0.10-seed_1.npy",
        ]
    )
    assert_same_losses(scored, str(plain))


@pytest.mark.slow
def test_another_machine_finds_it_done(scored, tmp_path, server):
    before = len(server)
    out, _ = run(scored, tmp_path, *SCORE)
    assert "score: unchanged, not run again" in out
    assert any("GET /bucket/runs/scored/scores/losses.npz" in line for line in server[before:])
    # and once more: nothing is fetched twice
    before = len(server)
    out, _ = run(scored, tmp_path, *SCORE)
    assert "score: unchanged, not run again" in out
    fetched = [line for line in server[before:] if "GET /bucket/runs/scored/" in line]
    assert all("/.lease.json" in line for line in fetched)


@pytest.mark.slow
def test_scoring_that_is_killed_goes_on_elsewhere(plain, tmp_path, server):
    url = "s3://bucket/runs/killed"

    def puts() -> list[str]:
        """Parts of losses that were put, by name."""
        lines = [line for line in server if "PUT /bucket/runs/killed/unfinished/" in line]
        return [line.split()[6] for line in lines if "/losses-" in line]

    process = start(url, tmp_path / "one", *SCORE)
    kill_when(process, lambda: len(puts()) >= 5)
    assert not any(name.startswith("scores/") for name in names(url))
    run(url, tmp_path / "two", *SCORE)
    assert_same_losses(url, str(plain))
    assert not any("unfinished" in name for name in names(url))
    # none is measured twice, but for one that was under way
    assert len(puts()) - len(set(puts())) <= 1


@pytest.mark.slow
def test_fine_tuning_that_is_killed_goes_on_elsewhere(plain, tmp_path, server):
    url = "s3://bucket/runs/tuned"
    folder = "finetune/random/keep_0.10-seed_1"
    process = start(url, tmp_path / "one", *FINETUNE)
    kill_when(process, lambda: len(checkpoints(server)) >= 2)
    kept = {name.split("/")[4] for name in names(url) if f"{folder}/checkpoint/" in name}
    assert len(kept) >= 1
    before = len(server)
    run(url, tmp_path / "two", *FINETUNE)
    fetched = {
        line.split("/checkpoint/")[1].split("/")[0]
        for line in server[before:]
        if "GET /bucket/runs/tuned/" in line and "/checkpoint/" in line
    }
    assert fetched
    assert fetched <= kept
    assert steps(names(url)) == steps(local_names(plain))
    with fsspec.open(f"{url}/results.csv", "r") as file, open(plain / "results.csv") as other:
        rows, others = list(csv.DictReader(file)), list(csv.DictReader(other))
    assert [row["test_accuracy"] for row in rows] == [row["test_accuracy"] for row in others]
    told = [
        [json.loads(line)["train_loss"] for line in text.splitlines()]
        for text in (
            files().cat_file(f"{url}/{folder}/metrics.jsonl").decode(),
            (plain / folder / "metrics.jsonl").read_text(),
        )
    ]
    assert told[0] == told[1]


def steps(found: list[str]) -> list[str]:
    """Returns files, and of checkpoints the folder: what is in them has random names."""
    return sorted({name.partition("/state/")[0] for name in found})


def checkpoints(asked: list[str]) -> set[str]:
    """Returns the steps whose checkpoints were put."""
    lines = [line for line in asked if "PUT /bucket/runs/tuned/" in line and "/checkpoint/" in line]
    return {line.split("/checkpoint/")[1].split("/")[0] for line in lines}


@pytest.mark.slow
def test_processes_that_share_nothing_else(plain, tmp_path, server):
    url = "s3://bucket/runs/two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        start(
            url,
            tmp_path / str(number),
            *SCORE,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    np.testing.assert_allclose(
        losses(url)["losses"], losses(str(plain))["losses"], rtol=0, atol=2e-6
    )
    assert not any("unfinished" in name for name in names(url))
    # what the second one had was for the time of the run
    assert len(list((tmp_path / "0" / "dlc_jax" / "workdirs").iterdir())) == 1
    assert not list((tmp_path / "1" / "dlc_jax" / "workdirs").iterdir())


@pytest.mark.slow
def test_two_machines_do_not_run_in_one_place(plain, tmp_path, server):
    url = "s3://bucket/runs/contended"
    first = start(url, tmp_path / "one", *SCORE)
    deadline = time.monotonic() + 60
    while lease.FILE not in names(url):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    other = [argument.replace("num_probes=2", "num_probes=3") for argument in SCORE]
    _, err = run(url, tmp_path / "two", *other, code=2)
    assert err.startswith(f"error: {url}: in use: process {first.pid} on ")
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert_same_losses(url, str(plain))
    assert lease.FILE not in names(url)


def test_a_lease_in_a_bucket(url, monkeypatch):
    for module, name in ((lease, "_RENEW_S"), (lease, "_VOID_S"), (lease, "_LOOK_S")):
        monkeypatch.setattr(module, name, getattr(module, name) / 40)
    monkeypatch.setattr(object_store, "_SETTLE_S", 0.1)
    place, said = ObjectStore(url), []
    with lease.held(place):
        assert names(url) == [lease.FILE]
        first = json.loads(place.read(lease.FILE))
        with (
            pytest.raises(expect.InputError, match=f"{re.escape(url)}: in use: process"),
            held(url),
        ):
            pass
        time.sleep(0.6)
        assert json.loads(place.read(lease.FILE))["renewals"] > first["renewals"]
    assert names(url) == []
    # of another machine that died: silent, then void
    place.write(lease.FILE, json.dumps({**first, "host": "node7"}).encode())
    with lease.held(place, said.append):
        assert json.loads(place.read(lease.FILE))["token"] != first["token"]
    assert "on node7 holds it since" in said[0]
    assert names(url) == []


def held(url: str):
    return lease.held(ObjectStore(url))


def test_two_that_create_a_lease_at_once(url, monkeypatch):
    """As in a bucket that ignores the condition: the last one has it, and the first finds out."""
    place, waited = ObjectStore(url), []

    def sleep(seconds):
        waited.append(seconds)
        place.write(lease.FILE, b"another")

    monkeypatch.setattr(object_store, "time", types.SimpleNamespace(sleep=sleep))
    assert not place.create(lease.FILE, b"mine")
    assert waited == [object_store._SETTLE_S]
    assert place.read(lease.FILE) == b"another"


@pytest.mark.parametrize(
    ("url", "environment", "said"),
    [
        ("s3://nowhere/run", {}, "error: s3://nowhere/run: there is no such bucket."),
        (
            "s3://bucket/run",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"},
            "error: s3://bucket/run: cannot be listed: EndpointConnectionError: Could not connect",
        ),
    ],
)
def test_the_command_says_what_is_wrong(url, environment, said, server, tmp_path):
    _, err = run(url, tmp_path, *SCORE, code=2, **environment)
    assert err.startswith(said)
    assert err.count("\n") == 1


class Refuses(http.server.BaseHTTPRequestHandler):
    """Google's answer to who has no credentials."""

    def do_GET(self):
        message = "Anonymous caller does not have storage.objects.list access to the bucket."
        body = json.dumps({"error": {"code": 401, "message": message}}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_google_without_credentials(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as google:
        threading.Thread(target=google.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{google.server_port}"
        _, err = run("gs://bucket/run", tmp_path, *SCORE, code=2, STORAGE_EMULATOR_HOST=host)
        google.shutdown()
    assert err.startswith("error: gs://bucket/run: cannot be listed: HttpError: Anonymous caller")
    assert err.endswith(
        "(expected the credentials that the cloud's own tools use, with access to it).\n"
    )
    assert err.count("\n") == 1


def opened(url: str, home: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return bucket.work_in(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket", "expected a folder in a bucket, such as s3://bucket/runs/demo"),
        ("nothing://bucket/run", "Protocol not known: nothing"),
    ],
)
def test_urls_that_are_none(url, said, tmp_path, monkeypatch, server):
    with (
        pytest.raises(expect.InputError, match=f"--workdir: .*{said}"),
        opened(url, tmp_path, monkeypatch),
    ):
        pass


@pytest.mark.parametrize(("package", "url"), [("s3fs", "s3://b/run"), ("gcsfs", "gs://b/run")])
def test_the_extra_is_missing(package, url):
    code = f"""
import sys
sys.modules[{package!r}] = None
from dlc_jax.workspace import bucket
with bucket.work_in({url!r}): pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = done.stderr.strip().splitlines()[-1]
    assert f"{url[:5]} needs a package that is not installed: pip install 'dlc_jax[bucket]'" in line


def test_no_credentials(server, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with (
        opened("s3://bucket/run", tmp_path, monkeypatch) as (folder, _),
        pytest.raises(expect.InputError, match="expected the credentials that the cloud's own"),
    ):
        artefacts.prepare_workdir(folder)


def test_a_folder_needs_none_of_this(tmp_path):
    code = f"""
import sys
from dlc_jax.cli import main
from dlc_jax.workspace import artefacts, bucket
with bucket.work_in({str(tmp_path / "~x")!r}) as (folder, echo):
    artefacts.prepare_workdir(folder)
print(folder, echo is print, {{"s3fs", "gcsfs", "botocore"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / '~x'} True set()\n", done.stderr


def write(path: Path, text: str) -> None:
    with artefacts.atomic(path, "w") as file:
        file.write(text)


def write_folder(path: Path, **texts: str) -> None:
    with artefacts.atomic_folder(path) as folder:
        for name, text in texts.items():
            (folder / "in").mkdir(exist_ok=True)
            (folder / "in" / name).write_text(text)


@pytest.fixture
def url(server, request) -> str:
    return f"s3://bucket/unit [x]/{request.node.name}"


def test_what_is_done_in_the_folder_is_done_in_the_bucket(url, tmp_path, monkeypatch):
    with opened(url, tmp_path, monkeypatch) as (folder, _):
        artefacts.prepare_workdir(folder)
        write(folder / "a" / "b.csv", "old")
        write(folder / "a" / "b.csv", "new")
        write(folder / "c", "")
        write_folder(folder / "d", x="1", y="2")
        write_folder(folder / "d", x="3")  # takes the place of the other
        artefacts.move(folder / "d", folder / "aside" / "d")
        write(folder / "g", "5")
        artefacts.move(folder / "g", folder / "aside" / "g")
        write_folder(folder / "e", x="4")
        write(folder / "f*", "gone")
        artefacts.remove(folder / "e")
        artefacts.remove(folder / "f*")
        artefacts.remove(folder / "never")
        assert names(url) == local_names(folder) == ["a/b.csv", "aside/d/in/x", "aside/g", "c"]
    assert ObjectStore(url).read("a/b.csv") == b"new"
    assert ObjectStore(url).read("aside/d/in/x") == b"3"


def test_the_bucket_is_the_truth(url, tmp_path, monkeypatch):
    with opened(url, tmp_path / "one", monkeypatch) as (folder, _):
        artefacts.prepare_workdir(folder)
        for name in ("same", "changed", "removed/too", "touched"):
            write(folder / name, "here")
    with opened(url, tmp_path / "two", monkeypatch) as (there, _):
        artefacts.prepare_workdir(there)
        write(there / "changed", "there")
        artefacts.remove(there / "removed")
        write(there / "added", "there")
    before = (folder / "same").stat()
    (folder / "touched").write_text("by hand")
    (folder / "more").write_text("by hand")
    (folder / "empty").mkdir()
    with opened(url, tmp_path / "one", monkeypatch) as (again, _):
        assert again == folder
        artefacts.prepare_workdir(folder)
        texts = {name: (folder / name).read_text() for name in local_names(folder)}
    assert texts == {"added": "there", "changed": "there", "same": "here", "touched": "here"}
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert (folder / "same").stat().st_mtime_ns == before.st_mtime_ns  # not fetched again


def test_exports_are_not_fetched(url, tmp_path, monkeypatch):
    with opened(url, tmp_path / "one", monkeypatch) as (folder, _):
        write_folder(folder / "exports" / "kept-images", x="1")
    with opened(url, tmp_path / "two", monkeypatch) as (folder, _):
        artefacts.prepare_workdir(folder)
        assert local_names(folder) == []
        write_folder(folder / "exports" / "kept-images", y="2")  # takes its place all the same
    assert names(url) == ["exports/kept-images/in/y"]


def test_one_run_at_a_time(url, tmp_path, monkeypatch):
    with (
        opened(url, tmp_path, monkeypatch),
        pytest.raises(expect.InputError, match="another process is running there") as error,
        opened(url, tmp_path, monkeypatch),
    ):
        pass
    assert str(error.value).startswith(f"{url}: its local copy {tmp_path}")


def test_messages_name_the_bucket(url, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run_badly() -> None:
        with bucket.work_in(url, said.append) as (folder, echo):
            echo(f"files: {folder}/ (all)")
            write(folder / "config.json", "{")
            artefacts.read_json(folder / "config.json")

    with pytest.raises(expect.InputError) as error:
        run_badly()
    assert said == [f"files: {url}/ (all)"]
    assert str(error.value).startswith(f"{url}/config.json: not valid JSON")


def test_links_are_refused(url, tmp_path, monkeypatch):
    with (
        opened(url, tmp_path, monkeypatch) as (folder, _),
        pytest.raises(expect.InputError, match="a bucket holds no links"),
        artefacts.atomic_folder(folder / "kept-links") as links,
    ):
        (links / "image").symlink_to(ROOT / "README.md")


def test_a_network_that_comes_back_and_one_that_does_not(url, tmp_path, monkeypatch):
    fails = [2]
    real = ObjectStore._path

    def path(store, name):
        if fails[0] > 0:
            fails[0] -= 1
            raise ConnectionResetError("lost")
        return real(store, name)

    with opened(url, tmp_path, monkeypatch) as (folder, _):
        write(folder / "a", "1")
        waits: list[float] = []
        monkeypatch.setattr(time, "sleep", waits.append)
        monkeypatch.setattr(ObjectStore, "_path", path)
        write(folder / "a", "2")
        assert waits == [1.0, 2.0]
        assert ObjectStore(url).read("a") == b"2"
        monkeypatch.setattr(object_store, "_PATIENCE_S", 0.0)
        fails[0] = 1000
        with pytest.raises(object_store.Unreachable, match="cannot be written: ConnectionReset"):
            write(folder / "a", "3")
    shutil.rmtree(tmp_path)
