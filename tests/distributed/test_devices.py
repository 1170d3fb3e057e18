"""Image scoring, linear heads and fine-tuning on eight devices, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from devices_run import FEW, MESHES

import dlc_jax as dlc

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("devices") / "found.json"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "devices_run.py"), str(out)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("data", "mesh"), [*(("odd", mesh) for mesh in MESHES), *(("few", mesh) for mesh in FEW)]
)
def test_losses_are_bit_for_bit_those_of_one_device(found, data, mesh):
    one = np.array(found[data]["one"])
    assert one.shape == (2, 5, 61 if data == "odd" else 3)  # losses and nearest classes
    assert np.ptp(one[0]) > 1e-3
    assert np.ptp(one[1]) > 0
    np.testing.assert_array_equal(np.array(found[data][mesh]), one)


def test_probes_side_by_side_and_fresh_crops_too(found):
    losses = {name: np.array(values[0]) for name, values in found["others"].items()}
    np.testing.assert_allclose(losses["chunks on two"], losses["chunks"], atol=2e-6)
    np.testing.assert_array_equal(losses["crops on four"], losses["crops"])
    assert found["others"]["crops on four"][1] == found["others"]["crops"][1]
    assert np.abs(losses["crops"] - np.array(found["odd"]["one"])[0, :2]).max() > 1e-4


def test_features_and_linear_heads_are_those_of_one_device(found):
    np.testing.assert_array_equal(found["features"]["four"], found["features"]["one"])
    assert found["linear"]["four"] == found["linear"]["one"]


def test_batch_norm_is_of_the_whole_batch(found):
    for kind, tolerance in (("updates", 1e-2), ("statistics", 1e-4)):
        worst = max(found["finetune"]["two"][kind].values())
        apart = max(found["finetune"]["apart"][kind].values())
        print(f"{kind}: {worst:.2g} of their norm, {apart:.2g} with a batch norm of each device")
        assert worst < tolerance < apart
        assert len(found["finetune"]["two"][kind]) >= 40


def test_a_mesh_of_one_device(sample_encoder, small_sample):
    mesh = dlc.make_mesh(fsdp=1)
    assert dict(mesh.shape) == {"data": 1, "probe": 1, "fsdp": 1}
    probes = dlc.probe(
        sample_encoder, small_sample, image_size=32, num_probes=2, run=dlc.Run(mesh=mesh)
    )
    assert probes.losses.shape == (2, 60)
