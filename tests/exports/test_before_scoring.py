"""What cannot be exported is refused before anything is scored."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.exports.instructions import INSTRUCTION_EXPORTS, InstructionExport
from dlc_jax.stages import pipeline
from dlc_jax.tasks.images import ImageTask
from dlc_jax.tasks.instructions import InstructionTask
from dlc_jax.workspace import artefacts

CONTENT = [encoded(image) for image in random_images(8, 8)]
CELL = "hardest/keep_0.50-seed_0"


@pytest.fixture(autouse=True)
def unscored(monkeypatch):
    def scored(*args):
        raise AssertionError("scored")

    for task in (ImageTask, InstructionTask):
        monkeypatch.setattr(task, "score", scored)


def run(workdir, train, **changes):
    values = {
        "stages": ("score", "select", "export"),
        "dataset": {"train": train},
        "encoder": {"name": "resnet18", "weights": "demo:resnet18"},
        "selection": {"methods": ("hardest",), "keep_fractions": (0.5,), "seeds": (0,)},
        "export": {"forms": ("ids",)},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values.setdefault(group, {})[name] = value
    pipeline.run(Config.of(values), workdir, lambda line: None)


def parquet(place):
    rows = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(CONTENT)]
    pq.write_table(pa.table({"image": rows, "label": list("abababab")}), place / "x.parquet")
    return f"parquet:{place}/x.parquet"


def npz(place):
    np.savez(place / "x.npz", images=random_images(8, 8), labels=np.arange(8) % 2)
    return f"npz:{place}/x.npz"


def folder(place, root="x"):
    for i, content in enumerate(CONTENT):
        path = place / root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return f"folder:{place}/{root}"


def split(place):
    return f"split:50/50:train:{parquet(place)}"


@pytest.mark.parametrize("source", [parquet, npz, split])
def test_links_of_what_is_no_file(tmp_path, source):
    with pytest.raises(dlc.InputError, match="^export.forms: sample .* is no file of its own"):
        run(tmp_path / "run", source(tmp_path), export__forms=("ids", "image_links"))


@pytest.mark.parametrize("form", ["parquet", "hf", "image_folder"])
def test_arrays_that_no_image_file_holds(tmp_path, form):
    for kind, shape in (("u2", (4, 8, 8, 3)), ("f4", (4, 8, 8))):
        np.savez(tmp_path / "x.npz", images=np.ones(shape, kind), labels=[0, 1, 0, 1])
        changes = {"dataset__deep_images": "full_range", "export__forms": (form,)}
        with pytest.raises(dlc.InputError, match="^export.forms: sample .* which PNG cannot hold"):
            run(tmp_path / "run", f"npz:{tmp_path}/x.npz", **changes)
        changes["export__forms"] = ("ids", "jsonl")
        with pytest.raises(AssertionError, match="scored"):
            run(tmp_path / "run", f"npz:{tmp_path}/x.npz", **changes)


@pytest.mark.parametrize("name", ["a\nb", "a\r", "\x0b", "a\x85b", "\u2028", "a\x1c", ""])
def test_ids_that_are_no_lines(tmp_path, name):
    dataset = dlc.array_dataset(CONTENT[:2], [0, 1], ids=["plain", name])
    with pytest.raises(dlc.InputError, match="is not one line of text; use form jsonl"):
        dlc.export(dataset, [0, 1], tmp_path / "x.txt", form="ids")
    dlc.export(dataset, [0, 1], tmp_path / "x.jsonl", form="jsonl")
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["plain", name]
    rows = [
        {"bytes": c, "path": p} for c, p in zip(CONTENT[:2], ["plain", name or "\n"], strict=True)
    ]
    pq.write_table(pa.table({"image": rows, "label": ["a", "b"]}), tmp_path / "x.parquet")
    with pytest.raises(dlc.InputError, match="^export.forms: id .* is not one line of text"):
        run(tmp_path / "run", f"parquet:{tmp_path}/x.parquet")


def test_what_can_be_exported_is_scored(tmp_path):
    forms = ("npy", "ids", "jsonl", "json", "parquet", "image_folder", "image_links", "hf")
    with pytest.raises(AssertionError, match="scored"):
        run(tmp_path / "run", folder(tmp_path), export__forms=forms)
    for name in ("kept-images", "kept-links", "kept-hf"):  # as an earlier run leaves them
        (tmp_path / "run" / "exports" / CELL / name).mkdir(parents=True)
    with pytest.raises(AssertionError, match="scored"):
        run(tmp_path / "run", folder(tmp_path), export__forms=forms)


@pytest.mark.parametrize(
    ("path", "form", "says"),
    [
        ("exports", "ids", "exports: is no folder; kept.txt is to be written there"),
        ("exports/hardest", "image_folder", "hardest: is no folder; kept-images is to be"),
        (f"exports/{CELL}", "json", "keep_0.50-seed_0: is no folder"),
        (f"exports/{CELL}/kept.jsonl/x", "jsonl", "kept.jsonl: is a folder; expected a file"),
    ],
)
def test_places_that_are_taken(tmp_path, path, form, says):
    place = tmp_path / "run" / path
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    with pytest.raises(dlc.InputError, match=says):
        run(tmp_path / "run", folder(tmp_path), export__forms=(form,))
    assert place.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"export__datasets_dir": "/there/is/none"}, "Any/train: no such folder"),
        ({"selection__methods": ("flexrand",), "selection__splits": (0.333,)}, "whole multiples"),
        ({"selection__methods": ("auto", "random")}, "no name for 'auto'"),
        ({"probe__num_probes": 3, "probe__placement": "midpoint"}, "no name; expected 'grid'"),
        ({"export__released_name": "Other"}, "sample 'a/0.png' is not in train and val of Other"),
        ({"export__released_name": "Half", "export__parts": ("kept", "dropped")}, "'a/0.png' is"),
    ],
)
def test_the_released_layout(tmp_path, changes, says):
    for name, first in (("Any", 0), ("Other", 100), ("Half", 1)):
        for i, content in enumerate(CONTENT):
            for part in ("train", "val"):
                place = tmp_path / name / part / "ab"[i % 2] / f"{i + first}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
    source = folder(tmp_path, "train")
    settings = {"export__datasets_dir": str(tmp_path), "export__released_name": "Any"}
    settings |= {"export__forms": ("released",)}
    with pytest.raises(AssertionError, match="scored"):
        run(tmp_path / "run", source, **settings)
    with pytest.raises(dlc.InputError, match=says):
        run(tmp_path / "run", source, **(settings | changes))
    assert not (tmp_path / "run" / artefacts.EXPORTS).exists()


@pytest.mark.parametrize(
    ("value", "form", "says"),
    [
        (math.nan, "jsonl", "column 'more' of row 'r1' holds a number that is NaN"),
        (b"bytes", "jsonl", "column 'more' of row 'r1' holds a value of type bytes"),
        ("text", "parquet", "does not fit a table"),
    ],
)
def test_rows_of_instructions_that_have_no_form(tmp_path, value, form, says):
    rows = [{"id": f"r{i}", "prompt": "a", "response": f"b{i}", "more": 0.5} for i in range(4)]
    rows[1]["more"] = value
    if form == "jsonl":
        rows = [row if i == 1 else {**row, "more": None} for i, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
        source = f"parquet:{tmp_path}/x.parquet"
    else:
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = f"jsonl:{tmp_path}/x.jsonl"
    of = {"encoder__name": "decoder", "encoder__weights": "demo:tiny-llama"}
    with pytest.raises(dlc.InputError, match=says):
        run(tmp_path / "run", source, export__forms=(form,), **of)
    other = {"jsonl": "parquet", "parquet": "jsonl"}[form]
    with pytest.raises(AssertionError, match="scored"):
        run(tmp_path / "run", source, export__forms=(other,), **of)


def test_a_form_of_instructions_alone_is_checked_and_placed_as_such(tmp_path, monkeypatch):
    def check(data):
        raise dlc.InputError(f"{len(data)} rows of no such form")

    form = InstructionExport(lambda data, path: None, ".alpaca.json", check)
    monkeypatch.setitem(INSTRUCTION_EXPORTS, "alpaca", form)
    (tmp_path / "x.jsonl").write_text('{"id": "a", "prompt": "b", "response": "c"}\n')
    of = {"encoder__name": "decoder", "encoder__weights": "demo:tiny-llama"}
    place = tmp_path / "run" / "exports" / CELL / "kept.alpaca.json"
    place.mkdir(parents=True)
    source = f"jsonl:{tmp_path}/x.jsonl"
    with pytest.raises(dlc.InputError, match=r"kept\.alpaca\.json: is a folder"):
        run(tmp_path / "run", source, export__forms=("alpaca",), **of)
    with pytest.raises(dlc.InputError, match="^1 rows of no such form"):
        run(tmp_path / "other", source, export__forms=("alpaca",), **of)
    with pytest.raises(dlc.InputError, match="^export.forms: unknown value 'alpaca'"):
        run(tmp_path / "third", folder(tmp_path), export__forms=("alpaca",))
