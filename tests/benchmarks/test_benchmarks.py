"""The benchmark scripts, from outside; what they measure is nobody's test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / 'benchmarks'
HLO = """HloModule jit_step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %all-reduce.1 = f32[8]{0} all-reduce(%fusion.1), to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%p, %all-reduce.1)
}

%helper (q: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"5"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%x), condition=%c, body=%body, backend_config={TRIPS}
  %while.2 = (s32[], f32[8]{0}) while(%x), condition=%c, body=%body
  %call.1 = f32[8]{0} call(%x), to_apply=%helper
  %kernel = f32[8]{0} custom-call(), custom_call_target="tpu_kernel", backend_config={"estimated_cycles":"3"}
  ROOT %add.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1"}
}
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.usefixtures('scripts')
def test_the_compilers_cost_counts_loops_and_lists_what_has_no_estimate():
    import tpu_compiler

    found = tpu_compiler.analyze(HLO.replace('TRIPS', '"known_trip_count":{"n":"7"}'))
    assert found['cycles'] == 7 * 10 + 10 + 5 + 1
    assert (found['loops'], found['unknown_loops']) == (2, 1)
    assert found['collectives'] == {'all-reduce': 8}
    assert found['custom_calls'] == {'tpu_kernel': 1}
    assert found['custom_call_cycles'] == 3


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
