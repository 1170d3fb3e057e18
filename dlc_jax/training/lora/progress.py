"""Which samples every step of a run sees, and how far a run is."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from dlc_jax.encoders.architecture import Architecture
from dlc_jax.training.lora.settings import LoraConfig, learning_rates
from dlc_jax.training.lora.step import LoraState, Optimiser
from dlc_jax.training.order import epoch_order
from dlc_jax.types import Params, path_name


class Plan(NamedTuple):
    """Which samples every step sees, and at what rate."""

    positions: Int64[np.ndarray, " k"]
    seed: int
    batch_size: int
    steps_per_epoch: int
    rates: list[float]

    @classmethod
    def of(cls, settings: LoraConfig, positions: Int64[np.ndarray, " k"], seed: int) -> Plan:
        per_epoch = -(-len(positions) // settings.batch_size)
        num_steps = per_epoch * settings.epochs
        rates = learning_rates(num_steps, settings.learning_rate, settings.warmup_steps)
        return cls(positions, seed, settings.batch_size, per_epoch, rates)

    def positions_of(self, step: int) -> Int64[np.ndarray, " b"]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.positions, self.seed, epoch + 1)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


class Progress(NamedTuple):
    """A run after some of its steps.

    Attributes:
      state: Where it stands.
      history: A line per finished epoch.
      open: What is added up of the epoch that is not: its steps and theirs since.
    """

    state: LoraState
    history: list[dict[str, Any]]
    open: dict[str, float]

    @classmethod
    def start(cls, adapter: Params, optimiser: Optimiser) -> Progress:
        adapter = jax.tree.map(jnp.asarray, adapter)
        return cls(LoraState(adapter, optimiser.at(0.0).init(adapter)), [], _NOTHING)

    @classmethod
    def of(cls, saved: tuple[Any, list[dict[str, Any]]] | None) -> Progress | None:
        """Returns what a checkpoint holds."""
        return None if saved is None else cls(saved[0], saved[1][:-1], saved[1][-1])

    @property
    def told(self) -> list[dict[str, Any]]:
        """For a checkpoint: the lines, and last what is open."""
        return [*self.history, self.open]

    @property
    def step(self) -> int:
        """How many are done."""
        return int((self.history[-1]["step"] if self.history else 0) + self.open["num_steps"])

    @property
    def elapsed_s(self) -> float:
        return (self.history[-1]["elapsed_s"] if self.history else 0.0) + self.open["elapsed_s"]

    def after(
        self, state: LoraState, loss: float, num_tokens: int, num_read: int, seconds: float
    ) -> Progress:
        more = {
            "num_steps": 1,
            "loss": loss,
            "num_tokens": num_tokens,
            "num_read": num_read,
            "elapsed_s": seconds,
        }
        return self._replace(state=state, open={k: self.open[k] + v for k, v in more.items()})

    def epoch_ended(self, plan: Plan, step: int) -> Progress:
        line = {
            "epoch": len(self.history) + 1,
            "step": step + 1,
            "learning_rate": plan.rates[step],
            "train_loss": self.open["loss"] / self.open["num_tokens"],
            "tokens_per_s": round(self.open["num_read"] / self.open["elapsed_s"], 1),
            "elapsed_s": round(self.elapsed_s, 3),
        }
        return self._replace(history=[*self.history, line], open=_NOTHING)


_NOTHING = dict.fromkeys(("num_steps", "loss", "num_tokens", "num_read", "elapsed_s"), 0.0)


def initial_adapter(architecture: Architecture, seed: int) -> Params:
    """Returns an adapter that changes nothing yet, as PEFT starts it.

    lora_a is uniform within 1 / sqrt(inputs), lora_b zero; (seed, path) decide every draw.
    """

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path)
        if name.endswith("lora_b"):
            return np.zeros(leaf.shape, np.float32)
        bound = leaf.shape[0] ** -0.5
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return generator.uniform(-bound, bound, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, architecture.abstract_adapter())
