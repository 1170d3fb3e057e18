"""A disk that is full: the last whole checkpoint stays, and the run goes on from it."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but

import dlc_jax as dlc
from dlc_jax.training.images import Finetuner
from dlc_jax.workspace.checkpoints import Checkpoints

FAST = {"image_size": 32, "epochs": 4, "batch_size": 16, "learning_rate": 0.05}


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(
    sample_encoder, small_sample, tmp_path, monkeypatch, capfd
):
    """Files may not grow beyond 100 kB from the third epoch on, as if the disk were full.

    The second checkpoint is still being written then, and may or may not be the last good one.
    """
    undisturbed = dlc.finetune(sample_encoder, small_sample, folder=tmp_path / "a", **FAST)
    real = Finetuner.batches
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    epochs = []

    def filling(self, positions, seed, epoch, first):
        epochs.append(epoch)
        if epoch == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        return real(self, positions, seed, epoch, first)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Finetuner, "batches", filling)
            with pytest.raises(
                ValueError,
                match=r"cannot write a checkpoint: File too large\. The last whole one, [12], is",
            ):
                dlc.finetune(sample_encoder, small_sample, folder=tmp_path / "b", **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "".join(capfd.readouterr()) == ""
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    (last,) = (int(path.name) for path in (tmp_path / "b" / "checkpoint").glob("[0-9]"))
    assert last in (1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "batches", lambda *a: epochs.append(("again", a[3])) or real(*a))
        resumed = dlc.finetune(sample_encoder, small_sample, folder=tmp_path / "b", **FAST)
    again = [epoch for epoch in epochs if isinstance(epoch, tuple)]
    assert again == [("again", epoch) for epoch in range(last + 1, 5)]
    for a, b in zip(
        jax.tree.leaves(resumed.weights), jax.tree.leaves(undisturbed.weights), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", slow_but([jnp.asarray], [np.asarray, jnp.asarray]))
def test_a_disk_that_is_full_from_the_start(tmp_path, capfd, caplog, kind):
    """One line, that does not speak of a whole checkpoint where there is none."""
    generator = np.random.default_rng(0)
    state = [kind(generator.normal(size=(200, 200)).astype(np.float32)) for _ in range(8)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with (
            pytest.raises(dlc.InputError) as error,
            Checkpoints(tmp_path / "checkpoint", "ab") as checkpoints,
        ):
            checkpoints.save(1, state, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value) == (
        f"{tmp_path}/checkpoint: cannot write a checkpoint: File too large. There is none yet; the "
        "same command starts this run again."
    )
    assert ("".join(capfd.readouterr()), caplog.messages) == ("", [])
    assert list(tmp_path.rglob("*")) == [tmp_path / "checkpoint"]
