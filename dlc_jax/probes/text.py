"""Response losses of a language model, unmasked or under every probe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32, Int
from tqdm import tqdm

from dlc_jax import distributed, expect
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.distributed import Run, Team
from dlc_jax.encoders.decoder import CausalModel
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.masking import Importance, PathSpec, Thresholds, masked, masked_by_layer
from dlc_jax.preprocess.token_batches import (
    TOKENS_PER_BATCH,
    BatchPlan,
    make_rows,
    placed,
    plan_batches,
)
from dlc_jax.preprocess.tokens import Tokenised, tokenise
from dlc_jax.probes.path import LearningPath, learning_path, measured_path
from dlc_jax.probes.shards import Arrays, Parts, ShardBatch, shards_done
from dlc_jax.types import Conventions, Params, ProbeLosses, ResponseLosses, overridden

# enough to deal out, and not too many files
_FEWEST_PARTS, _MOST_BATCHES, _MOST_PARTS = 64, 16, 4096
RESPONSES_PATH = PathSpec(num_probes=8, placement="midpoint")
_RESPONSE = "### Response:"  # what Cherry LLM scores responses behind


def response_losses(
    model: LanguageModel,
    data: Tokenised,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    run: Run = Run(),
) -> Float32[np.ndarray, " n"]:
    """Measures the mean cross-entropy of each response given its prompt.

    Args:
      model: From `load_language_model`.
      data: From `tokenise`.
      tokens_per_batch: Rows times padded length of a program call, for each part of the axis `data`
        of the model's mesh; changes speed and memory.
      run: Folder, mesh and bars; see `Run`. The mesh is of all processes, where several share the
        work, each with a model on its own part of it (`Team.of(mesh).mesh`); None: this process
        does all of it.
    Returns:
      In nats per token of the response; the prompt's tokens do not count.
    Raises:
      ValueError: processes without a folder to share; by sample, tokens that the model does not
        have.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> np.round(dlc.response_losses(model, tokens), 2)
      array([5.71, 4.96, 5.09, 4.65], dtype=float32)
    """
    expect.is_a(Run, run=run)
    work = _Work.of(model, data, tokens_per_batch, ["losses"], run)
    of_rows = functools.partial(_losses, model.architecture, model.params)
    return work.measured(lambda *rows: of_rows(*rows)[None], 1)[0]


def measure_responses(
    model: LanguageModel,
    data: Instructions,
    *,
    max_length: int | None = None,
    tokens: Tokenised | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_corrupt: str = "error",
    run: Run = Run(),
) -> ResponseLosses:
    """Measures responses with and without their prompts, for scores that are compared with DLC.

    All losses are of the same text: of a response that was cut off with its prompt before it, only
    the tokens that were left are measured without it. Alone, the first token counts where the
    tokenizer has a begin of sequence to predict it from. `after_prefix` has the prompt replaced by
    its end from `### Response:` on, or, of a prompt that ends otherwise, by `### Response:` and a
    newline. Where responses have several turns, neither is measured.

    Args:
      model: From `load_language_model`.
      data: From `load_instructions`.
      max_length, on_corrupt: As for `tokenise`; None: 2048, or the model's limit if it is lower.
      tokens: What `tokenise` gives of these data with the same arguments, where that was done.
      tokens_per_batch, run: As for `response_losses`.
    Raises:
      ValueError: see `tokenise` and `response_losses`.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> responses = dlc.measure_responses(model, data, max_length=64)
      >>> responses.num_tokens.tolist()
      [25, 24, 27, 25]
      >>> np.round(responses.losses, 2)
      array([5.71, 4.96, 5.09, 4.65], dtype=float32)
    """
    expect.is_a(Run, run=run)
    max_length = model.max_length(max_length)
    measured = functools.partial(response_losses, model, tokens_per_batch=tokens_per_batch, run=run)
    if tokens is None:
        tokens = tokenise(data, model.tokenizer, max_length, on_corrupt=on_corrupt)
    kept = data.subset(np.flatnonzero(np.isin(data.ids, tokens.ids)))
    model.check_tokens(tokens.named)
    if tokens.others is not None:
        none = {"alone": None, "after_prefix": None}
        return ResponseLosses(
            measured(tokens), num_tokens=tokens.num_response, ids=tokens.ids, **none
        )
    # texts that hold their special tokens take the begin of sequence with them
    begin = (model.tokenizer.bos_token or "") if kept.has_special_tokens else ""
    bare = kept.without_prompts(begin)
    prompts = [b + _prefix(p) for b, p in zip(bare.prompts, kept.prompts, strict=True)]
    alone = _cut_like(tokens, tokenise(bare, model.tokenizer, max_length))
    prefixed = dataclasses.replace(kept, prompts=tuple(prompts))
    longest = max_length + max(map(len, prompts))  # a token has a character or more
    after_prefix = _cut_like(tokens, tokenise(prefixed, model.tokenizer, longest))
    # one after the other, so that they share programs
    losses = measured(Tokenised.joined([tokens, alone, after_prefix])).reshape(3, -1)
    return ResponseLosses(
        losses=losses[0],
        alone=losses[1],
        num_tokens=tokens.num_response,
        ids=tokens.ids,
        after_prefix=losses[2],
    )


def _prefix(prompt: str) -> str:
    if prompt.rstrip().endswith(_RESPONSE):
        return prompt[prompt.rindex(_RESPONSE) :]
    return f"{_RESPONSE}\n"


def _cut_like(tokens: Tokenised, other: Tokenised) -> Tokenised:
    """Returns the responses behind other prompts, cut off where `tokens` are."""
    left = other.num_prompt + tokens.num_response
    whole = [len(row) for row in other.tokens]
    # at least two, since the first token of all has no loss
    return other.cut(np.where(tokens.truncated, np.maximum(left, 2), whole))


def probe_responses(
    model: LanguageModel,
    data: Tokenised,
    *,
    schedule: str | None = None,
    step: float | None = None,
    num_probes: int | str | None = None,
    masking: str | None = None,
    seed: int = 0,
    path: PathSpec | None = None,
    mode: str = "default",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    run: Run = Run(),
) -> ProbeLosses:
    """Measures the response losses of masked copies of the model.

    Of weights that are equal at a threshold, the first are zeroed. torch's global pruning zeroes as
    many but others: with half-precision checkpoints losses differ from torch's by 3e-3 to 2e-2.

    Args:
      model, data: As for `response_losses`.
      schedule, step, num_probes, masking: Instead of those in `path`.
      seed: Seed of random masking.
      path: Which masked copies; see `PathSpec`. One that is given stands for all of the default,
        `PathSpec(num_probes=8, placement="midpoint")`. The schedule is `linear` unless named.
      mode: `default`, or `official`, whose path cannot be chosen: three probes as in the released
        code, of sparsity 0, 0.2 and 0.2 again, the smallest weights of every linear layer apart,
        the head too, ties as in torch on a CPU. An embedding that is the head is masked as both.
      tokens_per_batch, run: As for `response_losses`.
    Returns:
      Losses [m, n] in nats, higher is harder. All samples are one class, without a prototype.
    Raises:
      ValueError: an unknown name, a value out of range, tokens that the model does not have, by
        sample, or losses that are not finite.
    Source: Jiang et al. 2025, section 3.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> probes = dlc.probe_responses(model, tokens, num_probes=2)
      >>> first, last = probes.losses.mean(axis=1)  # the last masks more
      >>> probes.losses.shape, bool(first < last)
      ((2, 4), True)
    """
    expect.is_a(Run, run=run)
    asked = {"schedule": schedule, "step": step, "num_probes": num_probes, "masking": masking}
    if Conventions.of(mode, "instructions").reads_as_released:
        for name, value in (asked | {"path": path}).items():
            if value is not None:
                raise expect.InputError(
                    f"{name}: mode {mode!r} has one path only; expected None, got {value!r}."
                )
        return _probed_as_released(model, data, tokens_per_batch, run)
    path = RESPONSES_PATH if path is None else path
    expect.is_a(PathSpec, path=path)
    if path.augment:
        raise expect.InputError("probe.augment: instructions have no crops; expected False.")
    path = overridden(path, **asked).for_mode("default")
    expect.seed(seed)
    model.check_tokens(data.named)  # before the path, which takes a pass over the weights
    probes = learning_path(model, path, seed, Conventions.of("default"))
    decisive = [path.schedule, path.step, path.num_probes, path.placement, path.max_sparsity]
    work = _Work.of(model, data, tokens_per_batch, [*decisive, path.masking, seed], run)

    def losses_of(some: LearningPath, suffix: str) -> Float32[np.ndarray, "k n"]:
        thresholds = distributed.on_every_device(model.params, some.thresholds)
        masks = (some.prunable, model.params, some.importance, thresholds)
        of_rows = functools.partial(_probe_losses, model.architecture, *masks)
        return work.measured(of_rows, len(some), suffix)

    return measured_path(path, probes, losses_of, **_as_one_class(data))


def _as_one_class(data: Tokenised) -> dict[str, Any]:
    """Returns what `ProbeLosses` has of the samples."""
    return {
        "labels": np.zeros(len(data), np.int32),
        "ids": data.ids,
        "prototypes": np.zeros((1, 0), np.float32),
        "class_names": ("all",),
        "skipped": data.skipped,
    }


_RELEASED_SHARE = 0.2  # that each step of the released code zeroes


def _probed_as_released(
    model: LanguageModel, data: Tokenised, tokens_per_batch: int, run: Run
) -> ProbeLosses:
    work = _Work.of(model, data, tokens_per_batch, ["as released"], run)

    def losses_of(params: Params, suffix: str) -> Float32[np.ndarray, "1 n"]:
        of_rows = functools.partial(_losses, model.architecture, params)
        return work.measured(lambda *rows: of_rows(*rows)[None], 1, suffix)

    first = losses_of(model.params, "-0")
    masked, sparsity = masked_by_layer(model.params, model.architecture.is_linear, _RELEASED_SHARE)
    second = losses_of(masked, "-1")
    # the second step finds the zeros of the first, and zeroes the same weights
    losses = np.concatenate([first, second, second])
    expect.losses_are_finite(losses, data.ids)
    sparsities = np.array([0, sparsity, sparsity], np.float32)
    return ProbeLosses(losses, sparsities, steps=np.arange(3), num_steps=3, **_as_one_class(data))


class _Work(NamedTuple):
    """Batches dealt out among processes, in parts that are kept as they are finished.

    Attributes:
      model, data: Language model and tokenised instructions.
      shards: All batches, neighbouring ones together.
      at_once: How many batches a program call takes side by side.
      parts: Where the losses of each shard are kept.
      team: Who does which part.
      progress: Whether to show a bar.
    """

    model: LanguageModel
    data: Tokenised
    shards: list[list[BatchPlan]]
    at_once: int
    parts: Parts
    team: Team
    progress: bool

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        data: Tokenised,
        tokens_per_batch: int,
        decisive: list[Any],
        run: Run,
    ) -> _Work:
        expect.at_least("tokens_per_batch", tokens_per_batch, 1)
        model.check_tokens(data.named)
        plans = plan_batches(data, tokens_per_batch)
        num = len(plans)
        size = max(min(-(-num // _FEWEST_PARTS), _MOST_BATCHES), -(-num // _MOST_PARTS))
        shards = [plans[start : start + size] for start in range(0, num, size)]
        mesh = distributed.mesh_of(model.params)
        team = Team.alone(mesh) if run.mesh is None else Team.of(run.mesh)

        def inputs() -> list[Any]:
            return [model.fingerprint, data.fingerprint, tokens_per_batch, *decisive]

        parts = Parts.of("response losses", run, team, inputs)
        at_once = 1 if mesh is None else mesh.shape[distributed.DATA]
        return cls(model, data, shards, at_once, parts, team, run.progress)

    def measured(
        self, of_rows: Callable[..., Any], num_probes: int, suffix: str = ""
    ) -> Float32[np.ndarray, "m n"]:
        """Returns the losses of all samples; parts are kept under names with this suffix."""
        names = [f"batches{suffix}-{number:06}" for number in range(len(self.shards))]
        mine = range(self.team.number, len(names), self.team.num_teams)  # the long ones come last

        def started(group: list[ShardBatch]) -> Array:
            """Starts on the losses of the tokens of a group: [m, k b, t - 1]."""
            params = self.model.params
            num_rows = group[0].items.num_rows * self.at_once
            num_rows = distributed.whole_rows(params, num_rows) // self.at_once
            batches = [
                make_rows(self.data, batch.items.rows, num_rows, batch.items.length)
                for batch in group
            ]
            batches += batches[:1] * (self.at_once - len(batches))
            rows = [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
            return of_rows(*distributed.over_devices(params, rows))

        def values_of(of_token: np.ndarray, place: int, _: int) -> np.ndarray:
            num_rows = of_token.shape[1] // self.at_once
            return of_token[:, place * num_rows : (place + 1) * num_rows]

        def losses_of(missing: list[int]) -> Iterator[Arrays]:
            total, left = (len(self._positions(numbers)) for numbers in (mine, missing))
            bar = tqdm(
                total=total,
                initial=total - left,
                desc="losses",
                unit="row",
                disable=distributed.hides_bar(self.progress),
            )
            # none ahead: two calls would take twice the memory
            groups = self._groups(missing)
            shards = shards_done(missing, groups, started, values_of, bar, ahead=0)
            for number, batches in zip(missing, shards, strict=True):
                pairs = zip(self.shards[number], batches, strict=True)
                found = [self._means(plan, batch.items) for plan, batch in pairs]
                yield {"losses": np.concatenate(found, axis=1)}

        losses = np.empty((num_probes, len(self.data)), np.float32)
        for number, found in enumerate(self.parts.complete(names, mine, losses_of)):
            losses[:, self._positions([number])] = found["losses"]
        return losses

    def _means(
        self, plan: BatchPlan, of_token: Float32[np.ndarray, "m b s"]
    ) -> Float32[np.ndarray, "m r"]:
        """Returns the mean over the tokens of each response that have one before them."""
        found = []
        for row, _, tokens, position in placed(self.data, plan.rows):
            counts = self.data.counts(position)[1:]
            of_response = of_token[:, row, tokens.start : tokens.stop - 1][:, counts]
            with np.errstate(invalid="ignore"):  # none: no number
                found.append(of_response.sum(axis=1) / np.float32(counts.sum()))
        return np.stack(found, axis=1)

    def _positions(self, numbers: Sequence[int]) -> list[int]:
        """Returns the positions of the samples of some shards."""
        return [i for number in numbers for plan in self.shards[number] for i in plan.positions]

    def _groups(self, numbers: list[int]) -> Iterator[list[ShardBatch]]:
        """Yields batches of one shape and shard that go side by side."""
        for number in numbers:
            for _, some in groupby(self.shards[number], lambda plan: (plan.num_rows, plan.length)):
                batches = [ShardBatch(number, np.array(plan.positions), plan) for plan in some]
                for start in range(0, len(batches), self.at_once):
                    yield batches[start : start + self.at_once]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probe_losses(
    architecture: CausalModel,
    prunable: tuple[str, ...],
    params: Params,
    importance: Importance,
    thresholds: Thresholds,
    *rows: Int[Array, "b t"],
) -> Float32[Array, "m b s"]:
    def one_probe(threshold: Thresholds) -> Float32[Array, "b s"]:
        # as in `kernel`: the importance of all weights would be four bytes each
        frozen, threshold = jax.lax.optimization_barrier((params, threshold))
        copy = masked(frozen, prunable, importance, threshold)
        return _token_losses(architecture, copy, *rows)

    return jax.lax.map(one_probe, thresholds)


def _token_losses(
    architecture: CausalModel,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
) -> Float32[Array, "b s"]:
    """Returns the cross-entropy of every token but the first of a row."""
    hidden = architecture.hidden(params, tokens, segments)
    return architecture.cross_entropies(params, hidden[:, :-1], tokens[:, 1:])


_losses = jax.jit(_token_losses, static_argnums=0)
