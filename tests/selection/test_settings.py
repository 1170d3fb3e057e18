"""Which column of scores a method goes by, and variants that nothing has."""

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.config import Config, default_config
from dlc_jax.selection import Cell, SelectionConfig
from dlc_jax.stages.select import SelectionInputs
from dlc_jax.types import Conventions
from dlc_jax.workspace.artefacts import ScoredSamples


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"score": "ifd", "variant": "superfiltering"}, ["ifd_superfiltering"]),
        ({"score": "ifd"}, ["ifd"]),
        ({"score": "grand", "variant": "deepcore"}, ["grand_deepcore"]),
        ({"methods": ("herding", "easiest"), "variant": "deepcore"}, ["dlc", "dlc"]),
        ({"methods": ("least_confidence",), "variant": "deepcore"}, ["least_confidence_deepcore"]),
        ({"methods": ("el2n", "forgetting"), "variant": "paper"}, ["el2n_paper", "forgetting"]),
        # by a score that has no such variant, a method of its own score beside it
        (
            {"methods": ("entropy", "easiest"), "score": "ifd", "variant": "superfiltering"},
            ["entropy", "ifd_superfiltering"],
        ),
    ],
)
def test_the_variant_decides_the_column(settings, columns):
    config = SelectionConfig(**settings)
    config.check(Conventions.of("default"))
    assert [config.score_of(method) for method in config.methods] == columns
    assert {config.how(m)["variant"] for m in config.methods} <= {"published", "deepcore", "paper"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variant": "superfiltering"}, "of none of the methods flexrand and the scores dlc; .*pu"),
        ({"score": "length", "variant": "superfiltering"}, "and the scores length; expected publ"),
        ({"score": "ifd", "variant": "deepcore"}, "expected published or superfiltering"),
        ({"methods": ("auto",), "variant": "deepcore"}, "methods auto and the scores dlc"),
        ({"methods": ("herding", "grand"), "variant": "paper"}, "'paper' of grand takes gradients"),
        ({"score": "ifd", "variant": "superfilter"}, "Did you mean 'superfiltering'"),
    ],
)
def test_a_variant_that_nothing_has_is_refused(settings, says):
    with pytest.raises(ValueError, match=f"selection.variant: .*{says}"):
        SelectionConfig(**settings).check(Conventions.of("default"))


def test_the_score_of_instructions_is_refused_for_images():
    values = {"dataset": {"train": "demo:caltech15/train"}, "encoder": {"weights": "demo:resnet18"}}
    values["selection"] = {"score": "ifd", "variant": "superfiltering"}
    with pytest.raises(ValueError, match="'ifd' is of instructions"):
        Config.of(values)


@pytest.mark.parametrize("mode", ["default", "official"])
def test_the_command_selects_what_select_does_with_ids(tmp_path, mode):
    config = default_config()
    config.mode, config.dataset.train = mode, "demo:caltech15/train"
    config.encoder.weights = "demo:resnet18"
    methods = ("flexrand", "random", "easiest")
    config.selection.methods = methods
    generator = np.random.default_rng(0)
    labels, scores = np.repeat([0, 1], 40), generator.integers(0, 9, 80).astype(np.float32)
    ids = np.array([f"{i:b}" for i in generator.permutation(80)])
    samples = ScoredSamples(ids, labels, ("a", "b"), {"dlc": scores})
    known = SelectionInputs(Config.of(config), tmp_path, samples)
    for method in methods:
        split = 0.5 if method == "flexrand" else None
        ours = known.select(Cell(method, 0.3, split, 2))
        kept = dlc.select(
            scores, labels, method=method, keep_fraction=0.3, seed=2, mode=mode, ids=ids
        )
        np.testing.assert_array_equal(ours.indices, kept.indices)
