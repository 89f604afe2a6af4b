"""The benchmark scripts run and choose correctly; their measurements are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / 'benchmarks'
SHARED = (
    'common',
    'gpu_adopt',
    'gpu_candidates',
    'gpu_triton',
    'zoo_models',
    'zoo_plot',
    'zoo_shapes',
)  # modules that are not scripts


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.usefixtures('scripts')
def test_every_convolution_is_measured_and_the_fastest_algorithm_is_written(tmp_path, monkeypatch):
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
def choices(scripts, tmp_path, monkeypatch):
    """Returns the module `tpu_choices`, which reads and writes a temporary table."""
    import tpu_choices

    monkeypatch.setattr(tpu_choices.grouped_conv, 'TABLE', tmp_path / tpu_choices.choice.TABLE)
    monkeypatch.setattr(tpu_choices.choice.resources, 'files', lambda package: tmp_path)
    yield tpu_choices
    monkeypatch.undo()
    tpu_choices.choice.reload()


def pyramid(choices, kernels, groups, stride=1):
    """Writes rows without joint algorithms into the table; returns their convolutions."""
    problems = []
    for k, g in zip(kernels, groups, strict=True):
        problems.append(choices.choice.Problem(k, stride, g, 64, 32, 56, 128, 'bfloat16'))
        row = dict.fromkeys(choices.choice.DIRECTIONS, choices.Algorithm('merged', g))
        choices.grouped_conv.write('tpu', problems[-1], row)
    return problems


def chosen_for(choices, problems):
    choices.choice.reload()
    return [choices.choice.choose('tpu', problem) for problem in problems]


def joint_groups(choices, problems, direction):
    """Returns the number of groups of the joint convolution, or None if they are not one convolution."""
    chosen = [getattr(row, direction) for row in chosen_for(choices, problems)]
    groups = {p.groups // a.merge for p, a in zip(problems, chosen, strict=True)}
    return groups.pop() if {a.name for a in chosen} == {'joint'} and len(groups) == 1 else None


@pytest.mark.parametrize('cheapest', [8, 4, 3])
def test_neighbours_are_joined_with_the_groups_that_make_their_block_cheapest(choices, cheapest):
    problems = pyramid(choices, (5, 7, 9), (4, 8, 16))

    def cost():
        return 90 if joint_groups(choices, problems[1:], 'input_gradient') == cheapest else 100

    sets = list(choices.together(problems))
    assert sets == [(pair, ('input_gradient',)) for pair in (tuple(problems[:2]), tuple(problems[1:]))]
    before = chosen_for(choices, problems)
    rejected = choices.join(*sets[0], cost, 'tpu')
    assert rejected == {
        'cycles_per_image_before': 100,
        'cycles_per_image': 100,
        'groups': {},
        'by_phase': [],
    }
    assert chosen_for(choices, problems) == before
    record = choices.join(*sets[1], cost, 'tpu')
    after = chosen_for(choices, problems)
    if cheapest == 3:  # divides neither number of groups
        assert record['groups'] == {}
        assert after == before
    else:
        assert record['cycles_per_image'] == cost() == 90
        assert record['groups'] == {'input_gradient': cheapest}
        assert after[0] == before[0]
        assert [row[::2] for row in after] == [row[::2] for row in before]  # the other two directions


def test_a_pyramid_of_equal_groups_is_joined_where_that_is_cheaper(choices):
    problems = pyramid(choices, (3, 5, 7), (32, 32, 32))
    cheapest = {'input_gradient': 32, 'weight_gradient': 2}

    def cost():
        left = {d: joint_groups(choices, problems, d) for d in choices.choice.DIRECTIONS}
        return 100 + 5 * (left['forward'] is not None) - sum(left[d] == g for d, g in cheapest.items())

    ((members, directions),) = choices.together(problems)
    assert list(members) == problems
    assert set(directions) == set(choices.choice.DIRECTIONS)
    record = choices.join(members, directions, cost, 'tpu')
    assert record == {
        'cycles_per_image_before': 100,
        'cycles_per_image': 98,
        'groups': cheapest,
        'by_phase': [],
    }
    assert cost() == 98


@pytest.mark.parametrize(('stride', 'kept'), [(1, []), (2, ['input_gradient'])])
def test_phases_are_tried_only_with_a_stride(choices, stride, kept):
    problems = pyramid(choices, (7, 9), (8, 16), stride)

    def cost():
        return 100 - sum(row.input_gradient.phases for row in chosen_for(choices, problems))

    record = choices.join(problems, ('input_gradient',), cost, 'tpu')
    assert record['by_phase'] == kept
    assert record['cycles_per_image'] == cost() == 100 - 2 * len(kept)


@pytest.mark.parametrize('script', sorted(p.name for p in FOLDER.glob('*.py') if p.stem not in SHARED))
@pytest.mark.slow
def test_every_script_has_a_help_text(script, tmp_path):
    process = subprocess.run(
        [sys.executable, FOLDER / script, '--help'], capture_output=True, text=True, cwd=tmp_path
    )
    assert (process.returncode, process.stdout.startswith('usage: '), process.stderr) == (0, True, '')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_step_measures_both_frameworks(tmp_path):
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
def test_results_are_written_under_the_platform_name_that_the_package_looks_up(platform, version, key):
    import grouped_conv

    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    assert grouped_conv.table_key(device) == key
    assert key in grouped_conv.choice.PLATFORMS


@pytest.mark.parametrize('script', ['train_step', 'grouped_conv'])
def test_the_benchmarks_run_without_the_data_packages(script):
    program = f"""
import sys
for name in ('ml_collections', 'grain', 'tensorflow_datasets', 'PIL', 'sklearn', 'safetensors', 'tqdm'):
    sys.modules[name] = None
sys.path.insert(0, {str(FOLDER)!r})
import {script}
from epsanet_jax.convert import torch_model
"""
    subprocess.run([sys.executable, '-c', program], check=True)


@pytest.mark.usefixtures('scripts')
def test_the_results_of_the_repository_can_be_plotted(tmp_path, monkeypatch):
    import plot

    results = Path(__file__).parents[2] / 'benchmarks/results'
    monkeypatch.setattr('sys.argv', ['plot.py', str(results), str(tmp_path / 'figure.png')])
    plot.main()
    assert (tmp_path / 'figure.png').stat().st_size > 10_000


@pytest.mark.usefixtures('scripts')
def test_the_plot_groups_bars_by_network_and_compares_with_the_resnet_of_the_same_depth():
    import plot

    def line(model, conv, cycles):
        line = {'benchmark': 'tpu_cost', 'topology': 'v5e:2x4', 'model': model, 'conv': conv}
        return {**line, 'cycles_per_image': cycles}

    lines = [
        line('resnet101', 'auto', 5e6),
        line('epsanet50_small', 'stock', 4e6),
        line('epsanet50_small', 'auto', 3e6),
        line('resnet50', 'auto', 2e6),
        {**line('resnet50', 'auto', 1), 'block': 'layer1_0'},
    ]
    assert plot.tpu_groups(lines) == {
        'ResNet-50': {'auto': (2, '2.00')},
        'EPSANet-50 Small': {'auto': (3, '3.00 (1.50x ResNet)'), 'stock': (4, '4.00 (2.00x ResNet)')},
        'ResNet-101': {'auto': (5, '5.00')},
    }
