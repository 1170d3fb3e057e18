"""A trainer that adds up the positions it is fed, for tests of the loop and of runs."""

import jax.numpy as jnp

import dlc_jax as dlc
from dlc_jax.training.loop import write_metrics
from dlc_jax.training.optimiser import epoch_order


class Counter:
    """Two samples per step, for two epochs; `fed` lists (epoch, positions) of every step."""

    kind = "fine-tuning"
    files = ("metrics.jsonl",)
    keeps_weights = True
    fingerprint = "ab" * 32
    notes = ()
    mesh = None
    shows_bars = False
    num_epochs = 2
    remedy = "try less"

    def __init__(self, checkpoint_steps=0, on_step=lambda number: None, losses=None):
        self.checkpoint_steps, self.on_step, self.losses = checkpoint_steps, on_step, losses
        self.fed, self.firsts = [], []

    def positions(self, kept):
        return kept.indices

    def start(self, positions, seed):
        return {"total": jnp.zeros(()), "steps": jnp.zeros((), jnp.int32)}

    def steps_per_epoch(self, num_samples):
        return -(-num_samples // 2)

    def rates(self, steps_per_epoch):
        return [0.1 * step for step in range(1, 1 + steps_per_epoch * self.num_epochs)]

    def batches(self, positions, seed, epoch, first):
        self.firsts.append((epoch, first))
        order = epoch_order(positions, seed, epoch)
        for start in range(2 * first, len(order), 2):
            yield epoch, order[start : start + 2]

    def step(self, state, batch, rate):
        epoch, some = batch
        self.fed.append((epoch, some.tolist()))
        self.on_step(len(self.fed))
        state = {"total": state["total"] + rate * int(some.sum()), "steps": state["steps"] + 1}
        number = int(state["steps"])
        loss = 1.0 if self.losses is None else self.losses[number - 1]
        return state, lambda: {"loss": loss, "samples": f"{some.tolist()}"}

    def line(self, progress, rate):
        epoch, sums = len(progress.history) + 1, progress.sums
        line = {"epoch": epoch, "learning_rate": rate, "loss": sums["loss"]}
        return line | {"samples": sums["samples"], "elapsed_s": progress.elapsed_s}

    def result(self, progress, positions):
        weights = {name: leaf.item() for name, leaf in progress.state.items()}
        seconds = progress.elapsed_s
        return dlc.RunResult(
            None, None, None, len(positions), (), progress.history, weights, seconds
        )

    def write(self, folder, result):
        write_metrics(folder, result.history)
        return {"num_kept": result.num_kept, "seconds": result.seconds}

    def said(self, result):
        return f"{result.num_kept} samples"

    def complete(self, workspace):
        """Nothing is left to do."""
