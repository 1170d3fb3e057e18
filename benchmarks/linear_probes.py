"""Linear heads on 513 subsets in one program, against a Python loop of single runs.

python -m benchmarks.linear_probes [--loop=54]

Nine keep fractions, 19 splits, three seeds on the features of the bundled sample. Each loop trains
some of them one after the other, and is scaled up: `single` calls the same program with one subset,
`finetune` is dlc_jax.finetune of the head alone, with features computed once, `torch` is
torch.nn.Linear under torch.optim.SGD, with features in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

import dlc_jax as dlc
from dlc_jax.training.images import FinetuneConfig, Finetuner
from dlc_jax.training.loop import train
from dlc_jax.training.optimiser import epoch_order
from dlc_jax.tuning.linear import train_epoch
from dlc_jax.types import Conventions

_LOOP = flags.DEFINE_integer("loop", 54, "Single runs of each loop.")
_SETTINGS = dlc.LinearProbeConfig()


def main(_: list[str]) -> None:
    dataset = dlc.load_dataset("demo:caltech15/train")
    test = dlc.load_dataset("demo:caltech15/test")
    encoder = dlc.load_encoder("resnet18", "demo:resnet18")
    features = dlc.features(encoder, dataset, image_size=64)
    val = {
        "val_features": dlc.features(encoder, test, image_size=64),
        "val_labels": test.labels,
    }
    scores = np.random.default_rng(0).normal(size=len(dataset))
    cells = [
        dlc.select(scores, dataset.labels, keep_fraction=keep, split=split, seed=seed)
        for keep in np.arange(1, 10) / 10
        for split in 0.05 * np.arange(1, 20)
        for seed in range(3)
    ]
    some = [cells[i] for i in np.linspace(0, len(cells) - 1, _LOOP.value).astype(int)]

    def together() -> None:
        dlc.linear_probes(features, dataset.labels, cells, **val)

    def single() -> None:
        for cell in some:
            dlc.linear_probes(features, dataset.labels, [cell], **val)

    settings = FinetuneConfig(
        epochs=_SETTINGS.epochs,
        batch_size=_SETTINGS.batch_size,
        learning_rate=_SETTINGS.learning_rate,
        linear_probe=True,
    )
    images = dlc.Images(dataset, size=64)
    finetuner = Finetuner(encoder, images, test, settings, Conventions.of("default"))

    def finetune() -> None:
        for cell in some:
            train(finetuner, cell.indices, cell.seed)

    together()  # compiles
    compiled = train_epoch._cache_size()
    all_at_once = median(together)
    print(f"{len(cells)} heads, {_SETTINGS.epochs} epochs, programs of an epoch: {compiled}")
    print(f"together  {all_at_once:8.2f} s")
    in_torch = torch_loop(features, dataset.labels, some, **val)
    for name, run in (("single", single), ("finetune", finetune), ("torch", in_torch)):
        run()  # compiles
        seconds = median(run) * len(cells) / len(some)
        print(f"{name:<9} {seconds:8.2f} s, {seconds / all_at_once:.1f} times that")


def torch_loop(
    features: np.ndarray,
    labels: np.ndarray,
    cells: list[dlc.Selection],
    val_features: np.ndarray,
    val_labels: np.ndarray,
) -> Callable[[], None]:
    """Returns a loop over the cells in torch."""
    import torch

    inputs, targets = torch.tensor(features), torch.tensor(labels, dtype=torch.long)
    val_inputs, val_targets = torch.tensor(val_features), torch.tensor(val_labels)

    def run() -> None:
        for cell in cells:
            torch.manual_seed(cell.seed)
            head = torch.nn.Linear(features.shape[1], int(labels.max()) + 1)
            optimiser = torch.optim.SGD(
                head.parameters(),
                lr=_SETTINGS.learning_rate,
                momentum=_SETTINGS.momentum,
                weight_decay=_SETTINGS.weight_decay,
                nesterov=_SETTINGS.nesterov,
            )
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [25, 37])
            for epoch in range(1, _SETTINGS.epochs + 1):
                order = torch.tensor(epoch_order(cell.indices, cell.seed, epoch))
                for where in order.split(_SETTINGS.batch_size):
                    optimiser.zero_grad()
                    loss = torch.nn.functional.cross_entropy(head(inputs[where]), targets[where])
                    loss.backward()
                    optimiser.step()
                schedule.step()
            (head(val_inputs).argmax(1) == val_targets).float().mean().item()

    return run


def median(run: Callable[[], None], repeats: int = 3) -> float:
    """Returns the median of the seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


if __name__ == "__main__":
    app.run(main)
