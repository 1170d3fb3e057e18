"""Torch modules as pure functions of JAX arrays, by `torchax`; see `Converted`."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from dlc_jax import expect
from dlc_jax.encoders.encoder import RANDOM_KEY
from dlc_jax.encoders.torch_functions import mode_class, optional, refuse_to_draw


class _Placeholder:
    """Stands for an overload of an operator that this version of torch does not have."""

    def __getattr__(self, name: str) -> _Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder()


@functools.cache
def environment() -> Any:
    """Returns torchax's environment, in which torch's functions compute with JAX arrays.

    torchax 0.0.13 registers overloads of operators that torch 2.13 no longer has. While it loads
    its operators, such look-ups find a placeholder, which no network can call.
    """
    torch = optional("torch", "a converted network")
    packet = torch._ops.OpOverloadPacket
    found = packet.__getattr__

    def found_or_placeholder(self: Any, name: str) -> Any:
        try:
            return found(self, name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return _Placeholder()

    packet.__getattr__ = found_or_placeholder
    try:
        env = optional("torchax", "a converted network").tensor.Environment()
    finally:
        packet.__getattr__ = found
    # its own key would give the same numbers in every step, and would outlive the trace
    env.get_and_rotate_prng_key = refuse_to_draw
    return env


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Makes methods of transformers forget their results, which belong to one trace, at once."""
    library: Any = sys.modules.get("transformers.pytorch_utils")
    if library is None:
        yield
        return
    # its caches stand aside where torch compiles, for the same reason
    before, library.is_torchdynamo_compiling = library.is_torchdynamo_compiling, lambda: True
    try:
        yield
    finally:
        library.is_torchdynamo_compiling = before


# A module holds the tensors of one trace at a time, and `_uncached` is of the whole process
_TRACING = threading.RLock()
_WAYS_OUT = (
    "Take another variant of the network, or bring it as dlc.Encoder(params, apply, is_prunable)."
)


LINEAR, IN_OUT = "linear layer", "linear layer, [in, out]"  # kinds of `Converted.layers`


class _Slot(NamedTuple):
    """A place of a module where a tensor is; `entries` is one of the module's dictionaries."""

    entries: dict[str, Any]
    key: str
    name: str


class Converted:
    """A torch module without its tensors, as a function of them.

    Tied tensors have one name, the first. Everything computes as in evaluation mode, but for batch
    norms, which `call` may train, and dropout, which it may give a key.

    Args:
      module: Its tensors are taken out of it; it is of no other use afterwards.
      what: Name of the network for messages.
      placed: Name and tensor of torch -> JAX array; None: on the default device, in single
        precision where it is in half.
      ways_out: What messages advise where it cannot be converted.
    Attributes:
      tensors: JAX arrays by torch's names, in torch's layouts, in the order of the state dict;
        those that it leaves out, and tensors that are no buffers, come last.
      buffers: Names of those that are no parameters.
      norm_statistics: Names of those that batch norms hold.
      layers: Names of weights of convolutions and linear layers: `convolution`, `linear layer`,
        which has [out, in], or `IN_OUT`.
      mixes_positions: Whether the last call multiplied activations with each other, as attention
        does.
      drawn: What the last call drew random numbers for: `dropout`, `drop_path`.
    """

    def __init__(
        self,
        module: Any,
        what: str,
        placed: Callable[[str, Any], Array] | None = None,
        ways_out: str = _WAYS_OUT,
    ):
        torch = optional("torch", what)
        self.what, self.ways_out = what, ways_out
        self.mixes_positions = False
        self.drawn: set[str] = set()
        self._module = module.eval()
        self._of_all_modules = vars(torch.nn.Module()).keys()
        self._slots: list[_Slot] = []
        norms = torch.nn.modules.batchnorm._BatchNorm
        self._batch_norms = [m for m in module.modules() if isinstance(m, norms)]
        self.norm_statistics: set[str] = set()
        found: dict[str, Any] = {}
        names: dict[int, str] = {}  # of tensors by identity
        parameters = set()
        self.layers = {}
        for prefix, owner in module.named_modules():
            for entries in (owner._parameters, owner._buffers, vars(owner)):
                for key, value in entries.items():
                    if not isinstance(value, torch.Tensor):
                        continue
                    name = names.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
                    self._slots.append(_Slot(entries, key, name))
                    found[name] = value
                    if entries is owner._buffers and isinstance(owner, norms):
                        self.norm_statistics.add(name)
                    if entries is owner._parameters:
                        parameters.add(name)
                        if kind := _layer_kind(torch.nn, owner, key):
                            self.layers[name] = kind
        self.buffers = frozenset(found.keys() - parameters)
        order = {name: number for number, name in enumerate(module.state_dict())}
        self.tensors = {}
        slots = {name: [slot for slot in self._slots if slot.name == name] for name in found}
        for name in sorted(found, key=lambda name: order.get(name, len(order))):
            tensor = found.pop(name)
            self.tensors[name] = placed(name, tensor) if placed else _as_array(torch, tensor)
            for slot in slots[name]:  # so that no second copy of all of them is held
                slot.entries[slot.key] = None

    def call(
        self,
        run: Callable[..., Any],
        tensors: Mapping[str, Array],
        *args: Array,
        real: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Any, dict[str, Array]]:
        """Runs the module; traceable.

        Args:
          run: Called with the module and the other arguments as torch's tensors.
          tensors: All of `tensors`, of any values and floating types.
          args: Arrays.
          real: [b] 1 for samples and 0 for padding: batch norms train on the real samples, and
            their running statistics move. None: evaluation mode.
          key: What dropout and stochastic depth draw from, [2]. None: they are off.
        Returns:
          What `run` gave, and the tensors that were changed in place; the next call's key is
          `RANDOM_KEY` among them.
        Raises:
          ValueError: an operator that torchax lacks, or one that draws random numbers.
        """
        env = environment()
        inside = {name: env.j2t_iso(tensor) for name, tensor in tensors.items()}
        names = {id(tensor): name for name, tensor in inside.items()}
        mode = mode_class()(env, self.what, names, real, key)
        with _TRACING:
            output = self._traced(run, inside, env.j2t_iso(args), env, mode)
        self.mixes_positions, self.drawn = mode.mixes_positions, mode.drawn
        changed = {n: t.jax() for n, t in inside.items() if t.jax() is not tensors[n]}
        if key is not None:
            changed[RANDOM_KEY] = mode.key
        return env.t2j_iso(output), changed | mode.moved

    def _traced(
        self, run: Callable[..., Any], inside: Mapping[str, Any], args: Any, env: Any, mode: Any
    ) -> Any:
        """Returns what `run` gives, under torchax's environment and our own mode."""
        before = self._attributes()
        self._fill(inside)
        self._module.train(mode.key is not None)
        for norm in self._batch_norms:
            norm.training = mode.real is not None
        try:
            with env, mode, _uncached():
                return run(self._module, *args)
        except expect.InputError:
            raise
        except Exception as error:  # whatever torch, torchax and JAX raise while they trace
            raise _explained(error, self.what, self.ways_out) from error
        finally:
            self._fill(dict.fromkeys(inside))
            self._module.eval()
            for owner, kept in before:  # what it cached belongs to this trace
                for name in self._own(owner) - kept.keys():
                    del vars(owner)[name]
                vars(owner).update(kept)

    def _attributes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Returns every part of the module with what its class has put into it."""
        found = []
        for owner in self._module.modules():
            kept = {name: vars(owner)[name] for name in self._own(owner)}
            caches = {n: copy.copy(v) for n, v in kept.items() if isinstance(v, dict | list)}
            found.append((owner, kept | caches))
        return found

    def _own(self, owner: Any) -> set[str]:
        return vars(owner).keys() - self._of_all_modules

    def _fill(self, tensors: Mapping[str, Any]) -> None:
        for slot in self._slots:
            slot.entries[slot.key] = tensors[slot.name]


def _layer_kind(nn: Any, owner: Any, key: str) -> str | None:
    if isinstance(owner, nn.modules.conv._ConvNd) and key == "weight":
        return "convolution"
    if type(owner).__name__ == "Conv1D" and key == "weight":  # transformers'
        return IN_OUT
    is_linear = isinstance(owner, nn.Linear) and key == "weight"
    is_projection = isinstance(owner, nn.MultiheadAttention) and key.endswith("proj_weight")
    return LINEAR if is_linear or is_projection else None


def _as_array(torch: ModuleType, tensor: Any) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    # a copy: the tensor's memory is torch's, or that of a mapped file
    return jnp.array(tensor.contiguous().numpy())


def _explained(error: Exception, what: str, ways: str) -> expect.InputError:
    if type(error).__name__ == "OperatorNotFound":
        words = str(error).split()
        name = words[words.index("name") + 1] if "name" in words[:-1] else str(error)
        return expect.InputError(f"{what}: torchax has no operator {name}. {ways}")
    return expect.InputError(
        f"{what}: cannot be converted ({type(error).__name__}: {expect.first_line(error)}). {ways}"
    )
