"""A kind of data that the package does not have: scored, selected, exported and trained on."""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.config import KINDS, Config
from dlc_jax.config.kinds import DataKind
from dlc_jax.exports.instructions import InstructionExport
from dlc_jax.planning.plan import Plan
from dlc_jax.probes.kernel import prototype_loss
from dlc_jax.stages import pipeline
from dlc_jax.tasks import TASKS, Task
from dlc_jax.tasks.exports import export_steps
from dlc_jax.tasks.measurements import TableStep, write_certificate
from dlc_jax.tasks.task import Sources, Training
from dlc_jax.training.loop import METRICS, read_metrics, write_metrics
from dlc_jax.types import ProbeLosses
from dlc_jax.workspace import Written, artefacts


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Labelled rows of features."""

    features: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    name: str

    def __len__(self):
        return len(self.ids)

    @property
    def fingerprint(self):
        return hashlib.sha256(self.features.tobytes() + self.labels.tobytes()).hexdigest()

    @property
    def class_means(self):
        return np.stack([self.features[self.labels == j].mean(axis=0) for j in (0, 1)])


def load_rows(source: str) -> Rows:
    with np.load(source.removeprefix("rows:")) as arrays:
        features, labels = arrays["features"], arrays["labels"]
    ids = np.array([f"row {i:02}" for i in range(len(labels))])
    return Rows(features, labels, ids, source)


@dataclasses.dataclass(frozen=True, eq=False)
class RowLossesStep:
    """Losses of rows of which the first features are masked, one more in every probe."""

    config: Config
    data: Rows

    name = "score"
    kind = "losses of rows"
    stage = "score"
    files = (artefacts.LOSSES,)
    obsolete = ()

    @property
    def key(self):
        return {"made_of": self.data.fingerprint}

    @property
    def settings(self):
        values = self.config.to_dict()
        return {"probe": values["probe"], "seed": 0, "asked": self.config.asked}

    def compute(self, scratch: Path) -> ProbeLosses:
        data, width = self.data, self.data.features.shape[1]
        means = data.class_means
        shown = [np.arange(width) >= num for num in range(width)]
        losses = [
            prototype_loss(
                jnp.asarray(data.features * some), jnp.asarray(data.labels), jnp.asarray(means)
            )
            for some in shown
        ]
        return ProbeLosses(
            np.stack(losses),
            np.arange(width, dtype=np.float32) / width,
            data.labels,
            data.ids,
            means,
            ("left", "right"),
            steps=np.arange(width),
            num_steps=width,
        )

    def write(self, root: Path, probes: ProbeLosses) -> Written:
        artefacts.write_losses(
            root,
            losses=probes.losses,
            sparsity=probes.sparsity,
            labels=probes.labels,
            ids=probes.ids,
        )
        facts = {"dataset": {"source": self.data.name, "fingerprint": self.data.fingerprint}}
        return Written([*self.files, *write_certificate(root, probes, 0, lambda line: None)], facts)


class Nearest(NamedTuple):
    """Accuracy of a classifier by the nearest class mean, in percent."""

    accuracy: float
    num_kept: int
    history: list[dict[str, Any]]
    seconds: float = 0.0


class RowTrainer:
    """Adds up the rows of each class, a batch in every step."""

    kind = "rows"
    files = (METRICS,)
    keeps_weights = False
    num_epochs = 2
    batch_size = 16
    checkpoint_steps = 0
    shows_bars = False
    remedy = "nothing to try"
    mesh = None
    notes = ()

    def __init__(self, train: Rows, test: Rows):
        self._train, self._test = train, test
        self.fingerprint = train.fingerprint + test.fingerprint

    def positions(self, kept):
        return np.flatnonzero(np.isin(self._train.ids, kept.ids))

    def start(self, positions, seed):
        return {"sums": jnp.zeros((2, self._train.features.shape[1]))}

    def steps_per_epoch(self, num_samples):
        return -(-num_samples // self.batch_size)

    def rates(self, steps_per_epoch):
        return [1.0] * (steps_per_epoch * self.num_epochs)

    def batches(self, positions, seed, epoch, first):
        for start in range(first * self.batch_size, len(positions), self.batch_size):
            yield positions[start : start + self.batch_size]

    def step(self, state, batch, rate):
        features, labels = self._train.features[batch], self._train.labels[batch]
        sums = [features[labels == label].sum(axis=0) for label in (0, 1)]
        return {"sums": state["sums"] + jnp.stack(sums)}, lambda: {
            "loss": 0.0,
            "num_rows": len(batch),
        }

    def line(self, progress, rate):
        return {"epoch": len(progress.history) + 1, **progress.sums}

    def result(self, progress, positions):
        counts = np.bincount(self._train.labels[positions], minlength=2)
        means = np.asarray(progress.state["sums"]) / (self.num_epochs * counts[:, None])
        distances = np.square(self._test.features[:, None] - means).sum(axis=2)
        right = distances.argmin(axis=1) == self._test.labels
        return Nearest(100 * float(right.mean()), len(positions), progress.history)

    def write(self, folder, result):
        write_metrics(folder, result.history)
        return {"num_kept": result.num_kept, "test_accuracy": result.accuracy, "seconds": 0.0}

    def said(self, result):
        return f"test accuracy {result.accuracy:.2f} %"

    def complete(self, workspace):
        pass


class RowTask:
    easiest_hardest = artefacts.LOSSES
    left_out = "rows left out"
    encoder_settings = ()

    def __init__(self, config: Config, say):
        self._config, self._say = config, say
        self.load = Sources(load_rows, lambda data: None).load

    def encoder_fingerprint(self):
        return "none"

    def check(self, workspace):
        self.load(str(self._config.dataset.test))

    def score(self, workspace):
        step = RowLossesStep(self._config, self.load(self._config.dataset.train))
        if not workspace.ensure(step):
            self._say("score: unchanged, not run again")
        workspace.ensure(TableStep(workspace.root, ("left", "right")))
        return self._config

    def exports(self, kept, root):
        data = self.load(self._config.dataset.train)

        def writer(selection, part):
            ids = [i for i in data.ids.tolist() if (i in selection.ids) == (part == "kept")]
            return lambda form, path: artefacts.write_json(path, {"ids": ids})

        return export_steps(self._config, root, kept, data.fingerprint, writer)

    def training(self, workspace):
        train = self.load(self._config.dataset.train)
        test = self.load(str(self._config.dataset.test))
        asked = {**self._config.asked, "encoder": {"name": "rows"}}
        return Training(train, "none", lambda: RowTrainer(train, test), asked, dict)

    def plan(self, mesh):
        return Plan("plan: no time at all")


@pytest.fixture
def rows(monkeypatch):
    form = InstructionExport(lambda data, path: None, ".rows.json", lambda data: None)
    kind = DataKind(
        name="rows",
        encoders=("nearest_mean",),
        stages=("plan", "score", "select", "export", "finetune", "report"),
        training="finetune",
        needs_test=True,
        measures=frozenset({"losses"}),
        forms={"rows": form},
        only={"mode": ("default", "there is no 'official' code of rows")},
    )
    monkeypatch.setitem(KINDS, "rows", kind)
    monkeypatch.setitem(TASKS, "rows", RowTask)


def run(folder: Path, stages: tuple[str, ...], **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "stages": stages,
        "dataset": {"train": f"rows:{folder}/train.npz", "test": f"rows:{folder}/test.npz"},
        "encoder": {"name": "nearest_mean", "weights": "none"},
        "selection": {"methods": ("easiest", "random"), "keep_fractions": (0.5,), "seeds": (1,)},
        "export": {"forms": ("rows",), "parts": ("kept", "dropped")},
    }
    said: list[str] = []
    pipeline.run(Config.of(values | changes), folder / "run", said.append)
    return said


def written(folder: Path, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    labels = np.arange(40, dtype=np.int32) % 2
    features = generator.normal(size=(40, 3)) + np.where(labels, 2, -2)[:, None]
    name = "train" if seed == 0 else "test"
    np.savez(folder / f"{name}.npz", features=features.astype(np.float32), labels=labels)
    return load_rows(f"rows:{folder}/{name}.npz")


def test_another_kind_needs_no_change_of_any_stage(rows, tmp_path):
    train, test = written(tmp_path, 0), written(tmp_path, 1)
    assert isinstance(RowTask(Config.of({"stages": ("report",)}), print), Task)
    every = KINDS["rows"].stages
    said = run(tmp_path, every)
    assert said[0] == "plan: no time at all"
    root = tmp_path / "run"

    cell = root / "selections" / "easiest" / "keep_0.50-seed_1.npy"
    kept, losses = np.load(cell), artefacts.read_losses(root)["losses"]
    assert losses.shape == (3, 40)
    for label in (0, 1):
        of_class = np.flatnonzero(train.labels == label)
        scores = losses.mean(axis=0)[of_class]
        assert set(kept) & set(of_class) == set(of_class[np.argsort(scores)[:10]])

    exported = root / "exports" / "easiest"
    parts = [
        json.loads((exported / f"keep_0.50-seed_1/{part}.rows.json").read_text())["ids"]
        for part in ("kept", "dropped")
    ]
    assert parts[0] == train.ids[kept].tolist()
    assert sorted(parts[0] + parts[1]) == train.ids.tolist()

    with open(root / "results.csv", newline="") as file:
        results = {row["method"]: row for row in csv.DictReader(file)}
    means = dataclasses.replace(train, features=train.features[kept], labels=train.labels[kept])
    distances = np.square(test.features[:, None] - means.class_means).sum(axis=2)
    expected = 100 * np.mean(distances.argmin(axis=1) == test.labels)
    assert float(results["easiest"]["test_accuracy"]) == expected
    metrics = read_metrics(root / "finetune" / "easiest" / "keep_0.50-seed_1")
    assert [(line["epoch"], line["num_rows"]) for line in metrics] == [(1, 20), (2, 20)]
    assert results.keys() == {"full", "random", "easiest"}

    again = run(tmp_path, every[1:])
    assert "score: unchanged, not run again" in again
    assert "finetune: 3 runs were finished before, not run again" in again
    assert "export: unchanged, not written again" in again


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": ("tune",)}, "stages: unknown value 'tune'; valid: plan, score, select"),
        ({"mode": "official"}, "mode: there is no 'official' code of rows; expected 'default'"),
        ({"selection": {"methods": ("herding",)}}, "selection.methods: rows have no features"),
        ({"selection": {"methods": ("auto",)}}, "selection.*: rows have no"),
        ({"selection": {"score": "el2n"}}, "selection.score: 'el2n' is of images"),
        ({"selection": {"score": "ifd"}}, "selection.score: 'ifd' is of instructions"),
        ({"export": {"forms": ("hf",)}}, "export.forms: unknown value 'hf'; valid: rows"),
    ],
)
def test_what_a_kind_has_not_is_refused(rows, tmp_path, changes, says):
    with pytest.raises(dlc.InputError, match=f"^{says}"):
        run(tmp_path, **{"stages": ("export",), **changes})


def test_an_unknown_encoder_is_refused():
    with pytest.raises(dlc.InputError, match="^encoder.name: unknown value 'nearest_mean'"):
        Config.of({"stages": ("select",), "encoder": {"name": "nearest_mean"}})


def test_no_stage_asks_which_kind_of_data_it_has():
    package = Path(dlc.__file__).parent
    for path in sorted((package / "stages").glob("*.py")):
        text = path.read_text()
        for words in ("data_kind.name", "isinstance(job.task", "isinstance(task", "DECODER"):
            assert words not in text, f"{path}: {words}"
