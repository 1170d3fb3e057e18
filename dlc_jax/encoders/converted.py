"""Image networks of timm and transformers as encoders, converted from torch."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dlc_jax import expect
from dlc_jax.encoders.encoder import RANDOM_KEY, Encoder
from dlc_jax.encoders.preparation import PROCESSOR
from dlc_jax.encoders.prunable import chosen_weights
from dlc_jax.encoders.stored_tensors import matches, opened, without_prefix
from dlc_jax.encoders.torch_functions import optional, quiet
from dlc_jax.encoders.torch_modules import Converted
from dlc_jax.files.json_files import read_json
from dlc_jax.files.libraries import fetching
from dlc_jax.types import Params

TIMM, TRANSFORMERS = CONVERTED = ("timm:", "hf:")
# Parts of names that are no layers of blocks: embeddings, positions, heads.
_NOT_IN_BLOCKS = re.compile(
    r"(.*_)?(embed|embeds|embedding|embeddings|pos|position|cpb|rpb|rel)\d*(_.*)?"
    r"|(head|classifier|pre_logits|attn_pool|attnpool|pooler).*"
)
_RATES_OF_TIMM = {"drop_path": "drop_path_rate", "dropout": "drop_rate"}
_CLASSIFIER = re.compile(r"(^|\.)(classifier|pre_logits)\.")


def is_converted(name: str | None) -> bool:
    """Whether an encoder of this name is a converted one."""
    return name is not None and name.startswith(CONVERTED)


class TorchNetwork:
    """The functions of an `Encoder` over a converted module.

    Args:
      converted: The module.
      tokens: Module and images [b, 3, s, s] -> tokens [b, t, d]; anything else: there are none.
      head: Module and images -> [b, d], what a classifier reads.
    """

    def __init__(
        self,
        converted: Converted,
        tokens: Callable[[Any, Any], Any],
        head: Callable[[Any, Any], Any],
    ):
        self._converted, self._tokens, self._head = converted, tokens, head

    def tokens(self, params: Params, images: Float[Array, "b s s 3"]) -> Array:
        """Returns tokens [b, t, d]."""
        return self._evaluated(self._tokens, params, images)

    def apply_head(self, params: Params, images: Float[Array, "b s s 3"]) -> Array:
        """Returns what a classifier reads, [b, d]."""
        return self._evaluated(self._head, params, images)

    def apply_training(
        self, params: Params, images: Float[Array, "b s s 3"], real: Float[Array, " b"]
    ) -> tuple[Array, Params]:
        """Returns the same in training mode, and all parameters with running statistics moved.

        With a key, [2], as `RANDOM_KEY` of the parameters, dropout and stochastic depth draw from
        it, and it is moved as well.
        """
        output, changed = self._run(self._head, params, images, real)
        return output, {**params, **changed}

    def _evaluated(
        self, run: Callable[[Any, Any], Any], params: Params, images: Float[Array, "b s s 3"]
    ) -> Array:
        output, changed = self._run(run, params, images, None)
        if changed:
            raise expect.InputError(
                f"{self._converted.what}: changes {expect.listed(changed)} in evaluation mode, so "
                "that its features are no function of image and weights."
            )
        return output

    def _run(
        self,
        run: Callable[[Any, Any], Any],
        params: Params,
        images: Float[Array, "b s s 3"],
        real: Array | None,
    ) -> tuple[Any, dict[str, Array]]:
        # buffers come in float32 also where everything else is bfloat16; batch norms take both
        norms = self._converted.norm_statistics
        tensors = {
            name: tensor.astype(images.dtype)
            if jnp.issubdtype(tensor.dtype, jnp.floating) and name not in norms
            else tensor
            for name, tensor in params.items()
        }
        key = tensors.pop(RANDOM_KEY, None)
        key = None if real is None else key
        return self._converted.call(run, tensors, jnp.moveaxis(images, -1, 1), real=real, key=key)


class Built(NamedTuple):
    """A module of torch with a checkpoint's weights, and what its library knows of it.

    Attributes:
      module: In evaluation mode.
      tokens, head: See `TorchNetwork`.
      image_size: Side of the images it is built for, in pixels.
      takes_any_size: Whether it takes others too.
      mean, std: Normalisation of RGB in [0, 1], where the checkpoint states none.
      config, processor: See `preparation`.
      function: What decides the function besides the name.
      prefix: See `Encoder`.
    """

    module: Any
    tokens: Callable[[Any, Any], Any]
    head: Callable[[Any, Any], Any]
    image_size: int
    takes_any_size: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    function: str
    config: Mapping[str, Any] = {}
    processor: Mapping[str, Any] = {}
    prefix: str = ""


def converted_encoder(
    name: str, built: Built, prunable: str | None = None, rates: Mapping[str, float] = {}
) -> Encoder:
    """Returns a module of torch as an encoder; the module is of no other use afterwards.

    Args:
      name: For messages and provenance.
      built: The module and what is known of it.
      prunable: See `load_encoder`.
      rates: `drop_path` and `dropout` that it was built with, where they are asked for.
    Raises:
      ValueError: it does not take images of this size, or cannot be converted; a glob that matches
        no weight; a rate that changes nothing.
    """
    converted = Converted(built.module, name)
    network = TorchNetwork(converted, built.tokens, built.head)
    size = built.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    output = _traced(name, network.tokens, converted.tensors, images)
    has_tokens = getattr(output, "ndim", None) == 3  # some give lists
    apply = network.tokens if has_tokens else network.apply_head
    _traced(name, network.apply_head, converted.tensors, images)
    if rates:
        key, real = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((2,), jnp.float32)
        params = {**converted.tensors, RANDOM_KEY: key}
        _traced(name, network.apply_training, params, images, real)
    if absent := [rate for rate in rates if rate not in converted.drawn]:
        raise expect.InputError(f"encoder.{absent[0]}: {name} has none; expected 0.")
    in_order = {key: number for number, key in enumerate(converted.tensors)}
    is_prunable: Callable[[str], bool]
    if prunable is None:
        is_prunable = frozenset(prunable_layers(converted)).__contains__
    else:
        is_prunable = chosen_weights(prunable, {key: key for key in converted.layers}, name)
    return Encoder(
        params=converted.tensors,
        apply=apply,
        apply_head=network.apply_head,
        apply_training=network.apply_training,
        statistics=converted.buffers,
        is_prunable=is_prunable,
        prunable=prunable,
        module_order=in_order.__getitem__,
        name=name,
        mean=tuple(built.mean),
        std=tuple(built.std),
        normalisation="architecture",
        image_size=None if built.takes_any_size else size,
        head="own" if has_tokens else "mean",
        function=built.function,
        prefix=built.prefix,
        drop_path=rates.get("drop_path", 0.0),
        dropout=rates.get("dropout", 0.0),
    )


def _traced(name: str, run: Callable[..., Any], *args: Any) -> Any:
    """Returns the shapes of what a function gives.

    Raises:
      ValueError: it uses what was computed in an earlier call.
    """
    keeps = f"{name}: cannot be converted, it keeps what it computed for its next call"
    with expect.refusing(keeps, jax.errors.UnexpectedTracerError, shown=expect.first_line):
        program, shapes = jax.make_jaxpr(run, return_shape=True)(*args)
    if any(isinstance(const, jax.core.Tracer) for const in program.consts):
        raise expect.InputError(f"{keeps}.")
    return shapes


def prunable_layers(converted: Converted) -> list[str]:
    """Returns the names of the weights that probes may zero, in torch's order.

    Of a network with linear layers in its blocks, or with attention, the convolutions and linear
    layers in its blocks; of any other, all convolutions. Blocks are the numbered parts of a network
    that hold two layers or more: `layers.0`, `stages.1.blocks.2`; embeddings, positions, relative
    ones too, and heads are none of them, wherever they stand.
    """
    convolutions = [
        name
        for name, kind in converted.layers.items()
        if kind == "convolution" and not _CLASSIFIER.search(name)
    ]
    layers = {
        name: kind
        for name, kind in converted.layers.items()
        if not any(_NOT_IN_BLOCKS.fullmatch(part) for part in name.split(".")[:-1])
    }
    in_blocks = [name for name in layers if _is_in_block(name, layers)]
    if converted.mixes_positions or any(layers[name] != "convolution" for name in in_blocks):
        found = in_blocks or list(layers)
    else:
        found = convolutions
    if not found:
        raise expect.InputError(
            f"{converted.what}: no convolution or linear layer of torch was found in it that "
            f"probes may zero. {converted.ways_out}"
        )
    return found


def _is_in_block(name: str, layers: Mapping[str, str]) -> bool:
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            block = ".".join(parts[: place + 1]) + "."
            if sum(other.startswith(block) for other in layers) > 1:
                return True
    return False


def timm_module(
    name: str,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    weights: str,
    image_size: int | None,
    rates: Mapping[str, float] = {},
) -> Built:
    """Returns a network of timm with a checkpoint's weights, without its classifier.

    Args:
      name: `timm:` and the architecture, perhaps with a tag, which does not matter.
      tensors, config: From `read_checkpoint`, or arrays by name.
      weights: Where they come from.
      image_size: Side of the images in pixels; None: the network's own.
      rates: `drop_path` and `dropout` while it is trained, where they are asked for.
    Raises:
      ValueError: timm is not there, or has no such architecture; a checkpoint that does not fit; a
        size that the network does not take, or a rate.
    """
    torch, timm = timm_library(name)
    architecture = architecture_of(name)
    if not timm.is_model(architecture):
        expect.one_of("encoder.name", name, [TIMM + known for known in timm.list_models()])
    arguments = dict(config.get("model_args", {}))
    unasked: dict[str, float] = {}
    built_with, problem = arguments, f"encoder.name: {name} cannot be built"
    problem += f" with model_args {arguments} of {weights}" if arguments else ""
    if rates:  # and no others, whatever the checkpoint was trained with
        built_with = {key: value for key, value in arguments.items() if "drop" not in key}
        built_with |= {_RATES_OF_TIMM[rate]: value for rate, value in rates.items()}
        unasked = {key: 0.0 for rate, key in _RATES_OF_TIMM.items() if rate not in rates}
        problem = f"encoder.{' and encoder.'.join(rates)}: {name} cannot be built with it"
    build = functools.partial(timm.create_model, architecture, **built_with)
    with expect.refusing(problem, Exception, shown=expect.first_line), quiet():
        try:
            module = build(num_classes=0, **unasked)
        except TypeError:  # it has no such rate
            module = build(num_classes=0)
        try:
            with torch.device("meta"):  # no weights: its names are all that matters
                with_head = build(num_classes=1)
        except Exception:  # it computes something while it is made
            with_head = build(num_classes=1)
    own = module.state_dict()
    ignored = tuple(re.escape(key) for key in with_head.state_dict() if key not in own)
    tensors, prefix = without_prefix(tensors, {key.partition(".")[0] for key in own}, ignored)
    _fill(torch, module, tensors, ignored, name, weights)
    stated = module.pretrained_cfg
    built_for = arguments.get("img_size") or stated["input_size"][-1]
    size = image_size or built_for
    if size != built_for and hasattr(module, "set_input_size"):
        problem = f"encoder.image_size: {name} does not take images of {size} px"
        with expect.refusing(problem, Exception, shown=expect.first_line):
            module.float().set_input_size((size, size))
    return Built(
        module,
        tokens=_timm_features,
        head=_timm_head,
        image_size=size,
        takes_any_size=not stated.get("fixed_input_size"),
        mean=stated["mean"],
        std=stated["std"],
        function=json.dumps(arguments, sort_keys=True) if arguments else "",
        config=_with_defaults(config, stated),
        prefix=prefix,
    )


def _with_defaults(config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint's `pretrained_cfg` with what timm states where that says nothing.

    Mean and std are not filled in, so that records say where they come from.
    """
    usual = ("input_size", "crop_pct", "crop_mode", "interpolation")
    known = {key: stated[key] for key in usual if stated.get(key) is not None}
    known = {key: list(v) if isinstance(v, tuple) else v for key, v in known.items()}
    return {"pretrained_cfg": known | dict(config.get("pretrained_cfg", config))}


def architecture_of(name: str) -> str:
    """Returns the architecture in a name of timm, without `timm:` and without the tag."""
    return name.removeprefix(TIMM).partition(".")[0]


def hub_id(name: str) -> str:
    """Returns the hub id of timm's weights for `timm:<architecture>`, of the tag if it has one."""
    wanted = name.removeprefix(TIMM)
    if "." in wanted:
        return f"timm/{wanted}"
    _, timm = timm_library(name)
    found = timm.get_pretrained_cfg(wanted) if timm.is_model(wanted) else None
    if found is None or not found.hf_hub_id:
        raise expect.InputError(
            f"encoder.weights: missing; timm has no weights of its own for {wanted!r}; give a hub "
            "id, a .safetensors file or a folder."
        )
    return f"{found.hf_hub_id.rstrip('/')}{'' if '.' in found.hf_hub_id else '.' + found.tag}"


def transformers_module(
    name: str, weights: str, image_size: int | None, rates: Mapping[str, float] = {}
) -> Built:
    """Returns a vision model of transformers with its weights.

    Of a model of images and text, its part for images.

    Args:
      name: `hf:` and a hub id or a folder.
      weights: A hub id or a folder; empty: that of the name.
      image_size: Side of the images in pixels; None: the network's own.
      rates: `drop_path` and `dropout` while it is trained, where they are asked for.
    Raises:
      ValueError: torch is not there; no such model, no vision model, or not all of its weights.
    """
    torch, _ = timm_library(name)
    transformers = optional("transformers", name)
    source = weights or name.removeprefix(TRANSFORMERS)
    is_local = Path(source).expanduser().is_dir()
    source = str(Path(source).expanduser()) if is_local else source
    if not is_local and not expect.is_hub_id(source):
        raise expect.InputError(
            f"encoder.name: {name}: no folder {source!r}, and that is no hub id (owner/name) "
            "either."
        )
    how = {"local_files_only": True} if is_local else {}
    problem = f"encoder.name: {name}: transformers could not load {source!r}"
    with expect.refusing(problem, Exception, shown=expect.first_line), quiet():
        whole = transformers.AutoConfig.from_pretrained(source, **how)
        config = getattr(whole, "vision_config", None) or whole
        module, info = transformers.AutoModel.from_pretrained(
            source,
            config=_with_rates(config, rates),
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation="eager",
            **how,
        )
    if getattr(module, "main_input_name", "") != "pixel_values":
        raise expect.InputError(
            f"encoder.name: {name}: {type(module).__name__} takes {module.main_input_name}; "
            "expected a vision model, which takes pixel_values."
        )
    lost = sorted(info["missing_keys"])
    if lost and all(key.startswith("pooler.") for key in lost):
        module.pooler, lost = None, []  # a classifier's checkpoint has none
    if lost or info["mismatched_keys"]:
        problems = {
            "parameters without an entry": lost,
            "entries of another shape": sorted(str(key) for key in info["mismatched_keys"]),
        }
        raise expect.InputError(
            f"encoder.weights: {source!r} does not fit {type(module).__name__}: "
            f"{expect.problems(problems)}"
        )
    own = getattr(config, "image_size", None) or 224
    own = own if isinstance(own, int) else own[-1]
    processor = _processor(transformers, source, (whole, config), is_local)
    size = image_size or _prepared_side(processor) or own
    arguments = {}
    if size != own and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
        arguments["interpolate_pos_encoding"] = True
    stated = {**config.to_dict(), **arguments}
    volatile = {"transformers_version", "_name_or_path", "dtype", "architectures"}
    function = json.dumps({k: v for k, v in stated.items() if k not in volatile}, sort_keys=True)
    return Built(
        module,
        tokens=functools.partial(_last_hidden_state, arguments),
        head=functools.partial(_pooled, arguments),
        image_size=size,
        takes_any_size=False,
        mean=Encoder.mean,
        std=Encoder.std,
        function=function,
        processor=processor,
    )


def _with_rates(config: Any, rates: Mapping[str, float]) -> Any:
    """Returns a configuration of transformers with these rates, where any are asked for."""
    if not rates:
        return config
    changed = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float):
            setattr(changed, key, rates.get("drop_path" if "path" in key else "dropout", 0.0))
    return changed


def _last_hidden_state(arguments: Mapping[str, Any], module: Any, images: Any) -> Any:
    return module(pixel_values=images, **arguments).last_hidden_state


def _pooled(arguments: Mapping[str, Any], module: Any, images: Any) -> Any:
    output = module(pixel_values=images, **arguments)
    if (pooled := getattr(output, "pooler_output", None)) is not None:
        return pooled.flatten(1)
    last = output.last_hidden_state
    return last[:, 0] if last.ndim == 3 else last.mean((2, 3))


def _processor(
    transformers: ModuleType, source: str, configs: Iterable[Any], is_local: bool
) -> Mapping[str, Any]:
    """Returns the model's stored image processor, or else the name of the usual one."""
    if is_local:
        stored = read_json(Path(source) / PROCESSOR)
    else:
        with fetching(f"encoder.name: {PROCESSOR} of {source!r} could not be", _OTHERWISE) as hub:
            stored = read_json(Path(hub.hf_hub_download(source, PROCESSOR)))
    if not stored:
        kinds = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING
        usual = [kind for one in configs for kind in kinds.get(type(one), {}).values()]
        stored = {"image_processor_type": usual[0].__name__} if usual else {}
    return stored


def _prepared_side(processor: Mapping[str, Any]) -> int | None:
    """Returns the side of the images that an image processor gives, if it states one."""
    crops = processor.get("do_center_crop", "crop_size" in processor)
    size = processor.get("crop_size" if crops else "size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return size if isinstance(size, int) else None


_OTHERWISE = (
    f"Where a model has none: put its config.json, its weights and a {PROCESSOR} into a folder, "
    "and give that one."
)


def _timm_features(module: Any, images: Any) -> Any:
    return module.forward_features(images)


def _timm_head(module: Any, images: Any) -> Any:
    return module.forward_head(module.forward_features(images), pre_logits=True)


def timm_library(what: str) -> tuple[ModuleType, ModuleType]:
    """Returns torch and timm, also where torchvision's operators do not match torch's build.

    A torchvision without its compiled operators defines none, and cannot be imported then; timm
    imports it, and networks need none of them.
    """
    torch = optional("torch", what)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # importing timm raises then, if it needs it
    except RuntimeError as error:
        if "torchvision::nms" in str(error):
            _define_operators(torch)
    return torch, optional("timm", what)


@functools.cache  # the library must outlive this function
def _define_operators(torch: ModuleType) -> Any:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    return library


def _fill(
    torch: ModuleType,
    module: Any,
    tensors: Mapping[str, Any],
    ignored: tuple[str, ...],
    name: str,
    weights: str,
) -> None:
    """Puts a checkpoint's tensors into a module, without a copy of them where that goes."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    state = {}
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for key, tensor in tensors.items():
            if isinstance(tensor, np.ndarray):
                state[key] = torch.from_numpy(tensor)
                continue
            if tensor.file not in files:
                files[tensor.file] = stack.enter_context(opened(tensor.file, framework="pt"))
            state[key] = files[tensor.file].get_tensor(tensor.name)
        problems = _misfits(state, expected, ignored)
        convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        if problems and convert is not None:  # perhaps the names of the original repository
            with contextlib.suppress(Exception), quiet():
                renamed = convert(dict(state), module)
                if not _misfits(renamed, expected, ignored):
                    state, problems = renamed, {}
        if report := expect.problems(problems):
            raise expect.InputError(f"encoder.weights: {weights!r} does not fit {name!r}: {report}")
        module.load_state_dict(
            {key: value for key, value in state.items() if key in expected},
            strict=False,  # counters of batches may be missing
            assign=True,
        )


def _misfits(
    state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...]
) -> dict[str, list[str]]:
    counters = ".num_batches_tracked"
    found = {
        "entries the encoder has no place for": [
            key for key in sorted(state.keys() - expected.keys()) if not matches(key, ignored)
        ],
        "entries of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != shape
        ],
        "parameters without an entry": [
            key for key in expected if key not in state and not key.endswith(counters)
        ],
    }
    return {problem: entries for problem, entries in found.items() if entries}
