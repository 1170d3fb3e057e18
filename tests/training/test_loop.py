"""The loop that both kinds of fine-tuning share: what it does first, keeps, and resumes from."""

import dataclasses
import time

import numpy as np
import pytest
from counter import Counter

import dlc_jax as dlc
from dlc_jax import signals
from dlc_jax.distributed import processes
from dlc_jax.training import loop
from dlc_jax.training.loop import Progress, RunFolder, read_metrics, train
from dlc_jax.training.optimiser import epoch_order

POSITIONS = np.array([1, 3, 4, 6, 8, 9, 11])  # four steps an epoch, the last of one sample


def untimed(history):
    return [{k: v for k, v in line.items() if k != "elapsed_s"} for line in history]


def assert_same(one, two):
    assert one.weights == two.weights
    assert untimed(one.history) == untimed(two.history)


def numbers(folder):
    return sorted(int(path.name) for path in folder.glob("[0-9]*"))


def stop_at(monkeypatch, number):
    """Has the nth question whether to stop answered by yes."""
    asked = []
    monkeypatch.setattr(processes, "is_due", lambda: asked.append(1) or len(asked) == number)


def test_every_epoch_sees_all_samples_in_its_own_order():
    counter = Counter()
    result = train(counter, POSITIONS, 5)
    for epoch in (1, 2):
        seen = [i for number, some in counter.fed for i in some if number == epoch]
        assert seen == epoch_order(POSITIONS, 5, epoch).tolist()
    assert [line["loss"] for line in result.history] == [4.0, 4.0]
    assert [line["learning_rate"] for line in result.history] == pytest.approx([0.4, 0.8])
    assert result.history[0]["elapsed_s"] <= result.history[1]["elapsed_s"] == result.seconds


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("checkpoint_steps", [0, 3])
def test_a_run_that_is_stopped_resumes_at_the_next_step(
    tmp_path, monkeypatch, number, checkpoint_steps
):
    whole, counter = Counter(), Counter(checkpoint_steps)
    expected, folder = train(whole, POSITIONS, 5), RunFolder(tmp_path, "ab")
    with monkeypatch.context() as patch:
        stop_at(patch, number)
        with pytest.raises(signals.Stopped):
            train(counter, POSITIONS, 5, folder)
    is_saved = number % 4 == 0 or (checkpoint_steps > 0 and number % checkpoint_steps == 0)
    assert numbers(tmp_path / "stopped") == ([] if is_saved else [number])
    result = train(counter, POSITIONS, 5, folder)
    assert counter.fed == whole.fed
    assert_same(result, expected)
    assert untimed(read_metrics(tmp_path)) == untimed(expected.history)


@pytest.mark.parametrize(
    ("checkpoint_steps", "fails_at", "there", "first"),
    [(0, 4, [], (1, 0)), (0, 7, [1], (2, 0)), (3, 6, [4], (2, 0)), (3, 8, [6], (2, 2))],
)
def test_a_run_that_fails_resumes_at_its_last_checkpoint(
    tmp_path, checkpoint_steps, fails_at, there, first
):
    def fails(number):
        if number == fails_at:
            raise RuntimeError("power cut")

    folder = RunFolder(tmp_path, "ab")
    with pytest.raises(RuntimeError, match="power cut"):
        train(Counter(checkpoint_steps, fails), POSITIONS, 5, folder)
    assert numbers(tmp_path / "checkpoint") == there
    counter = Counter(checkpoint_steps)
    assert_same(train(counter, POSITIONS, 5, folder), train(Counter(), POSITIONS, 5))
    assert counter.firsts[0] == first
    assert numbers(tmp_path / "checkpoint") == [8 if checkpoint_steps else 2]


def test_the_later_of_a_stop_and_a_checkpoint_counts(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, "ab")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(signals.Stopped):
            train(Counter(), POSITIONS, 5, folder)
    train(Counter(), POSITIONS, 5, folder)
    counter = Counter()
    assert_same(train(counter, POSITIONS, 5, folder), train(Counter(), POSITIONS, 5))
    assert counter.fed == []
    assert numbers(tmp_path / "stopped") == [2]  # the finished run deletes it


@pytest.mark.parametrize("checkpoint_steps", [0, 1])
def test_a_loss_that_is_not_finite_is_never_kept(tmp_path, checkpoint_steps):
    losses = [1.0, 2.0, float("inf"), 4.0]
    says = r"gave a loss \(inf\) that is not finite, at step 3, learning rate 0\.3; try less\."
    with pytest.raises(dlc.InputError, match=says):
        train(Counter(checkpoint_steps, losses=losses), POSITIONS, 5, RunFolder(tmp_path, "ab"))
    assert numbers(tmp_path / "checkpoint") == ([2] if checkpoint_steps else [])


@dataclasses.dataclass
class Slow:
    """Takes a while to see an epoch; fails at one of them."""

    last_epoch: int = 2
    fails_at: int = 0
    key = ()

    def __post_init__(self):
        self.seen = []

    def __call__(self, epoch, state, sums):
        time.sleep(0.05)
        self.seen.append((epoch, state["steps"].item(), sums["loss"]))
        if epoch == self.fails_at:
            raise RuntimeError("not seen")


def test_an_epoch_counts_once_it_is_watched(tmp_path):
    watch = Slow()
    result = train(Counter(), POSITIONS, 5, watch=watch)
    assert watch.seen == [(1, 4, 4.0), (2, 8, 4.0)]
    assert result.history[0]["elapsed_s"] >= 0.05
    assert result.seconds >= 0.1
    with pytest.raises(RuntimeError, match="not seen"):
        train(Counter(), POSITIONS, 5, RunFolder(tmp_path, "ab"), Slow(fails_at=2))
    assert numbers(tmp_path / "checkpoint") == [1]


def test_a_watch_may_end_a_run_before_its_schedule_does():
    result = train(Counter(), POSITIONS, 5, watch=Slow(last_epoch=1))
    assert untimed(result.history) == untimed(train(Counter(), POSITIONS, 5).history)[:1]


def test_sums_are_waited_for_two_steps_late():
    counter = Counter()
    waited, step = [], counter.step

    def watched(state, batch, rate):
        state, added = step(state, batch, rate)
        number = len(counter.fed)
        return state, lambda: waited.append((number, len(counter.fed))) or added()

    counter.step = watched
    train(counter, POSITIONS, 5)
    epoch = [(1, 3), (2, 4), (3, 4), (4, 4)]
    assert waited == [*epoch, *((number + 4, now + 4) for number, now in epoch)]


def test_progress_is_told_and_read_again():
    lines = [{"epoch": 1, "elapsed_s": 2.0}]
    between, within = Progress(1, lines, {}), Progress(1, lines, {"num_steps": 3, "elapsed_s": 0.5})
    for progress in (Progress(0, [], {}), between, within):
        assert Progress.of(progress.state, progress.facts) == progress
    assert (between.elapsed_s, within.elapsed_s) == (2.0, 2.5)
    assert (between.num_steps, within.num_steps) == (0, 3)


def test_the_counter_is_a_trainer():
    assert isinstance(Counter(), loop.Trainer)
    assert isinstance(Slow(), loop.Watch)


def test_sums_add_up_in_the_order_of_their_steps():
    parts = [{}, {"loss": 0.1, "right": "1"}, {"loss": 0.2, "right": "01"}, {"loss": 0.3}]
    assert loop._total(parts) == {"loss": 0.1 + 0.2 + 0.3, "right": "101"}


def test_a_stop_is_kept_although_the_last_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    stop_at(monkeypatch, 5)  # a step into the second epoch
    folder, real = RunFolder(tmp_path, "ab"), loop._Loop._leave

    def leave(self, *args, **kwargs):
        def fail():
            raise dlc.InputError("no space")

        monkeypatch.setattr(self.checkpoints, "wait", fail)
        real(self, *args, **kwargs)

    monkeypatch.setattr(loop._Loop, "_leave", leave)
    with pytest.raises(dlc.InputError, match="no space"):
        train(Counter(), POSITIONS, 5, folder)
    assert numbers(tmp_path / "stopped") == [5]
