"""Which of several equally small weights torch zeroes first: for number-by-number comparisons.

torch.nn.utils.prune asks torch.topk for the smallest weights. topk runs C++'s partial_sort (a heap)
where it is asked for 1/64 of the weights or fewer, and nth_element (introselect) otherwise, neither
of which looks at positions: which of the tied weights are zeroed follows from how those algorithms
happen to move them. A single tied weight can move a loss by 2e-4 (a narrow ResNet-50; 5e-6 in a
ResNet-18), far more than everything else in which two correct float32 implementations differ;
`mode="official"` therefore replays both algorithms.
"""

from __future__ import annotations

import heapq

import jax
import numpy as np
from jaxtyping import Float, Int

from dlc_jax.distributed import fetch
from dlc_jax.masking.torch_order import TorchLayout
from dlc_jax.types import Params, by_path

_BLOCK = 1 << 14  # weights compared with the top of the heap at a time


def removal_steps(
    params: Params, prunable: tuple[str, ...], counts: np.ndarray
) -> dict[str, np.ndarray | jax.Array]:
    """Returns, per weight, the step of the path at which torch zeroes it (m: never), int32.

    As importance it yields torch's masks: step k zeroes what has a step of k or less. Replays
    torch's CPU build with GNU's C++ library.

    Args:
      params: The encoder's parameters.
      prunable: Paths of the prunable leaves, in the order of torch's modules.
      counts: [m] weights zeroed at every step of the path, ascending from 0. Torch's choice at one
        step depends on all steps before it, so steps that are no probe count too.
    """
    leaves = {path: np.abs(fetch(by_path(params)[path]).astype(np.float32)) for path in prunable}
    layouts = {path: TorchLayout.of(path, leaf.shape) for path, leaf in leaves.items()}
    ordered = [layouts[path].in_torch(leaf).ravel() for path, leaf in leaves.items()]
    steps = _steps_of_flat(np.concatenate(ordered), counts)
    importance: dict[str, np.ndarray | jax.Array] = {}
    for path, leaf in leaves.items():
        part, steps = steps[: leaf.size], steps[leaf.size :]
        importance[path] = np.ascontiguousarray(layouts[path].from_torch(part, leaf))
    return importance


def _steps_of_flat(
    magnitude: Float[np.ndarray, " weights"], counts: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " weights"]:
    steps = np.full(len(magnitude), len(counts), np.int32)
    ends = np.asarray(counts[counts > 0])
    looked_at = np.unique(np.concatenate([ends - 1, ends[ends < len(magnitude)]]))
    ascending = np.partition(magnitude, looked_at)
    for k in np.flatnonzero(np.diff(counts)) + 1:  # the steps that zero any
        last = ascending[counts[k] - 1]
        left = steps == len(counts)
        if counts[k] < len(ascending) and ascending[counts[k]] == last:
            remaining = np.flatnonzero(left)
            taken = remaining[smallest(magnitude[remaining], int(counts[k] - counts[k - 1]))]
            steps[taken] = k
        else:
            steps[left & (magnitude <= last)] = k
    return steps


def smallest(values: Float[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """Returns the positions of the k smallest values, those at a tie as torch.topk picks them."""
    if k * 64 <= len(values):
        return _left_in_heap(values, k)
    values, order = values.copy(), np.arange(len(values), dtype=np.int32)
    first, last, nth = 0, len(values), k - 1
    depth_limit = 2 * (len(values).bit_length() - 1)
    while last - first > 3 and depth_limit:
        depth_limit -= 1
        cut = _partition(values, order, first, last)
        first, last = (cut, last) if cut <= nth else (first, cut)
    if last - first > 3:  # too many steps for nth_element, which then takes the heap
        tail = _left_in_heap(values[first:last], k - first)
        return np.concatenate([order[:first], order[first:last][tail]])
    tail = np.argsort(values[first:last], kind="stable")
    order[first:last] = order[first:last][tail]
    return order[:k]


def _left_in_heap(values: Float[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """Returns the positions of the k smallest values, as C++'s partial_sort picks among equal ones.

    The first k values form a heap, largest on top; each later value below the top replaces it.
    Python's heapq moves elements as GNU's heap does, to the leaves and back up, and of equal
    children it takes the same one, so that with the signs changed it drops the same elements.
    """
    tie = np.partition(values, k - 1)[k - 1]
    tied: list[tuple[float, int]] = []  # objects in the heap are told apart by identity

    def below(top: float, start: int, stop: int) -> list[float]:
        part = values[start:stop]
        places = np.flatnonzero(part < top)
        negated = (-part[places].astype(np.float64)).tolist()
        tied.extend(
            (negated[i], start + int(places[i])) for i in np.flatnonzero(part[places] == tie)
        )
        return negated

    heap = below(np.inf, 0, k)
    heapq.heapify(heap)
    for start in range(k, len(values), _BLOCK):
        for value in below(-heap[0], start, start + _BLOCK):
            heapq.heappushpop(heap, value)
    left = {id(value) for value in heap if value == -tie}
    ties = [position for value, position in tied if id(value) in left]
    return np.concatenate([np.flatnonzero(values < tie), np.array(ties, np.int64)])


def _partition(values: np.ndarray, order: np.ndarray, first: int, last: int) -> int:
    """One step of introselect on [first, last), in place; returns where the upper part starts."""
    _median_to_first(values, order, first, last)
    pivot, part = values[first], values[first + 1 : last]
    # Two scans from both ends exchange the i-th value not below the pivot with the i-th from the
    # right not above it, until they meet; all exchanges of a step are known beforehand.
    from_left = np.flatnonzero(part >= pivot)
    from_right = np.flatnonzero(part <= pivot)[::-1]
    pairs = min(len(from_left), len(from_right))
    num_swaps = int(np.count_nonzero(from_left[:pairs] < from_right[:pairs]))
    left, right = from_left[:num_swaps], from_right[:num_swaps]
    for array in (part, order[first + 1 : last]):
        array[left], array[right] = array[right], array[left]
    stops = [len(part), *from_left[num_swaps:][:1], *right[-1:]]
    return first + 1 + int(min(stops))


def _median_to_first(values: np.ndarray, order: np.ndarray, first: int, last: int) -> None:
    """Swaps the median of the second, middle and last value with the first."""
    a, b, c = first + 1, first + (last - first) // 2, last - 1
    if values[a] < values[b]:
        median = b if values[b] < values[c] else c if values[a] < values[c] else a
    else:
        median = a if values[a] < values[c] else c if values[b] < values[c] else b
    for array in (values, order):
        array[first], array[median] = array[median], array[first]
