"""The plan of a run that prunes instructions: what it computes, by the shapes of programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.encoders.decoder import Architecture, DecoderConfig
from dlc_jax.encoders.known_models import KNOWN_MODELS
from dlc_jax.encoders.language_model import (
    NotInDecoderError,
    longest_sequence,
    model_folder,
    read_config,
    read_config_alone,
)
from dlc_jax.files.libraries import fetching
from dlc_jax.planning.costs import Cost, Speeds, kept_by_run, num_kept, planned_stages
from dlc_jax.planning.decoder_memory import Finetuning, Scoring
from dlc_jax.planning.machine import Machine, MeshSize, resident_bytes
from dlc_jax.planning.memory import DeviceJob, Host, Memory, tree_bytes
from dlc_jax.planning.plan import Plan, Work
from dlc_jax.planning.programs import count_flops
from dlc_jax.planning.speed import block_speed
from dlc_jax.preprocess.token_batches import bucket_length
from dlc_jax.preprocess.tokens import tokenise
from dlc_jax.training.lora.step import Sums, TokenRows, add_rows
from dlc_jax.types import by_path

_MOST_READ = 256  # samples whose length is looked at
_CHARACTERS = 4  # of a token, where there is no tokenizer
# for the other scores: responses with their prompts, alone, and behind "### Response:"
_UNMASKED_PASSES = 3


class Lengths(NamedTuple):
    """Average lengths of rows in tokens, padding included.

    Attributes:
      whole: Tokens of prompt and response.
      alone: Tokens of the response.
      measured: How they were measured, in words.
    """

    whole: int
    alone: int
    measured: str

    @classmethod
    def of(cls, data: Instructions, tokenizer: Any, max_length: int) -> Lengths:
        """Looks at some samples.

        Args:
          data: Instructions.
          tokenizer: None: lengths are taken from the number of characters.
          max_length: Longest row.
        """
        num = min(len(data), _MOST_READ)
        some = data.subset(np.arange(num) * len(data) // num)
        if tokenizer is None:
            pairs = zip(some.prompts, some.responses, strict=True)
            lengths = [(len(p) + len(r), len(r)) for p, r in pairs]
            whole, alone = np.maximum(np.array(lengths) // _CHARACTERS, 2).T
            how = f"{_CHARACTERS} characters a token, since there is no tokenizer here"
        else:
            tokens = tokenise(some, tokenizer, max_length, on_corrupt="skip")
            whole, alone = np.array([len(row) for row in tokens.tokens]), tokens.num_response
            how = "tokenised"
        padded = [
            round(float(np.mean([bucket_length(int(n), max_length) for n in found])))
            for found in (whole, alone)
        ]
        return cls(padded[0], padded[1], f"{num} of {len(data)} samples, {how}")


@dataclasses.dataclass(frozen=True, eq=False)
class InstructionCosts:
    """All that a run does with instructions.

    Attributes:
      config: Checked configuration of the run.
      sizes: Sizes and switches of the model.
      mesh: Devices that are planned for.
      num_samples, num_test: Instructions.
      lengths: Average lengths of their rows.
    """

    config: Config
    sizes: DecoderConfig
    mesh: MeshSize
    num_samples: int
    num_test: int
    lengths: Lengths

    def costs(self) -> list[Cost]:
        """Returns the parts of the run in their order, those of the stages that are planned."""
        n, m = self.num_samples, int(self.config.probe.num_probes)
        whole, alone = map(self.forward_flops, (self.lengths.whole, self.lengths.alone))
        kept = list(map(self.trained, kept_by_run(self.config, self.counts)))
        name = f"LoRA, {len(kept)} runs"
        epochs = self.config.lora.epochs
        training = self._task("finetune", name, sum(kept) * epochs, self.training_flops)
        scoring = [
            self._task("score", f"losses of {m} probes", n, whole, m),
            self._task("score", "losses with and without prompts", n, whole + 2 * alone)._replace(
                passes=_UNMASKED_PASSES, num_samples=_UNMASKED_PASSES * n
            ),
        ]
        if self.config.conventions.reads_as_released:
            scoring = [self._task("score", "losses, unmasked and masked", n, whole, 2)]
        costs = [*scoring, training._replace(passes=len(kept) * epochs)]
        if self.num_test:
            name = f"tests, {self.num_test} instructions"
            costs.append(self._task("finetune", name, self.num_test, whole, len(kept)))
        return [cost for cost in costs if cost.stage in planned_stages(self.config)]

    def trained(self, num_samples: int) -> int:
        """Returns the samples that an epoch trains on; ValueError where it takes no step."""
        lora = self.config.lora
        return min(num_samples, lora.steps_per_epoch(num_samples) * lora.batch_size)

    def _task(self, stage: str, name: str, num: int, flops: int, passes: int = 1) -> Cost:
        total = passes * num * flops
        return Cost(stage, name, passes, passes * num, total, -(-total // self.mesh.num_devices))

    def forward_flops(self, length: int) -> int:
        """Returns the operations for a row among others as long, with logits of all its tokens."""
        num_rows = max(1, self.config.probe.tokens_per_batch // length)
        tokens = jax.ShapeDtypeStruct((num_rows, length), jnp.int32)

        def forward(architecture: Architecture) -> int:
            def losses(params: Any, tokens: jax.Array) -> jax.Array:
                hidden = architecture.hidden(params, tokens, tokens)
                return architecture.cross_entropies(params, hidden, tokens)

            return count_flops(losses, architecture.abstract_params(), tokens)

        whole = Architecture(self.sizes, self.config.probe.dtype)
        return self._over_depth(forward, whole) // num_rows

    @functools.cached_property
    def training_flops(self) -> int:
        """Operations for one row in a step."""
        lora = self.config.lora
        tokens = jax.ShapeDtypeStruct((lora.rows_at_once, self.lengths.whole), jnp.int32)

        def gradients(architecture: Architecture) -> int:
            def added(params: Any, adapter: Any, tokens: jax.Array, sums: Any) -> Any:
                some: Any = (tokens, tokens, tokens > 0)
                rows = TokenRows(*some)
                return add_rows(architecture, params, adapter, rows, sums)

            adapter = architecture.abstract_adapter()
            frozen = dataclasses.replace(architecture, adapter=None).abstract_params()
            return count_flops(added, frozen, adapter, tokens, jax.eval_shape(Sums.zero, adapter))

        whole = Architecture(self.sizes, lora.dtype).for_training(lora.adapter, lora.rematerialise)
        # in a loop, the first block alone has no gradient that is left out
        whole = dataclasses.replace(whole, loops=False)
        return self._over_depth(gradients, whole) // lora.rows_at_once

    def _over_depth(self, count: Callable[[Architecture], int], whole: Architecture) -> int:
        """Adds up blocks, each counted once for every attention window there is."""

        @functools.cache
        def of(*windows: int | None) -> int:
            config = dataclasses.replace(self.sizes, windows=windows)
            return count(dataclasses.replace(whole, config=config))

        windows = self.sizes.windows
        first = windows[0]
        rest = 2 * of(first) - of(first, first)  # what is not in blocks
        return rest + sum(of(window) - rest for window in windows)

    @property
    def counts(self) -> Int64[np.ndarray, " c"]:
        """Samples of each class; they are one, as far as a plan goes."""
        return np.array([self.num_samples])


_GIB = 1 << 30
REFERENCES = (Machine("1 x 80 GiB", 1, 80 * _GIB), Machine("8 x 24 GiB", 8, 24 * _GIB))
_TOKEN, _REPLAY = 4, 48  # bytes; a weight takes 45 in `removal_steps`


def plan_of_instructions(
    config: Config, sizes: DecoderConfig, mesh: MeshSize, costs: InstructionCosts | None
) -> Plan:
    """Returns the plan.

    Args:
      config: Checked configuration.
      sizes: Sizes and switches of the model.
      mesh: Devices that are planned for.
      costs: What is computed; None: there are no data, and only the model is planned for.
    Raises:
      ValueError: a target of LoRA that the model does not have.
    """
    lora = config.lora
    Architecture(sizes, lora.dtype).for_training(lora.adapter, lora.rematerialise)
    leaves = jax.tree.leaves(Architecture(sizes, config.probe.dtype).abstract_params())
    num = sum(leaf.size for leaf in leaves)
    title = f"plan: {config.encoder.weights}, {num:,} parameters"
    if costs is not None:
        lengths = costs.lengths
        title += (
            f"; {costs.num_samples:,} instructions of {lengths.whole} tokens, padding included "
            f"({lengths.measured})"
        )
    return Plan(
        title,
        mesh.num_devices,
        _jobs(config, sizes, mesh),
        None if costs is None else _work(costs),
        {some: _jobs(config, sizes, MeshSize(1, 1, some.num_devices)) for some in REFERENCES},
    )


def _jobs(config: Config, sizes: DecoderConfig, mesh: MeshSize) -> dict[str, DeviceJob]:
    """Returns what devices do; every part of the data axis has batches of its own."""
    probe = config.probe
    max_length = longest_sequence(sizes, config.encoder.weights, config.encoder.max_length)
    scoring = Scoring(
        sizes,
        probe.dtype,
        probe.masking,
        2 if config.conventions.reads_as_released else int(probe.num_probes),
        probe.tokens_per_batch,
        max_length,
        mesh.fsdp,
        mesh.probe,
        holds_copy=config.conventions.reads_as_released,
    )
    finetuning = Finetuning(sizes, config.lora, max_length, mesh.fsdp, mesh.data * mesh.probe)
    jobs: dict[str, DeviceJob] = {"score": scoring, "finetune": finetuning}
    return {stage: jobs[stage] for stage in planned_stages(config)}


def _work(costs: InstructionCosts) -> Work:
    config, n, length = costs.config, costs.num_samples, costs.lengths.whole
    lora = Architecture(costs.sizes, config.lora.dtype, config.lora.adapter)
    adapter = tree_bytes(lora.abstract_adapter())
    loaded = Memory("programs, libraries, instructions", resident_bytes())
    tokens = Memory("tokens", _TOKEN * n * length)
    held = {
        "score": Memory("losses", 4 * n * int(config.probe.num_probes)),
        "finetune": Memory("checkpoint on its way to disk", 2 * adapter),
    }
    if config.conventions.reads_as_released:
        model = Architecture(costs.sizes, config.probe.dtype)
        leaves = by_path(model.abstract_params())
        largest = max(leaf.size for path, leaf in leaves.items() if model.is_linear(path))
        held["score"] = Memory("replay of torch's order in the largest layer", _REPLAY * largest)
    otherwise = "try fewer instructions, or a host with more memory"
    hosts = {
        stage: Host.of(job, loaded, tokens, held[stage], otherwise=otherwise)
        for stage, job in _jobs(config, costs.sizes, costs.mesh).items()
    }

    def measure(_: int) -> tuple[list[str], Speeds]:
        probe = config.probe
        rate, what = block_speed(costs.sizes, probe.dtype, probe.tokens_per_batch, length)
        return [what], Speeds.of(costs.mesh, rate)

    flops = costs.training_flops
    sample = Cost("finetune", "a sample", 1, 1, flops, flops // costs.mesh.num_devices)
    fractions = config.selection.keep_fractions
    kept = {fraction: costs.trained(num_kept(costs.counts, fraction)) for fraction in fractions}
    every = costs.trained(n)
    return Work(costs.costs(), sample, every, kept, config.lora.epochs, hosts, [], measure)


def model_sizes(weights: str) -> DecoderConfig:
    """Returns sizes and switches of a model; those of `KNOWN_MODELS` need no network.

    Args:
      weights: As for `load_language_model`. Of a hub id, `config.json` alone is fetched.
    Raises:
      ValueError: see `load_language_model`.
    """
    if weights in KNOWN_MODELS and not Path(weights).is_dir():
        return KNOWN_MODELS[weights]
    if is_local(weights) or not expect.is_hub_id(weights):
        return _planned(read_config, model_folder(weights))
    with fetching(
        f"encoder.weights: {weights!r} is no local folder, and its config.json could not be",
        f"Without network the plan knows {', '.join(KNOWN_MODELS)}; of another model, give a "
        "folder that has its config.json.",
    ) as hub:
        folder = Path(hub.hf_hub_download(weights, "config.json")).parent
    return _planned(read_config_alone, folder)


def _planned(read: Callable[[Path], DecoderConfig], folder: Path) -> DecoderConfig:
    try:
        return read(folder)
    except NotInDecoderError as error:
        raise expect.InputError(
            f"plan: memory and time are known of models that the decoder here computes; {error}"
        ) from error


def is_local(weights: str) -> bool:
    """Whether a model is bundled or in a folder here."""
    return weights.startswith("demo:") or Path(weights).expanduser().is_dir()
