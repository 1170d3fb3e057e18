"""The command on data as people have them: deep images, files nobody reads, empty classes."""

import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, encoded

import dlc_jax as dlc

pytestmark = pytest.mark.slow
CLASS = "étoile"


def run(module: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", f"dlc_jax.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def put(root, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


@pytest.fixture
def messy(tmp_path, sample):
    """Two classes in Train and Test, of which one has a deep and a constant image in training."""
    for part, form, first in (("Train", "NFC", 0), ("Test", "NFD", 10)):
        for i in range(8):
            put(tmp_path, f"{part}/bonsai/{i}.jfif", sample[first + i].image)
            name = unicodedata.normalize(form, CLASS)
            put(tmp_path, f"{part}/{name}/{i}.jpg", sample[50 + first + i].image)
        put(tmp_path, f"{part}/bonsai/notes.txt", b"x")
        put(tmp_path, f"{part}/@eaDir/1.jpg", sample[0].image)
        (tmp_path / part / "empty").mkdir()
    wide = np.random.default_rng(0).integers(0, 4096, (64, 64), np.uint16)
    put(tmp_path, "Train/bonsai/wide.png", encoded(wide))
    put(tmp_path, "Train/bonsai/even.png", encoded(np.full((64, 64), 300, np.uint16)))
    return tmp_path


def test_a_run_on_messy_data_is_refused_or_tells_what_it_did(messy):
    train = f"folder:{messy}/Train"
    options = (
        "--config=configs/demo.py",
        "--config.probe.num_probes=2",
        "--config.encoder.image_size=32",
        "--config.stages=('score','select','finetune')",
        "--config.selection.keep_fractions=0.5",
        "--config.selection.seeds=1",
        "--config.selection.methods=random",
        "--config.finetune.epochs=1",
        f"--config.dataset.test=folder:{messy}/Test",
        f"--config.cache.folder={messy}/cache",
        f"--workdir={messy}/run",
    )
    done = run("main", *options, f"--config.dataset.train=folder:{messy}", code=2)
    assert done.stderr.startswith("error: ")
    assert f"folder:{messy}/Train." in done.stderr
    options += (f"--config.dataset.train={train}",)
    done = run("main", *options, "--config.dataset.on_corrupt=skip", code=2)
    assert done.stderr.count("\n") == 1
    assert "error: " in done.stderr
    assert "has 16 bits a channel, expected 8 bits a channel" in done.stderr
    done = run("main", *options, "--config.dataset.deep_images=min_max")
    assert f"{train}: left out: 1 .txt\n" in done.stdout
    assert f"{train}: note: classes without samples, left out: 'empty'\n" in done.stdout
    assert "score: note: 1 constant images are mid-grey by" in done.stdout
    assert "bonsai/even.png" in done.stdout
    provenance = json.loads((messy / "run" / "provenance.json").read_text())
    for key in ("dataset", "test_dataset"):
        facts = provenance[key]
        assert facts["left_out"] == {".txt": 1}
        assert facts["empty_classes"] == ["empty"]
        assert facts["deep_images"] == "min_max"
    assert provenance["dataset"]["mid_grey"] == ["bonsai/even.png"]
    settings = json.loads((messy / "run" / "config.json").read_text())
    assert settings["dataset"]["deep_images"] == "min_max"
    again = run("main", *options, "--config.dataset.deep_images=min_max")
    assert "score: unchanged" in again.stdout
    assert "left out: 1 .txt" in again.stdout
    official = run("main", *options, "--config.mode=official", f"--workdir={messy}/official")
    assert "mid-grey" not in official.stdout


def test_the_check_lists_what_a_run_refuses(messy):
    put(messy, "Train/bonsai/bad.jpg", b"x")
    put(messy, "Train/bonsai/worse.jpg", b"y")
    arguments = (f"--dataset=folder:{messy}/Train", f"--test=folder:{messy}/Test")
    done = run("check", *arguments, f"--json={messy}/found.json", code=1)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["samples", "20"] in lines
    assert ["samples", "of", "the", "test", "set", "16"] in lines
    for name in ("bad.jpg", "worse.jpg", "wide.png", "even.png"):
        assert any(line.startswith(f"  bonsai/{name} ") for line in done.stdout.splitlines())
    found = json.loads((messy / "found.json").read_text())
    assert list(found["deep"]) == ["bonsai/even.png", "bonsai/wide.png"]
    done = run("check", *arguments, "--deep_images=full_range", code=1)
    assert "wide.png" not in done.stdout
    assert dlc.load_dataset(f"folder:{messy}/Train").class_names == ("bonsai", CLASS)
