"""Reads the compiler's estimates and the collectives from the text of a compiled module."""

import collections
import math
import re
from typing import Any

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
_BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64}  # other names end in the number


def analyze(text: str) -> dict[str, Any]:
    """Returns sums over the text of a compiled module, for one device.

    Returns:
        cycles: sum of the TPU compiler's 'estimated_cycles'; loop bodies count once per iteration.
        loops, unknown_loops: number of loops, and of loops of unknown length, whose bodies count once.
        collectives: for each kind the 'count' and the 'bytes' of the results; they have no estimate.
        custom_calls: number of calls of each target.
        custom_call_cycles: sum of their estimates, which their authors give and `cycles` does not include.
    """
    computations, entry = split(text)
    collectives: dict[str, dict[str, int]] = {}
    custom_calls: collections.Counter[str] = collections.Counter()
    totals = collections.Counter({'cycles': 0, 'loops': 0, 'unknown_loops': 0, 'custom_call_cycles': 0})

    def visit(name: str, times: int) -> None:
        for line in computations[name]:
            found = re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles = times * int(found.group(1)) if found else 0
            _, shape, opcode = operation(line)
            if opcode == 'custom-call':
                target = re.search(r'custom_call_target="([^"]*)"', line)
                custom_calls[target.group(1) if target else '?'] += times
                totals['custom_call_cycles'] += cycles
                continue
            totals['cycles'] += cycles
            kind = next((c for c in COLLECTIVES if opcode in (c, f'{c}-start')), None)
            if kind:
                sums = collectives.setdefault(kind, {'count': 0, 'bytes': 0})
                sums['count'] += times
                sums['bytes'] += times * shape_bytes(shape)
            if opcode == 'while':
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                totals['loops'] += 1
                totals['unknown_loops'] += trips is None
                for body in re.findall(r'body=%?([\w.\-]+)', line):
                    visit(body, times * (int(trips.group(1)) if trips else 1))
            elif opcode in ('call', 'conditional', 'async-start'):
                for called in re.findall(r'(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)', line):
                    visit(called, times)

    visit(entry, 1)
    return {**totals, 'collectives': collectives, 'custom_calls': dict(custom_calls)}


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape in HLO text, or of a tuple of shapes: '(f32[4,2]{1,0}, f32[])'."""
    total = 0
    for kind, sizes in re.findall(r'([a-z]+\d*\w*)\[([\d,]*)\]', shape):
        number = re.search(r'\d+$', kind)
        bits = _BITS.get(kind) or (int(number.group()) if number else 8)
        total += math.prod(int(size) for size in sizes.split(',') if size) * bits // 8
    return total


def operation(line: str) -> tuple[str, str, str]:
    """Returns name, shape and opcode of an instruction: '%name = SHAPE opcode(...)'; '' if it is none."""
    found = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w-]*)\(', line)
    return found.groups() if found else ('', '', '')  # type: ignore[return-value]


def operands(line: str) -> list[str]:
    """Returns the names of an instruction's operands."""
    found = re.search(r' [a-z][\w-]*\(([^()]*)\)', line)
    return re.findall(r'%([\w.\-]+)', found.group(1)) if found else []


def split(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation of a module, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry, current = '', None
    for line in text.splitlines():
        header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{\s*$', line)
        if header:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith('}'):
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry
