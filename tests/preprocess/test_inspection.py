"""`dlc_jax.check`: what it finds, in the process and as a command."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, encoded, random_images

import dlc_jax as dlc
from dlc_jax.preprocess.inspection import inspect


@pytest.fixture
def troubled(sample):
    """Twenty samples of two classes with one of each kind of trouble, and a test set."""
    images = [sample[i].image for i in (*range(15), *range(50, 55))]
    images[3] = images[3][:700]  # truncated
    images[5] = images[4]  # repeated, same label
    images[16] = images[6]  # repeated under another label
    images[7] = encoded(random_images(1, 90)[0][:12])  # 90 x 12
    labels = np.array([0] * 15 + [1] * 5)
    names = [f"s{i:02}" for i in range(20)]
    train = dlc.array_dataset(images, labels, names, ["many", "few"], name="train")
    held = [images[0], sample[60].image, sample[60].image]
    test = dlc.array_dataset(held, [0, 1, 1], ["t0", "t1", "t2"], ["many", "few"], name="test")
    return train, test


def test_each_kind_of_trouble_is_found_and_named(troubled):
    found = inspect(*troubled, minimum=6)
    assert (found.num_samples, found.num_test_samples) == (20, 3)
    assert list(found.unreadable) == ["s03"]
    assert "truncated" in found.unreadable["s03"]
    assert found.duplicates == [["s04", "s05"], ["s06", "s16"], ["test:t1", "test:t2"]]
    assert found.conflicting == [["s06", "s16"]]
    assert found.across == [["s00", "test:t0"]]
    assert found.small_classes == {"few": 5}
    assert found.odd_sizes == {"s07": "90 x 12"}
    assert found.imbalance == pytest.approx(5 / 14)
    assert not found.is_clean
    rows = {name: (number, first) for name, number, first in found.rows()}
    assert rows["samples"] == (20, "")
    assert rows["samples of the test set"] == (3, "")
    assert rows["repeated content (groups)"] == (2, "s04 = s05")
    assert rows["repeated content (groups), test set"] == (1, "test:t1 = test:t2")
    assert rows["in training and test (groups)"] == (1, "s00 = test:t0")
    assert rows["label imbalance"] == (0, "")


def test_arrays_of_one_channel_are_readable_and_prefixes_do_not_confuse():
    grey = np.arange(3 * 40 * 40, dtype=np.uint32).astype(np.uint8).reshape(3, 40, 40, 1)
    grey[1] += 1
    dataset = dlc.array_dataset([*grey, grey[0]], [0, 1, 0, 0], ["test:a", "b", "c", "d"])
    found = inspect(dataset, minimum=1)
    assert found.unreadable == {}
    assert found.across == []
    assert ["test:a", "d"] in found.duplicates
    broken = dlc.array_dataset([b"x", grey[0]], [0, 1], ["a", "b"])
    assert "BytesIO" not in inspect(broken, minimum=1).unreadable["a"]


def test_the_sample_is_clean_and_imbalance_is_told(sample):
    assert inspect(sample).is_clean
    where = np.concatenate([np.arange(50), [50, 51, 52, 53]])
    some = sample.subset(where)
    some = dlc.array_dataset(
        [some[i].image for i in range(54)], some.labels, some.ids.tolist(), name="some"
    )
    found = inspect(some, minimum=2)
    assert not found.is_clean
    assert found.rows()[-1] == ("label imbalance", 1, "smallest class over largest: 0.080")


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dlc_jax.check", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_command_tells_by_its_exit_code(troubled, tmp_path):
    done = command("--dataset=demo:caltech15/train", "--test=demo:caltech15/test")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing found" in done.stdout
    path = dlc.export(troubled[0], np.arange(20), tmp_path / "train.parquet")
    done = command(f"--dataset=parquet:{path}", f"--json={tmp_path}/found.json")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("unreadable"))
    assert line.split()[:3] == ["unreadable", "1", "s03"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["conflicting"] == [["s06", "s16"]]
    for arguments, says in (
        (("--dataset=folder:/absent",), "no such folder"),
        ((), "--dataset is required"),
        (("--datset=x",), "Unknown command line flag"),
        (("--dataset=demo:caltech15/train", "--minimum=0"), "minimum: must be >= 1"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
