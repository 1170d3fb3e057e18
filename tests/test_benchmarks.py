"""Benchmarks start, and the one of the whole way from files to kept sets runs."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import coverage, encoder_coverage

PROGRAMS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()
)


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_starts_and_tells_how_it_is_called(name):
    done = run(name, "--help")  # absl's programs end with 1, argparse's with 0
    assert "Traceback" not in done.stderr
    assert name in done.stdout


@pytest.mark.long
def test_files_to_kept_sets_by_the_released_procedure_and_ours(tmp_path):
    found = tmp_path / "rows.json"
    done = run(
        "prune_end_to_end",
        "--num_images=15",
        "--image_size=32",
        "--encoders=resnet18",
        "--by=dlc_jax none,released,dlc_jax 5",
        f"--json={found}",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(found.read_text())
    failed = [row for row in rows if "error" in row]
    assert [(row["by"], row["error"]) for row in failed] == 2 * [("dlc_jax none", "ended with 1")]
    rows = [row for row in rows if "error" not in row]
    told = [(row["by"], row["state"], row["num_probes"]) for row in rows]
    assert told == [
        ("released", "warm", [50]),
        ("dlc_jax 5", "cold", [5]),
        ("dlc_jax 5", "warm", [5]),
    ]
    assert all(0 < row["seconds"][0] < row["process"][0] for row in rows)


@pytest.mark.long
def test_coverage_of_a_converted_network_is_a_line_that_is_not_run_again(tmp_path):
    rows = tmp_path / "rows.jsonl"
    names = ["timm:test_vit", "hf:swin", "timm:none"]
    arguments = (f"--only={','.join(names)}", f"--rows={rows}")
    done = run("encoder_coverage", *arguments)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["name"] for row in found] == names
    assert [row["module"] for row in found] == ["vision_transformer", "transformers", "timm"]
    for row in found[:2]:
        assert row["reason"] == ""
        assert 0 < row["features"] < 1e-5
        assert 0 < max(row["probe"]) < 1e-5
        assert 0 < row["step"][0] < 1e-3
        assert 0.3 < row["share_prunable"] < 1
    assert found[2]["reason"].startswith("after module: RuntimeError: Unknown model (none)")
    for door, held in (("timm:", "1 of 2, 50 %"), ("hf:", "1 of 1, 100 %")):
        for what in ("features", "probe", "step"):
            assert f"- {door} {what}: {held}" in done.stdout
    again = run("encoder_coverage", *arguments)
    assert again.stdout.count("| hf:swin |") == 1  # in the table alone
    assert len(rows.read_text().splitlines()) == 3


def test_coverage_sees_an_update_a_statistic_and_a_shape_that_differ():
    moved = {"weight": np.full(4, 100.0), "bias": np.full(2, 1e-9), "mean": np.ones(3)}
    statistics = frozenset(["mean"])

    def furthest(**changed: np.ndarray) -> float:
        return encoder_coverage.furthest({**moved, **changed}, moved, statistics)

    assert furthest() == 0
    assert furthest(other=np.ones(9)) == 0  # what torch does not have
    assert furthest(weight=np.full(4, 101.0)) == pytest.approx(0.01)
    assert furthest(mean=np.full(3, 0.99)) == pytest.approx(0.01)
    assert furthest(bias=np.full(2, 2e-9)) < 1e-7  # noise
    assert coverage.distance(np.ones(3), np.ones((1, 3))) == np.inf
    assert coverage.distance(np.full(3, 1.1), np.ones(3)) == pytest.approx(0.1)
    row = {"module": "m", "name": "timm:a", "reason": "", "features": 2e-5, "step": [3e-3, 8e-4]}
    assert encoder_coverage.verdicts(row) == {"features": False, "probe": False, "step": True}
    assert "| **2.0e-05** |  | 3.0e-03 / 8.0e-04 |" in encoder_coverage.line(row)
    assert encoder_coverage.verdicts(row | {"step": [3.3e-3, 8e-4]})["step"] is False


def gpu(out: Path) -> list[str]:
    return ["bash", "benchmarks/gpu.sh", "text", str(out)]


@pytest.mark.long
def test_a_part_that_is_stopped_leaves_what_it_has_and_goes_on_from_there(tmp_path):
    env = os.environ | {"SMALL": "1", "PYTHON": sys.executable}
    found = tmp_path / "small" / "text.json"
    started = subprocess.Popen(gpu(tmp_path), cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    for line in started.stdout:
        if line.startswith("== text.llama_torch"):
            started.send_signal(signal.SIGTERM)
            break
    assert "stopped" in started.stdout.read()
    assert started.wait() == 143
    steps = json.loads(found.read_text())["steps"]
    assert {name: step["ended"] for name, step in steps.items()} == {
        "llama": True,
        "llama_torch": False,
    }
    assert {row["by"] for row in steps["llama"]["found"]["rows"]} == {
        "dlc_jax bfloat16",
        "dlc_jax bfloat16, attention cudnn",
        "dlc_jax bfloat16, attention cudnn_causal",
    }
    again = subprocess.run(gpu(tmp_path), cwd=ROOT, env=env, capture_output=True, text=True)
    assert "== text.llama: done before" in again.stdout
    assert again.returncode == 0, again.stdout + again.stderr
    assert "not ended: none" in again.stdout
    steps = json.loads(found.read_text())["steps"]
    by = {row["by"]: row["rate"] for row in steps["llama_torch"]["found"]["rows"]}
    assert set(by) == {"dlc_jax bfloat16", "torch bfloat16"}
    assert min(by.values()) > 0


@pytest.mark.slow
def test_a_part_that_is_out_of_time_says_what_is_missing(tmp_path):
    env = os.environ | {"SMALL": "1", "PYTHON": sys.executable, "SECONDS_IN_ALL": "5"}
    done = subprocess.run(gpu(tmp_path), cwd=ROOT, env=env, capture_output=True, text=True)
    assert "== text.llama: no time left" in done.stdout, done.stderr
    assert done.returncode == 1
    steps = json.loads((tmp_path / "small" / "text.json").read_text())["steps"]
    assert {name: step["ended"] for name, step in steps.items()} == dict.fromkeys(steps, False)
    assert list(steps) == ["llama", "llama_torch", "llama_1b", "memory_resnet18", "select"]


VIT = "vit_small_patch16_224"


@pytest.fixture
def arrays(tmp_path):
    """What a CPU and a device have computed, which differ by a rounding; and how to compare it."""
    generator = np.random.default_rng(0)
    cpu = {
        "is_cpu": np.array(False),
        "programs": np.array(2),
        "losses/llama": generator.normal(size=(8, 12)),
        "finetune/losses": generator.normal(size=5),
        "finetune/head": generator.normal(size=(7, 3)),
        "lora/losses": generator.normal(size=2),
        "lora/b": generator.normal(size=100),
        "labels/resnet18": np.repeat(np.arange(3), 40),
    }
    for name in ("resnet18", VIT):
        losses = generator.uniform(1, 4, 120) + np.zeros((50, 1))
        cpu[f"masks/{name}"] = generator.integers(0, 256, (5, 32), np.uint8)
        cpu |= {f"losses/{name}/{dtype}": losses for dtype in ("float32", "bfloat16")}
    cpu["losses/probe axis"] = cpu["losses/resnet18/float32"]
    device = {
        name: value + 1e-7 * value if value.dtype == float else value for name, value in cpu.items()
    }

    def compare(changed: dict[str, np.ndarray], **again: np.ndarray) -> dict[str, float]:
        """Returns what does not hold where some arrays of the device are others."""
        runs = {"cpu": cpu, "device": device | changed, "again": device | changed | again}
        for run_name, values in runs.items():
            np.savez(tmp_path / f"{run_name}.npz", **values)
        found = tmp_path / "checks.json"
        done = run(
            "correctness",
            "--compare=" + ",".join(str(tmp_path / f"{name}.npz") for name in runs),
            f"--json={found}",
        )
        assert done.returncode == 0, done.stderr
        expect = json.loads(found.read_text())
        assert len(expect) == 21
        return {check["name"]: check["found"] for check in expect if not check["holds"]}

    return device, compare


@pytest.mark.slow
def test_rounding_differences_pass(arrays):
    _, compare = arrays
    assert compare({}) == {}


@pytest.mark.slow
def test_wrong_results_are_reported(arrays):
    device, compare = arrays
    for name in ("masks/resnet18", f"masks/{VIT}"):
        masks = device[name].copy()
        masks[3, 7] ^= 1
        assert compare({name: masks}) == {f"{name}: the same bits as on the CPU": 0.8}
    moved = device["losses/llama"] + 2e-5 * np.eye(8, 12)
    assert compare({"losses/llama": moved}) == {
        "losses/llama: from the CPU's": pytest.approx(2e-5, rel=0.1)
    }
    twice = "everything: the same bits twice"
    found = compare({}, programs=np.array(3))
    assert set(found) == {twice}
    assert 0.9 < found[twice] < 1
    assert compare({"is_cpu": np.array(True)}) == {"the device is no CPU": 0}
    name = "programs for 50 probes in two types"
    assert compare({"programs": np.array(51)}) == {name: 51}
    axis = device["losses/probe axis"].copy()
    axis[0, 0] += 1e-6
    assert set(compare({"losses/probe axis": axis})) == {
        "probe axis: the same bits as on one device"
    }


@pytest.mark.slow
def test_changed_ranks_and_kept_sets_are_reported(arrays):
    device, compare = arrays
    other = device["losses/resnet18/bfloat16"][:, ::-1]
    found = compare({"losses/resnet18/bfloat16": other})
    assert {name.split(":")[0] for name in found} == {
        "kept/bfloat16/easiest",
        "kept/bfloat16/hardest",
        "kept/bfloat16/flexrand",
        "ranks/bfloat16",
    }
    assert max(found.values()) < 0.98
    swapped = device["losses/resnet18/float32"].copy()
    first, second = np.argsort(swapped[0, :40])[19:21]  # on both sides of the half
    swapped[:, [first, second]] = swapped[:, [second, first]]
    found = compare({"losses/resnet18/float32": swapped, "losses/probe axis": swapped})
    assert {name.split(":")[0] for name in found} == {
        "losses/resnet18/float32",
        "kept/float32/easiest",
        "kept/float32/hardest",
        "kept/float32/flexrand",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moved", "expected"),
    [
        ("losses/resnet18/float32", 2e-5, "from the CPU's"),
        (f"losses/{VIT}/float32", 4e-6, "from the CPU's"),
        (f"losses/{VIT}/bfloat16", 4e-3, "from the CPU's"),
        ("finetune/losses", 2e-4, "from the CPU's"),
        ("lora/losses", 2e-5, "from the CPU's"),
        ("finetune/head", 2e-2, "change, from the CPU's, of its norm"),
        ("lora/b", 2e-2, "change, from the CPU's, of its norm"),
    ],
)
def test_distances_beyond_their_bound_are_reported(arrays, name, moved, expected):
    device, compare = arrays
    values = device[name]
    values = values * (1 + moved) if "norm" in expected else values + moved
    changed = {name: values}
    if name == "losses/resnet18/float32":
        changed["losses/probe axis"] = values
    assert compare(changed) == {f"{name}: {expected}": pytest.approx(moved, rel=0.1)}


def python_3_12() -> str | None:
    pyenv = Path.home() / ".pyenv" / "versions"
    for path in (shutil.which("python3.12"), *sorted(map(str, pyenv.glob("3.12*/bin/python")))):
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels are of x86-64")
@pytest.mark.skipif(python_3_12() is None, reason="no Python 3.12")
def test_kit_holds_missing_packages_under_60_mib(tmp_path):
    kit = tmp_path / "kit"
    command = ["bash", "benchmarks/gpu_kit.sh", str(kit)]
    env = os.environ | {"PYTHON": python_3_12()}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheels = {path.name.split("-")[0] for path in (kit / "wheels").iterdir()}
    assert wheels >= {"jaxtyping", "ml_collections", "tensorflow_datasets", "wadler_lindig"}
    assert not wheels & {"jax", "jaxlib", "numpy", "dlc_jax", "pyarrow", "matplotlib"}
    assert len(list((kit / "photographs" / "caltech15").glob("*/*.jpg"))) == 750
    assert (kit / "package" / "dlc_jax" / "api.py").is_file()
    assert sum(path.stat().st_size for path in kit.rglob("*")) < 60 * 2**20
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 2
    assert f"{kit}: there already; expected a new folder" in again.stderr
