"""Random access to TFRecord files, without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of the length (4 bytes), the data, and a checksum
of the data (4 bytes). The first access to a file reads all lengths to find where each record starts.
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
    """The records of a file that belong to a split: `take` records after the first `skip` records."""

    path: str
    skip: int
    take: int


class TfRecords:
    """The records of the parts of several files, in order."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(part.take for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Returns the data of a record, without checking its checksum: parsing detects damage.

        Raises:
            InputError: the file is truncated.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        path, skip, take = self._parts[which]
        places, number = _places(path), skip + index - (self._ends[which] - take)
        if number >= len(places):
            missing = f'record {number} is missing, the file holds {len(places)} whole records'
            raise InputError(f'{path} is truncated: {missing}')
        start, length = places[number]
        with open(path, 'rb') as f:
            f.seek(start)
            return f.read(length)


@functools.lru_cache(maxsize=4096)
def _places(path: str) -> list[tuple[int, int]]:
    """Returns the position and the length of the data of each record."""
    places, position, size = [], 0, os.path.getsize(path)
    with open(path, 'rb') as f:
        while position + _HEADER.size <= size:
            f.seek(position)
            length, _ = _HEADER.unpack(f.read(_HEADER.size))
            places.append((position + _HEADER.size, length))
            position += _HEADER.size + length + _CHECKSUM
    return places if position <= size else places[:-1]  # the last record is truncated


class Examples:
    """The parsed examples of a TFDS split in TFRecord files, with TFDS decoders of the features."""

    def __init__(self, builder: Any, split: str, decoders: Any):
        parts = builder.info.splits[split].file_instructions
        self._records = TfRecords([Part(str(part.filename), part.skip, part.take) for part in parts])
        self._features, self._decoders = builder.info.features, decoders

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
