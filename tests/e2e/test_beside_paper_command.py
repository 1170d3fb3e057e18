"""The command on folders that are called and divided as a data set of the paper is."""

import numpy as np
import pytest
from test_command_line import run

import dlc_jax as dlc

pytestmark = pytest.mark.slow
ARGUMENTS = (
    "--config=configs/cxrb10.py",
    "--config.stages=score,select,finetune,report",
    "--config.encoder.weights=demo:resnet18",
    "--config.encoder.image_size=32",
    "--config.probe.num_probes=2",
    "--config.selection.keep_fractions=0.5",
    "--config.selection.splits=0.5",
    "--config.selection.seeds=1,2",
    "--config.finetune.epochs=1",
    "--config.finetune.batch_size=20",
)


def write_folders(root, sample: dlc.Dataset, num_classes: int = 10) -> None:
    """Two images of each class in train, two in val and one in test."""
    for label in range(num_classes):
        members = np.flatnonzero(sample.labels == label)[:5]
        for part, position in zip(("train", "train", "val", "val", "test"), members, strict=True):
            place = root / part / sample.class_names[label] / f"{position}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(sample[int(position)].image)


def test_a_run_on_a_data_set_of_the_paper_is_reported_beside_it(tmp_path, sample):
    root, work = tmp_path / "CXRB10", tmp_path / "work"
    write_folders(root, sample)
    sources = (f"--config.dataset.train=folder:{root}/train+val",)
    sources += (f"--config.dataset.test=folder:{root}/test",)
    printed = run(*ARGUMENTS, *sources, f"--workdir={work}").stdout
    text = (work / "report" / "results.md").read_text()
    assert text in printed
    beside = text[text.index("Beside the paper, CXRB10: ") :]
    assert "Ours: resnet18, demo:resnet18." in beside
    rows = [line.split("|")[1:-1] for line in beside.splitlines() if line.startswith("| 0.5")]
    found = {cells[1].strip(): [cell.strip() for cell in cells[2:]] for cells in rows}
    lines = (work / "results.csv").read_text().splitlines()
    results = [line.split(",") for line in lines[1:]]
    for label, method, theirs, std in (
        ("random", "random", 32.21, ""),
        ("flexrand (split 0.5)", "flexrand", 34.53, "0.06"),
    ):
        ours = np.mean([float(line[5]) for line in results if line[0] == method])
        expected = ["2", f"{ours:.2f}", f"{theirs:.2f}", f"{ours - theirs:+.2f}", std]
        assert found[label] == expected
    assert found["forgetting"] == ["", "", "33.69", "", "0.00"]
    assert "full" not in found
