"""The plan of a run that prunes images."""

from __future__ import annotations

from collections.abc import Callable

from dlc_jax.planning import tables
from dlc_jax.planning.break_even import Speeds, paybacks
from dlc_jax.planning.costs import num_kept, planned_stages
from dlc_jax.planning.host import Disk, cache_disk, finetuning_parts, scoring_parts
from dlc_jax.planning.image_costs import ImageCosts
from dlc_jax.planning.machine import is_processor, this_machine
from dlc_jax.planning.memory import DeviceJob
from dlc_jax.planning.printing import (
    Echo,
    print_devices,
    print_host,
    print_payback,
    print_time,
)
from dlc_jax.planning.speed import Decoding, scoring_speed
from dlc_jax.planning.ways_to_fit import fits, ways_on_processor

_GIB = 1 << 30


def plan_images(work: ImageCosts, decoding: Decoding, echo: Echo) -> list[str]:
    """Prints the plan; returns what does not fit."""
    echo(f"\n{tables.work_table(work.costs())}\n")
    no_room = _print_bytes(work, decoding, echo)
    problems: dict[str, str] = {}
    machine = this_machine(work.mesh.num_devices)
    stages = planned_stages(work.config)
    jobs: dict[str, DeviceJob] = {"score": work.scoring(), "finetune": work.finetuning()}
    said = {"score": _of_scoring(work), "finetune": _of_finetuning(work)}
    for stage in stages:
        problems |= print_devices(stage, said[stage], [machine], [jobs[stage]], echo)
    parts: dict[str, Callable] = {"score": scoring_parts, "finetune": finetuning_parts}
    ways = {"score": _fewer_losses(work), "finetune": _fewer_images(work)}
    # of a processor the host's memory is the device's, and what else is there counts as well
    problems |= print_host({stage: parts[stage](work) for stage in stages}, ways, echo)
    if fits(work.scoring(), machine):
        _print_time(work, decoding, echo)
    else:
        echo("time: not measured, since scoring does not fit")
    return [*problems.values(), *no_room]


def _of_scoring(work: ImageCosts) -> str:
    job = work.scoring()
    return (
        f"{job.num_probes} probes per device in {job.dtype}, {job.chunk} at once, "
        f"{job.batch_size} images per device and call"
    )


def _of_finetuning(work: ImageCosts) -> str:
    settings, each = work.config.finetune, work.finetuning().arguments()[1].shape[0]
    what = "a linear head" if settings.linear_probe else "all weights"
    return f"{what} in {settings.dtype}, batches of {settings.batch_size}, {each} per device"


def _print_bytes(work: ImageCosts, decoding: Decoding, echo: Echo) -> list[str]:
    """Prints what is read, decoded and kept; returns what has no room."""
    size, n = work.config.encoder.image_size, work.num_samples
    stored = n * decoding.num_bytes
    crops = 3 * n * size**2
    scoring = [cost for cost in work.costs() if cost.stage == "score"]
    times = sum(cost.decodes for cost in scoring) // n
    reads = f"{_often(times + 1)}: content hash, and every time they are decoded"
    echo(
        f"images on disk: about {tables.amount(stored)} ({decoding.num_read} looked at), read "
        f"{reads}" + (f"; {decoding.num_unreadable} are unreadable" * (decoding.num_unreadable > 0))
    )
    echo(
        f"decoded: {n:,} x {size} x {size} x 3 = {tables.amount(crops)}, {_often(times)} for "
        "scoring"
    )
    if seen := sum(cost.decodes for cost in work.costs() if cost.is_training and cost.crops):
        echo(
            f"decoded at full size to be cropped anew in every epoch: {seen:,} images, "
            f"{tables.amount(3 * seen * decoding.pixels)}; {tables.gib(work.kept_image_bytes)} kept"
        )
    num_passes = sum(cost.name != "decode into the cache" for cost in scoring)
    return _print_cache(work, num_passes, echo) if scoring else []


def _print_cache(work: ImageCosts, num_passes: int, echo: Echo) -> list[str]:
    cache, size = work.config.cache, work.config.encoder.image_size
    disk = cache_disk(cache, work.num_each, size)
    needed = tables.amount(disk.needed)
    if not work.is_cached:
        why = (
            "probe.augment: crops differ"
            if work.config.probe.augment
            else (f"cache.max_gib={_gib_for(disk.needed)} would keep {needed} per host")
        )
        echo(f"cache: not used ({why})")
        return []
    echo(
        f"cache: {needed} per host in {cache.path}, written once, read {num_passes + 1} times "
        f"(checked, then {num_passes} passes); {tables.amount(disk.free)} are free"
    )
    return _no_room(disk, str(cache.path))


def _no_room(disk: Disk, folder: str) -> list[str]:
    if disk.is_there or disk.needed <= disk.free:
        return []
    return [
        f"decoded images take {tables.amount(disk.needed)} of {folder}, where "
        f"{tables.amount(disk.free)} are free; try cache.max_gib=0, which decodes twice, or "
        "another cache.folder"
    ]


def _often(times: int) -> str:
    return {1: "once", 2: "twice"}.get(times, f"{times} times")


def _gib_for(num_bytes: int) -> str:
    return f"{-(-num_bytes // _GIB)}"


def _fewer_losses(work: ImageCosts) -> Callable[[int], str]:
    def way(excess: int) -> str:
        probe, n = work.config.probe, work.num_samples
        left = int(probe.num_probes) - -(-excess // (6 * n))
        if left >= 1:
            return f"try probe.num_probes={left} with probe.placement=midpoint"
        if is_processor():
            return ways_on_processor(work.scoring(), excess)
        return "no single setting helps; score parts of the data set"

    return way


def _fewer_images(work: ImageCosts) -> Callable[[int], str]:
    def way(excess: int) -> str:
        left = (work.kept_image_bytes - excess) / _GIB
        settings = work.config.finetune
        if settings.augment and not settings.linear_probe and left >= 0:
            return f"try finetune.image_memory_gib={int(left * 1e4) / 1e4:g}"
        if is_processor():
            return ways_on_processor(work.finetuning(), excess)
        return "try finetune.image_memory_gib=0, or a host with more memory"

    return way


def _print_time(work: ImageCosts, decoding: Decoding, echo: Echo) -> None:
    config, n = work.config, work.num_samples
    speed = scoring_speed(work.scoring())
    echo(f"measured: {speed.said}")
    echo(
        f"measured: {1 / decoding.seconds:,.0f} images decoded a second, "
        f"{1 / decoding.crop_seconds:,.0f} random crops, on all cores of this host"
    )
    speeds = Speeds.of(work.mesh, speed.flops_per_s, decoding.seconds, decoding.crop_seconds)
    costs = work.costs()
    seconds = [speeds.seconds(cost) for cost in costs]
    print_time(costs, seconds, echo)
    pruning = sum(s for s, cost in zip(seconds, costs, strict=True) if cost.stage == "score")
    if not pruning:
        return
    epochs, augmented = config.finetune.epochs, work.config.finetune.augment
    each = speeds.training_seconds(work.training_flops / work.mesh.num_devices, float(augmented))
    fractions = config.selection.keep_fractions
    least = config.selection.min_per_class
    kept = [num_kept(work.counts, fraction, least) for fraction in fractions]
    rows = paybacks(fractions, kept, n, epochs, pruning, each)
    print_payback(rows, epochs, pruning, n * epochs * each, echo)
