"""Memory of devices from shapes, against what XLA says of the compiled programs."""

import dataclasses

import pytest

from dlc_jax.planning.image_memory import ImageFinetuning, ImageScoring
from dlc_jax.training.images import FinetuneConfig


def taken(job) -> tuple[int, int]:
    """Returns the bytes of arguments and temporaries, and those of results."""
    program = job.program()
    memory = program.func.lower(*program.args, *job.arguments()).compile().memory_analysis()
    return (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
    )


@pytest.mark.parametrize(
    ("batch_size", "chunk", "holds_importance"),
    [(128, 1, False), pytest.param(32, 4, True, marks=pytest.mark.slow)],
)
def test_scoring_takes_less_than_planned(sample_encoder, batch_size, chunk, holds_importance):
    encoder = sample_encoder.for_mode("default")
    job = ImageScoring(encoder, 64, 15, 8, chunk, "float32", holds_importance, batch_size)
    found, _ = taken(job)
    planned = job.plan().num_bytes
    print(f"{found:,} of {planned:,} bytes, ratio {planned / found:.2f}")
    assert found <= planned <= 2.5 * found


@pytest.mark.slow
def test_fine_tuning_takes_less_than_planned(sample_encoder):
    settings = FinetuneConfig(batch_size=32)
    job = ImageFinetuning(sample_encoder.for_mode("default"), 64, 15, settings, num_devices=1)
    found = sum(taken(job))
    planned = job.plan().num_bytes
    print(f"{found:,} of {planned:,} bytes, ratio {planned / found:.2f}")
    assert found <= planned <= 2.5 * found


def test_what_grows_with_what(sample_encoder):
    encoder = sample_encoder.for_mode("default")
    job = ImageScoring(encoder, 64, 15, 50, 1, "float32", False, 64)
    parts = dict(part[:2] for part in job.plan().parts)
    num_weights = sum(leaf.size for leaf in job._prunable().values())
    assert parts["masked weights"] == 4 * num_weights
    four = dataclasses.replace(job, chunk=4, num_probes=52)
    assert dict(part[:2] for part in four.plan().parts)["masked weights"] == 16 * num_weights
    assert job.plan().num_bytes < dataclasses.replace(job, batch_size=128).plan().num_bytes


def test_a_batch_is_divided_among_devices(sample_encoder):
    encoder, settings = sample_encoder.for_mode("default"), FinetuneConfig(batch_size=128)
    one, four = (ImageFinetuning(encoder, 64, 15, settings, num) for num in (1, 4))
    assert [job.arguments()[1].shape[0] for job in (one, four)] == [128, 32]
    quarter = ImageFinetuning(encoder, 64, 15, FinetuneConfig(batch_size=32), 1)
    assert four.plan().num_bytes == quarter.plan().num_bytes < one.plan().num_bytes


def test_a_linear_head_alone_is_small(sample_encoder):
    encoder = sample_encoder.for_mode("default")
    settings = FinetuneConfig(linear_probe=True)
    job = ImageFinetuning(encoder, 64, 15, settings, num_devices=1)
    assert job.arguments()[1].shape == (128, 128)  # features
    assert job.plan().num_bytes < 4e6
