"""Benchmarks start, and the one of the whole way from files to kept sets runs."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

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


@pytest.mark.slow
def test_files_to_kept_sets_by_the_released_procedure_and_ours(tmp_path):
    found = tmp_path / "rows.json"
    done = run(
        "prune_end_to_end",
        "--num_images=15",
        "--image_size=32",
        "--encoders=resnet18",
        "--by=released,dlc_jax 5",
        f"--json={found}",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(found.read_text())
    told = [(row["by"], row["state"], row["num_probes"]) for row in rows]
    assert told == [
        ("released", "warm", [50]),
        ("dlc_jax 5", "cold", [5]),
        ("dlc_jax 5", "warm", [5]),
    ]
    assert all(0 < row["seconds"][0] < row["process"][0] for row in rows)
