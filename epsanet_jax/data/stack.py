"""Stacks rows to batches in reused memory."""

import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

_LARGE = 2**12  # bytes: memory is reused for rows of at least this size
_KEPT = 32  # batches whose memory is kept


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


# References to an array that only a list holds; the number depends on the version of Python.
(_UNUSED,) = _references([np.empty(1)])


class Stack:
    """Stacks rows to batches, in the memory of earlier batches that are no longer used.

    New memory costs more than copying the rows: the operating system has to find and clear every page.
    """

    def __init__(self):
        self._lock, self._free = threading.Lock(), {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Returns the stacked values of the rows, by name."""
        return {name: self._stack([row[name] for row in rows]) for name in rows[0]}

    def _stack(self, values: list[Any]) -> np.ndarray:
        first = np.asarray(values[0])
        if first.nbytes < _LARGE:
            return np.stack(values)
        shape = (len(values), *first.shape)
        with self._lock:
            owned = self._free.setdefault((shape, first.dtype), [])
            # Code that still needs the memory, including JAX, holds a reference.
            counts = _references(owned)
            if _UNUSED in counts:
                batch = owned[counts.index(_UNUSED)]
            else:
                batch = np.empty(shape, first.dtype)
                owned.append(batch)
                del owned[:-_KEPT]
        return np.stack(values, out=batch)

    def __reduce__(self) -> tuple[type['Stack'], tuple[()]]:
        return Stack, ()
