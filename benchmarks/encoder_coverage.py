"""Which networks can be converted: all kinds of timm's, and vision models of transformers.

python -m benchmarks.encoder_coverage [--rows=runs/encoder_coverage.jsonl] [--only=NAME,...]
    [--num=N] [--limit_s=900]

Of every module of timm that registers a model, the architecture with the fewest parameters; of
transformers, small networks of some families. Each has random weights, seeded; what is constant
when a network is new (norms, layer scale, running statistics) is moved, so that it matters.
Compared with torch, all in float32 on random images:

features  what `Encoder.apply` and `apply_head` give, relative 2-norm of the difference; at most
          1e-5
probe     the same with 30 % and 70 % of the weights zeroed that the encoder's probes zero, in torch
          by `prune.global_unstructured`, the same of equally small weights; at most 1e-5
step      one step of SGD in training mode without dropout: the update of the tensor that is
          furthest off, running statistics included, relative to its norm in torch; at most 1e-3,
          or four times what torch's own float32 is off its float64; where it is over that, a third
          number, ours in float64 against torch's, decides: at most 1e-6

The table shows the larger of the two probes, and beside the step's distance torch's own. Networks
that take any size get images of 128 px, others of their own. Each is a process of its own
and one line of --rows; those that are there already are not run again. Ends with a table in
Markdown. Needs the test extra. Three hours on two cores, the architectures alone seven minutes.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app

from benchmarks import coverage, peers

SPARSITIES = (0.3, 0.7)
FEATURES_TOLERANCE, STEP_TOLERANCE, TIMES_TORCHS, DOUBLE_TOLERANCE = 1e-5, 1e-3, 4, 1e-6
NUM_CLASSES, SMALL = 10, 128
# Large, so that an update is not lost in the rounding of the weight
LEARNING_RATE = 100.0

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
_VIT = {**_SIZES, "intermediate_size": 64, "patch_size": 8}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
# Class of transformers and its settings, by family
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("BeitModel", {**_VIT, "use_relative_position_bias": True, "out_indices": [1]}),
    "clip": ("CLIPVisionModel", _VIT),
    "convnext": ("ConvNextModel", {**_STAGES, "image_size": 64}),
    "convnextv2": ("ConvNextV2Model", {**_STAGES, "image_size": 64}),
    "deit": ("DeiTModel", _VIT),
    "dinov2": ("Dinov2Model", {**_SIZES, "patch_size": 8}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {**_SIZES, "patch_size": 8}),
    # its positions are drawn while it trains
    "dinov3_vit": ("DINOv3ViTModel", {**_VIT, "pos_embed_rescale": None}),
    "regnet": ("RegNetModel", {**_STAGES, "embedding_size": 8, "groups_width": 8}),
    "resnet": ("ResNetModel", {**_STAGES, "embedding_size": 8}),
    "siglip": ("SiglipVisionModel", _VIT),
    "swin": ("SwinModel", _WINDOWS),
    "swinv2": ("Swinv2Model", _WINDOWS),
    "vit": ("ViTModel", _VIT),
}


class Original(NamedTuple):
    """A network of torch, stored in a folder.

    Attributes:
      module: The network.
      folder: Its weights and `config.json`.
      encoder: What `dlc.load_encoder` takes for it.
      image_size: Pixels.
      tokens: Module and images -> tokens [b, t, d] or anything else.
      head: Module and images -> what a classifier reads, [b, d].
    """

    module: Any
    folder: Path
    encoder: tuple[str, ...]
    image_size: int
    tokens: Callable[[Any, Any], Any]
    head: Callable[[Any, Any], Any]


def main(_: list[str]) -> None:
    coverage.drive("encoder_coverage", names, examine, line, table)


def names(path: Path) -> list[str]:
    """Returns what is examined."""
    smallest = [f"timm:{name}" for _, name, _ in smallest_architectures(path)]
    return [*smallest, *(f"hf:{family}" for family in TRANSFORMERS)]


def smallest_architectures(path: Path) -> list[tuple[str, str, int]]:
    """Returns module, architecture and number of parameters, smallest first; looks once."""
    import torch

    timm = peers.import_timm()
    stored = [row for row in coverage.read(path) if row.get("timm") == timm.__version__]
    if not stored:
        found = []
        for module in timm.list_modules():
            sizes = {}
            for name in timm.list_models(module=module, include_tags=False):
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sizes[name] = coverage.num_params(timm.create_model(name))
            name = min(sizes, key=lambda name: (sizes[name], name))
            found.append((sizes[name], module, name))
        smallest = [(module, name, size) for size, module, name in sorted(found)]
        stored = [{"timm": timm.__version__, "architectures": smallest}]
        coverage.append(path, stored[0])
    return stored[0]["architectures"]


def examine(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields what is found of one network, part by part."""
    door, _, own_name = name.partition(":")
    module = "timm" if door == "timm" else "transformers"
    timm = peers.import_timm()
    if door == "timm" and timm.is_model(own_name):
        module = timm.models.model_entrypoint(own_name).__module__.rpartition(".")[2]
    yield {"module": module}
    original = of_timm if door == "timm" else of_transformers
    yield from compared(original(own_name, folder))


def of_timm(name: str, folder: Path) -> Original:
    """Stores a network of timm with random weights."""
    import torch
    from safetensors.torch import save_file

    timm = peers.import_timm()
    torch.manual_seed(0)
    module = with_all_moved(timm.create_model(name))
    config = module.pretrained_cfg
    state = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    stored = {key: config[key] for key in ("input_size", "mean", "std")}
    written = {"architecture": name, "pretrained_cfg": stored}
    (folder / "config.json").write_text(json.dumps(written))

    def tokens(module: Any, images: Any) -> Any:
        return module.forward_features(images)

    def head(module: Any, images: Any) -> Any:
        return module.forward_head(module.forward_features(images), pre_logits=True)

    size = config["input_size"][-1]
    if not config.get("fixed_input_size") and size > SMALL:
        try:
            with torch.no_grad():
                head(module, torch.zeros(1, 3, SMALL, SMALL))
            size = SMALL
        except Exception:  # it takes no other than its own
            pass
    return Original(module, folder, (f"timm:{name}", str(folder)), size, tokens, head)


def of_transformers(family: str, folder: Path) -> Original:
    """Stores a small network of transformers with random weights."""
    import torch

    peers.import_timm()  # for torchvision
    import transformers

    torch.manual_seed(0)
    class_name, settings = TRANSFORMERS[family]
    kind = getattr(transformers, class_name)
    module = with_all_moved(kind(kind.config_class(**settings)).eval())
    module.save_pretrained(folder)

    def tokens(module: Any, images: Any) -> Any:
        return module(pixel_values=images).last_hidden_state

    def head(module: Any, images: Any) -> Any:
        return module(pixel_values=images).pooler_output.flatten(1)

    size = settings.get("image_size", SMALL)
    return Original(module, folder, (f"hf:{folder}", ""), size, tokens, head)


def with_all_moved(module: Any) -> Any:
    """Moves what is constant, in place, and returns the network in evaluation mode.

    New norms, layer scales and running statistics leave values as they are, or hide whole blocks.
    """
    import torch

    def uniform(like: Any, low: float, high: float) -> Any:
        return torch.empty_like(like).uniform_(low, high)

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter += uniform(parameter, 0.05, 0.25)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer += uniform(buffer, -0.1, 0.1)
            elif name.endswith("running_var"):
                buffer *= uniform(buffer, 0.5, 1.5)
    return module.eval()


def compared(original: Original) -> Iterator[dict[str, Any]]:
    """Yields what is found, part by part."""
    import jax
    import torch

    import dlc_jax as dlc
    from dlc_jax import masking
    from dlc_jax.encoders.encoder import normalise, precision_of

    size = original.image_size
    yield {"num_params": coverage.num_params(original.module), "image_size": size}
    encoder = dlc.load_encoder(*original.encoder)
    shape = (4 if size <= 256 else 2, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    # compiled, as a step does it: XLA multiplies by 1 / std then
    prepare = jax.jit(normalise, static_argnums=(1, 2))
    normalised = np.array(prepare(images, encoder.mean, encoder.std))
    inputs = torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())

    @jax.jit
    def ours(params: Any, images: Any) -> dict[str, Any]:
        with precision_of("float32"):
            found = {"apply": encoder.apply(params, images)}
            if encoder.apply_head not in (None, encoder.apply):
                found["head"] = encoder.apply_head(params, images)
        return found

    def of_torch(module: Any, inputs: Any) -> dict[str, Any]:
        with torch.no_grad():
            head, tokens = (run(module, inputs) for run in (original.head, original.tokens))
        has_tokens = isinstance(tokens, torch.Tensor) and tokens.ndim == 3
        return {"apply": (tokens if has_tokens else head).numpy(), "head": head.numpy()}

    def difference(params: Any, module: Any) -> float:
        theirs = of_torch(module, inputs)
        found = ours(params, normalised)
        return max(coverage.distance(value, theirs[key]) for key, value in found.items())

    features = difference(encoder.params, original.module)
    yield {"features": features}
    if features > FEATURES_TOLERANCE:  # perhaps the network magnifies what is rounded
        exact = of_torch(copy.deepcopy(original.module).double(), inputs.double())
        found = of_torch(original.module, inputs)
        own = max(coverage.distance(value, exact[key]) for key, value in found.items())
        with jax.enable_x64(True):
            double = ours(encoder.params, normalised.astype(np.float64))
        off = max(coverage.distance(value, exact[key]) for key, value in double.items())
        reason = f"features: torch's own float32 is {own:.1e} off its float64"
        yield {"reason": f"{reason}; ours in float64 {off:.1e}"}
    prunable = masking.prunable_paths(encoder.params, encoder.is_prunable, encoder.module_order)
    num_weights = sum(encoder.params[path].size for path in prunable)
    mask = jax.jit(masking.masked, static_argnums=1)
    probes, num_other_ties = [], 0
    for sparsity in SPARSITIES:
        counts = np.array([0, round(sparsity * num_weights)])
        masks = []
        # of equally small weights torch zeroes others than the first
        for importance in (masking.removal_steps(encoder.params, prunable, counts), None):
            at = masking.exact_thresholds(encoder.params, prunable, importance, counts)
            last = masking.Thresholds(at.value[-1], at.cutoff[-1])
            masks.append(mask(encoder.params, prunable, importance, last))
        as_torch, by_position = masks
        probes.append(difference(as_torch, coverage.pruned(original.module, prunable, sparsity)))
        num_other_ties += sum(
            np.count_nonzero((as_torch[path] == 0) & (by_position[path] != 0)) for path in prunable
        )
    share = num_weights / coverage.num_params(original.module)
    yield {
        "probe": probes,
        "other_ties": num_other_ties,
        "num_prunable": len(prunable),
        "share_prunable": round(share, 3),
    }
    yield {"step": step_differences(original, encoder, images, inputs)}


def step_differences(
    original: Original, encoder: Any, images: np.ndarray, inputs: Any
) -> list[float | None]:
    """Returns how far a step is off torch's, and how far torch's own is off its float64.

    None instead of that if torch has none; a third, ours in float64 against torch's, where the
    first is over its limit.
    """
    import jax
    import torch

    from dlc_jax.training.images.step import initial_head

    labels = np.arange(len(images), dtype=np.int32) % NUM_CLASSES
    with torch.no_grad():
        num_features = original.head(original.module, inputs[:1]).shape[1]
    head = initial_head(num_features, NUM_CLASSES, "mean", 0)
    ours = our_step(encoder, head, images, labels, "float32")
    theirs = torch_step(original, head, inputs, labels, torch.float32)
    found = [furthest(ours, theirs, encoder.statistics)]
    try:
        exact = torch_step(original, head, inputs, labels, torch.float64)
    except RuntimeError:  # it makes float32 itself
        return [*found, None]
    found.append(furthest(theirs, exact, encoder.statistics))
    if not step_holds(found):  # perhaps an activation has another sign, by rounding
        with jax.enable_x64(True):
            double = our_step(encoder, head, images, labels, "float64")
        found.append(furthest(double, exact, encoder.statistics))
    return found


def our_step(
    encoder: Any, head: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray, dtype: str
) -> dict[str, np.ndarray]:
    """Returns how our step moves parameters, running statistics and the head, by name."""
    import jax
    import jax.numpy as jnp

    from dlc_jax.training.images.data import Batch
    from dlc_jax.training.images.step import Network, Sgd, TrainState, train_step

    sgd = Sgd(0.9, 1e-5, True)

    @jax.jit  # as one program: many small ones take longer to compile
    def start(params: Any) -> Any:
        state = TrainState.start(params, encoder.statistics, head, sgd)
        is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, state)

    state = start(encoder.params)
    batch = jax.device_put(Batch.padded(images, labels, len(labels)))
    network = Network.of(encoder, dtype)
    after, _ = train_step(network, sgd, state, *batch, jnp.asarray(LEARNING_RATE, dtype))
    new, old = jax.device_get((after.weights(), encoder.params))
    moved = {name: value - old[name] for name, value in new["encoder"].items()}
    return {**moved, "head": (new["head"]["kernel"] - head["kernel"]).T}


def torch_step(
    original: Original, head: dict[str, np.ndarray], inputs: Any, labels: np.ndarray, dtype: Any
) -> dict[str, np.ndarray]:
    """Returns how torch's step moves parameters, running statistics and the head, by name."""
    import torch

    module, linear = copy.deepcopy(original.module), torch.nn.Linear(*head["kernel"].shape)
    linear.load_state_dict(
        {"weight": torch.from_numpy(head["kernel"].T), "bias": torch.from_numpy(head["bias"])}
    )
    module, linear = module.to(dtype).train(), linear.to(dtype)
    for part in module.modules():
        if "Drop" in type(part).__name__ and not [*part.children()]:  # not a block around others
            part.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weight = linear.weight.detach().clone()
    parameters = [*module.parameters(), *linear.parameters()]
    sgd = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-5)
    logits = linear(original.head(module, inputs.to(dtype)))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long()).backward()
    sgd.step()
    with torch.no_grad():
        idle = {name for name, value in module.named_parameters() if value.grad is None}
        state = module.state_dict()  # of what takes no part torch decays nothing
        moved = {name: state[name] - before[name] for name in state if name not in idle}
        moved["head"] = linear.weight - weight
    return {name: value.numpy() for name, value in moved.items() if value.is_floating_point()}


def furthest(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], statistics: frozenset[str]
) -> float:
    """Returns the largest distance of a tensor's update, relative to its norm.

    Of tensors that hardly move, such as biases before a batch norm, to a thousandth of the norm of
    the tensor that moves most. Only what both have counts: a classifier does not train.
    """
    worst = 0.0
    for part in (found.keys() & statistics, found.keys() - statistics):
        names = [name for name in part if name in expected]
        norms = {name: float(np.linalg.norm(expected[name])) for name in names}
        floor = max([1e-3 * norm for norm in norms.values()] + [1e-30])
        for name in names:
            off = float(np.linalg.norm(np.asarray(found[name], np.float64) - expected[name]))
            worst = max(worst, off / max(norms[name], floor))
    return worst


def verdicts(row: dict[str, Any]) -> dict[str, bool]:
    """Returns whether features, probe and step are those of torch."""
    return {
        "features": row.get("features", float("inf")) <= FEATURES_TOLERANCE,
        "probe": max(row.get("probe", [float("inf")])) <= FEATURES_TOLERANCE,
        "step": step_holds(row.get("step", [float("inf")])),
    }


def step_holds(found: list[float | None]) -> bool:
    """Whether these distances of `step_differences` are within the limits."""
    own, torchs, double = (*found, None, None)[:3]
    if double is not None:
        return double <= DOUBLE_TOLERANCE
    return own is not None and own <= max(STEP_TOLERANCE, TIMES_TORCHS * (torchs or 0))


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    holds = verdicts(row)

    def cell(name: str, values: list[float | None]) -> str:
        known = " / ".join(f"{value:.1e}" for value in values if value is not None)
        return known if holds[name] or not known else f"**{known}**"

    probe = row.get("probe")
    cells = [
        row.get("module", ""),
        row["name"],
        f"{row.get('num_params', 0) / 1e6:.2f}",
        str(row.get("image_size", "")),
        cell("features", [row.get("features")]),
        cell("probe", [max(probe)] if probe else []),
        cell("step", row.get("step", [])),
        row["reason"].replace("|", "/"),
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table, and how many networks each comparison holds for."""
    titles = ("module", "network", "M parameters", "px", "features", "probe", "step", "reason")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *map(line, rows), ""]
    for door in ("timm:", "hf:"):
        some = [verdicts(row) for row in rows if row["name"].startswith(door)]
        for name in some[0] if some else ():
            held = sum(row[name] for row in some)
            lines.append(f"- {door} {name}: {held} of {len(some)}, {100 * held / len(some):.0f} %")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
