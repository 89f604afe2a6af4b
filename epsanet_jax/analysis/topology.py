"""Devices to compile for, which need not exist here, and their published properties."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import xla_bridge  # nothing public tells whether JAX has started
from jax.experimental import topologies

from epsanet_jax.errors import InputError, one_line
from epsanet_jax.platform import check_platform

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation. Source: 'key specifications' on the page of each version in Google Cloud's docs.

    Attributes:
        memory: HBM, bytes; for v5e the 15.75 of 16 GiB that libtpu leaves to programs.
        link_rate: one-way rate of all links of a chip together, bytes per second.
        axes: number of axes of the torus.
        wraps_at: an axis of a slice is a ring if its length is a multiple of this.
        clock: Hz, from peak compute and the number of matrix units; None if that number is not published. For
            v6e it is four units of 256x256: its compiler schedules 469,000 operations a cycle for a product
            of 4096x4096 matrices, which are more than three such units can do.
        bandwidth: of the HBM, bytes per second.
    """

    memory: int
    link_rate: float
    axes: int
    wraps_at: int
    clock: float | None
    bandwidth: float


CHIPS = {
    'v4': Chip(32 * GIB, 300e9, 3, 4, 1.05e9, 1228e9),
    'v5e': Chip(int(15.75 * GIB), 200e9, 2, 16, 1.5e9, 819e9),
    'v5p': Chip(95 * GIB, 600e9, 3, 4, 1.75e9, 2765e9),
    'v6e': Chip(32 * GIB, 400e9, 2, 16, 1.75e9, 1640e9),
    'tpu7x': Chip(192 * GIB, 600e9, 3, 4, None, 7380e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and their known properties. None stands for unknown.

    Attributes:
        name: name as the user gave it.
        devices: devices for a mesh.
        memory: memory of one device, bytes.
        reduce_rate: rate at which a device sends in an all-reduce, bytes per second.
        clock: clock rate, Hz.
        bandwidth: of the memory of one device, bytes per second.
    """

    name: str
    devices: list[Any]
    memory: int | None
    reduce_rate: float | None = None
    clock: float | None = None
    bandwidth: float | None = None

    @property
    def platform(self) -> str:
        """'cpu', 'tpu' or 'cuda'."""
        return self.name.partition(':')[0] if self.name.startswith(('cpu:', 'cuda:')) else 'tpu'


def open_topology(name: str) -> Topology:
    """Returns the devices of a topology.

    Args:
        name: 'cpu:8', a TPU slice such as 'v5e:2x4' (needs libtpu, but no TPU), or 'cuda:8' (needs JAX's
            CUDA plug-in).

    Raises:
        InputError: there is no such topology, or its compiler is not installed.
    """
    match = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)', name)
    if not match or any(int(side) < 1 for side in match[2].split('x')):
        raise InputError(
            f'--topology={name} must be cpu:N, cuda:N, or a TPU slice such as v5e:2x4 or v5p:4x4x4; '
            f'known TPUs: {", ".join(CHIPS)}'
        )
    kind, sides = match[1], [int(side) for side in match[2].split('x')]
    if kind in ('cpu', 'cuda') and len(sides) > 1:
        raise InputError(f'--topology={name} must be {kind}:N with a single number')
    if kind == 'cpu':
        return _cpu(name, sides[0])
    if kind == 'cuda':
        return _cuda(name, sides[0])
    if kind not in CHIPS:
        raise InputError(f'--topology={name}: unknown TPU {kind!r}; known TPUs: {", ".join(CHIPS)}')
    return _tpu(name, CHIPS[kind], sides)


def _cpu(name: str, count: int) -> Topology:
    if not xla_bridge.backends_are_initialized():
        pattern = r'--xla_force_host_platform_device_count=\d+'
        os.environ['XLA_FLAGS'] = re.sub(pattern, '', os.environ.get('XLA_FLAGS', ''))
        jax.config.update('jax_num_cpu_devices', count)
    check_platform()
    devices = jax.devices('cpu')
    if len(devices) < count:
        raise InputError(
            f'--topology={name}: this process has already started JAX with {len(devices)} CPU devices'
        )
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return Topology(name, devices[:count], memory // count)


def _cuda(name: str, count: int) -> Topology:
    try:
        devices = topologies.get_topology_desc(platform='cuda', topology=f'1x1x{count}').devices
    except Exception as e:  # a missing plug-in raises several types
        raise InputError(f'--topology={name}: no compiler is installed for it: {one_line(e)}') from e
    return Topology(name, list(devices), None)


def _tpu(name: str, chip: Chip, sides: list[int]) -> Topology:
    use_libtpu_without_a_tpu()
    if importlib.util.find_spec('libtpu') is None:
        raise InputError(f'--topology={name} needs the TPU compiler: pip install libtpu')
    try:
        devices = list(topologies.get_topology_desc(topology_name=name, platform='tpu').devices)
    except Exception as e:
        raise InputError(f'--topology={name}: libtpu has no such slice: {one_line(e)}') from e
    share = math.prod(sides) / len(devices)  # a chip may be several devices
    rate = reduce_rate(chip, sides)
    return Topology(
        name, devices, int(chip.memory * share), rate and rate * share, chip.clock, chip.bandwidth * share
    )


def reduce_rate(chip: Chip, sides: Sequence[int]) -> float | None:
    """Returns the bytes per second that each chip of a slice sends in an all-reduce; None for one chip.

    On an axis that is not a ring, all chips wait for those at its ends, which use half of their links.
    """
    shares = [1.0 if side % chip.wraps_at == 0 else 0.5 for side in sides if side > 1]
    return chip.link_rate * sum(shares) / chip.axes if shares else None


def use_libtpu_without_a_tpu() -> None:
    """Prevents libtpu and JAX from searching, locking or starting a TPU; call it before JAX starts."""
    for variable, value in {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }.items():
        os.environ.setdefault(variable, value)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')
