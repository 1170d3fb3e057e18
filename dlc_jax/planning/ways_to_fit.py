"""Which setting to turn, and how far, so that a job fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dlc_jax.planning.image_memory import ImageFinetuning, ImageScoring
from dlc_jax.planning.machine import USABLE, Machine, is_processor, num_here
from dlc_jax.planning.memory import DeviceJob, Finetuning, Scoring, first_that_fits, halves

_MOST_DEVICES = 256


def fits(job: DeviceJob, machine: Machine) -> bool:
    """Whether a device of the machine holds its part of the job."""
    return job.plan().num_bytes <= machine.limit


def ways_out(job: DeviceJob, machine: Machine) -> str:
    """Returns the settings each of which alone would make it fit, changed as little as can be."""
    ways = [
        way
        for values in _settings_to_change(job)
        if (way := first_that_fits(values, machine.limit)) is not None
    ]
    if not ways:
        return f"no single setting helps, up to {_MOST_DEVICES} devices; change several"
    return f"try {', or '.join(ways)}"


def ways_on_processor(job: DeviceJob, excess: int) -> str:
    """Returns the settings with which a processor's devices take so much less of their host."""
    count = num_here(local=True)
    left = job.plan().num_bytes - -(-excess // count)
    return ways_out(job, Machine("", count, int(left / USABLE)))


Values = list[tuple[str, DeviceJob]]  # a setting with its values, in the order to try


def _settings_to_change(job: Any) -> Iterator[Values]:
    if isinstance(job, Scoring):
        yield _halved(job, "probe.tokens_per_batch", job.tokens_per_batch, 256)
        yield from _of_language_models(job)
    elif isinstance(job, Finetuning):
        yield from _of_lora(job)
        yield from _of_language_models(job)
    elif isinstance(job, ImageScoring):
        yield _halved(job, "probe.batch_size", job.batch_size, 1)
        yield _halved(job, "probe.chunk", job.chunk, 1)
        if not is_processor():
            yield [("probe.dtype=bfloat16", dataclasses.replace(job, dtype="bfloat16"))]
    elif isinstance(job, ImageFinetuning):
        yield from _of_image_finetuning(job)


def _halved(job: Any, setting: str, value: int, least: int) -> Values:
    field = setting.rpartition(".")[2]
    return [
        (f"{setting}={num}", dataclasses.replace(job, **{field: num}))
        for num in halves(value, least)
    ]


def _of_lora(job: Finetuning) -> Iterator[Values]:
    if not job.lora.rematerialise:
        lora = dataclasses.replace(job.lora, rematerialise=True)
        yield [("lora.rematerialise=True", dataclasses.replace(job, lora=lora))]
    yield [
        (f"lora.rows_at_once={num}", dataclasses.replace(job, lora=lora))
        for num in halves(job.lora.rows_at_once, job.num_devices)
        for lora in [dataclasses.replace(job.lora, rows_at_once=num)]
    ]


def _of_language_models(job: Scoring | Finetuning) -> Iterator[Values]:
    yield [
        (f"encoder.max_length={num}", dataclasses.replace(job, max_length=num))
        for num in halves(job.max_length, 128)
    ]
    yield _doubled(
        "mesh.fsdp", job.fsdp, job.groups, lambda num: dataclasses.replace(job, fsdp=num)
    )


def _of_image_finetuning(job: ImageFinetuning) -> Iterator[Values]:
    def with_settings(**changes: Any) -> ImageFinetuning:
        return dataclasses.replace(job, settings=dataclasses.replace(job.settings, **changes))

    settings = job.settings
    yield [
        (f"finetune.batch_size={num}", with_settings(batch_size=num))
        for num in halves(settings.batch_size, job.num_devices)
    ]
    if not is_processor():
        yield [("finetune.dtype=bfloat16", with_settings(dtype="bfloat16"))]
        more = _doubled(
            "devices", job.num_devices, 1, lambda num: dataclasses.replace(job, num_devices=num)
        )
        yield [(f"mesh.data=-1 on {way.partition('=')[2]} devices", bigger) for way, bigger in more]


def _doubled(
    setting: str, value: int, others: int, with_value: Callable[[int], DeviceJob]
) -> Values:
    """Tries more devices, `others` of them for each that the setting has."""
    values = [value << i for i in range(1, 9)]
    return [
        (f"{setting}={num}", with_value(num)) for num in values if num * others <= _MOST_DEVICES
    ]
