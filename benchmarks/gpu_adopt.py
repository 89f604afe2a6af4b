"""What `gpu.py` measured, as rows of the table of algorithms and as Markdown.

Rows are for the platform 'cuda'. Per direction, the fastest algorithm is chosen if it saves at least MARGIN
of the time of XLA's own and its results agree. Convolutions of a pyramid are computed together where that
saves as much. Candidates that the package does not have are only shown.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from grouped_conv import write

from epsanet_jax.errors import InputError
from epsanet_jax.ops.algorithms import Algorithm
from epsanet_jax.ops.choice import DIRECTIONS, Problem

MARGIN = 0.03  # of the time: smaller gains may be noise
# Of the time, for XLA's own convolutions of groups with fewer outputs than inputs to be chosen. cuDNN has
# several kernels for them, and which one a program gets varies: one took 0.22 ms alone, 0.55 ms in a step.
GROUPED_MARGIN = 0.1
TOLERANCE = 0.02  # relative distance from XLA's own result, in bfloat16
TABLE = Path('epsanet_jax/ops/choices.json')
PAGE = Path('docs/performance.md')
MARKS = '<!-- GPU: begin -->', '<!-- GPU: end -->'
STOCK = Algorithm('stock')
Lines = Sequence[dict[str, Any]]
Times = dict[Any, float]  # ms by algorithm, candidate or side of PyTorch


def adopt(folder: Path, root: Path, rehearsal: bool) -> list[Path]:
    """Writes the rows, the page's tables and the lines into the files of a checkout; returns these files.

    Raises:
        InputError: the folder holds no lines, or those of a rehearsal that is not wanted, or the page has no
            place for the tables. No file is changed.
    """
    lines = common.read_lines(folder / 'lines.jsonl')
    measured = [line for line in lines if 'platform' in line]
    if not measured:
        raise InputError(f'nothing was measured in {folder}')
    if not rehearsal and any(line['platform'] == 'cpu' for line in measured):
        raise InputError(f'{folder} holds a rehearsal: it can only be adopted with --into')
    page = (root / PAGE).read_text()
    parts = re.split(f'({MARKS[0]}\n|{MARKS[1]}\n)', page)
    if len(parts) != 5:
        raise InputError(f'{root / PAGE} needs the lines {MARKS[0]!r} and {MARKS[1]!r} once, in this order')
    device = re.sub(r'\W+', '_', measured[0]['device'].split(' x ')[-1]).lower()
    results = root / 'benchmarks/results' / f'gpu_{device}.jsonl'
    parts[2] = '\n' + '\n'.join(markdown(lines)) + '\n\n'
    write_rows(lines, root / TABLE)
    (root / PAGE).write_text(''.join(parts))
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return [root / TABLE, root / PAGE, results]


def write_rows(lines: Lines, table: Path) -> int:
    """Replaces the rows of what was measured in a table; returns their number."""
    rows = choose(lines)
    for problem, best in rows.items():
        write('cuda', problem, best, table)
    return len(rows)


def times(lines: Lines) -> dict[tuple[Problem, str], Times]:
    """Returns the times of each convolution and direction; those with wrong results are left out."""
    found: dict[tuple[Problem, str], Times] = {}
    for line in lines:
        if 'direction' in line and 'kernel' in line and 'ms' in line and line.get('error', 0) <= TOLERANCE:
            problem = Problem(*(line[field] for field in Problem._fields))
            way = line.get('candidate') or line.get('side') or _algorithm(line['algorithm'])
            found.setdefault((problem, line['direction']), {})[way] = line['ms']
    return found


def choose(lines: Lines) -> dict[Problem, dict[str, Algorithm]]:
    """Returns the fastest algorithm of each convolution that was measured and each direction."""
    found = times(lines)
    rows: dict[Problem, dict[str, Algorithm]] = {}
    spent: dict[tuple[Problem, str], float] = {}
    for (problem, direction), took in found.items():
        ours = {way: ms for way, ms in took.items() if isinstance(way, Algorithm)}
        if STOCK not in ours:
            continue  # nothing to compare with
        fastest = min((way for way in ours if way != STOCK), key=lambda way: ours[way], default=STOCK)
        fewer = problem.groups > 1 and problem.features < problem.channels
        bound = 1 / (1 - GROUPED_MARGIN) if fewer else 1 - MARGIN
        chosen = fastest if ours[fastest] <= bound * ours[STOCK] else STOCK
        rows.setdefault(problem, dict.fromkeys(DIRECTIONS, STOCK))[direction] = chosen
        spent[problem, direction] = ours[chosen]
    gains = []
    for line in lines:
        if 'joint' in line and 'ms' in line and line['error'] <= TOLERANCE:
            members = [Problem(**problem) for problem in line['joint']]
            apart = [spent.get((p, line['direction']), 0.0) for p in members]
            if all(apart) and line['ms'] <= (1 - MARGIN) * sum(apart):
                gains.append((sum(apart) - line['ms'], line['direction'], line['groups'], members))
    for _, direction, groups, members in sorted(gains, key=lambda gain: -gain[0]):
        if all(rows[p][direction].name != 'joint' for p in members):
            for p in members:
                rows[p][direction] = Algorithm('joint', p.groups // groups)
    return rows


def _algorithm(fields: dict[str, Any]) -> Algorithm:
    return Algorithm(**{**fields, 'tile': tuple(fields.get('tile', (1, 1)))})


def markdown(lines: Lines) -> Iterator[str]:
    """Yields the lines of the tables."""
    about = next(line for line in lines if 'jax' in line and 'platform' in line)
    versions = ', '.join(f'{name} {about[name]}' for name in ('jax', 'flax'))
    torch = next((line['torch'] for line in lines if 'torch' in line), 'not measured')
    device = next((line for line in lines if 'tb_per_s' in line), None)
    yield f'{about["device"].split(" x ")[-1]}, {versions}, PyTorch {torch}.'
    if device:
        yield f'It copies {device["tb_per_s"]} TB/s and multiplies matrices at {device["tflops"]} TFLOP/s.'
    yield ''
    yield from _table(
        ('network', 'step', 'batch', 'ours', "XLA's own", 'conv fusion', "PyTorch's best", 'ours / PyTorch'),
        ('the same, queued', 'peak memory, ours', "PyTorch's", 'share of the bytes floor'),
        _steps(lines, device['tb_per_s'] if device else None),
    )
    yield ''
    yield 'Single convolutions, in microseconds for a batch (forward / input gradient / weight gradient):'
    yield ''
    yield from _table(
        ('convolution', "XLA's own", 'chosen', 'PyTorch', 'best candidate'), (), _convolutions(lines)
    )
    yield ''
    yield from _others(lines)


def _table(names: Sequence[str], more: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    names = (*names, *more)
    yield f'| {" | ".join(names)} |'
    yield f'|{"---|" * len(names)}'
    yield from (f'| {" | ".join(row)} |' for row in rows)


def _steps(lines: Lines, bandwidth: float | None) -> Iterator[Sequence[str]]:
    steps: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line.get('benchmark') == 'train_step':
            kind = 'fusion' if line['part'] == 'conv fusion' else line.get('conv', line['side'])
            steps.setdefault((line['model'], line['mode'], line['batch']), {})[kind] = line
    for (model, mode, batch), sides in steps.items():
        rate = {kind: line['images_per_s'] for kind, line in sides.items()}
        torch = max((kind for kind in rate if kind.startswith('torch')), key=lambda k: rate[k], default=None)
        ours, best = sides.get('auto'), sides.get(torch or '')
        ratio = f'{ours["images_per_s"] / best["images_per_s"]:.2f}' if ours and best else ''
        ms = {kind: line['ms_queued'] for kind, line in sides.items() if 'ms_queued' in line}
        torch_ms = min((took for kind, took in ms.items() if kind.startswith('torch')), default=None)
        queued = f'{torch_ms / ms["auto"]:.2f}' if torch_ms and 'auto' in ms else ''
        share = ''
        if ours and ours.get('bytes') and bandwidth:
            share = f'{ours["bytes"] / (bandwidth * 1e12) / (ours["ms"] / 1e3):.2f}'
        yield (
            *(model, mode, str(batch)),
            *(f'{rate[kind]:,.0f}' if kind in rate else '' for kind in ('auto', 'stock', 'fusion')),
            f'{rate[torch]:,.0f} ({torch.removeprefix("torch-")})' if torch else '',
            ratio,
            queued,
            *(f'{s["peak_bytes"] / 1e9:.1f} GB' if s and 'peak_bytes' in s else '' for s in (ours, best)),
            share,
        )


def _convolutions(lines: Lines) -> Iterator[Sequence[str]]:
    found, rows = times(lines), choose(lines)
    for p in dict.fromkeys(problem for problem, _ in found):
        columns: list[list[str]] = [[], [], [], []]
        for direction in DIRECTIONS:
            took = found.get((p, direction), {})
            chosen = rows[p][direction] if p in rows else STOCK
            kinds = (
                {way: ms for way, ms in took.items() if way == STOCK},
                {way: ms for way, ms in took.items() if way == chosen},
                {way: ms for way, ms in took.items() if str(way).startswith('torch-')},
                {
                    way: ms
                    for way, ms in took.items()
                    if isinstance(way, str) and not way.startswith('torch-')
                },
            )
            for cells, kind in zip(columns, kinds, strict=True):
                way = min(kind, key=lambda way: kind[way], default=None)
                text = '-' if way is None else f'{1e3 * kind[way]:.0f}'
                if kind is kinds[1] and chosen != STOCK:
                    text = f'{text} {_short(chosen)}'.removeprefix('- ')
                cells.append(f'{text} {way}' if kind is kinds[3] and way is not None else text)
        name = f'{p.kernel}x{p.kernel}, {p.groups} groups, {p.size}x{p.size}x{p.channels} to {p.features}'
        name += f', stride {p.stride}' if p.stride > 1 else ''
        yield (f'{name}, batch {p.batch}', *(' / '.join(c) for c in columns))


def _short(a: Algorithm) -> str:
    tile = f' {a.tile[0]}x{a.tile[1]}' if a.tile != (1, 1) else ''
    return a.name + (f' {a.merge}' if a.merge > 1 else '') + tile + (' by phase' if a.phases else '')


def _others(lines: Lines) -> Iterator[str]:
    tested = [line for line in lines if line.get('benchmark') == 'gpu_tests' and 'passed' in line]
    for platforms in dict.fromkeys(line['platforms'] for line in tested):
        some = [line for line in tested if line['platforms'] == platforms]
        passed, failed = (sum(line[kind] for line in some) for kind in ('passed', 'failed'))
        yield f'- Tests on {platforms}: {passed} passed, {failed} failed, in {len(some)} files.'
    for line in lines:
        if line.get('benchmark') == 'gpu_train':
            yield (
                f'- A short training of {line["model"]} on {line["image_size"]} px, {line["side"]}: loss '
                f'{line["losses"][0]:.2f} to {line["last_loss"]:.2f} in {line["steps"]} steps, accuracy '
                f'{line["accuracy"]}, {line["images_per_s"]:,.0f} images/s with batch {line["batch"]}.'
            )
    golden = [line['largest_difference'] for line in lines if 'largest_difference' in line]
    if golden:
        equal = sum(difference == 0 for difference in golden)
        yield f'- {equal} of {len(golden)} transforms equal torchvision; largest difference {max(golden)}.'
    for part, status in {line['part']: line['status'] for line in lines if 'status' in line}.items():
        if status != 'done':
            yield f'- Part "{part}": {status}.'
