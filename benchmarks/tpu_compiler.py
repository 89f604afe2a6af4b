"""The TPU compiler on a machine without a TPU, and what its output says of the cost.

Needs libtpu, and the environment set before JAX starts: `prepare_environment`.
"""

import collections
import os
import re
import tempfile
from pathlib import Path
from typing import Any

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')


def prepare_environment() -> None:
    """Makes libtpu load without a TPU; call it before JAX is imported."""
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ['JAX_PLATFORMS'] = 'cpu'
    Path(tempfile.gettempdir(), 'libtpu_lockfile').unlink(missing_ok=True)


def devices(topology: str) -> list[Any]:
    """Returns the devices of a topology such as 'v5e:2x4'."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology_name=topology, platform='tpu').devices)
    except Exception as e:
        message = ' '.join(str(e).split())[:300]
        raise SystemExit(f'error: no topology {topology!r}: {message} (is libtpu installed?)') from e


def analyze(text: str) -> dict[str, Any]:
    """Sums the compiler's own estimates over a compiled module's text.

    Returns:
        cycles: 'estimated_cycles' of all operations, bodies of loops times their trip count.
        loops: loops found; unknown_loops: those among them whose trip count is not known, counted once.
        collectives: how many there are of each kind; they carry no estimate.
        custom_calls: targets and how many; their estimate, if any, is what their author says and is in
            custom_call_cycles, not in cycles.
    """
    computations, entry = _computations(text)
    result = {
        'cycles': 0,
        'loops': 0,
        'unknown_loops': 0,
        'collectives': collections.Counter(),
        'custom_calls': collections.Counter(),
        'custom_call_cycles': 0,
    }

    def visit(name: str, times: int) -> None:
        for line in computations[name]:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles = times * int(cycles.group(1)) if cycles else 0
            opcode = re.search(r'[\])}] ([a-z][\w-]*)\(', line)
            opcode = opcode.group(1) if opcode else ''
            if opcode == 'custom-call':
                target = re.search(r'custom_call_target="([^"]*)"', line)
                result['custom_calls'][target.group(1) if target else '?'] += times
                result['custom_call_cycles'] += cycles
                continue
            result['cycles'] += cycles
            kind = next((c for c in COLLECTIVES if opcode in (c, f'{c}-start')), None)
            if kind:
                result['collectives'][kind] += times
            if opcode == 'while':
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                result['loops'] += 1
                result['unknown_loops'] += trips is None
                body = re.search(r'body=%?([\w.\-]+)', line)
                visit(body.group(1), times * (int(trips.group(1)) if trips else 1))
            elif opcode in ('call', 'conditional', 'async-start'):
                for called in re.findall(r'(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)', line):
                    visit(called, times)

    visit(entry, 1)
    return {k: dict(v) if isinstance(v, collections.Counter) else v for k, v in result.items()}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
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
