"""Floating-point operations of a function, from shapes alone.

Two for each multiplication with addition in matrix products and convolutions, padding and all; what
is done element by element is not counted. XLA's own analysis counts the body of a loop once however
often it runs, as over probes, and not every backend has one; without loops the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dlc_jax.planning.liveness import inner_programs, traced


def count_flops(function: Callable, *arguments: Any) -> int:
    """Returns the operations of one call.

    Args:
      function: Is traced, not run.
      arguments: Arrays, or their shapes and types.
    """
    return _count(traced(function, *arguments))


def _count(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


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
    inside = [_count(program) for program in inner_programs(params)]
    if name == "cond":
        return max(inside)
    return sum(inside) * (params["length"] if name == "scan" else 1)
