"""Each kind of result has the values that were recorded under its number.

`python tests/golden/test_result_numbers.py` records the values of kinds whose number was raised,
and of new ones. It never overwrites values under the number that they were recorded with.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results_by_kind import MADE

from dlc_jax.tasks.images import MEASURED
from dlc_jax.workspace.artefacts import RESULT_NUMBERS, result_number

FILE = Path(__file__).parent / "data" / "results.json"
RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
RECORD = "python tests/golden/test_result_numbers.py"
KINDS = list(dict.fromkeys([*RECORDED, *(made.kind for made in MADE)]))
SLOW = ("training record", "response losses", "adapter")  # to compile
ROOT = Path(__file__).parents[2]


def values_of(kind: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the values of a kind as JSON has them, and the tolerance of each."""
    values, tolerances = {}, {}
    for made in MADE:
        if made.kind == kind:
            for name, value in made.make().items():
                assert name not in values, name
                values[name], tolerances[name] = _plain(value), made.tolerance
    return values, tolerances


def _plain(value: Any) -> list[Any]:
    array = np.asarray(value).ravel()
    if array.dtype.kind == "f":
        return [float(f"{number:.7g}") for number in array.tolist()]
    return array.tolist()


def differences(kind: str, new: dict[str, Any], tolerances: dict[str, float]) -> list[str]:
    """Returns how new values differ from recorded ones of the same name."""
    old = RECORDED[kind]["values"]
    found = []
    for name in old.keys() & new.keys():
        was, now = np.asarray(old[name]), np.asarray(new[name])
        if was.shape != now.shape:
            found.append(f"{name}: {was.size} values were recorded, now {now.size}")
        elif now.dtype.kind != "f":
            if not np.array_equal(was, now):
                found.append(f"{name}: {int((was != now).sum())} of {was.size} differ")
        elif was.size:
            size = np.abs(was) + np.sqrt(np.square(was).mean())
            off = float((np.abs(now - was) / np.where(size > 0, size, 1)).max())
            if not off <= tolerances[name]:
                found.append(f"{name}: off by {off:.1e}, at most {tolerances[name]:.0e} is noise")
    return sorted(found)


# Classes that have a kind which is not a text in them.
WITHOUT_KIND = {"Step", "Record", "InputStep", "RunStep", "Trainer", "_TrialStep"}


def kinds_in_the_package() -> tuple[set[str], set[str]]:
    """Returns the kinds of all steps, and the classes that have a kind of another form."""
    found, others = {name.replace("_", " ") for name in MEASURED}, set()
    for path in (ROOT / "dlc_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for line in node.body if isinstance(node, ast.ClassDef) else []:
                targets = [getattr(line, "target", None), *getattr(line, "targets", [])]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                if "kind" not in [*names, getattr(line, "name", None)]:
                    continue
                value = getattr(line, "value", None)
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found.add(value.value)
                else:
                    others.add(node.name)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("key_of"):
                kind = node.args[0] if node.args else None
                if isinstance(kind, ast.Constant):
                    found.add(kind.value)
    return found, others


def test_every_kind_is_recorded_and_no_other():
    kinds, others = kinds_in_the_package()
    assert others == WITHOUT_KIND, "where else do kinds of results come from?"
    assert {made.kind for made in MADE} == kinds, "results_by_kind.py"
    assert RECORDED.keys() == kinds, f"record the values: {RECORD}"
    assert RESULT_NUMBERS.keys() <= kinds


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def test_values_change_with_the_number_only(kind):
    number = result_number(kind)
    recorded = RECORDED.get(kind, {"number": None, "values": {}})
    if recorded["number"] != number:
        pytest.fail(f"kind {kind!r} has number {number}: record the new values: {RECORD}")
    new, tolerances = values_of(kind)
    if found := differences(kind, new, tolerances):
        pytest.fail(
            f"kind {kind!r} gives other values under number {number}; if that is meant, raise "
            f"RESULT_NUMBERS[{kind!r}] in dlc_jax/workspace/artefacts.py and record them again: "
            f"{RECORD}\n" + "\n".join(found)
        )
    assert new.keys() == recorded["values"].keys(), f"record what was added or left out: {RECORD}"


def record() -> list[str]:
    """Writes the values of all kinds; returns what it refuses."""
    refused, written = [], {}
    for kind in KINDS:
        number = result_number(kind)
        recorded = RECORDED.get(kind, {"number": 0, "values": {}})
        new, tolerances = values_of(kind)
        if number == recorded["number"]:
            refused += [f"{kind}: {line}" for line in differences(kind, new, tolerances)]
            new |= {name: v for name, v in recorded["values"].items() if name in new}
        elif number < recorded["number"]:
            refused.append(f"{kind}: number {number} is below {recorded['number']}")
        written[kind] = {"number": number, "values": new}
    if not refused:
        FILE.write_text(f"{_as_text(written)}\n")
    return refused


def _as_text(written: dict[str, Any]) -> str:
    """Returns JSON with a line for each name, so that a change shows what changed."""
    kinds = []
    for kind, content in written.items():
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in content["values"].items()]
        values = ",\n".join(lines)
        kinds.append(
            f'{json.dumps(kind)}: {{"number": {content["number"]}, "values": {{\n{values}\n}}}}'
        )
    return "{\n" + ",\n".join(kinds) + "\n}"


if __name__ == "__main__":
    if found := record():
        sys.exit(
            "nothing was recorded: raise the number in dlc_jax/workspace/artefacts.py first\n"
            + "\n".join(found)
        )
