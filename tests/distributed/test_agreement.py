"""What processes that do not see the same are told; here, they are threads."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, random_images
from test_processes import SCORE, ended, start

import dlc_jax as dlc
from dlc_jax import expect
from dlc_jax.config import Config, default_config
from dlc_jax.datasets.instructions import instructions
from dlc_jax.distributed import processes
from dlc_jax.tasks import agreement


@pytest.fixture
def in_processes(monkeypatch):
    """Calls a function of the process's number in as many threads; returns what each raised."""
    mine = threading.local()

    def run(num, function):
        barrier, passed, raised = threading.Barrier(num, timeout=20), {}, [None] * num

        def everyones(value):
            passed[mine.number] = json.dumps(value)
            barrier.wait()
            found = [json.loads(passed[number]) for number in range(num)]
            barrier.wait()
            return found

        def call(number):
            mine.number = number
            try:
                function(number)
            except Exception as error:
                raised[number] = error

        monkeypatch.setattr(processes, "count", lambda: num)
        monkeypatch.setattr(processes, "index", lambda: mine.number)
        monkeypatch.setattr(processes, "everyones", everyones)
        threads = [threading.Thread(target=call, args=(number,)) for number in range(num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised

    return run


def check_refused(raised: list, says: str) -> None:
    """All are refused at the same place, and the first one says it."""
    assert isinstance(raised[0], expect.SharedError), raised
    assert says in str(raised[0])
    assert all(isinstance(error, processes.SaidByFirst) for error in raised[1:])


def folder(root: Path, size: int = 8) -> Path:
    """Makes 12 images of two classes."""
    for number, image in enumerate(random_images(12, size)):
        path = root / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    return root


@pytest.mark.parametrize("num", [2, 3])
def test_the_same_samples_have_the_fingerprint_of_one_process(in_processes, tmp_path, num):
    root = folder(tmp_path)
    seen = [dlc.load_dataset(f"folder:{root}") for _ in range(num)]
    assert in_processes(num, lambda me: agreement.agree_on_images(seen[me])) == [None] * num
    expected = dlc.load_dataset(f"folder:{root}").fingerprint
    assert [dataset.fingerprint for dataset in seen] == [expected] * num


def test_large_sets_are_divided_and_every_sample_read_twice(in_processes, monkeypatch):
    reads = []

    class Images:
        def __len__(self):
            return 3100

        def __getitem__(self, position):
            reads.append(position)
            return position.to_bytes(4, "little")

    monkeypatch.setattr(agreement, "_FEW_BLOCKS", 1)
    labels, ids = np.arange(3100) % 2, np.arange(3100).astype(np.str_)
    seen = [dlc.Dataset(Images(), labels, ids, ("a", "b")) for _ in range(4)]
    assert in_processes(4, lambda me: agreement.agree_on_images(seen[me])) == [None] * 4
    assert sorted(reads) == sorted([*range(3100)] * 2)
    assert len({dataset.fingerprint for dataset in seen}) == 1
    assert seen[0].fingerprint == dlc.Dataset(Images(), labels, ids, ("a", "b")).fingerprint


def flip(root: Path) -> None:
    path = root / "class1" / "7.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def swap(root: Path) -> None:
    (root / "class0" / "0.png").rename(root / "class1" / "0.png")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flip, "sample 'class1/7.png' of process 0 is not the same in process {last}"),
        (
            lambda root: (root / "class1" / "7.png").unlink(),
            "number of samples: process {last} has 11, process 0 has 12",
        ),
        (lambda root: (root / "class1").rename(root / "dog"), "class names: process {last} has"),
        (swap, "of process 0 is not the same in process {last} ("),
    ],
)
@pytest.mark.parametrize("num", [2, 3])
def test_other_images_are_refused(in_processes, tmp_path, num, change, says):
    roots = [folder(tmp_path / str(number)) for number in range(num)]
    change(roots[-1])
    seen = [dlc.load_dataset(f"folder:{root}") for root in roots]
    raised = in_processes(num, lambda me: agreement.agree_on_images(seen[me]))
    check_refused(raised, says.format(last=num - 1))
    assert f"process {num - 1}" in str(raised[0])


def test_other_instructions_are_refused(in_processes):
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "kind": "x"} for i in range(2000)]
    for change in ({"response": "other"}, {"kind": "y"}):
        other = [*rows[:1500], rows[1500] | change, *rows[1501:]]
        seen = [instructions(rows), instructions(other)]
        raised = in_processes(2, lambda me: agreement.agree_on_instructions(seen[me]))  # noqa: B023
        check_refused(raised, f"sample {str(seen[0].ids[1500])!r} of process 0 is not the same")
    assert in_processes(2, lambda me: agreement.agree_on_instructions(seen[0])) == [None] * 2


def test_other_files_of_a_model_are_refused(in_processes, tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.safetensors").write_bytes(bytes([number]))

    def compare(me):
        agreement.agree_on_files(tmp_path / str(me), ("model*",))

    check_refused(in_processes(2, compare), "0/model.safetensors: process 1 has")


def test_other_settings_are_refused(in_processes):
    def compare(me):
        config = default_config()
        config.dataset.train = "folder:x"
        config.encoder.weights = "demo:resnet18"
        config.probe.num_probes = 8 - 4 * me
        config.cache.folder = f"/local/{me}"  # may well differ
        agreement.agree_on_settings(Config.of(config), "runs/x")

    check_refused(
        in_processes(2, compare), "config.probe.num_probes: process 1 has 4, process 0 has 8"
    )


@pytest.mark.slow
def test_a_file_that_differs_ends_all_processes_before_scoring(tmp_path, monkeypatch):
    homes = [tmp_path / "0", tmp_path / "1"]
    for home in homes:
        folder(home / "data", 32)
    flip(homes[1] / "data")
    arguments = [*SCORE, "--config.dataset.train=folder:~/data"]
    codes, said = ended(start(2, tmp_path / "run", arguments, homes=homes))
    assert codes == [2, 2], said
    assert "sample 'class1/7.png' of process 0 is not the same in process 1" in said[0]
    assert "Traceback" not in said[0] + said[1]
    assert not (tmp_path / "run" / "scores").exists()
    shutil.rmtree(homes[1])
    os.symlink(homes[0], homes[1])
    codes, said = ended(start(2, tmp_path / "run", arguments, homes=homes))
    assert codes == [0, 0], said
