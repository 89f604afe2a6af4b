"""What a step needs on devices that need not be there: memory, communication and cost, from the compiler."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from epsanet_jax.analysis import hlo
from epsanet_jax.analysis.topology import GIB, Topology
from epsanet_jax.errors import InputError

Lower = Callable[[int], Any]  # global batch -> jax.stages.Lowered


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says about a training step. All numbers are for one device.

    Attributes:
        model: its name.
        topology: name of the topology.
        devices: their number.
        batch: rows of the global batch.
        fits: whether the step fits into a device's memory; None if that is not known.
        bytes_per_device: parameters, optimizer, batch, program and temporaries at their peak.
        memory_per_device: what the device has; None if not known.
        collectives: by kind: 'count' and 'bytes' in a step, and 'seconds' at the links' published rate, with
            nothing hidden behind computation (None if the rate is not known).
        cost: 'flops', 'bytes_accessed' and, for TPUs, 'estimated_cycles' and 'seconds' at the chip's clock
            (None if not known): the compiler's model, not a measurement.
        compile_s: seconds.
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
        """Of a step by the compiler's model, the collectives after the computation; None if not known."""
        parts = [self.cost.get('seconds'), *(c['seconds'] for c in self.collectives.values())]
        return None if None in parts else sum(parts)


def make_plan(
    lower: Lower, name: str, batch: int, topology: Topology, report: Callable[[str], None] = lambda _: None
) -> Plan:
    """Compiles a step for a topology.

    Args:
        lower: lowers the step for a global batch.
        name: of the model.
        batch: rows of the global batch.
        topology: from `open_topology`.
        report: called with a line before the compiler starts.

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
        needed, there = _out_of_memory(e)
        seconds = time.perf_counter() - began
        return plan(
            fits=False,
            bytes_per_device=needed,
            memory_per_device=there,
            collectives={},
            cost={},
            compile_s=seconds,
        )
    seconds = time.perf_counter() - began
    needed = _bytes(compiled.memory_analysis())
    found = hlo.analyze(compiled.as_text())
    return plan(
        fits=None if topology.memory is None else needed <= topology.memory,
        bytes_per_device=needed,
        memory_per_device=topology.memory,
        collectives={
            kind: {**entry, 'seconds': _transfer(kind, entry['bytes'], topology)}
            for kind, entry in sorted(found['collectives'].items())
        },
        cost=_cost(compiled.cost_analysis(), found['cycles'], topology),
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
    """Finds the largest batch that fits, from a straight line through the memory of two batches.

    Args:
        lower: lowers the step for a global batch.
        divides: whether a batch divides among the devices.
        name: of the model.
        batch: the larger of the two batches to compile. For TPUs it is rounded up to at least 256 rows per
            device, because their compiler pads rows to multiples of 128.
        unit: rows that every batch must be a multiple of.
        topology: from `open_topology`, with known memory.
        report: called with a line before the compiler starts.

    Returns:
        The batch, 0 if none fits, and the two plans, the smaller batch first.

    Raises:
        InputError: the memory is not known, or the batch cannot be halved.
    """
    if topology.memory is None:
        raise InputError(f'--find-batch: the memory of {topology.name} is not known')
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
            f'--find-batch: batches of {smaller} and {larger} need the same memory; give a larger --batch'
        )
    room = min(plan.memory_per_device or 0 for plan in plans) - low
    return largest(max(0, int(smaller + room * (larger - smaller) / (high - low)))), plans


def _bytes(memory: Any) -> int:
    """Returns the peak: arguments, of which results take the place, temporaries, and the program."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _out_of_memory(error: Exception) -> tuple[int, int]:
    """Returns what is needed and what is there, in bytes, of the compiler's error; or raises it again."""
    sizes = re.findall(r'([\d.]+)([KMG])\b', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or len(sizes) < 2:
        raise error
    units = {'K': 2**10, 'M': 2**20, 'G': GIB}
    needed, there = (int(float(number) * units[unit]) for number, unit in sizes[:2])
    return needed, there


def _transfer(kind: str, size: int, topology: Topology) -> float | None:
    """Returns the seconds of a collective whose results have that size, on rings of all devices."""
    count = len(topology.devices)
    if topology.reduce_rate is None:
        return 0.0 if count == 1 else None
    rounds = 2 if kind == 'all-reduce' else 1  # scatter-reduce, then gather
    return rounds * size * (count - 1) / count / topology.reduce_rate


def _cost(analysis: dict[str, float], cycles: int, topology: Topology) -> dict[str, Any]:
    cost: dict[str, Any] = {
        'flops': int(analysis.get('flops', 0)),
        'bytes_accessed': int(analysis.get('bytes accessed', 0)),
    }
    if topology.platform == 'tpu':
        cost['estimated_cycles'] = cycles
        cost['seconds'] = cycles / topology.clock if topology.clock else None
    return cost


def describe(plan: Plan) -> list[str]:
    """Returns the plan as lines for people."""
    fits = {True: 'fits', False: 'DOES NOT FIT', None: 'memory of the device is not known'}[plan.fits]
    there = '' if plan.memory_per_device is None else f' of {_amount(plan.memory_per_device, "B")}'
    lines = [
        f'{plan.model} on {plan.topology}: {plan.devices} devices, batch {plan.batch}, '
        f'{plan.batch // plan.devices} rows each',
        f'memory:      {_amount(plan.bytes_per_device, "B")}{there} a device: {fits}',
    ]
    for kind, entry in plan.collectives.items():
        seconds = (
            '' if entry['seconds'] is None else f', {entry["seconds"] * 1e3:.2f} ms at the published rate'
        )
        lines.append(f'{kind + ":":<12} {entry["count"]} of {_amount(entry["bytes"], "B")} together{seconds}')
    if plan.cost:
        cost = f'{_amount(plan.cost["flops"], "FLOP")}, {_amount(plan.cost["bytes_accessed"], "B")} accessed'
        if 'estimated_cycles' in plan.cost:
            cost += f', {_amount(plan.cost["estimated_cycles"], "cycles")}'
        lines.append(f'compiler:    {cost} a device')
    if plan.seconds:
        rate = plan.batch / plan.seconds
        lines.append(
            f'modelled:    {plan.seconds * 1e3:.1f} ms a step, {rate:,.0f} images/s, from the compiler'
        )
    return [*lines, f'compiled in  {plan.compile_s:.0f} s']


def _amount(number: float, unit: str) -> str:
    """Returns a number with its unit and the prefix that leaves 1 to 1000."""
    for prefix in ('', 'k', 'M', 'G', 'T'):
        if number < 1000 or prefix == 'T':
            break
        number /= 1000
    return f'{number:.3g} {prefix}{unit}'
