"""Docstrings are plain English, and public classes have names of their own."""

import ast
import collections
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dlc_jax as dlc

PACKAGE = Path(dlc.__file__).parent
_ENTRY = re.compile(
    r"\s*(?:[\w, `*\[\].]+: )?(Of\b|\[[\w, ]+\] of\b|By (name|which)\b|That\b|Whose\b|Which[.,])"
)
_WORDS = re.compile(r"\bgo(es)? by\b", re.I)
_TELLS = re.compile(r"(?<!cannot )\b(tells?|told)\b(?!.*\bapart\b)", re.I | re.DOTALL)


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path.relative_to(PACKAGE).as_posix(), node


def docstrings() -> Iterator[tuple[str, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path, node in nodes():
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield f"{path}: {getattr(node, 'name', 'module')}", text


def problems(text: str) -> list[str]:
    """Returns the lines of a docstring that are not plain English."""
    lines = text.splitlines()
    entries, section = [lines[0]], ""
    for line in lines[1:]:
        if re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises):", line):
            section = line
        elif section and re.match(r" {2}\S", line):
            entries.append(line)
    found = [line.strip() for line in entries if _ENTRY.match(line)]
    found += [line.strip() for line in lines if _WORDS.search(line)]
    return found + [part for part in re.split(r"(?<=[.;:])\s", text) if _TELLS.search(part)]


@pytest.mark.parametrize(
    "text",
    [
        "Of one device.",
        "Plans.\n\nArgs:\n  count: Of all processes.",
        "Plans.\n\nAttributes:\n  a, b: That are there.",
        "What goes by.",
        "Is told of every epoch.",
        "The first one tells the others.",
        "A position tells\nwhich of two images it is, a hash\ntoo. Tell them apart.",
        "Plans.\n\nArgs:\n  ids: [n] of the samples.",
        "Plans.\n\nArgs:\n  tensors: By name.",
    ],
)
def test_what_is_not_plain_is_found(text):
    assert problems(text)


def test_what_is_plain_is_not():
    text = "Numbers tell images\napart, and which. Where one cannot tell, both.\n\nOf two, one.\n\n"
    text += "Args:\n  n: Number.\n    Of both."
    assert problems(text) == []


def test_docstrings_are_plain_english():
    found = {name: lines for name, text in docstrings() if (lines := problems(text))}
    assert found == {}


def test_no_two_public_classes_have_one_name():
    places = collections.defaultdict(list)
    for path, node in nodes():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            places[node.name].append(path)
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
