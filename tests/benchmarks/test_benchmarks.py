"""The benchmark scripts, from outside; what they measure is nobody's test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.usefixtures('scripts')
def test_every_convolution_of_a_network_is_measured_and_the_best_is_written(tmp_path, monkeypatch):
    import grouped_conv

    problems = grouped_conv.problems('epsanet50_small', 4, 'float32', 64)
    kernels = {(p.kernel, p.groups) for p in problems}
    assert kernels == {(7, 1), (1, 1), (3, 1), (5, 4), (7, 8), (9, 16)}
    assert len(set(problems)) == len(problems)
    small = grouped_conv.Problem(5, 1, 4, 8, 4, 6, 2, 'float32')
    costs = grouped_conv.measure(small, 'weight_gradient', 'cpu', None, limit=3)
    assert all(cost['ms'] > 0 for cost in costs.values())
    assert {'merged', 'tiled', 'folded'} <= {algorithm.name for algorithm in costs}

    monkeypatch.setattr(grouped_conv, 'TABLE', tmp_path / 'choices.json')
    for algorithm in (next(iter(costs)), grouped_conv.Algorithm('tiled', 2, (2, 4))):
        grouped_conv.write('cpu', small, dict.fromkeys(grouped_conv.DIRECTIONS, algorithm))
    rows = json.loads((tmp_path / 'choices.json').read_text())['cpu']
    assert [row['forward'] for row in rows] == [{'name': 'tiled', 'merge': 2, 'tile': [2, 4]}]


@pytest.fixture
def branches(scripts, tmp_path, monkeypatch):
    """The script that chooses, on a table of its own with three branches, none of them joint."""
    import tpu_choices

    choice, grouped_conv = tpu_choices.choice, tpu_choices.grouped_conv
    monkeypatch.setattr(grouped_conv, 'TABLE', tmp_path / choice.TABLE)
    monkeypatch.setattr(choice.resources, 'files', lambda package: tmp_path)
    each = ((5, 4, 'stock'), (7, 8, 'merged'), (9, 16, 'tiled'))
    problems = [choice.Problem(k, 1, g, 64, 16, 56, 128, 'bfloat16') for k, g, _ in each]
    for problem, (_, _, name) in zip(problems, each, strict=True):
        algorithm = tpu_choices.Algorithm(name)
        grouped_conv.write('tpu', problem, dict.fromkeys(choice.DIRECTIONS, algorithm))
    choice.reload()
    yield tpu_choices, problems
    monkeypatch.undo()
    choice.reload()


@pytest.mark.parametrize(('cheapest', 'merges'), [(8, (1, 2)), (4, (2, 4)), (2, None)])
def test_neighbours_are_joined_in_the_groups_that_make_their_block_cheapest(branches, cheapest, merges):
    tpu_choices, problems = branches
    choice = tpu_choices.choice

    def cost():
        choice.reload()
        chosen = [choice.choose('tpu', problem).input_gradient for problem in problems[1:]]
        joint = {a.name for a in chosen} == {'joint'}
        groups = {p.groups // a.merge for p, a in zip(problems[1:], chosen, strict=True)}
        return 90 if joint and groups == {cheapest} else 100

    before = [choice.choose('tpu', problem) for problem in problems]
    rejected = tpu_choices.join(tuple(problems[:2]), cost)
    assert rejected == {'cycles_per_image_before': 100, 'cycles_per_image': 100, 'groups': None}
    record = tpu_choices.join(tuple(problems[1:]), cost)
    assert record['cycles_per_image'] == cost() == (90 if merges else 100)
    assert record['groups'] == (cheapest if merges else None)
    if merges:
        joint = [tpu_choices.Algorithm('joint', merge) for merge in merges]
        before[1:] = [c._replace(input_gradient=a) for c, a in zip(before[1:], joint, strict=True)]
    assert [choice.choose('tpu', problem) for problem in problems] == before


@pytest.mark.slow
def test_both_frameworks_take_turns_at_the_step(tmp_path):
    out = tmp_path / 'lines.jsonl'
    arguments = ['--batch', '2', '--image-size', '32', '--modes', 'forward', '--rounds', '1', '--out']
    one_device = {**os.environ, 'XLA_FLAGS': ''}
    subprocess.run([sys.executable, FOLDER / 'train_step.py', *arguments, out], check=True, env=one_device)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line['side'] for line in lines] == ['ours', 'torch-nchw', 'torch-channels-last']
    best = max(line['images_per_s'] for line in lines[1:])
    assert lines[0]['ratio'] == pytest.approx(lines[0]['images_per_s'] / best, rel=0.02)
    assert lines[0]['peak_bytes'] > 0
    assert {line['mode'] for line in lines} == {'forward'}


@pytest.mark.usefixtures('scripts')
@pytest.mark.parametrize(
    ('platform', 'version', 'key'),
    [('cpu', '<unknown>', 'cpu'), ('gpu', 'PJRT C API\ncuda 12090', 'cuda'), ('gpu', 'rocm 60000', 'rocm')],
)
def test_what_is_measured_on_a_platform_is_what_the_package_looks_up_there(platform, version, key):
    import grouped_conv

    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    assert grouped_conv.table_key(device) == key
    assert key in grouped_conv.choice.PLATFORMS


@pytest.mark.parametrize('script', ['train_step', 'grouped_conv'])
def test_the_benchmarks_run_where_nothing_reads_data(script):
    program = f"""
import sys
for name in ('ml_collections', 'grain', 'tensorflow_datasets', 'PIL', 'sklearn', 'safetensors', 'tqdm'):
    sys.modules[name] = None
sys.path.insert(0, {str(FOLDER)!r})
import {script}
from epsanet_jax.convert import torch_model
"""
    subprocess.run([sys.executable, '-c', program], check=True)
