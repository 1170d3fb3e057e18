"""What only some stages ask of a kind of data."""

import functools
import gc
import json
import weakref

import numpy as np
import pytest
from conftest import random_images

import dlc_jax as dlc
from dlc_jax.config import KINDS, Config
from dlc_jax.selection import Cell
from dlc_jax.stages import pipeline
from dlc_jax.tasks import TASKS, images, instructions
from dlc_jax.tasks.exports import ExportStep
from dlc_jax.tasks.task import EvaluatedTask, TunedTask


@pytest.mark.parametrize(("stage", "protocol"), [("tune", TunedTask), ("evaluate", EvaluatedTask)])
def test_kinds_that_have_a_stage_have_what_it_asks_for(stage, protocol):
    asked = [name for name in vars(protocol) if not name.startswith("_")]
    assert asked
    for name, kind in KINDS.items():
        has = {hasattr(TASKS[name], attribute) for attribute in asked}
        assert has == {stage in kind.stages}, name


@pytest.mark.slow
def test_the_encoder_is_loaded_once_for_all_stages(tmp_path, monkeypatch):
    loaded = []

    def counted(*given, load=images.load_encoder, **settings):
        loaded.append(given)
        return load(*given, **settings)

    monkeypatch.setattr(images, "load_encoder", counted)
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=random_images(20, 40), labels=np.arange(20) % 2)
    values = {
        "stages": ("score", "tune", "select", "finetune"),
        "dataset": {name: f"npz:{tmp_path}/{name}.npz" for name in ("train", "test")},
        "encoder": {"name": "resnet18", "weights": "demo:resnet18", "image_size": 32},
        "probe": {"num_probes": 2},
        "tuning": {"by": "finetune", "methods": ("easiest",), "num_repeats": 5},
        "finetune": {"epochs": 0, "full_set": False},
        "selection": {"methods": ("auto",), "keep_fractions": (0.5,), "seeds": (0,)},
    }
    pipeline.run(Config.of(values), tmp_path / "run", lambda line: None)
    assert loaded == [("resnet18", "demo:resnet18")]


@pytest.fixture
def rows(tmp_path):
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return rows, f"json:{tmp_path}/rows.json"


def test_listing_exports_of_instructions_copies_no_rows(rows, tmp_path, monkeypatch):
    rows, source = rows
    values = {"stages": ("export",), "dataset": {"train": source}, "export": {"forms": ("jsonl",)}}
    task = instructions.InstructionTask(Config.of(values), print)
    data, asked = task.load(source), []

    def subset(self, positions, of=dlc.Instructions.subset):
        asked.append(len(positions))
        return of(self, positions)

    def steps(config, root, kept, fingerprint, writer):
        for selection in kept.values():
            yield ExportStep("-.jsonl", {}, functools.partial(writer(selection, "kept"), "jsonl"))

    kept = {}
    for seed in range(3):
        cell = Cell("random", 0.25, None, seed)
        labels, ids = np.zeros(len(data), int), data.ids
        kept[cell] = dlc.select(None, labels, ids=ids, **cell._asdict())
    monkeypatch.setattr(dlc.Instructions, "subset", subset)
    monkeypatch.setattr(instructions, "export_steps", steps)
    listed = list(task.exports(kept, tmp_path))
    assert asked == [8]  # those that were scored
    listed[0].put(tmp_path / "kept.jsonl")
    assert asked == [8, 2]
    written = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert written == [rows[i] for i in kept[Cell("random", 0.25, None, 0)].indices]


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_goes_with_its_last_reference_and_what_it_loaded(kind, rows, tmp_path):
    np.savez(tmp_path / "train.npz", images=random_images(4, 40), labels=np.arange(4) % 2)
    source = {"images": f"npz:{tmp_path}/train.npz", "instructions": rows[1]}[kind]
    task = TASKS[kind](Config.of({"stages": ("report",), "dataset": {"train": source}}), print)
    data = weakref.ref(task.load(source))
    gc.collect()
    gc.disable()
    try:
        assert data() is not None
        del task
        assert data() is None
    finally:
        gc.enable()
