"""How a run ended."""

import json
import types

import pytest
from etils import epath
from runs import (
    lines,
    recipe,
)

from epsanet_jax.analysis import goodput, plot
from epsanet_jax.training import loop
from epsanet_jax.training.config import (
    Config,
)
from epsanet_jax.training.init_from import Start
from epsanet_jax.training.result import make_result


def test_the_time_of_a_run_is_that_of_its_own_steps(tmp_path):
    """A run of 100 steps of 100 images at 100 images/s that continues a training of 1,000 steps."""
    written = [{'split': 'train', 'step': step, 'images_per_s': 100.0} for step in (1050, 1100)]
    written.append({'split': 'eval', 'step': 1100, 'loss': 1.0, 'top1': 0.5, 'top5': 0.9, 'examples': 10})
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in written))
    config = Config(batch_size=100)
    run = types.SimpleNamespace(
        workdir=epath.Path(tmp_path), config=config, start=Start(10.0, 0.1), steps_per_epoch=100.0
    )
    result = make_result(run, 1100, 'runs/x')
    assert (result.seconds, result.images_per_s) == (100.0, 100.0)
    assert 'time: 0:01:40 of training steps' in str(result)


def test_the_result_shows_the_accuracy_the_files_and_the_next_commands(watched):
    workdir, result = watched
    text = str(result)
    assert 'finished at step 6' in text
    assert f'EMA top-1 {result.last["ema_top1"]:.2%}' in text
    assert f'best: top-1 {result.best["ema_top1"]:.2%} at step 6 ({workdir}/checkpoints/6)' in text
    assert f'evaluate it: epsanet evaluate {workdir} --step best' in text
    timed = [line for line in lines(workdir) if line['split'] == 'train' and line['images_per_s']]
    assert result.seconds == pytest.approx(sum(16 / line['images_per_s'] for line in timed))
    assert f'{result.images_per_s:.1f} images/s' in text
    assert (workdir / 'checkpoints' / '6').is_dir()


def test_a_finished_run_is_not_changed_and_has_the_same_result(uninterrupted, capsys):
    workdir, result = uninterrupted
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
    assert loop.train(recipe(), str(workdir)) == result
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before
    assert capsys.readouterr().out == ''


def test_the_wall_time_of_a_run_that_was_killed_is_explained(watched):
    workdir, result = watched
    times = [x for x in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines()) if 'at' in x]
    first, second = (i for i, x in enumerate(times) if 'began' in x)
    assert (times[first]['step'], times[second]['step']) == (0, 3)
    again = [x for x in times[:second] if x['step'] > 3]
    assert {x['step'] for x in again} == {4, 5}
    assert result.goodput['lost'] == pytest.approx(sum(x['steps'] + x.get('waiting', 0) for x in again))
    assert min(result.goodput.values()) >= 0
    assert sum(result.goodput.values()) == pytest.approx(times[-1]['at'] - times[0]['began'], abs=0.1)
    assert f'wall time: {goodput.describe(result.goodput)}' in str(result)
    assert f'run: wall time {goodput.describe(result.goodput)}' in plot.plot(
        [str(workdir)], str(workdir / 'x.png')
    )
