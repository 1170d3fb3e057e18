"""Embeddings of instructions: measured once, selected by, and compared with a target."""

import json
import re

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.selection import Candidates
from dlc_jax.stages import pipeline
from dlc_jax.tasks import instructions as task
from dlc_jax.workspace import artefacts, records

WORDS = ("red", "green", "blue", "house", "river", "mountain", "seven", "eleven", "music")


@pytest.fixture
def values(tmp_path):
    """Settings for 24 rows of which two say the same, and a target of two."""
    generator = np.random.default_rng(0)

    def rows(num):
        for _ in range(num):
            said = generator.choice(WORDS, 6)
            yield {
                "instruction": f"Say {said[0]}.",
                "output": " ".join(said[: generator.integers(2, 6)]),
            }

    some = list(rows(23))
    for name, found in (("train", [*some, some[3]]), ("target", list(rows(2)))):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    return {
        "dataset": {"train": f"json:{tmp_path}/train.json"},
        "encoder": {"name": "decoder", "weights": "demo:tiny-llama", "max_length": 64},
        "probe": {"num_probes": 1, "dtype": "float32"},
        "stages": ("score", "select"),
    }


def test_one_pass_gives_what_all_of_them_need(values, tmp_path, monkeypatch):
    passes = []
    real = {name: getattr(task, name) for name in ("measure_responses", "response_features")}

    def counting(name):
        def counted(*given, **settings):
            passes.append(name)
            return real[name](*given, **settings)

        return counted

    for name in real:
        monkeypatch.setattr(task, name, counting(name))
    said: list[str] = []

    def run(**changes):
        said.clear()
        passes.clear()
        pipeline.run(Config.of({**values, **changes}), tmp_path / "run", said.append)

    methods = ("longest", "rds", "k_center_greedy", "herding", "hardest")
    selection = {
        "methods": methods,
        "keep_fractions": (0.5,),
        "target": f"json:{tmp_path}/target.json",
        "max_similarity": 0.9999,
    }
    run(selection=selection)
    assert passes == ["measure_responses", "response_features"]  # the second of the target
    left_out = (
        "select: 1 of 24 samples left out as near-duplicates of others (a cosine above 0.9999)"
    )
    assert left_out in said
    assert "Spearman's correlation of DLC with perplexity" in "\n".join(said)
    root = tmp_path / "run"
    held = {name: np.load(root / f"scores/{name}.npz") for name in ("features", "similarities")}
    model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
    data, target = (
        dlc.tokenise(dlc.load_instructions(source), model.tokenizer, 64)
        for source in (values["dataset"]["train"], selection["target"])
    )
    features, targets = (dlc.response_features(model, some) for some in (data, target))
    np.testing.assert_array_equal(held["features"]["ids"], data.ids)
    np.testing.assert_allclose(held["features"]["features"], features, atol=1e-5)
    cosines = dlc.similarities(features, targets)
    np.testing.assert_allclose(held["similarities"]["similarities"], cosines, atol=1e-6)
    found = dlc.measure_responses(
        model, dlc.load_instructions(values["dataset"]["train"]), max_length=64
    )
    table = artefacts.read_scores(root).scores
    t_shirt = dlc.score(found, method="ifd", variant="t_shirt")
    np.testing.assert_allclose(table["ifd_t_shirt"], t_shirt, rtol=1e-4)
    losses = np.load(root / "scores/losses.npz")["losses"][0]
    inputs = {name: held[name][name] for name in held}
    for method in methods:
        scores = found.num_tokens.astype(np.float32) if method == "longest" else losses
        labels = np.zeros(24, int)
        candidates = Candidates(scores, labels, ids=data.ids, inputs=inputs)
        rules = dlc.Rules(max_similarity=0.9999)
        kept = candidates.select(method=method, keep_fraction=0.5, rules=rules)
        (path,) = (root / f"selections/{method}").glob("*.npy")
        np.testing.assert_array_equal(np.load(path), kept.indices)
        manifest = json.loads(path.with_suffix(".json").read_text())
        assert manifest["how"]["max_similarity"] == 0.9999
        assert manifest["num_left_out"] == kept.num_left_out == 1
        assert not {3, 23} <= {*kept.indices.tolist()}
    run(selection=selection)
    assert passes == []
    assert {f"{name}: unchanged, not measured again" for name in held} <= {*said}
    other = selection | {"target": values["dataset"]["train"]}
    with pytest.raises(
        dlc.InputError, match=r"similarities are those of target json:.*target\.json"
    ):
        run(selection=other, stages=("select",))
    run(selection=other)
    assert passes == ["response_features"]
    assert np.load(root / "scores/similarities.npz")["similarities"].shape == (24, 24)


def test_features_that_are_asked_for_later_take_one_pass(values, tmp_path, monkeypatch):
    root = tmp_path / "run"
    pipeline.run(Config.of(values), root, lambda line: None)
    assert records.read(root, "features") is None
    before = records.read(root, "score").outputs
    later = values | {"selection": {"methods": ("k_center_greedy",), "keep_fractions": (0.5,)}}
    with pytest.raises(dlc.InputError, match="has no features of these scores; run the stage"):
        pipeline.run(Config.of(later | {"stages": ("select",)}), root, lambda line: None)
    monkeypatch.setattr(task, "measure_responses", None)
    pipeline.run(Config.of(later), root, lambda line: None)
    assert records.read(root, "score").outputs == before
    assert np.load(root / "scores/features.npz")["features"].shape == (24, 192)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ("rds",)}, "selection.target: is what method 'rds' selects by"),
        ({"methods": ("random",), "target": "demo:dolly/test"}, "expected both or neither"),
        ({"methods": ("random",), "max_similarity": 1.5}, "selection.max_similarity: the cosine"),
        ({"methods": ("el2n",)}, "instructions have no record of training"),
        ({"methods": ("contextual_diversity",)}, "instructions have no record of training"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, changes, says):
    with pytest.raises(dlc.InputError, match=re.escape(says)):
        Config.of(values | {"selection": changes})


def test_longest_is_of_instructions_alone(values, tmp_path):
    images = {
        "encoder": {"name": "resnet18", "weights": "demo:resnet18"},
        "selection": {"methods": ("longest",)},
    }
    with pytest.raises(dlc.InputError, match="'longest' is of the responses of instructions"):
        Config.of(images | {"dataset": {"train": "demo:caltech15/train"}})
    official = values | {"mode": "official", "selection": {"methods": ("longest",)}}
    with pytest.raises(dlc.InputError, match=r"official"):
        Config.of(official)


def test_a_target_is_read_before_anything_is_scored(values, tmp_path):
    rows = json.loads((tmp_path / "target.json").read_text())
    rows.append({"instruction": "word " * 80, "output": "red"})
    (tmp_path / "target.json").write_text(json.dumps(rows))
    selection = {
        "methods": ("rds",),
        "keep_fractions": (0.5,),
        "target": f"json:{tmp_path}/target.json",
    }
    root, said = tmp_path / "run", []
    with pytest.raises(dlc.InputError, match=r"target\.json: 1 samples have no response left"):
        pipeline.run(Config.of(values | {"selection": selection}), root, said.append)
    assert not [line for line in said if line.startswith("score:")]
    data = values["dataset"] | {"on_corrupt": "skip"}
    pipeline.run(Config.of(values | {"selection": selection, "dataset": data}), root, said.append)
    (note,) = [line for line in said if line.startswith("similarities: note")]
    assert "1 of the 3 samples of json:" in note
    cell = "selections/rds/keep_0.50-seed_0"
    manifest = json.loads((root / f"{cell}.json").read_text())
    assert manifest["how"]["target"] == selection["target"]
    seconds = {
        name: records.read(root, name).seconds for name in ("score", "features", "similarities")
    }
    waited = records.read(root, cell).facts["earlier_seconds"]
    # features came from the pass that scored
    assert waited == pytest.approx(sum(seconds.values()), abs=0.01)


def test_fewer_than_asked_for_is_said(values, tmp_path):
    """Of copies one is left."""
    rows = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(rows[:2] + rows[:2] * 4))
    selection = {"methods": ("random",), "keep_fractions": (0.5,), "max_similarity": 0.9999}
    said: list[str] = []
    pipeline.run(Config.of(values | {"selection": selection}), tmp_path / "run", said.append)
    assert (
        "select: 8 of 10 samples left out as near-duplicates of others (a cosine above 0.9999)"
        in said
    )
    note = "select: note: random/keep_0.50-seed_0 keeps 2, 3 fewer than asked for"
    assert any(line.startswith(note) for line in said)
