"""Which package may import which: the contracts of pyproject.toml, and that they see a breach."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LINT = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
)
MOST_LOOSE = 10


def lint(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package without its data, and its contracts."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in (ROOT / "dlc_jax").rglob("*.py"):
        to = folder / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    return folder


def test_contracts_hold(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


BREACHES = {
    "a lower package": ("datasets/labels.py", "from dlc_jax.stages import select", "stands below"),
    "inside a function": (
        "scores.py",
        "def late():\n    from dlc_jax.training.lora import LoraConfig\n",
        "stands below",
    ),
    "by way of the public names": (
        "probes/path.py",
        "from dlc_jax.api import probe",
        "stands below",
    ),
    "the other kind": (
        "training/lora/step.py",
        "from dlc_jax.training.images.step import Network",
        "side by side",
    ),
    "a circle of modules": (
        "selection/methods.py",
        "from dlc_jax.selection.settings import SELECTORS",
        "in a circle",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_line_that_breaks_one_is_seen(copy, name):
    file, line, contract = BREACHES[name]
    path = copy / "dlc_jax" / file
    text = path.read_text()
    path.write_text(f"{text}\n{line}\n")
    try:
        done = lint(copy)
    finally:
        path.write_text(text)
    assert done.returncode == 1, done.stdout
    broken = [row for row in done.stdout.splitlines() if row.endswith(" BROKEN")]
    assert any(contract in row for row in broken), broken


def test_a_package_that_no_contract_names_is_seen(copy):
    new = copy / "dlc_jax" / "helpers"
    new.mkdir()
    (new / "__init__.py").touch()
    try:
        assert lint(copy).returncode == 1
    finally:
        shutil.rmtree(new)


def test_nothing_is_imported_behind_the_contracts():
    """By name, from outside the package, or from a folder that import-linter does not see."""
    files = sorted((ROOT / "dlc_jax").rglob("*.py"))
    for path in files:
        assert (path.parent / "__init__.py").is_file(), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                tops = {name.partition(".")[0] for name in names}
                assert not tops & {"benchmarks", "configs", "tests", "conftest"}, (path, names)
                assert getattr(node, "level", 0) == 0, path  # absolute everywhere
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                named = ast.unparse(node.args[0])
                assert "dlc_jax" not in named or path.parent.name == "dlc_jax", (path, named)


KEYS = {"workspace/artefacts.py"}
# Name -> where it may be read; the package's version has no part in a key, see keys.py
READERS = {
    "__version__": KEYS | {"__init__.py", "version.py"},
    "importlib.metadata": KEYS,
    "features.version": KEYS,
    "RESULT_NUMBERS": KEYS,
    "result_number": KEYS | {"workspace/records.py"},
    "def json_hash": KEYS,
    "def key_of": KEYS,
}


def names_in(tree: ast.AST) -> set[str]:
    """Returns every name, attribute, import and definition, also with what is before its dot."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr, f"{getattr(node.value, 'id', '')}.{node.attr}"}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            found |= {alias.name for alias in node.names} | ({module} if module else set())
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            found.add(f"def {node.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # of getattr
    return found


def test_versions_and_numbers_of_results_are_read_in_one_place():
    package = ROOT / "dlc_jax"
    files = {
        path.relative_to(package).as_posix(): names_in(ast.parse(path.read_text()))
        for path in package.rglob("*.py")
    }
    for name, allowed in READERS.items():
        assert {file for file, names in files.items() if name in names} == allowed, name


def test_few_modules_lie_loose():
    loose = sorted(path.name for path in (ROOT / "dlc_jax").glob("*.py"))
    assert len(loose) <= MOST_LOOSE, loose
