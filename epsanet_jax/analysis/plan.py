"""Memory, communication and cost of a training step, from a compiler for devices that need not exist."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from epsanet_jax.analysis import hlo, schedule
from epsanet_jax.analysis.topology import GIB, Topology
from epsanet_jax.errors import InputError

Lower = Callable[[int], Any]  # global batch -> jax.stages.Lowered


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a training step as the compiler reports them, per device. None stands for unknown.

    Attributes:
        model: name of the model.
        topology: name of the topology.
        devices: number of devices.
        batch: rows of the global batch.
        fits: whether the step fits into the memory of a device.
        bytes_per_device: peak of parameters, optimizer, batch, program and temporaries.
        memory_per_device: memory of a device, bytes.
        collectives: for each kind 'count' and 'bytes' per step, and 'seconds' at the published rate of the
            links, without overlap with the computation.
        cost: 'flops', 'bytes_accessed' and, for TPUs, 'estimated_cycles' and 'seconds' at the chip's clock:
            the compiler's model, not a measurement. Also 'hbm_bytes' and 'roofline_seconds', the least time
            of the computation (`analysis.schedule`), from the bytes alone unless 'scheduled' is true.
        compile_s: time that the compiler took, seconds.
    """

    model: str
    topology: str
    devices: int
    batch: int
    fits: bool | None
    bytes_per_device: int
    memory_per_device: int | None
    collectives: dict[str, dict[str, Any]]
    cost: dict[str, Any]
    compile_s: float

    @property
    def seconds(self) -> float | None:
        """Time of a step by the compiler's model: computation, then collectives; None if unknown."""
        parts = [self.cost.get('seconds'), *(c['seconds'] for c in self.collectives.values())]
        return None if None in parts else sum(parts)


def make_plan(
    lower: Lower,
    name: str,
    batch: int,
    topology: Topology,
    report: Callable[[str], None] = lambda _: None,
    schedules: str | None = None,
) -> Plan:
    """Compiles a step for a topology.

    Args:
        lower: function that lowers the step for a global batch.
        name: name of the model.
        batch: rows of the global batch.
        topology: topology from `open_topology`.
        report: called with a message before the compiler starts.
        schedules: folder to which the compiler writes schedules (`schedule.write_schedules`), if it does.

    Raises:
        InputError: the step cannot be lowered for this batch.
    """
    plan = functools.partial(Plan, name, topology.name, len(topology.devices), batch)
    began = time.perf_counter()
    lowered = lower(batch)
    report(f'compiling for {topology.name}, batch {batch}: takes minutes for a large network ...')
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        return plan(False, *_out_of_memory(e), {}, {}, time.perf_counter() - began)
    seconds, needed = time.perf_counter() - began, _bytes(compiled.memory_analysis())
    text = compiled.as_text()
    found = hlo.analyze(text)
    cost = _cost(compiled.cost_analysis(), found['cycles'], topology)
    return plan(
        fits=None if topology.memory is None else needed <= topology.memory,
        bytes_per_device=needed,
        memory_per_device=topology.memory,
        collectives={
            kind: {**entry, 'seconds': _transfer(kind, entry['bytes'], topology)}
            for kind, entry in sorted(found['collectives'].items())
        },
        cost=cost | _roofline(text, topology, schedules),
        compile_s=seconds,
    )


def find_batch(
    lower: Lower,
    divides: Callable[[int], bool],
    name: str,
    batch: int,
    unit: int,
    topology: Topology,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[int, list[Plan]]:
    """Estimates the largest batch that fits, by linear extrapolation of the memory of two batches.

    `batch` is the larger one of the two, for TPUs rounded up to at least 256 rows per device, because their
    compiler pads rows to multiples of 128. Batches are multiples of `unit`; `divides` returns whether the
    devices can share a batch. The other arguments are those of `make_plan`.

    Returns:
        The batch, 0 if none fits, and the two plans, the smaller batch first.

    Raises:
        InputError: the memory is unknown, or the batch is too small.
    """
    if topology.memory is None:
        raise InputError(f'--find-batch: the memory of {topology.name} is unknown')
    unit *= 128 if topology.platform == 'tpu' else 1

    def largest(limit: int) -> int:
        return next((n for n in range(limit // unit * unit, 0, -unit) if divides(n)), 0)

    larger = max(2, -(-batch // unit)) * unit if topology.platform == 'tpu' else batch
    smaller = largest(larger // 2)
    if not smaller:
        raise InputError(f'--find-batch: a batch of {larger} cannot be halved; give a larger --batch')
    plans = [make_plan(lower, name, size, topology, report) for size in (smaller, larger)]
    low, high = (plan.bytes_per_device for plan in plans)
    if high <= low:
        raise InputError(
            f'--find-batch: {smaller} and {larger} rows need equal memory; give a larger --batch'
        )
    room = min(plan.memory_per_device or 0 for plan in plans) - low
    return largest(max(0, int(smaller + room * (larger - smaller) / (high - low)))), plans


def _bytes(memory: Any) -> int:
    """Returns the peak: arguments, results that do not reuse them, temporaries and the program."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _out_of_memory(error: Exception) -> tuple[int, int]:
    """Returns the needed and the available bytes from a compiler's error; raises any other error again."""
    sizes = re.findall(r'([\d.]+)([KMG])\b', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or len(sizes) < 2:
        raise error
    units = {'K': 2**10, 'M': 2**20, 'G': GIB}
    needed, available = (int(float(number) * units[unit]) for number, unit in sizes[:2])
    return needed, available


def _transfer(kind: str, size: int, topology: Topology) -> float | None:
    """Returns the seconds of a collective with results of `size` bytes, on rings of all devices."""
    count = len(topology.devices)
    if topology.reduce_rate is None:
        return 0.0 if count == 1 else None
    rounds = 2 if kind == 'all-reduce' else 1  # scatter-reduce, then gather
    return rounds * size * (count - 1) / count / topology.reduce_rate


def _cost(analysis: dict[str, float], cycles: int, topology: Topology) -> dict[str, Any]:
    cost: dict[str, Any] = {
        name: int(analysis.get(name.replace('_', ' '), 0)) for name in ('flops', 'bytes_accessed')
    }
    if topology.platform == 'tpu':
        cost['estimated_cycles'] = cycles
        cost['seconds'] = cycles / topology.clock if topology.clock else None
    return cost


def _roofline(text: str, topology: Topology, schedules: str | None) -> dict[str, Any]:
    if topology.bandwidth is None:
        return {}
    kernels = schedule.read_kernels(schedules) if schedules and topology.clock else {}
    clock = topology.clock or 1e9  # any, if only the bytes count
    found = schedule.roofline(text, kernels, topology.bandwidth / clock)
    return {
        'hbm_bytes': found.hbm_bytes,
        'roofline_seconds': found.roofline_cycles / clock,
        'scheduled': bool(kernels),
    }


def describe(plan: Plan) -> list[str]:
    """Returns the lines that `epsanet plan` prints."""
    fits = {True: 'fits', False: 'DOES NOT FIT', None: 'memory of the device unknown'}[plan.fits]
    available = '' if plan.memory_per_device is None else f' of {_amount(plan.memory_per_device, "B")}'
    lines = [
        f'{plan.model} on {plan.topology}: {plan.devices} devices, batch {plan.batch}, '
        f'{plan.batch // plan.devices} rows per device',
        f'memory:      {_amount(plan.bytes_per_device, "B")}{available} per device: {fits}',
    ]
    for kind, entry in plan.collectives.items():
        line = f'{kind + ":":<12} {entry["count"]}, in all {_amount(entry["bytes"], "B")}'
        if entry['seconds'] is not None:
            line += f', {entry["seconds"] * 1e3:.2f} ms at the published rate'
        lines.append(line)
    if plan.cost:
        cost = f'{_amount(plan.cost["flops"], "FLOP")}, {_amount(plan.cost["bytes_accessed"], "B")} accessed'
        if 'estimated_cycles' in plan.cost:
            cost += f', {_amount(plan.cost["estimated_cycles"], "cycles")}'
        lines.append(f'compiler:    {cost} per device')
    if plan.seconds:
        speed = f'{plan.batch / plan.seconds:,.0f} images/s'
        lines.append(
            f"modelled:    {plan.seconds * 1e3:.1f} ms per step, {speed}, by the compiler's estimate: rough"
        )
    least = plan.cost.get('roofline_seconds')
    if least:
        bound = 'the schedules and the memory' if plan.cost['scheduled'] else 'the memory alone'
        moved = _amount(plan.cost['hbm_bytes'], 'B')
        lines.append(
            f'roofline:    {least * 1e3:.1f} ms per step or more, {plan.batch / least:,.0f} images/s, '
            f'by {bound}: {moved} through the HBM of each device'
        )
    return [*lines, f'compiled in  {plan.compile_s:.0f} s']


def _amount(number: float, unit: str) -> str:
    """Returns a number with a unit and the prefix that makes it less than 1000."""
    for prefix in ('', 'k', 'M', 'G', 'T'):
        if number < 1000 or prefix == 'T':
            break
        number /= 1000
    return f'{number:.3g} {prefix}{unit}'
