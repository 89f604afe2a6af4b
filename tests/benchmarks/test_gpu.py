"""`benchmarks/gpu.py` runs its plan, continues it and adopts its results; the measurements are not tested."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.errors import InputError
from epsanet_jax.ops import grouped_conv
from epsanet_jax.ops.algorithms import Algorithm
from epsanet_jax.ops.choice import DIRECTIONS, Problem

ROOT = Path(__file__).parents[2]
STOCK, DENSE, TILED = Algorithm('stock'), Algorithm('merged', 4), Algorithm('tiled', 1, (2, 2))
SMALL, LARGE = (Problem(k, 1, g, 64, 16, 56, 128, 'bfloat16') for k, g in ((7, 8), (9, 16)))


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))


def plain(x, kernel, groups):
    return grouped_conv(x, kernel, groups=groups, algorithm='stock')


@pytest.mark.parametrize(
    ('size', 'inputs', 'outputs'), [(5, 1, 2), pytest.param(3, 2, 1, marks=pytest.mark.slow)]
)
def test_the_kernel_for_thin_groups_computes_a_convolution_and_its_input_gradient(size, inputs, outputs, rng):
    import gpu_triton

    x = rng.standard_normal((1, 5, 18, 2 * inputs), np.float32)  # neither whole rows nor whole columns
    kernel = rng.standard_normal((size, size, inputs, 2 * outputs), np.float32)
    dy = rng.standard_normal((1, 5, 18, 2 * outputs), np.float32)
    expected, transpose = jax.vjp(lambda x: plain(x, kernel, 2), x)
    np.testing.assert_allclose(gpu_triton.convolve(x, kernel, 2, interpret=True), expected, atol=1e-5)
    result = gpu_triton.input_gradient(jnp.asarray(kernel), jnp.asarray(dy), 2, interpret=True)
    np.testing.assert_allclose(result, transpose(dy)[0], atol=1e-5)


def test_the_kernel_for_thin_groups_can_be_lowered_for_a_gpu():
    import gpu_triton

    x = jax.ShapeDtypeStruct((8, 56, 56, 64), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((9, 9, 4, 16), jnp.bfloat16)
    traced = jax.jit(lambda x, kernel: gpu_triton.convolve(x, kernel, 16)).trace(x, kernel)
    assert 'triton' in traced.lower(lowering_platforms=('cuda',)).as_text()


def test_padded_channels_do_not_change_a_convolution(rng):
    import gpu_candidates

    problem = Problem(3, 2, 4, 12, 8, 6, 2, 'float32')
    x, kernel = rng.standard_normal((2, 6, 6, 12), np.float32), rng.standard_normal((3, 3, 3, 8), np.float32)
    window = gpu_candidates.window(problem)
    result = gpu_candidates.padded(jnp.asarray(x), jnp.asarray(kernel), window, 4, 2, (8, 8))
    expected = grouped_conv(x, kernel, groups=4, stride=2, algorithm='stock')
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_the_plan_takes_twelve_minutes_and_begins_with_the_op_and_the_step():
    import gpu

    parts = gpu.plan(Path('out'), Path('images.npz'), rehearse=False)
    assert sum(part.seconds for part in parts if not part.later) <= 720
    assert parts == sorted(parts, key=lambda part: part.later)
    assert [part.name for part in parts][:3] == ['device', 'op epsanet50_small', 'ours']
    assert {'torch', 'torch compiled', 'stock', 'tests on the GPU'} <= {p.name for p in parts if not p.later}
    assert len({part.name for part in parts}) == len(parts)
    rehearsal = gpu.plan(Path('out'), Path('images.npz'), rehearse=True)
    assert [part.name for part in rehearsal] == [part.name for part in parts]
    without = gpu.plan(Path('out'), None, rehearse=False)
    assert {part.name for part in parts} - {part.name for part in without} == {
        'training, ours',
        'training, torch',
    }


SCRIPTS = {
    'good.py': 'print(\'{"value": 1}\'); print("not a record"); print(1)',
    'bad.py': 'import sys; print(\'{"value": 2}\'); sys.exit("out of memory")',
    'slow.py': 'import time; print(\'{"value": 3}\', flush=True); time.sleep(600)',
}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Returns a function that runs these scripts, given as (name, seconds), and returns its lines."""
    import gpu

    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(gpu, 'HERE', tmp_path)

    def run(*parts, minutes=5):
        made = [gpu.Part(name, seconds, [f'{name.split()[0]}.py']) for name, seconds in parts]
        monkeypatch.setattr(gpu, 'plan', lambda *_: made)
        out = str(tmp_path / 'out')
        monkeypatch.setattr(sys, 'argv', ['gpu.py', '--out', out, '--minutes', str(minutes)])
        gpu.main()
        return gpu.common.read_lines(tmp_path / 'out/lines.jsonl')

    return run


def test_a_part_that_fails_or_hangs_leaves_its_lines_and_does_not_stop_the_others(planned, capsys):
    lines = planned(('bad', 60), ('slow', 1), ('good', 60), ('good too', 600))
    assert [line['value'] for line in lines if 'value' in line] == [2, 3, 1]
    bad, slow, good = (line for line in lines if 'status' in line)
    assert (bad['status'], bad['exit_status'], bad['last_line']) == ('failed', 1, 'out of memory')
    assert (slow['part'], slow['status']) == ('slow', 'stopped after 2 s')
    assert (good['part'], good['status']) == ('good', 'done')
    first, *parts = capsys.readouterr().out.splitlines()
    assert first.startswith('4 parts, 0 done before')
    assert len(parts) == 4
    assert '4 of 4 good too: not started, planned 600 s, left 2' in parts[-1]


def test_a_second_call_starts_with_what_is_missing_and_repeats_failures_last(planned, tmp_path, capsys):
    planned(('bad', 60), ('good', 60))
    with (tmp_path / 'out/lines.jsonl').open('a') as file:
        file.write('{"part": "good again", "val')  # killed in the middle of a line
    capsys.readouterr()
    planned(('bad', 60), ('good', 60), ('good again', 60))
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith('1 of 2 good again: done')
    assert second.startswith('2 of 2 bad: failed')


def test_a_record_is_not_joined_to_a_line_that_was_cut_off(tmp_path):
    import common
    import gpu

    path = tmp_path / 'lines.jsonl'
    path.write_text('{"a": 1}\n{"b": ')
    gpu.Recorder(path)({'c': 2})
    assert common.read_lines(path) == [{'a': 1}, {'c': 2}]


def test_measurements_and_rehearsals_are_not_mixed(planned, monkeypatch, capsys):
    planned(('good', 60))
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--rehearse'])
    import gpu

    with pytest.raises(SystemExit) as error:
        gpu.main()
    assert error.value.code == 2
    assert 'holds measurements: use another --out' in capsys.readouterr().err


def timed(problem, algorithm, ms, direction='forward', **more):
    fields = {k: v for k, v in algorithm._asdict().items() if v != getattr(Algorithm(''), k)}
    line = {'platform': 'gpu', 'device': '1 x H100', 'jax': '1', 'flax': '2', **problem._asdict()}
    return {**line, 'direction': direction, 'algorithm': fields, 'ms': ms, 'error': 0.0, **more}


def test_the_fastest_correct_algorithm_is_chosen_if_it_is_clearly_faster():
    import gpu_adopt

    lines = [
        *(timed(SMALL, STOCK, 1.0, direction) for direction in DIRECTIONS),
        timed(SMALL, DENSE, 0.5),
        timed(SMALL, TILED, 0.4, error=0.1),  # wrong
        timed(SMALL, DENSE, 1.12, 'input_gradient'),
        timed(SMALL, TILED, 0.9, 'weight_gradient'),
        timed(SMALL, DENSE, 0.95, 'weight_gradient'),
        timed(LARGE, DENSE, 0.1),  # nothing to compare with
    ]
    expected = {'forward': DENSE, 'input_gradient': STOCK, 'weight_gradient': TILED}
    assert gpu_adopt.choose(lines) == {SMALL: expected}


@pytest.mark.parametrize(
    ('groups', 'features', 'ms', 'expected'),
    [
        (1, 16, 0.98, STOCK),
        (8, 16, 0.98, DENSE),
        (8, 16, 1.05, DENSE),
        (8, 64, 0.98, STOCK),  # as many outputs as inputs
        (8, 64, 1.05, STOCK),
        (8, 64, 0.95, DENSE),
    ],
)
def test_noise_is_no_gain_but_groups_of_few_outputs_are_xlas_only_if_clearly_faster(
    groups, features, ms, expected
):
    import gpu_adopt

    problem = SMALL._replace(groups=groups, features=features)
    rows = gpu_adopt.choose([timed(problem, STOCK, 1.0), timed(problem, DENSE, ms)])
    assert rows[problem]['forward'] == expected


@pytest.mark.parametrize(('ms', 'joined'), [(1.4, True), (1.49, False)])
def test_convolutions_are_computed_together_where_that_is_faster_than_the_best_of_each(ms, joined):
    import gpu_adopt

    both = {'joint': [SMALL._asdict(), LARGE._asdict()], 'groups': 8, 'direction': 'forward', 'ms': ms}
    lines = [
        timed(SMALL, STOCK, 1.0),
        timed(LARGE, STOCK, 1.0),
        timed(LARGE, DENSE, 0.5),
        {**both, 'error': 0},
    ]
    rows = gpu_adopt.choose(lines)
    chosen = [rows[problem]['forward'] for problem in (SMALL, LARGE)]
    assert chosen == ([Algorithm('joint', 1), Algorithm('joint', 2)] if joined else [STOCK, DENSE])


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that results are adopted into."""
    for name in ('epsanet_jax/ops/choices.json', 'docs/performance.md'):
        (tmp_path / 'copy' / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / 'copy' / name)
    table = tmp_path / 'copy/epsanet_jax/ops/choices.json'
    rows = json.loads(table.read_text())
    del rows['cuda']
    table.write_text(json.dumps(rows))
    return tmp_path / 'copy'


def adopt(folder, checkout, lines, rehearsal=False):
    import gpu_adopt

    (folder / 'lines.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return gpu_adopt.adopt(folder, checkout, rehearsal)


def test_results_become_rows_a_page_and_a_file_of_lines(tmp_path, checkout):
    step = {'platform': 'gpu', 'device': '1 x H100', 'jax': '1', 'flax': '2', 'benchmark': 'train_step'}
    step |= {'model': 'epsanet50_small', 'mode': 'train', 'batch': 256, 'ms': 64.0, 'peak_bytes': 2e10}
    ours = {**step, 'part': 'ours', 'side': 'ours', 'bytes': 6.4e10, 'ms_queued': 50.0}
    torch = {**step, 'part': 'torch', 'torch': '3'}
    lines = [
        {**step, 'part': 'device', 'benchmark': 'gpu_device', 'tb_per_s': 2.0, 'tflops': 700},
        timed(SMALL, STOCK, 1.0),
        timed(SMALL, DENSE, 0.25),
        {**timed(SMALL, STOCK, 0.2), 'candidate': 'Triton kernel'},
        {**ours, 'conv': 'auto', 'images_per_s': 4000.0},
        {**step, 'part': 'stock', 'side': 'ours', 'conv': 'stock', 'images_per_s': 1000.0},
        {**torch, 'side': 'torch-nchw', 'images_per_s': 1600.0, 'ms_queued': 125.0},
        {**torch, 'side': 'torch-channels-last', 'images_per_s': 2000.0},
        {'part': 'tests', 'status': 'failed'},
    ]
    before = json.loads((checkout / 'epsanet_jax/ops/choices.json').read_text())
    for _ in range(2):  # the second time it replaces what it wrote
        table, page, results = adopt(tmp_path, checkout, lines)
        rows = json.loads(table.read_text())
        assert [row['forward'] for row in rows.pop('cuda')] == [{'name': 'merged', 'merge': 4}]
        assert rows == {platform: rows for platform, rows in before.items() if platform != 'cuda'}
        assert [json.loads(line) for line in results.read_text().splitlines()] == lines
        text = page.read_text()
        row = '| epsanet50_small | train | 256 | 4,000 | 1,000 |  | 2,000 (channels-last) | 2.00 '
        assert text.count(f'{row}| 2.50 | 20.0 GB | 20.0 GB | 0.50 |\n') == 1
        assert '| 7x7, 8 groups, 56x56x64 to 16, batch 128 | 1000 / - / - | 250 merged 4 / - / - |' in text
        assert '| 200 Triton kernel / - / - |' in text
        assert '- Part "tests": failed.\n' in text
    untouched = text.split('<!-- GPU: begin -->')[0], text.split('<!-- GPU: end -->')[1]
    assert all(part in (ROOT / 'docs/performance.md').read_text() for part in untouched)


@pytest.mark.parametrize('problem', ['empty', 'rehearsal', 'no place'])
def test_what_cannot_be_adopted_changes_nothing(problem, tmp_path, checkout):
    lines = [] if problem == 'empty' else [timed(SMALL, STOCK, 1.0)]
    if problem == 'rehearsal':
        lines[0]['platform'] = 'cpu'
    if problem == 'no place':
        (checkout / 'docs/performance.md').write_text('# Performance\n')
    before = {path: path.read_bytes() for path in checkout.rglob('*.*')}
    match = {
        'empty': 'nothing was measured in',
        'rehearsal': 'holds a rehearsal',
        'no place': 'needs the lines',
    }
    with pytest.raises(InputError, match=match[problem]):
        adopt(tmp_path, checkout, lines)
    assert {path: path.read_bytes() for path in checkout.rglob('*.*')} == before


def test_test_files_that_need_a_missing_package_are_left_out():
    import gpu_parts

    missing = "E   ModuleNotFoundError: No module named 'grain'\nERROR tests/x.py\n1 error in 0.50s"
    assert gpu_parts.outcome(missing) == {'left_out': 'needs the package grain'}
    failed = (
        "FAILED tests/x.py::test_a - ModuleNotFoundError: No module named 'grain'\n1 failed, 2 passed in 1s"
    )
    counts = {'passed': 2, 'failed': 1, 'skipped': 0, 'error': 0}
    assert gpu_parts.outcome(failed) == {**counts, 'failures': [failed.splitlines()[0]]}
    crashed = gpu_parts.outcome('Fatal Python error: Aborted')
    assert crashed['failures'] == ['Fatal Python error: Aborted']


def test_images_are_packed_with_their_labels(tmp_path, image_folder):
    import gpu_train

    source = next(image_folder.glob('a.png'))
    for name in ('ant', 'bee'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        shutil.copy(source, tmp_path / 'data' / name / 'image.png')
    gpu_train.pack(tmp_path / 'data', tmp_path / 'new/images.npz', size=16, most=5)
    images, labels = gpu_train.load(tmp_path / 'new/images.npz')
    assert (images.shape, images.dtype) == ((2, 16, 16, 3), np.uint8)
    assert sorted(labels) == [0, 1]


@pytest.mark.slow
def test_the_short_training_compiles_its_step_once(tmp_path, monkeypatch, capsys, rng):
    import gpu_train

    images, labels, made = tmp_path / 'images.npz', [0, 1] * 12, []
    gpu_train.save(images, rng.integers(0, 256, (24, 32, 32, 3), np.uint8), labels)
    make = gpu_train.steps.make_train_step
    monkeypatch.setattr(
        gpu_train.steps, 'make_train_step', lambda *a, **k: made.append(make(*a, **k)) or made[0]
    )
    command = ['gpu_train.py', '--images', str(images), '--small', '--batch', '8', '--steps', '3']
    monkeypatch.setattr(sys, 'argv', [*command, '--dtype', 'float32'])
    gpu_train.main()
    assert [step._cache_size() for step in made] == [1]
    line = json.loads(capsys.readouterr().out)
    assert len(line['losses']) == 3
    assert line['accuracy'] is not None


def rehearse(out, **options):
    env = {
        **os.environ,
        'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false',
    }
    command = [sys.executable, ROOT / 'benchmarks/gpu.py', '--rehearse', '--out', out, '--minutes', '600']
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_every_part_runs_after_the_first_call_was_killed_in_the_middle(tmp_path, checkout):
    import common
    import gpu

    out = tmp_path / 'out'
    process = rehearse(out, start_new_session=True)
    while not any(
        'finished' in line for line in common.read_lines(out / 'lines.jsonl')
    ):  # in the second part
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = common.read_lines(out / 'lines.jsonl')
    process = rehearse(out)
    printed = process.communicate()[0].splitlines()
    assert process.returncode == 0
    parts = gpu.plan(out, out / 'images.npz', rehearse=True)
    assert printed[0].startswith(f'{len(parts)} parts, 1 done before')
    assert len(printed) == len(parts)
    lines = common.read_lines(out / 'lines.jsonl')
    assert lines[: len(before)] == before
    assert {line['part']: line['status'] for line in lines if 'status' in line} == {
        p.name: 'done' for p in parts
    }
    finished = [line['finished'] for line in lines if 'finished' in line]
    assert len(set(finished)) == len(finished) == 5 + 4  # convolutions and a pyramid; PyTorch and candidates
    assert not [line for line in lines if 'failed' in line and line['benchmark'] == 'gpu_op']
    assert {line.get('benchmark') for line in lines} >= {
        'gpu_op',
        'train_step',
        'gpu_tests',
        'gpu_golden',
        'gpu_kernels',
        'gpu_train',
    }
    assert all(
        line['passed'] and not line['failed'] for line in lines if line.get('benchmark') == 'gpu_tests'
    )
    ours, theirs = (line['losses'] for line in lines if line.get('benchmark') == 'gpu_train')
    np.testing.assert_allclose(ours[:3], theirs[:3], atol=0.01)
    command = [sys.executable, ROOT / 'benchmarks/gpu.py', '--adopt', out]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count('\n')) == (2, 1)
    subprocess.run([*command, '--into', checkout], check=True)
    assert json.loads((checkout / 'epsanet_jax/ops/choices.json').read_text())['cuda']
    assert '| resnet50 | train | 2 |' in (checkout / 'docs/performance.md').read_text()
