"""Random access to TFRecord files, without TensorFlow.

A file is a row of records: the length as 8 bytes, little-endian, its checksum (4), the data, a checksum of
that (4). Where each begins is found by going from length to length, once for each file that is asked for.
"""

import bisect
import functools
import itertools
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from epsanet_jax.errors import InputError

_HEADER, _CHECKSUM = struct.Struct('<QI'), 4


class Part(NamedTuple):
    """The records of a file that belong to a split: those from `skip` on, `take` of them."""

    path: str
    skip: int
    take: int


class TfRecords:
    """The records of a split, one file's after the other's.

    Args:
        parts: in their order.
    """

    def __init__(self, parts: Sequence[Part]):
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(part.take for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Returns a record's data; its checksum is not checked, damage shows when it is parsed.

        Raises:
            InputError: the file has fewer records than it should.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        path, skip, take = self._parts[which]
        places = _places(path)
        number = skip + index - (self._ends[which] - take)
        if number >= len(places):
            raise InputError(f'{path} holds {len(places)} whole records, and record {number} is asked for')
        start, length = places[number]
        with open(path, 'rb') as f:
            f.seek(start)
            return f.read(length)


@functools.lru_cache(maxsize=4096)
def _places(path: str) -> list[tuple[int, int]]:
    """Returns where each record's data begins, and its length."""
    places, position, size = [], 0, os.path.getsize(path)
    with open(path, 'rb') as f:
        while position + _HEADER.size <= size:
            f.seek(position)
            length, _ = _HEADER.unpack(f.read(_HEADER.size))
            start = position + _HEADER.size
            position = start + length + _CHECKSUM
            if position > size:
                break  # cut off
            places.append((start, length))
    return places


class Examples:
    """The examples of a TFDS split that lies in TFRecord files, parsed.

    Args:
        builder: TFDS's, of the data set.
        split: 'train', 'train[:90%]' ...
        decoders: as TFDS takes them.
    """

    def __init__(self, builder: Any, split: str, decoders: Any):
        parts = builder.info.splits[split].file_instructions
        self._records = TfRecords([Part(str(part.filename), part.skip, part.take) for part in parts])
        self._features, self._decoders = builder.info.features, decoders

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
