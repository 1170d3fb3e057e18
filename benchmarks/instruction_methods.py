"""Which method keeps the best instructions? Loss of held-out responses after LoRA.

python -m benchmarks.instruction_methods --workdir=runs/instruction_methods

Measures the bundled rows with the bundled model, keeps a quarter by every method, with all rows and
without near-duplicates, fine-tunes on each with three seeds and measures every held-out response.
Prints a table: loss in nats, as the mean over responses and as that over tokens, for each the gap
to random in percent of what training on all rows gains, with a 95 % interval by bootstrap over
seeds and rows together; tokens that were trained on; and what DLC adds to perplexity and length. An
hour on two cores; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

import dlc_jax as dlc
from dlc_jax.files.whole_files import atomic
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.reports import what_dlc_adds
from dlc_jax.reports.table import markdown
from dlc_jax.scores import column_name
from dlc_jax.workspace.artefacts import json_hash

_SEEDS = (0, 1, 2)
_LEFT_OUT = 0.2  # of all rows, as near-duplicates: the limit takes about as many
_LORA = dlc.LoraConfig(
    optimiser="adamw", learning_rate=1e-3, warmup_steps=3, batch_size=8, epochs=2, packing=True
)
_DRAWS = 10_000


class Way(NamedTuple):
    """A method, the score it uses, and whether near-duplicates are left out first."""

    method: str
    score: str = "dlc"
    variant: str = "published"
    is_deduplicated: bool = False

    @property
    def name(self) -> str:
        if self.method in ("hardest", "flexrand"):
            return f"{self.method} by {column_name(self.score, self.variant)}"
        return self.method


WAYS = (
    Way("random"),
    Way("longest", "length"),
    Way("hardest", "perplexity"),
    Way("hardest", "ifd"),
    Way("hardest", "ifd", "t_shirt"),
    Way("hardest"),
    Way("flexrand"),
    Way("k_center_greedy"),
)


class Setting(NamedTuple):
    """What all runs share."""

    workdir: Path
    model: dlc.LanguageModel
    train: Tokenised
    test: Tokenised

    def losses_after(
        self, kept: np.ndarray | None, seed: int, name: str
    ) -> Float32[np.ndarray, " t"]:
        """Returns the loss of every held-out response after LoRA on what is kept."""
        decisive = [self.model.fingerprint, self.train.fingerprint, self.test.fingerprint]
        decisive += [repr(_LORA), None if kept is None else kept.tolist(), seed]
        file = self.workdir / f"{name}-{seed}-{json_hash(decisive)[:12]}.npy"
        if not file.exists():
            result = dlc.finetune_lora(self.model, self.train, kept, seed=seed, settings=_LORA)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(file) as whole:
                np.save(whole, dlc.response_losses(result.model, self.test))
            print(f"{name}, seed {seed}: {np.load(file).mean():.4f}", flush=True)
        return np.load(file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", type=Path, required=True, help="where finished runs are, or go"
    )
    parser.add_argument("--weights", default="demo:tiny-llama", help="the model")
    parser.add_argument("--train", default="demo:dolly/train", help="rows to select from")
    parser.add_argument("--test", default="demo:dolly/test", help="rows whose loss is measured")
    parser.add_argument("--keep", type=float, default=0.25, help="fraction kept")
    parser.add_argument("--max_length", type=int, default=256, help="longest sequence, in tokens")
    parser.add_argument("--rows", type=int, help="only so many rows of each; for a trial")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    model = dlc.load_language_model(asked.weights, dtype="float32")
    read = functools.partial(dlc.tokenise, max_length=asked.max_length, on_corrupt="skip")
    sources = [dlc.load_instructions(source) for source in (asked.train, asked.test)]
    if asked.rows:
        sources = [data.subset(np.arange(min(asked.rows, len(data)))) for data in sources]
    train, test = (read(data, model.tokenizer) for data in sources)
    setting = Setting(asked.workdir, model, train, test)
    fits = np.flatnonzero(np.isin(sources[0].ids, train.ids))
    responses = dlc.measure_responses(
        model,
        sources[0].subset(fits),
        max_length=asked.max_length,
        tokens=train,
        with_features=True,
    )
    probes = dlc.probe_responses(model, train)
    features = responses.features
    assert features is not None
    limit = limit_for(features)
    base, full = dlc.response_losses(model, test), []

    def means(losses: np.ndarray) -> str:
        of_token = np.average(losses, weights=test.num_response)
        return f"{losses.mean():.4f} per response, {of_token:.4f} per token"

    for seed in _SEEDS:
        full.append(setting.losses_after(None, seed, "all"))
    found, tokens = {}, {}
    for way in [way._replace(is_deduplicated=x) for way in WAYS for x in (False, True)]:
        own = probes if way.score == "dlc" else responses
        scores = dlc.score(own, method=way.score, variant=way.variant)
        rules = dlc.Rules(max_similarity=limit if way.is_deduplicated else None)
        runs, counts = [], []
        for seed in _SEEDS:
            kept = dlc.select(
                scores,
                np.zeros(len(train), int),
                method=way.method,
                keep_fraction=asked.keep,
                seed=seed,
                ids=train.ids,
                features=features,
                rules=rules,
            ).indices
            name = f"{way.name}{', distinct' if way.is_deduplicated else ''}".replace(" ", "_")
            runs.append(setting.losses_after(kept, seed, name))
            counts.append(int(train.num_response[kept].sum()))
        found[way], tokens[way] = np.stack(runs), round(float(np.mean(counts)))
    print(
        f"\n{len(train)} rows, {len(kept)} kept of them; {len(test)} held out. A cosine above "
        f"{limit:.4f} counts as near-duplicate. Loss before training {means(base)}, after training "
        f"on all rows {means(np.mean(full, axis=0))}.\n\n"
        f"{table(found, base, np.stack(full), test.num_response, tokens)}\n"
    )
    columns = {name: dlc.score(responses, method=name) for name in ("perplexity", "length")}
    print(what_dlc_adds(columns | {"dlc": dlc.score(probes)}) + ".")


def limit_for(features: np.ndarray) -> float:
    """Returns the cosine above which a fifth of all rows has a near-duplicate before it."""
    cosines = np.triu(dlc.similarities(features, features), k=1).max(axis=0)
    return float(np.quantile(cosines, 1 - _LEFT_OUT))


def table(
    found: dict[Way, np.ndarray],
    base: np.ndarray,
    full: np.ndarray,
    lengths: np.ndarray,
    tokens: dict[Way, int],
) -> str:
    """Returns a line per method: losses and gaps to random, with and without near-duplicates.

    Args:
      found: Loss of every held-out response after training on what each way keeps, [seeds, n].
      base, full: The same before training [n], and after training on all rows [seeds, n].
      lengths: [n] tokens of the held-out responses.
      tokens: How many each way trained on.
    """
    reference = found[WAYS[0]]
    header = ["method", "near-duplicates"]
    for unit in ("response", "token"):
        header += [f"per {unit}", "gap, %", "95 % interval"]
    rows = []
    for way, losses in found.items():
        row = [way.name, "left out" if way.is_deduplicated else "kept"]
        for weights in (np.ones(len(base)), lengths):
            gained = np.average(base - full.mean(axis=0), weights=weights) / 100
            loss, start = (
                np.average(some.mean(axis=0), weights=weights) for some in (losses, reference)
            )
            low, high = (
                np.quantile(list(_gaps(reference, losses, weights)), [0.025, 0.975]) / gained
            )
            gap = [f"{(start - loss) / gained:+.1f}", f"{low:+.1f} to {high:+.1f}"]
            row += [f"{loss:.4f}", *(["-", "-"] if losses is reference else gap)]
        rows.append([*row, f"{tokens[way]:,}"])
    return markdown([*header, "tokens"], rows)


def _gaps(reference: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> Iterator[float]:
    """Yields the gap of resampled seeds, of either apart, and rows, the same of both."""
    generator = np.random.default_rng(0)
    num_seeds, num_rows = losses.shape
    for _ in range(_DRAWS):
        rows = generator.integers(0, num_rows, num_rows)
        seeds = generator.integers(0, num_seeds, (2, num_seeds))
        gaps = reference[seeds[0]][:, rows].mean(axis=0) - losses[seeds[1]][:, rows].mean(axis=0)
        yield np.average(gaps, weights=weights[rows])


if __name__ == "__main__":
    main()
