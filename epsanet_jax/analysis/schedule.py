"""Roofline of a program for a TPU, from the final schedules that its compiler writes; needs no TPU.

The TPU compiler schedules each operation of a compiled program as a list of bundles: instructions that start
in the same cycle. A bundle runs as often as the loops around it. The sum is the compute time of the
operation, or the time that the matrix units need for the rows they get, if that is longer: a schedule may
fill their queue faster than they work. The bytes of its operands and results that lie in HBM, divided by the
bandwidth, are its memory time. The roofline of an operation is the larger of the two; that of a program is
the sum over its operations. Transfers that run beside the operations (`copy-start`) add nothing to the sum,
but a program takes at least the memory time of all bytes.

The roofline is a lower bound. It leaves out waiting inside an operation (for the first data of a transfer, or
for results that come late), transfers that do not fit beside the operations, and other chips.
"""

import collections
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from epsanet_jax.analysis import hlo
from epsanet_jax.errors import InputError

# No work: names for values.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'partition-id', 'replica-id'}
_CONTROL = {'while', 'call', 'conditional'}
_BUNDLE = re.compile(r'^\s*(?:0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:\s')
_EXIT = re.compile(r'%(p\w+) = scmp\.\w+\.\w+\.\w+ (?:\(!?%p\w+\), )?%(s\w+), (\d+) /\* [^*]*loop exit test')
_AGAIN = re.compile(r'sbr\.rel \(!%(p\w+)\)')  # back to where a loop begins, unless the test has ended it
_STEP = re.compile(r'%(s\w+) = sadd\.s32 (\d+), %s')
_ELSEWHERE = re.compile(r'S\([1-9]\d*\)')  # in a layout: another memory than HBM
_DELAY = 4  # bundles after a branch that are still executed
_ROWS = re.compile(r'vmatmul\.(\w+)[\w.]*\.mxu(\d)')
_DUMP = re.compile(r'(\d+)-(.+)-\d+-final_bundles\.txt')
_SHAPE = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?')


class Kernel(NamedTuple):
    """The final schedule of one operation."""

    bundles: int
    cycles: int  # bundles, each as often as the loops around it run, or `matrix_cycles` if they are more
    matrix_cycles: int  # of the busiest matrix unit: one for each row of its left operands
    unknown_loops: int  # loops whose number of trips is not in the schedule; their bodies count once


class Op(NamedTuple):
    """An operation of a program. Loops of the program around it are included in all figures."""

    name: str  # of the instruction
    label: str  # where it comes from in the model
    shape: str  # of the result
    cycles: int | None  # of its schedule; None if the compiler wrote none
    matrix_cycles: int  # of these, those in which the busiest matrix unit gets a row
    hbm_bytes: int
    roofline: float  # cycles


class Roofline(NamedTuple):
    """Totals over a program, for one device.

    Attributes:
        schedule_cycles: compute time of all operations.
        hbm_bytes: bytes read from and written to HBM.
        roofline_cycles: sum of the larger of compute and memory time of each operation, without transfers
            beside them; at least the memory time of all bytes.
        unknown_loops: loops of unknown length, whose bodies count once.
        unscheduled: for each kind of operation, how many have no schedule; only their bytes count.
        ops: the operations, the most expensive first.
    """

    schedule_cycles: int
    hbm_bytes: int
    roofline_cycles: int
    unknown_loops: int
    unscheduled: dict[str, int]
    ops: list[Op]


def write_schedules(folder: str | os.PathLike[str]) -> None:
    """Makes the TPU compiler write the schedules of all that it compiles in this process to a folder.

    Compiling takes two to four times as long.

    Raises:
        InputError: libtpu is already loaded, and would not read the options.
    """
    if Path('/proc/self/maps').exists() and 'libtpu.so' in Path('/proc/self/maps').read_text():
        raise InputError('schedules must be asked for before the TPU compiler is loaded: start a new process')
    options = (
        f'--xla_jf_dump_to={folder}',
        '--xla_jf_dump_llo_text=true',
        '--xla_jf_emit_annotations=true',
        '--xla_jf_dump_llo_pass_label_regex=final_bundles',  # without it, gigabytes for a single block
    )
    os.environ['LIBTPU_INIT_ARGS'] = ' '.join((os.environ.get('LIBTPU_INIT_ARGS', ''), *options)).strip()


def clear(folder: str | os.PathLike[str]) -> None:
    """Removes the schedules of earlier programs from a folder, which may be megabytes to gigabytes."""
    for path in Path(folder).glob('[0-9]*-*'):
        path.unlink()


def read_kernel(path: str | os.PathLike[str]) -> Kernel:
    """Reads a schedule, `*-final_bundles.txt`."""
    bundles: list[str] = []
    for line in Path(path).read_text(errors='replace').splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    steps = {name: int(n) for text in bundles for name, n in _STEP.findall(text) if int(n) < 2**31}
    times, begins, trips = [1] * len(bundles), [], {}
    for i, text in enumerate(bundles):
        if _BUNDLE.match(text).group(1) == 'LB':  # type: ignore[union-attr]
            begins.append(i)
        for test, count, n in _EXIT.findall(text):
            trips[test] = -(-int(n) // steps.get(count, 1))
        again = _AGAIN.search(text)
        if again and again.group(1) in trips and begins:
            loop = slice(begins.pop(), i + 1 + _DELAY)
            times[loop] = [n * max(trips[again.group(1)], 1) for n in times[loop]]
    rows: collections.Counter[str] = collections.Counter()
    for n, text in zip(times, bundles, strict=True):
        for kind, unit in _ROWS.findall(text):
            rows[unit] += n * (16 if kind == 'bf16' else 8)
    busiest = max(rows.values(), default=0)
    return Kernel(len(bundles), max(sum(times), busiest), busiest, len(begins))


def read_kernels(folder: str | os.PathLike[str]) -> dict[str, Kernel]:
    """Returns the schedules in a folder by the name of the operation.

    The compiler may schedule an operation several times, for other sizes of its blocks; the last one counts.
    """
    last: dict[str, tuple[int, Path]] = {}
    for path in Path(folder).glob('*-final_bundles.txt'):
        found = _DUMP.fullmatch(path.name)
        if found and 'schedule-analysis' not in path.name:
            stamp, name = int(found.group(1)), found.group(2)
            last[name] = max(last.get(name, (0, path)), (stamp, path))
    return {name: read_kernel(path) for name, (_, path) in last.items()}


def roofline(text: str, kernels: dict[str, Kernel], bytes_per_cycle: float) -> Roofline:
    """Joins the schedules with the bytes of each operation.

    Args:
        text: the compiled program.
        kernels: from `read_kernels`; without any, only the memory time counts.
        bytes_per_cycle: bandwidth of the HBM divided by the clock.
    """
    computations, entry = hlo.split(text)
    by_computation = _shared(computations, kernels)
    ops: list[Op] = []
    unscheduled: collections.Counter[str] = collections.Counter()
    unknown = 0

    def visit(computation: str, times: int) -> None:
        nonlocal unknown
        shapes = {name: shape for name, shape, _ in map(hlo.operation, computations[computation])}
        for line in computations[computation]:
            name, shape, opcode = hlo.operation(line)
            if opcode in _CONTROL:
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                unknown += opcode == 'while' and trips is None
                for called in re.findall(r'(?:body|to_apply|calls|\w+_computation)=%?([\w.\-]+)', line):
                    visit(called, times * (int(trips.group(1)) if trips else 1))
            elif opcode and opcode not in _FREE and not opcode.endswith('-done'):
                kernel = kernels.get(name) or by_computation.get(_fingerprint(line, computations))
                unknown += kernel.unknown_loops if kernel else 0
                if kernel is None and not opcode.endswith('-start'):
                    unscheduled[opcode] += times
                moved = times * _hbm_bytes(line, shape, opcode, shapes)
                cycles = None if kernel is None else times * kernel.cycles
                limit = 0 if opcode.endswith('-start') else max(cycles or 0, moved / bytes_per_cycle)
                busy = times * kernel.matrix_cycles if kernel else 0
                ops.append(Op(name, _label(line), shape, cycles, busy, moved, limit))

    visit(entry, 1)
    moved = sum(op.hbm_bytes for op in ops)
    return Roofline(
        sum(op.cycles or 0 for op in ops),
        moved,
        round(max(sum(op.roofline for op in ops), moved / bytes_per_cycle)),
        unknown,
        dict(unscheduled),
        sorted(ops, key=lambda op: -op.roofline),
    )


def stored_bytes(shape: str) -> int:
    """Returns the bytes that a shape, or a tuple of shapes, takes in HBM; arrays in other memory take none.

    The layout '{0,3,2,1:T(8,128)S(1)}' names the axes from the innermost, the tile to which the innermost are
    padded, and, unless it is HBM, the memory.
    """
    return sum(_padded_bytes(*array) for array in _SHAPE.findall(shape) if not _ELSEWHERE.search(array[2]))


def _padded_bytes(kind: str, sizes: str, layout: str) -> int:
    dims = [int(size) for size in sizes.split(',') if size]
    order = [int(axis) for axis in layout.partition(':')[0].split(',') if axis] or range(len(dims))[::-1]
    inner = [dims[axis] for axis in order]  # innermost first
    tile = re.search(r'T\(([\d,]+)\)', layout)
    for axis, size in enumerate(reversed([int(n) for n in tile.group(1).split(',')] if tile else [])):
        if axis < len(inner):
            inner[axis] = -(-inner[axis] // size) * size
    return hlo.shape_bytes(f'{kind}[{",".join(map(str, inner))}]')


def _hbm_bytes(line: str, shape: str, opcode: str, shapes: dict[str, str]) -> int:
    if opcode.endswith('-start'):  # a transfer; the result names both ends
        ends = _SHAPE.findall(shape)[:2]
        return min(_padded_bytes(*end) for end in ends) * sum(not _ELSEWHERE.search(end[2]) for end in ends)
    return stored_bytes(shape) + sum(stored_bytes(shapes.get(name, '')) for name in hlo.operands(line))


def _label(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return re.sub(r'jit\(\w+\)/|jvp\((\w*)\)/', '', found.group(1)) if found else '?'


def _fingerprint(line: str, computations: dict[str, list[str]]) -> str:
    """Returns an instruction and the computation that it calls without names and metadata."""
    called = re.search(r'calls=%?([\w.\-]+)', line)
    body = computations.get(called.group(1), []) if called else []
    names = r'^\s*(?:ROOT )?|metadata=\{.*?\}(?=,|$)|backend_config=.*|sharding=.*|%[\w.\-]+'
    return '\n'.join(re.sub(names, '', text).strip(' ,') for text in (line, *body))


def _shared(computations: dict[str, list[str]], kernels: dict[str, Kernel]) -> dict[str, Kernel]:
    """Returns the kernels by fingerprint: equal operations share one schedule, that of the first."""
    found = {}
    for lines in computations.values():
        for line in lines:
            name = hlo.operation(line)[0]
            if name in kernels:
                found[_fingerprint(line, computations)] = kernels[name]
    return found


def describe(ops: list[Op], count: int, images: int) -> Iterator[str]:
    """Yields a line for each of the operations with the largest roofline; figures are per image."""
    sums: dict[tuple[str, str], list[float]] = {}
    for op in ops:
        total = sums.setdefault((op.shape, op.label), [0.0] * 5)
        cycles = op.roofline / 1e3, (op.cycles or 0) / 1e3, op.matrix_cycles / 1e3
        for i, value in enumerate((*cycles, op.hbm_bytes / 1e6)):
            total[i] += value / images
        total[4] += 1
    yield 'k cycles: roofline  schedule  matrix units  MB in HBM  calls  operation'
    for (shape, label), values in sorted(sums.items(), key=lambda item: -item[1][0])[:count]:
        limit, cycles, busy, moved, calls = values
        numbers = f'{limit:18.1f} {cycles:9.1f} {busy:13.1f} {moved:10.2f} {calls:6.0f}'
        yield f'{numbers}  {shape[:40]:40} {label[-90:]}'
