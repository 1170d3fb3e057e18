"""What the tables of networks that can be converted share: a process and a line for each."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

_ROWS = flags.DEFINE_string("rows", None, "What is known already; None: of this table in runs/.")
_ONLY = flags.DEFINE_list("only", [], "Names of networks; empty: all.")
_NUM = flags.DEFINE_integer("num", None, "How many more are run at most.")
_LIMIT = flags.DEFINE_integer("limit_s", 900, "Seconds after which a network is given up.")
_RUN = flags.DEFINE_string("run", None, "Of a network's own process: its name.")
_ROW = flags.DEFINE_string("row", None, "Of a network's own process: where its row goes.")

Row = dict[str, Any]


def drive(
    program: str,
    names: Callable[[Path], list[str]],
    examine: Callable[[str, Path], Iterator[Row]],
    line: Callable[[Row], str],
    table: Callable[[list[Row]], str],
) -> None:
    """Examines every network that has no line yet, and prints the table.

    Args:
      program: Module of this package, which each network's process runs again.
      names: Path of the lines -> names of networks.
      examine: Name and a scratch folder -> what is found, part by part.
      line, table: Rows -> text.
    """
    if _RUN.value:
        _examined(examine, _RUN.value, Path(_ROW.value))
        return
    path = Path(_ROWS.value or f"runs/{program}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in read(path) if "name" in row}
    wanted = _ONLY.value or names(path)
    for name in [name for name in wanted if name not in done][: _NUM.value]:
        row = _run(program, name)
        append(path, row)
        print(line(row), flush=True)
    print(f"\n{table([row for row in read(path) if 'name' in row])}")


def _examined(examine: Callable[[str, Path], Iterator[Row]], name: str, row: Path) -> None:
    """Examines one network; writes its row after every part."""
    from benchmarks.measuring import save
    from dlc_jax.expect import first_line

    found: Row = {"name": name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for new in examine(name, Path(folder)):
                found |= new
                save(str(row), found)
        except Exception as error:
            found["reason"] = f"after {[*found][-1]}: {first_line(error)}"
            save(str(row), found)


def _run(program: str, name: str) -> Row:
    """Returns what the process of one network has found when it ended or was stopped."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / "row.json"
        command = [sys.executable, "-m", f"benchmarks.{program}", f"--run={name}", f"--row={row}"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_LIMIT.value,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
            last = (done.stderr.strip().splitlines() or [""])[-1]
            ended = f"ended with {done.returncode}: {last}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {_LIMIT.value} s"
        found = json.loads(row.read_text()) if row.exists() else {"name": name}
    found["seconds"] = round(time.perf_counter() - start)
    return {**found, "reason": found.get("reason") or ended}


def read(path: Path) -> list[Row]:
    """Returns what is known already."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Adds a line."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def num_params(module: Any) -> int:
    """Returns how many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters())


def distance(found: Any, expected: Any) -> float:
    """Returns the relative 2-norm of the difference; infinite for other shapes."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def pruned(module: Any, names: tuple[str, ...], sparsity: float) -> Any:
    """Returns a copy whose tensors of these names torch has pruned together."""
    from torch.nn.utils import prune

    module = copy.deepcopy(module)
    parts = [name.rpartition(".") for name in names]
    where = [(module.get_submodule(owner), leaf) for owner, _, leaf in parts]
    prune.global_unstructured(where, prune.L1Unstructured, amount=sparsity)
    return module
