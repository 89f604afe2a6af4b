"""Devices to compile for."""

import pytest

from epsanet_jax import InputError
from epsanet_jax.analysis import topology


@pytest.mark.parametrize(
    ('kind', 'sides', 'rate'),
    [
        ('v5e', (16, 16), 200e9),  # documented all-reduce bandwidth of a pod: 51.2 TB/s / 256
        ('v5e', (2, 4), 100e9),
        ('v5e', (1, 4), 50e9),
        ('v5e', (16, 8), 150e9),
        ('v5p', (4, 4, 8), 600e9),
        ('v5p', (2, 2, 1), 200e9),
        ('v5e', (1, 1), None),
    ],
)
def test_axis_that_is_not_a_ring_reduces_at_half_the_rate(kind, sides, rate):
    found = topology.reduce_rate(topology.CHIPS[kind], sides)
    assert found == (rate if rate is None else pytest.approx(rate))


def test_cpu_devices_share_the_memory():
    two, eight = (topology.open_topology(f'cpu:{n}') for n in (2, 8))
    assert (two.platform, len(two.devices), len(eight.devices)) == ('cpu', 2, 8)
    assert two.memory // 4 == pytest.approx(eight.memory, abs=4)
    assert topology.Topology('v5e:2x4', [], None).platform == 'tpu'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v9:2x2', "unknown TPU 'v9'; known TPUs: v4, v5e"),
        ('cpu:2x2', 'must be cpu:N with a single number'),
        ('cpu:0', 'must be cpu:N, cuda:N, or a TPU slice'),
        ('cpu:9', 'this process has already started JAX with 8 CPU devices'),
    ],
)
def test_invalid_topologies_are_refused(name, message):
    with pytest.raises(InputError, match=f'--topology={name}.*{message}'):
        topology.open_topology(name)
