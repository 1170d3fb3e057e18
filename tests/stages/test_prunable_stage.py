"""`encoder.prunable` in a work directory: printed, recorded, part of what decides scores."""

import numpy as np
import pytest
from test_measurements import settings_of_few_images

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.stages import pipeline
from dlc_jax.workspace import artefacts, records


@pytest.mark.slow
def test_what_is_masked_is_printed_recorded_and_decides_scores(tmp_path):
    values, root = settings_of_few_images(tmp_path), tmp_path / "run"
    values["probe"] |= {"step": 0.5}
    values["selection"] = {"methods": ("easiest",), "keep_fractions": (0.5,)}

    def scored(
        stages: tuple[str, ...] = ("score",), **encoder: str
    ) -> tuple[list[str], np.ndarray]:
        said: list[str] = []
        changed = values["encoder"] | encoder
        pipeline.run(Config.of({**values, "encoder": changed, "stages": stages}), root, said.append)
        return said, artefacts.read_losses(root)["losses"]

    def fact() -> str:
        return records.read(root, "score").facts["encoder"]["masked"]

    said, by_rule = scored()
    text = "20 convolutions (699,696 weights) of 100 tensors"
    assert f"score: masks {text}" in said
    assert fact() == text
    said, asked = scored(prunable="layer4.*")
    text = "5 convolutions (524,288 weights) of 100 tensors, not 15 convolutions"
    assert f"score: masks {text}" in said
    assert fact() == text
    np.testing.assert_allclose(asked[0], by_rule[0], atol=1e-6)  # nothing is masked
    assert np.abs(asked[1] - by_rule[1]).max() > 1e-3
    said, _ = scored(prunable="layer4.*")
    assert "score: unchanged, not run again" in said
    with pytest.raises(dlc.InputError, match=r"encoder\.prunable: None .* 'layer4\.\*'"):
        scored(("select",))
    scored(("select",), prunable="layer4.*")
