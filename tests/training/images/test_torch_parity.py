"""Fine-tuning against torch and timm, step by step, on the same batches and initial weights."""

import functools
import tempfile
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import narrow

import dlc_jax as dlc
from dlc_jax import encoders
from dlc_jax.encoders import ENCODERS, assign, read_checkpoint
from dlc_jax.encoders.vit import ViTSize
from dlc_jax.preprocess.images import load_images
from dlc_jax.training.images.data import Batch
from dlc_jax.training.images.step import Network, TrainState, initial_head, train_step
from dlc_jax.training.optimiser import Sgd, learning_rates
from dlc_jax.types import Conventions, by_path

CLASSES = 5
SGD = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
RATE, SIZE, EPOCHS = 1e-2, 32, 10  # the rate falls after epochs 5 and 7
MILESTONES = (0.5, 0.75)


def pretrained_resnet(timm):
    """The bundled encoder in timm. From random weights float32 and float64 torch part as well:

    a sign that flips in a ReLU moves everything after some steps (docs/log/fine-tuning.md).
    """
    from safetensors.torch import load_file

    model = timm.create_model("resnet18", num_classes=CLASSES)
    narrow(model)
    folder = resources.files("dlc_jax.datasets") / "sample"
    state = load_file(str(folder / "model.safetensors"))
    state = {key: value.float() for key, value in state.items() if not key.startswith("fc.")}
    model.load_state_dict(state, strict=False)
    return model


def small_vit(timm):
    return timm.create_model(
        "vit_small_patch16_224", num_classes=CLASSES, img_size=64, depth=2, drop_path_rate=0.0
    )


@pytest.fixture
def two_blocks(monkeypatch):
    """Lets ViT-S load with two blocks."""
    name = "vit_small_patch16_224"
    build = functools.partial(encoders._build_vit, ViTSize(384, 2, 6))
    monkeypatch.setitem(ENCODERS, name, ENCODERS[name]._replace(build=build))


def encoder_of(name: str, model, tmp_path) -> dlc.Encoder:
    """The timm model's weights through the way that users load them."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return dlc.load_encoder(name, str(tmp_path / "model.safetensors"))


def as_ours(name: str, model, like) -> dict[str, np.ndarray]:
    """The encoder's and the head's tensors of a timm model, by our paths and in our layout."""
    from safetensors.torch import save_file

    architecture = ENCODERS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.safetensors"
        save_file(model.state_dict(), file)
        tensors, _ = read_checkpoint(file)
        params = assign(tensors, like, architecture.names, architecture.ignored)
    head = model.get_classifier()
    found = {path: np.asarray(leaf) for path, leaf in by_path(params).items()}
    found["head/kernel"] = head.weight.detach().numpy().T.copy()
    found["head/bias"] = head.bias.detach().numpy().copy()
    return found


@pytest.fixture(scope="module")
def batches(sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """Five batches of the sample's first classes, the last of which is short."""
    where = np.random.default_rng(0).permutation(np.flatnonzero(sample.labels < CLASSES))[:140]
    pixels = load_images(sample.subset(where), 64).pixels
    labels = sample.labels[where]
    return [(pixels[i : i + SIZE], labels[i : i + SIZE]) for i in range(0, len(labels), SIZE)]


def train_torch(model, encoder, data) -> list[float]:
    import torch

    optimiser = torch.optim.SGD(model.parameters(), RATE, **SGD)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [EPOCHS // 2, EPOCHS * 3 // 4])
    model.train()
    losses = []
    for _ in range(EPOCHS):
        for images, labels in data:
            pixels = (images / np.float32(255) - np.float32(encoder.mean)) / np.float32(encoder.std)
            inputs = torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2).copy())
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels).long())
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        scheduler.step()
    return losses


def rates_of(epochs, rate, milestones=MILESTONES, floors=True) -> list[float]:
    settings = dlc.FinetuneConfig(epochs=epochs, learning_rate=rate, milestones=milestones)
    return learning_rates(settings, Conventions.of("default" if floors else "official"))


def train_ours(encoder, head, data, epochs=EPOCHS, **changes) -> tuple[TrainState, list[float]]:
    sgd = Sgd(**{**SGD, **changes})
    state = TrainState.start(encoder.params, encoder.statistics, head, sgd)
    network = Network.of(encoder, "float32")
    losses = []
    for rate in rates_of(epochs, RATE):
        for images, labels in data:
            batch = Batch.padded(images, labels, SIZE)
            state, metrics = train_step(network, sgd, state, *batch, jnp.float32(rate))
            losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "loss_tolerance"),
    [
        # on some CPUs a sign flips in a ReLU, also between float32 and float64 of torch
        ("resnet18", pretrained_resnet, 1e-4),
        ("vit_small_patch16_224", small_vit, 1e-5),
    ],
)
def test_fifty_steps_move_every_tensor_as_torch_does(
    timm, tmp_path, name, make, loss_tolerance, batches, two_blocks
):
    import torch

    assert len(batches[0][1]) > len(batches[-1][1])
    assert len(batches) * EPOCHS == 50
    torch.manual_seed(0)
    model = make(timm)
    encoder = encoder_of(name, model, tmp_path)
    before = as_ours(name, model, encoder.params)
    head = {"kernel": before["head/kernel"], "bias": before["head/bias"]}
    expected_losses = train_torch(model, encoder, batches)
    state, losses = train_ours(encoder, head, batches)
    expected = as_ours(name, model, encoder.params)
    weights = state.weights()
    after = by_path(weights["encoder"]) | by_path({"head": weights["head"]})
    assert after.keys() == expected.keys()
    np.testing.assert_allclose(losses[:20], expected_losses[:20], atol=loss_tolerance)
    assert expected_losses[-1] < expected_losses[0]  # there was something to learn
    for path, start in before.items():
        update = expected[path] - start
        error = np.asarray(after[path]) - expected[path]
        assert np.linalg.norm(update) > 0, path
        assert np.linalg.norm(error) <= 1e-2 * np.linalg.norm(update), path


@pytest.mark.slow
def test_what_the_comparison_would_catch(timm, tmp_path, batches):
    """Each of these slips moves some tensor by more than the tolerance."""
    encoder = encoder_of("resnet18", pretrained_resnet(timm), tmp_path)
    head = initial_head(128, CLASSES, "mean", 0)
    right, _ = train_ours(encoder, head, batches, epochs=2)

    def apart(state: TrainState) -> float:
        start = by_path(encoder.params)
        ours, other = by_path(right.weights()["encoder"]), by_path(state.weights()["encoder"])
        return max(
            float(
                np.linalg.norm(other[path] - ours[path]) / np.linalg.norm(ours[path] - start[path])
            )
            for path in start
        )

    assert apart(train_ours(encoder, head, batches, epochs=2)[0]) == 0
    for change in ({"weight_decay": 0.0}, {"nesterov": False}):
        assert apart(train_ours(encoder, head, batches, epochs=2, **change)[0]) > 2e-2, change
    without_short = batches[:-1]
    assert apart(train_ours(encoder, head, without_short, epochs=2)[0]) > 2e-2


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_optimiser_alone_is_torchs(nesterov, weight_decay, momentum):
    import torch

    if nesterov and not momentum:
        pytest.skip("torch refuses Nesterov without momentum")
    generator = np.random.default_rng(1)
    start = generator.normal(size=(7, 5)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    constants = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    theirs = torch.optim.SGD([parameter], 1e-2, **constants)
    ours, params = Sgd(**constants).at(1e-2), jnp.asarray(start)
    state, step = ours.init(params), jax.jit(ours.update)
    for _ in range(200):
        gradient = generator.normal(size=(7, 5)).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient)
        theirs.step()
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, parameter.detach().numpy(), atol=1e-6)
    assert np.abs(params - start).max() > 0.01


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 10, 20, 30, 50, 90])
@pytest.mark.parametrize("mode", ["default", "official"])
def test_learning_rates_are_multisteplrs(epochs, mode):
    import torch

    milestones = [0.5 * epochs, 0.75 * epochs]
    if mode == "default":
        milestones = [int(value) for value in milestones]
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones)
    expected = []
    for _ in range(epochs):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    found = rates_of(epochs, 1e-3, floors=Conventions.of(mode).floors_milestones)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_papers_decays():
    rates = rates_of(50, 1e-3)
    assert [rates.index(rate) for rate in sorted(set(rates), reverse=True)] == [0, 25, 37]
    official = rates_of(50, 1e-3, floors=False)
    assert [official.index(rate) for rate in sorted(set(official), reverse=True)] == [0, 25]
    assert rates_of(100, 1e-3, (0.29,)).index(1e-4) == 29
