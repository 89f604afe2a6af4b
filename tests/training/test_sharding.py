"""The mesh: devices, BatchNorm groups and microbatches."""

import types

import jax
import pytest

from epsanet_jax import InputError
from epsanet_jax.training import sharding


@pytest.mark.parametrize(
    ('batch_size', 'bn_group', 'shape'),
    [(16, None, (1, 8)), (16, 16, (1, 8)), (16, 4, (4, 2)), (16, 2, (8, 1)), (32, 2, (8, 1)), (8, 1, (8, 1))],
)
def test_a_batchnorm_group_is_on_as_many_devices_as_it_needs(batch_size, bn_group, shape):
    mesh = sharding.make_mesh(batch_size, bn_group)
    assert mesh.devices.shape == shape
    assert mesh.devices.flatten().tolist() == jax.devices()


@pytest.mark.parametrize(
    ('batch_size', 'bn_group', 'message'),
    [
        (12, None, 'batch_size 12 does not divide among 8 devices; the next that does is 16'),
        (16, 3, 'batch_size 16 does not divide into BatchNorm groups of 3'),
        (48, 4, 'groups of 4 do not fit devices with 6 rows'),
        (8, 32, 'batch_size 8 does not divide into BatchNorm groups of 32'),
    ],
)
def test_batches_that_do_not_divide_are_refused(batch_size, bn_group, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(batch_size, bn_group)


@pytest.mark.parametrize(
    ('batch_size', 'bn_group', 'microbatches', 'message'),
    [
        (32, 4, 3, 'batch_size 32 does not divide into 3 microbatches'),
        (32, 16, 4, r'4 microbatches of 8 rows do not hold whole BatchNorm groups \(groups of 16\): set'),
        (32, None, 2, 'groups .over the whole batch.: set model.bn_group to a divisor of 16'),
    ],
)
def test_microbatches_must_hold_whole_batchnorm_groups(batch_size, bn_group, microbatches, message):
    with pytest.raises(InputError, match=message):
        sharding.microbatch_size(batch_size, bn_group, microbatches)


def test_processes_need_the_same_number_of_devices():
    devices = [types.SimpleNamespace(process_index=p, id=i) for i, p in enumerate((0, 1, 1, 1))]
    message = 'every process needs the same number of devices, got process 0: 1, process 1: 3'
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(16, 4, devices)
