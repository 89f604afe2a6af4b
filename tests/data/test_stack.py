"""Stacked batches share memory only when it is no longer used."""

import numpy as np
import pytest

from epsanet_jax.data.stack import Stack
from epsanet_jax.training import sharding


def test_memory_is_reused_only_when_nothing_refers_to_it(rng):
    stack, mesh = Stack(), sharding.make_mesh(8)
    rows = [
        [{'image': rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)} for _ in range(8)] for _ in range(50)
    ]
    on_devices = [sharding.to_devices(stack(batch), mesh)['image'] for batch in rows]
    for found, batch in zip(on_devices, rows, strict=True):
        np.testing.assert_array_equal(found, np.stack([row['image'] for row in batch]))
    first = stack(rows[0])['image']
    view, place = first[2:3], first.ctypes.data
    del first
    assert stack(rows[1])['image'].ctypes.data != place
    np.testing.assert_array_equal(view[0], rows[0][2]['image'])
    del view, found, on_devices
    stack = Stack()
    assert len({stack(batch)['image'].ctypes.data for batch in rows}) == 1


def test_values_are_stacked_by_name(rng):
    rows = [{'image': rng.integers(0, 256, (64, 64, 3), np.uint8), 'label': np.int32(i)} for i in range(3)]
    batch = Stack()(rows)
    assert (batch['image'].shape, batch['image'].dtype) == ((3, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(batch['image'][2], rows[2]['image'])
    assert batch['label'].tolist() == [0, 1, 2]


def test_rows_of_different_shapes_are_an_error():
    with pytest.raises(ValueError, match='same shape'):
        Stack()([{'image': np.zeros((size, 64, 3))} for size in (64, 65)])
