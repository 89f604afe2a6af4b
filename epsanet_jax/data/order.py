"""The order of the examples in training: the index of row i of batch s depends on the seed, s and i alone."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.sources import Source

_ENDLESS = 2**48


def shuffled(examples: int, seed: int) -> grain.MapDataset:
    """Returns the indices of examples in an order without end; every epoch is shuffled again."""
    return grain.MapDataset.range(examples).seed(seed).shuffle().repeat(None)


def balanced(labels: Sequence[int] | np.ndarray, seed: int) -> grain.MapDataset:
    """Returns indices of examples without end, with the classes in equal shares.

    Of K classes, each K rows in a row, counted from the first of the training, hold every class once, in an
    order that is shuffled each time. The examples of a class are shuffled, all are used before one is used
    again, and then they are shuffled again.

    Args:
        labels: [N], label of each example. Classes without examples do not count.
        seed: seed of both orders.
    """
    return grain.MapDataset.range(_ENDLESS).map(_Balanced(np.asarray(labels), seed)).seed(seed)


class _Balanced(grain.transforms.Map):
    """Maps the place in the order to the index of an example."""

    def __init__(self, labels: np.ndarray, seed: int):
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self._seed = seed
        self._known: dict[int, tuple[int, np.ndarray]] = {}  # the last permutation of each stream

    def map(self, element):
        visit = element // len(self._members)  # how often each class was drawn before
        number = self._permuted(0, element, len(self._members))
        members = self._members[number]
        return int(members[self._permuted(1 + number, visit, len(members))])

    def _permuted(self, stream: int, index: int, size: int) -> int:
        # Not grain's shuffle, which takes 30 ms for a value of a small range.
        epoch, place = divmod(index, size)
        known = self._known.get(stream)
        if known is None or known[0] != epoch:
            known = epoch, np.random.default_rng([self._seed, stream, epoch]).permutation(size)
            self._known[stream] = known
        return int(known[1][place])


@runtime_checkable
class WithLabels(Protocol):
    """A source that knows its labels without reading its images."""

    labels: Sequence[int]


def read_labels(source: Source) -> np.ndarray:
    """Returns the label of each example; reads every record if the source does not know them otherwise.

    A record that cannot be read raises BadImageError, or OSError.
    """
    if isinstance(source, WithLabels):
        return np.asarray(source.labels)
    return np.array([_label(source, index) for index in range(len(source))])


def _label(source: Source, index: int) -> int:
    try:
        return source[index]['label']
    except BadImageError as e:
        raise BadImageError(f'{source.name_of(index)}: {e}') from e
