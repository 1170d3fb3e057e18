"""Small results of every kind of step, from inputs that are made here."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions
from dlc_jax.encoders import resnet, vit
from dlc_jax.encoders.causal_model import Adapter
from dlc_jax.encoders.decoder import Architecture, DecoderConfig
from dlc_jax.encoders.language_model import model_folder
from dlc_jax.evaluation import _pairs
from dlc_jax.evaluation.likelihoods import continuation_log_likelihoods
from dlc_jax.masking.torch_order import TorchLayout
from dlc_jax.preprocess.decode import RandomCrops
from dlc_jax.preprocess.images import load_images
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.probes.path import LearningPath, learning_path
from dlc_jax.probes.text import RESPONSES_PATH
from dlc_jax.reports.results import Result, results_table, summarise
from dlc_jax.scores import SCORES
from dlc_jax.selection import INPUTS, SELECTORS, Candidates, most_similar, similarities
from dlc_jax.training.images.step import initial_head
from dlc_jax.training.lora.settings import learning_rates
from dlc_jax.training.lora.step import initial_adapter
from dlc_jax.training.optimiser import epoch_order
from dlc_jax.training.optimiser import learning_rates as image_learning_rates
from dlc_jax.types import Conventions, by_path, path_name

Values = dict[str, Any]  # by name: integers, texts and truths are exact, floats are not


class Made(NamedTuple):
    """What makes values of a kind, and how far floats may be off, relative to their size."""

    kind: str
    make: Callable[[], Values]
    tolerance: float


MADE: list[Made] = []


def of(kind: str, *, tolerance: float = 1e-4) -> Callable[[Callable[[], Values]], Any]:
    """Registers a function that computes values of this kind; a kind may have several."""

    def register(make: Callable[[], Values]) -> Callable[[], Values]:
        MADE.append(Made(kind, make, tolerance))
        return make

    return register


def some(values: Any) -> np.ndarray:
    """Returns the values, flat; of more than 32 every so many, their mean and root mean square."""
    flat = np.asarray(values).ravel()
    if flat.size <= 32 or flat.dtype == bool:
        return flat
    flat = flat.astype(np.float64)
    sums = [flat.mean(), np.sqrt(np.square(flat).mean())]
    return np.concatenate([flat[:: -(-flat.size // 30)], sums])


# Inputs. NumPy draws the weights, since jax has changed its draws between versions.


def filled(abstract: Any, *, step: float | None = None) -> Any:
    """Returns weights in place of shapes, multiples of `step` where one is given, so that many
    are equal."""
    generator = np.random.default_rng(0)

    def draw(path: tuple, leaf: Any) -> jax.Array:
        name = path_name(path).rpartition("/")[2]
        values = generator.normal(size=leaf.shape)
        if name in ("scale", "var"):
            values = 1 + 0.2 * np.tanh(values)
        elif name in ("bias", "mean"):
            values = 0.2 * values
        elif leaf.ndim >= 2:
            values = values / np.sqrt(np.prod(leaf.shape[:-1]))
            values = values if step is None else np.round(values / step) * step
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def encoder_of(build: Callable[[], nnx.Module], is_prunable: Any, **options: Any) -> dlc.Encoder:
    graph, state = nnx.split(nnx.eval_shape(build))
    found = dlc.Encoder.from_module(
        nnx.merge(graph, nnx.State(filled(nnx.to_pure_dict(state), step=1 / 32))),
        is_prunable,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        **options,
    )
    return dataclasses.replace(found, normalisation="architecture")  # which `official` overrides


@functools.cache
def small_resnet() -> dlc.Encoder:
    size = resnet.ResNetSize((1, 1), bottleneck=False)
    return encoder_of(lambda: resnet.ResNet(size, 4, rngs=nnx.Rngs(0)), resnet.is_prunable)


@functools.cache
def small_vit() -> dlc.Encoder:
    size = vit.ViTSize(width=16, depth=2, num_heads=2)
    return encoder_of(
        lambda: vit.ViT(size, 4, rngs=nnx.Rngs(0)),
        vit.is_prunable,
        image_size=32,
        module_order=vit.module_order,
        head="cls",
    )


@functools.cache
def images(num: int = 24, seed: int = 0, dtype: type = np.uint8) -> dlc.Dataset:
    """Coarse noise around a pattern for each of three classes, 40 x 44."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).normal(size=(3, 5, 4, 3))
    labels = np.arange(num) % 3
    coarse = 128 + 25 * (patterns[labels] + generator.normal(size=(num, 5, 4, 3)))
    pixels = np.clip(coarse, 0, 255).round().repeat(8, axis=1).repeat(11, axis=2)
    pixels = pixels * (np.iinfo(dtype).max // 255)
    return dlc.array_dataset(pixels.astype(dtype), labels, ids=[f"s{i}" for i in range(num)])


LLAMA = DecoderConfig(
    vocab_size=50,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=24,
    windows=(None, 5),
    max_length=64,
    norm_epsilon=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    attention_scale=8**-0.5,
    attention_cap=None,
    final_cap=None,
    activation="silu",
    sandwich=False,
    offset_norm=False,
    scale_embedding=False,
    tied=False,
)
GEMMA = dataclasses.replace(
    LLAMA,
    attention_cap=5.0,
    final_cap=3.0,
    activation="gelu_pytorch_tanh",
    sandwich=True,
    offset_norm=True,
    scale_embedding=True,
    tied=True,
)


@functools.cache
def small_decoder(config: DecoderConfig = LLAMA) -> dlc.LanguageModel:
    architecture = Architecture(config, "float32")
    params = filled(architecture.abstract_params(), step=1 / 32)
    return dlc.LanguageModel(params, architecture, Path("none"), "small")


@functools.cache
def reader() -> dlc.LanguageModel:
    """A small decoder with the tokenizer of the bundled one."""
    architecture = Architecture(
        dataclasses.replace(LLAMA, vocab_size=4096, max_length=256), "float32"
    )
    params = filled(architecture.abstract_params())
    return dlc.LanguageModel(params, architecture, model_folder("demo:tiny-llama"), "reader")


@functools.cache
def tokens(num: int = 12, seed: int = 0) -> Tokenised:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 30, num)
    return Tokenised(
        tuple(generator.integers(0, 50, n).astype(np.int32) for n in lengths),
        np.array([generator.integers(1, n - 2) for n in lengths], np.int32),
        np.zeros(num, bool),
        np.array([f"s{i}" for i in range(num)]),
    )


# Losses


def probed(found: dlc.ProbeLosses) -> Values:
    return {"losses": some(found.losses), "sparsity": found.sparsity, "steps": found.steps}


def named(cases: dict[str, Values]) -> Values:
    return {f"{case}: {name}": v for case, values in cases.items() for name, v in values.items()}


FIVE = dlc.PathSpec(step=0.2, num_probes=5)
PATHS = {
    "grid": FIVE,
    "geometric": dlc.PathSpec(schedule="geometric", step=0.3, num_probes=5),
    "random": dataclasses.replace(FIVE, masking="random"),
    "augment": dataclasses.replace(FIVE, augment=True),
    "midpoint": dlc.PathSpec(placement="midpoint", num_probes=5),
    "cut": dlc.PathSpec(step=0.1, num_probes=10, max_sparsity=0.4),
    "auto, some": dlc.PathSpec(step=0.1, num_probes="auto", agreement=0.01),
    "auto, all": dlc.PathSpec(step=0.1, num_probes="auto", agreement=1.0),
}


@of("losses", tolerance=3e-4)  # distances of few features cancel
def losses_of_images() -> Values:
    measure = functools.partial(dlc.probe, images=images(), image_size=32, seed=3)
    cases = {name: measure(small_resnet(), path=path) for name, path in PATHS.items()}
    cases["official"] = measure(small_resnet(), path=FIVE, mode="official")
    cases["vit"] = measure(small_vit(), path=FIVE)
    found = named({name: probed(probes) for name, probes in cases.items()})
    return found | {"prototypes": some(cases["grid"].prototypes)}


@of("losses")
def steps_of_paths() -> Values:
    specs = {
        "linear": dlc.PathSpec(schedule="linear"),
        "geometric": dlc.PathSpec(schedule="geometric"),
        "midpoint": dlc.PathSpec(schedule="geometric", placement="midpoint", num_probes=8),
        "auto": dlc.PathSpec(schedule="linear", step=0.03, num_probes="auto"),
        "cut": dlc.PathSpec(schedule="linear", max_sparsity=0.5),
    }
    return {f"weights zeroed: {name}": spec.counts(12_345).chosen for name, spec in specs.items()}


@of("losses")
def masks() -> Values:
    """Which weights each probe keeps, where many are equal: sums of their places."""
    found: Values = {}
    for name, encoder in (("resnet", small_resnet()), ("vit", small_vit())):
        for case in ("default", "official", "random"):
            mode = "official" if case == "official" else "default"
            spec = dataclasses.replace(FIVE, masking="random" if case == "random" else "l1")
            path = learning_path(encoder, spec.for_mode(mode), 3, Conventions.of(mode))
            found[f"kept: {name}, {case}"] = places_kept(encoder, path)
    return found


def places_kept(encoder: dlc.Encoder, path: LearningPath) -> list[int]:
    leaves, sums = by_path(encoder.params), []
    for name in sorted(path.prunable, key=list(leaves).index):
        leaf, layout = path.prunable.index(name), TorchLayout.of(name, leaves[name].shape)
        if path.importance is None:
            matters = np.abs(np.asarray(leaves[name])).view(np.int32).ravel()
        else:
            matters = np.asarray(path.importance[name]).ravel()
        places = np.arange(len(matters))
        in_torch = np.asarray(layout.positions(leaves[name])).ravel()
        for value, cutoff in zip(path.thresholds.value, path.thresholds.cutoff, strict=True):
            kept = (matters > value) | ((matters == value) & (in_torch >= cutoff[leaf]))
            sums.append(int((places[kept] + 1).sum()))
    return sums


@of("losses")
def certificate() -> Values:
    generator = np.random.default_rng(0)
    losses = generator.normal(size=(5, 40)).cumsum(axis=0).astype(np.float32)
    probes = dlc.ProbeLosses(
        losses=losses,
        sparsity=np.linspace(0, 0.8, 5, dtype=np.float32),
        labels=(np.arange(40) % 3).astype(np.int32),
        ids=np.arange(40).astype(np.str_),
        prototypes=np.zeros((3, 2), np.float32),
        class_names=("a", "b", "c"),
        steps=np.arange(0, 50, 10),
        num_steps=50,
    )
    found = dlc.certify(probes, keep_fractions=(0.3,), num_draws=50)
    intervals = [*found.spearman, *found.easiest[0.3], *found.hardest[0.3]]
    return {"certificate": intervals}


@of("suspect labels")
def suspects() -> Values:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 40).astype(np.int32)
    is_known = generator.random(40) < np.array([0.9, 0.8, 0.6, 0.1])[:, None]
    nearest = np.where(is_known, labels, generator.integers(0, 3, (4, 40))).astype(np.int32)
    probes = dlc.ProbeLosses(
        losses=generator.gamma(2, size=(4, 40)).astype(np.float32),
        sparsity=np.linspace(0, 0.9, 4, dtype=np.float32),
        labels=labels,
        ids=np.arange(40).astype(np.str_),
        prototypes=np.zeros((3, 2), np.float32),
        class_names=("a", "b", "c"),
        nearest=nearest,
    )
    found = dlc.suspect_labels(probes)
    return {"ranked": found.ranked, "suggested": found.suggested, "scores": found.scores}


@of("near duplicates")
def most_similar_samples() -> Values:
    features = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    return dict(zip(("others", "cosines"), most_similar(features), strict=True))


# Features


@of("features")
def features_of_images() -> Values:
    measure = functools.partial(dlc.features, images=images(), image_size=32)
    found = {}
    for name, encoder in (("resnet", small_resnet()), ("vit", small_vit())):
        for mode in ("default", "official"):
            found[f"{name}, {mode}"] = some(measure(encoder, mode=mode))
    found["vit, cls"] = some(measure(dataclasses.replace(small_vit(), pooling="cls")))
    return found


@of("features", tolerance=0.02)  # of a number, Pillow's next version may round a few otherwise
def crops() -> Values:
    found: Values = {"evaluation": some(load_images(images(), 32).pixels / 255)}
    for name in ("full_range", "min_max", "clip"):
        deep = dataclasses.replace(images(6, dtype=np.uint16), deep_images=name)
        found[f"16 bits, {name}"] = some(load_images(deep, 32).pixels / 255)
    return found


# Fine-tuning


def trained(result: dlc.RunResult) -> Values:
    weights = by_path(result.weights)
    chosen = [path for path in weights if path.startswith("head/")]
    chosen += [path for path in weights if path.endswith(("kernel", "mean", "var", "scale"))]
    found: Values = {path: some(weights[path]) for path in dict.fromkeys(chosen)}
    for name in ("learning_rate", "train_loss"):
        found[name] = [line[name] for line in result.history]
    return found


TRAINING = dlc.FinetuneConfig(epochs=2, batch_size=9, learning_rate=0.05, weight_decay=1e-3)


def normalised_resnet() -> dlc.Encoder:
    """The ResNet as mode `official` normalises for it: one program does for both modes."""
    return small_resnet().for_mode("official")


@of("fine-tuning", tolerance=1e-3)
def fine_tuned() -> Values:
    tune = functools.partial(
        dlc.finetune, images=images(), kept=np.arange(1, 22), image_size=32, seed=5
    )
    head = dataclasses.replace(TRAINING, linear_probe=True)
    plain = dataclasses.replace(TRAINING, augment=False)
    of_head = tune(small_resnet(), settings=head, test=images(12, seed=1))
    cases = {
        "default": tune(normalised_resnet(), settings=TRAINING),
        "official": tune(small_resnet(), settings=TRAINING, mode="official"),
        "without crops": tune(normalised_resnet(), settings=plain),
        "head": of_head,
        "head of a vit": tune(small_vit(), settings=head),
    }
    found = named({name: trained(result) for name, result in cases.items()})
    return found | {"test accuracy": [of_head.test_accuracy], "predictions": of_head.predictions}


@of("fine-tuning")
def draws_of_training() -> Values:
    found: Values = {
        f"order, epoch {epoch}": epoch_order(np.arange(24), 5, epoch) for epoch in (1, 2)
    }
    for kind in ("mean", "cls"):
        found[f"head, {kind}"] = initial_head(8, 3, kind, 5)["kernel"].ravel()
    settings = dlc.FinetuneConfig(epochs=7, learning_rate=1.0, milestones=(0.5, 0.75))
    for mode in ("default", "official"):
        conventions = Conventions.of(mode)
        case = f"rates, floored: {conventions.floors_milestones}"
        found[case] = image_learning_rates(settings, conventions)
    return found


@of("fine-tuning", tolerance=0.02)  # see `crops`
def random_crops() -> Values:
    cut = RandomCrops(images(), 32, seed=5)
    pixels = load_images(images(), 44).pixels
    return {
        f"crop {draw}": some(
            cut.cut([Image.fromarray(p) for p in pixels[:3]], np.arange(3), draw) / 255
        )
        for draw in (0, 1)
    }


@of("training record", tolerance=1e-3)
def training_record() -> Values:
    record = dlc.record_training(
        normalised_resnet(),
        images(),
        image_size=32,
        seed=5,
        settings=TRAINING,
        record=dlc.RecordConfig(num_runs=2, early_fraction=0.5),
    )
    names = ("correct", "logits", "probabilities", "early_logits", "early_squared_norms")
    return {name: some(getattr(record, name)) for name in names}


# Scores


def fixed_record() -> dlc.TrainingRecord:
    generator = np.random.default_rng(0)
    logits = 3 * generator.normal(size=(3, 20, 4))
    return dlc.TrainingRecord(
        correct=generator.random((6, 20)) < generator.random(20),
        logits=logits[0].astype(np.float32),
        early_logits=logits[1:].astype(np.float32),
        early_squared_norms=generator.gamma(5, 20, (2, 20)).astype(np.float32),
        early_epoch=2,
        batch_size=8,
        labels=(np.arange(20) % 4).astype(np.int32),
        ids=np.arange(20).astype(np.str_),
        class_names=("a", "b", "c", "d"),
        seconds=1.0,
        num_epochs=8,
    )


@of("scores")
def scores() -> Values:
    generator = np.random.default_rng(0)
    given = generator.gamma(3, 1, (3, 20)).astype(np.float32)
    names = np.arange(20).astype(np.str_)
    responses = dlc.ResponseLosses(
        given[0],
        given[1],
        np.arange(1, 21),
        names,
        given[2],
        tuple(generator.normal(-0.3, 1, num).astype(np.float32) for num in range(1, 21)),
    )
    measured = {"losses": given, "training": fixed_record(), "responses": responses}
    return {
        f"{name}, {variant}": dlc.score(measured[score.of], method=name, variant=variant)
        for name, score in SCORES.items()
        for variant in score.variants
    }


@of("second features")
def features_of_another_encoder() -> Values:
    return {"resnet": some(dlc.features(small_resnet(), images(), image_size=48))}


@of("similarities")
def cosines() -> Values:
    features = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    return {"cosines": similarities(features, features[:3] + 1)}


# Selections: NumPy alone decides them, so that they are exact.

LABELS = np.repeat([0, 1, 2, 3], [21, 14, 8, 1])


@functools.cache
def samples() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    num = len(LABELS)
    powers = np.exp(generator.normal(size=(num, 4)))
    return {
        "scores": generator.permutation(num).astype(np.float32) + 1,
        "tied": generator.integers(1, 5, num).astype(np.float32),
        "features": generator.normal(size=(num, 3)).astype(np.float32),
        "probabilities": (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32),
        "ids": np.array([f"s{i}" for i in generator.permutation(num)]),
        "similarities": generator.uniform(-1, 1, (num, 5)).astype(np.float32),
        "second_features": generator.normal(size=(num, 6)).astype(np.float32),
    }


def kept(cell: dict[str, Any], *, tied: bool = False, with_ids: bool = False) -> list[int]:
    given = samples()
    candidates = Candidates(
        given["tied" if tied else "scores"],
        LABELS,
        ids=given["ids"] if with_ids else None,
        inputs={name: given[name] for name in INPUTS},
    )
    return candidates.select(**cell).indices.tolist()


@of("selection")
def selections() -> Values:
    found: Values = {}
    for method, takes in SELECTORS.items():
        cell: dict[str, Any] = {"method": method, "keep_fraction": 0.3, "seed": 1}
        official = cell | {"mode": "official"}
        found[method] = kept(cell)
        found[f"{method}, by ids"] = kept(cell, with_ids=True)
        found[f"{method}, ties"] = kept(cell, tied=True)
        found[f"{method}, ties, by ids"] = kept(cell, tied=True, with_ids=True)
        found[f"{method}, official"] = kept(official)
        for variant in takes.variants:
            rules = dlc.Rules(variant=variant, per_class=False)
            found[f"{method}, {variant}, of all"] = kept(cell | {"rules": rules})
    for keep_fraction in (0.1, 0.6):
        for split in (0.1, 0.35, 0.8):
            for mode in ("default", "official"):
                cell = {"keep_fraction": keep_fraction, "split": split, "seed": 2, "mode": mode}
                found[f"flexrand {keep_fraction}, split {split}, {mode}"] = kept(cell)
    for name, rules in {
        "nucs": dlc.Rules(allocation="nucs"),
        "nucs, two at least": dlc.Rules(allocation="nucs", min_per_class=2),
        "two at least": dlc.Rules(min_per_class=2),
        "without near-duplicates": dlc.Rules(max_similarity=0.7),
    }.items():
        found[name] = kept({"keep_fraction": 0.15, "rules": rules})
    herding = dlc.Rules(variant="deepcore")
    found["herding, deepcore"] = kept({"method": "herding", "keep_fraction": 0.3, "rules": herding})
    return found


@of("selection")
def selections_of_many() -> Values:
    """Where a few scores are far from the others, which strata and shares of classes depend on."""
    generator = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [120, 80, 40])
    scores = np.exp(2 * generator.normal(size=240)).astype(np.float32)
    choose = functools.partial(dlc.select, scores, labels, keep_fraction=0.25, seed=1)
    return {
        "ccs, of many": choose(method="ccs").indices,
        "nucs, of many": choose(rules=dlc.Rules(allocation="nucs")).num_kept_per_class,
    }


class NearestMean:
    """Trials in place of trained heads: the class whose kept samples' mean is nearest."""

    name = "nearest mean"

    def __init__(self, features: np.ndarray, labels: np.ndarray):
        self._features, self._labels = features.astype(np.float64), labels

    def __call__(self, trials: Any, held_out: np.ndarray, /) -> np.ndarray:
        right = []
        for trial in trials:
            own = self._labels[trial.positions]
            means = [self._features[trial.positions[own == j]].mean(axis=0) for j in range(4)]
            away = np.linalg.norm(self._features[held_out][:, None] - np.stack(means), axis=-1)
            right.append(away.argmin(axis=1) == self._labels[held_out])
        return np.stack(right)


@functools.cache
def mislabelled() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores that know which labels are wrong, labels, and features."""
    generator = np.random.default_rng(0)
    truth = np.arange(120) % 4
    wrong = generator.random(120) < 0.3
    labels = np.where(wrong, (truth + generator.integers(1, 4, 120)) % 4, truth)
    features = 0.5 * generator.normal(size=(120, 6)) + 1.5 * np.eye(4, 6)[truth]
    scores = wrong + 0.1 * generator.random(120)
    return scores.astype(np.float32), labels, features.astype(np.float32)


def tuned(trials: Any, **options: Any) -> dlc.Tuning:
    scores, labels, features = mislabelled()
    return dlc.tune(
        scores,
        labels,
        features=features,
        trials=trials,
        keep_fractions=(0.2, 0.5),
        splits=(0.3, 0.8),
        num_repeats=5,
        **options,
    )


@of("selection")
def selections_of_auto() -> Values:
    scores, labels, features = mislabelled()
    tuning = tuned(NearestMean(features, labels))
    choose = functools.partial(
        dlc.select, scores, labels, keep_fraction=0.2, seed=1, tuning=tuning, features=features
    )
    return {
        "auto": choose(method="auto").indices,
        "flexrand, split of auto": choose(split="auto").indices,
    }


# Tuning


def outcome(tuning: dlc.Tuning) -> Values:
    choices = [*tuning.methods, *tuning.splits]
    return {
        "chosen": [f"{choice.method} {choice.split}" for choice in choices],
        "accuracy": [tuning.full_accuracy, *(row.accuracy for row in tuning.tried)],
        "gaps to random": [value for row in tuning.tried for value in row.to_random],
        "gaps to all": [value for row in tuning.tried for value in row.to_full],
    }


HEADS = dlc.LinearProbeConfig(epochs=4, batch_size=16, learning_rate=0.1)


@of("tuning")
def tunings() -> Values:
    _, labels, features = mislabelled()
    ids = np.array([f"s{i}" for i in range(len(labels))])
    cases = {
        "nearest mean": tuned(NearestMean(features, labels)),
        "nearest mean, by ids": tuned(NearestMean(features, labels), ids=ids, seed=1),
        "heads": tuned(HEADS),
    }
    return named({name: outcome(tuning) for name, tuning in cases.items()})


@of("tuning")
def heads() -> Values:
    _, labels, features = mislabelled()
    found: Values = {}
    settings = dataclasses.replace(HEADS, epochs=2)  # (0.5, 0.75) of which are 1 and no epoch
    for mode in ("default", "official"):
        for head in ("mean", "cls"):
            probes = dlc.linear_probes(
                features,
                labels,
                [np.arange(70), np.arange(0, 90, 2)],
                val_features=features[90:],
                val_labels=labels[90:],
                seeds=[1, 2],
                settings=settings,
                head=head,
                mode=mode,
            )
            found[f"heads, {head}, {mode}"] = some(probes.heads["kernel"])
    return found


# Instructions


@of("response losses")
def losses_of_responses() -> Values:
    measure = functools.partial(dlc.probe_responses, data=tokens(), seed=3)
    paths = {name: path for name, path in PATHS.items() if name not in ("random", "augment")}
    found = named({name: probed(measure(small_decoder(), path=p)) for name, p in paths.items()})
    random = dataclasses.replace(FIVE, masking="random", schedule="linear")
    path = learning_path(small_decoder(), random, 3, Conventions.of("default"))
    found["kept: random"] = some(places_kept(small_decoder(), path))
    found["weights zeroed: default"] = RESPONSES_PATH.for_mode("default").counts(12_345).chosen
    found["unmasked"] = dlc.response_losses(small_decoder(), tokens())
    found["unmasked, as gemma"] = dlc.response_losses(small_decoder(GEMMA), tokens())
    return found


@of("response losses")
def losses_with_and_without_prompts() -> Values:
    words = ["rain is water that falls", "red is one", "that makes five", "ask again later"]
    rows = [
        {"prompt": f"Say {n}.{end}", "response": f"{word}, " * 9 + "the end"}
        for n, (word, end) in enumerate(zip(words, ["\n\n### Response:\n", " "] * 2, strict=True))
    ]
    found = dlc.measure_responses(reader(), instructions(rows), max_length=64)
    names = ("losses", "alone", "num_tokens", "after_prefix")
    changes = {"changes": np.concatenate(found.changes)}
    return {name: getattr(found, name) for name in names} | changes


@of("features")
def features_of_responses() -> Values:
    cases = {"decoder": small_decoder(), "decoder, as gemma": small_decoder(GEMMA)}
    return {name: some(dlc.response_features(model, tokens())) for name, model in cases.items()}


@of("adapter", tolerance=1e-3)
def adapters() -> Values:
    found: Values = {}
    plain = dlc.LoraConfig(rank=2, alpha=4.0, batch_size=4, warmup_steps=1, dtype="float32")
    for optimiser, rate in (("sgd", 0.5), ("adamw", 0.02)):
        for packing in (False, True):
            result = dlc.finetune_lora(
                small_decoder(),
                tokens(),
                test=tokens(5, seed=1),
                epochs=1,
                optimiser=optimiser,
                learning_rate=rate,
                seed=5,
                settings=dataclasses.replace(plain, packing=packing),
            )
            weights = by_path(result.model.params)
            case = f"{optimiser}, {'packed' if packing else 'not packed'}"
            for matrix in ("lora_a", "lora_b"):
                leaves = [np.ravel(v) for path, v in weights.items() if path.endswith(matrix)]
                found[f"{case}: {matrix}"] = some(np.concatenate(leaves))
            line = result.history[-1]
            found[f"{case}: losses"] = [line["train_loss"], result.test_loss]
            found[f"{case}: rate"] = [line["learning_rate"]]
    return found


@of("adapter")
def draws_of_adapters() -> Values:
    architecture = small_decoder().architecture.with_adapter(Adapter(2, 4.0, ("q_proj", "up_proj")))
    start = by_path(initial_adapter(architecture, 5))
    return {
        "rates": learning_rates(9, 1.0, 3),
        **{f"start: {path}": some(value) for path, value in start.items()},
    }


@of("answers")
def answers() -> Values:
    model, mmlu = reader(), dlc.load_mmlu("demo:mmlu")
    mmlu = dataclasses.replace(mmlu, subjects=mmlu.subjects[:3])
    result = dlc.evaluate_mmlu(model, mmlu, num_shots=1, limit=2)
    prompts = [s.prompt(question, 1) for s in mmlu.subjects for question in s.questions[:2]]
    found = continuation_log_likelihoods(model, _pairs(prompts, model.tokenizer))
    return {
        "log-likelihoods": found.sums,
        "accuracy": [result.accuracy, *result.by_group.values(), *result.by_subject.values()],
        "asked": [result.num_questions, result.num_truncated, *found.num_cut.tolist()],
    }


@of("export")
def exports() -> Values:
    dataset = images()
    kept = dlc.select(np.arange(24.0), dataset.labels, keep_fraction=0.5, ids=dataset.ids)
    found: Values = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in ("ids", "jsonl", "json"):
            path = dlc.export(dataset, kept, Path(folder) / form, form=form, part="kept")
            found[form] = path.read_text().splitlines()
        path = dlc.export(dataset, kept, Path(folder) / "images", form="image_folder")
        found["image_folder"] = sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))
    return found


@of("report")
def report() -> Values:
    generator = np.random.default_rng(0)
    results = [
        Result(method, fraction, split, seed, float(generator.normal(70, 3)), 1.0)
        for method, split in (("random", None), ("flexrand", 0.5))
        for fraction in (0.1, 0.5)
        for seed in (0, 1, 2)
    ]
    return {"table": results_table(summarise(results)).splitlines()}
