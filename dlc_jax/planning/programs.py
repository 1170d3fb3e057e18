"""Memory and floating-point operations of a function, from shapes alone; it is never run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# Never written to memory on their own: XLA computes them where they are used.
_FREE = ("broadcast_in_dim", "iota")
_EXPORTED = "call_exported"


def peak_bytes(function: Callable, *arguments: Any) -> int:
    """Returns the most bytes that are alive at once, arguments not counted, results counted.

    Operation by operation, in the order of the program: XLA fuses operations and reuses buffers
    within them, so that it needs less rather than more.

    Args:
      function: Is traced, not run.
      arguments: Arrays, or their shapes and types.
    """
    return _peak(traced(function, *arguments))


def traced(function: Callable, *arguments: Any) -> Any:
    """Returns the jaxpr of a function, which is not run.

    A jitted one, or `functools.partial` of it, by its own `trace`: JAX refuses to trace one with
    compiler options inside another function.
    """
    partial = functools.partial(function)  # of a partial, its function and all its arguments
    if isinstance(partial.func, jax.stages.Wrapped):
        program = partial.func.trace(*partial.args, *arguments, **partial.keywords)
        return program.jaxpr.jaxpr
    return jax.make_jaxpr(function)(*arguments).jaxpr


def _peak(jaxpr: Any) -> int:
    outputs = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    last_use = {var: len(jaxpr.eqns) for var in outputs}
    for place in reversed(range(len(jaxpr.eqns))):
        for var in jaxpr.eqns[place].invars:
            if isinstance(var, core.Var):
                last_use.setdefault(var, place)
    alive: dict[Any, int] = {}
    peak = 0
    for place, equation in enumerate(jaxpr.eqns):
        made = {var: _num_bytes(var, equation.primitive.name) for var in equation.outvars}
        # what it computes inside holds its results at the end
        inside = max(map(_peak, inner_programs(equation.params)), default=0)
        if equation.primitive.name == _EXPORTED:
            needed = _lowered(equation).compile().memory_analysis()
            if needed is not None:  # not every backend has it
                inside = needed.temp_size_in_bytes + needed.output_size_in_bytes
        peak = max(peak, sum(alive.values()) + max(inside, sum(made.values())))
        alive |= {var: size for var, size in made.items() if last_use.get(var, place) > place}
        for var in equation.invars:
            if isinstance(var, core.Var) and last_use[var] == place:
                alive.pop(var, None)
    return peak


def inner_programs(value: Any) -> Iterator[Any]:
    """Yields the programs in an operation's parameters."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from inner_programs(part)


def _lowered(equation: Any) -> jax.stages.Lowered:
    """Returns a program that `jax.export` has written, ready to be compiled: all else is hidden."""
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars]
    exported = equation.params["exported"]
    args, kwargs = jax.tree.unflatten(exported.in_tree, shapes)
    return jax.jit(exported.call).lower(*args, **kwargs)


def _num_bytes(var: Any, operation: str) -> int:
    if operation in _FREE:
        return 0
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize


def count_flops(function: Callable, *arguments: Any) -> int:
    """Returns the floating-point operations of one call.

    Two for each multiplication with addition in matrix products and convolutions, padding and all;
    what is done element by element is counted within exported programs only, which are XLA's to
    analyse. Elsewhere its analysis would count the body of a loop once however often it runs, as
    over probes, and not every backend has one; without loops the two agree.

    Args:
      function: Is traced, not run.
      arguments: Arrays, or their shapes and types.
    """
    return sum(map(_of_equation, traced(function, *arguments).eqns))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        # a gradient's zeros between the values of a strided map are not multiplied with
        made_up = math.prod(params["lhs_dilation"])
        taps = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * taps // made_up
    if name == _EXPORTED:
        return int((_lowered(equation).cost_analysis() or {}).get("flops", 0))
    inside = [sum(map(_of_equation, program.eqns)) for program in inner_programs(params)]
    if name == "cond":
        return max(inside)
    return sum(inside) * (params["length"] if name == "scan" else 1)
