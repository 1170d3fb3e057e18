"""Which column of scores a method goes by, and variants that nothing has."""

import pytest

from dlc_jax.config import Config
from dlc_jax.selection.settings import SelectionConfig


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"score": "ifd", "variant": "superfiltering"}, ["ifd_superfiltering"]),
        ({"score": "ifd"}, ["ifd"]),
        ({"score": "grand", "variant": "deepcore"}, ["grand_deepcore"]),
        ({"methods": ("herding", "easiest"), "variant": "deepcore"}, ["dlc", "dlc"]),
        ({"methods": ("least_confidence",), "variant": "deepcore"}, ["least_confidence_deepcore"]),
        # by a score that has no such variant, a method of its own score beside it
        (
            {"methods": ("entropy", "easiest"), "score": "ifd", "variant": "superfiltering"},
            ["entropy", "ifd_superfiltering"],
        ),
    ],
)
def test_the_variant_decides_the_column(settings, columns):
    config = SelectionConfig(**settings)
    config.check("default")
    assert [config.score_of(method) for method in config.methods] == columns
    assert {config.how(m)["variant"] for m in config.methods} <= {"published", "deepcore"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variant": "superfiltering"}, "of none of the methods flexrand and the scores dlc; .*pu"),
        ({"score": "length", "variant": "superfiltering"}, "and the scores length; expected publ"),
        ({"score": "ifd", "variant": "deepcore"}, "expected published or superfiltering"),
        ({"methods": ("auto",), "variant": "deepcore"}, "methods auto and the scores dlc"),
        ({"score": "ifd", "variant": "superfilter"}, "Did you mean 'superfiltering'"),
    ],
)
def test_a_variant_that_nothing_has_is_refused(settings, says):
    with pytest.raises(ValueError, match=f"selection.variant: .*{says}"):
        SelectionConfig(**settings).check("default")


def test_the_score_of_instructions_is_refused_for_images():
    values = {"dataset": {"train": "demo:caltech15/train"}, "encoder": {"weights": "demo:resnet18"}}
    values["selection"] = {"score": "ifd", "variant": "superfiltering"}
    with pytest.raises(ValueError, match="'ifd' is of instructions"):
        Config.of(values)
