"""What a run shows: TensorBoard, curves, a profile, how it ended."""

import gzip
import json

import pytest
from command import run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import Killed, kill_after, lines, recipe

from epsanet_jax import InputError
from epsanet_jax.training import loop
from epsanet_jax.training.config import CheckpointConfig, ProfileConfig
from epsanet_jax.training.tensorboard import Events


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    """A run that died after its fifth step, went back to its third and ended, with averages and a profile."""
    workdir = tmp_path_factory.mktemp('watched') / 'run'
    config = recipe(
        log_every_steps=1,
        eval_every_epochs=0.0,
        ema_decay=0.9,
        checkpoint=CheckpointConfig(every_steps=3, every_minutes=0),
        profile=ProfileConfig(start=4, steps=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            loop.train(config, str(workdir))
    return workdir, loop.train(config, str(workdir))


def test_tensorboard_reads_the_same_numbers_each_step_once(watched):
    workdir, _ = watched
    events = EventAccumulator(str(workdir / 'tensorboard'))
    events.Reload()
    for name in ('loss', 'top1', 'lr', 'images_per_s'):
        expected = {
            line['step']: line[name] for line in lines(workdir) if line['split'] == 'train' and line[name]
        }
        read = {event.step: event.value for event in events.Scalars(f'train/{name}')}
        assert read == pytest.approx(expected, rel=1e-6), name
        assert len(events.Scalars(f'train/{name}')) == len(expected)
    (accuracy,) = events.Scalars('eval/ema_top1')
    assert (accuracy.step, accuracy.value) == (6, pytest.approx(lines(workdir)[-1]['ema_top1']))


def test_events_of_steps_that_are_made_again_are_not_read(tmp_path):
    for start, value in ((0, 1.0), (2, 9.0)):
        events = Events(tmp_path, start)
        for step in range(start + 1, 5):
            events.write({'split': 'train', 'step': step, 'loss': value, 'data_wait': None})
        events.close()
    read = EventAccumulator(str(tmp_path / 'tensorboard'))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars('train/loss')] == [(1, 1), (2, 1), (3, 9), (4, 9)]


def test_the_profile_is_of_the_window_and_opens(watched):
    *_, trace = sorted((watched[0] / 'profile').rglob('perfetto_trace.json.gz'))
    content = json.loads(gzip.decompress(trace.read_bytes()))
    assert len(content['traceEvents']) > 10
    assert list((watched[0] / 'profile').rglob('*.xplane.pb'))


def test_a_run_tells_how_it_ended_and_where_everything_lies(watched):
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


def test_curves_of_one_run_and_of_several(watched, tmp_path, capsys):
    workdir, result = watched
    status, out, _ = run(capsys, 'plot', workdir)
    assert status == 0
    assert f'top-1 {result.last["ema_top1"]:.2%}' in out
    with Image.open(workdir / 'curves.png') as picture:
        assert min(picture.size) > 500
        assert len(picture.convert('RGB').getcolors(2**24)) > 10
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'metrics.jsonl').write_bytes(
        b'{"split": "train", "step": 1, "loss": 2.0, "top1": 0.1, "lr": 0.1}\n'
        b'{"split": "eval\xff", "step": 1}\n'
    )
    target = tmp_path / 'both.svg'
    status, out, _ = run(capsys, 'plot', f'{workdir}/', other, '--out', target)
    assert status == 0
    assert 'other: step 1, not evaluated yet' in out
    assert all(f'>{name}<' in target.read_text() for name in ('run', 'other'))
    assert [path.name for path in tmp_path.iterdir() if 'tmp' in path.name] == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere'], 'nowhere holds no metrics.jsonl with metrics of a run'),
        (['{workdir}', '--out', 'curves.gif'], '--out must end with .png, .svg, .pdf, got curves.gif'),
        (['{workdir}', '--out', 'no/such/folder.png'], 'cannot write no/such/folder.png'),
        (['{workdir}', '--out', '{workdir}/metrics.jsonl/x.png'], 'metrics.jsonl/x.png'),
    ],
)
def test_curves_that_cannot_be_drawn(watched, capsys, arguments, message):
    status, out, err = run(capsys, 'plot', *(a.format(workdir=watched[0]) for a in arguments))
    assert (status, out) == (2, '')
    assert message in err
    assert err.count('\n') == 1


def test_a_profile_of_a_negative_length_is_refused(tmp_path):
    with pytest.raises(InputError, match='config.profile.steps must be at least 0, got -1'):
        loop.train(recipe(profile=ProfileConfig(0, -1)), str(tmp_path / 'run'))


def test_commands_take_the_averages_unless_told_otherwise(watched, capsys, tmp_path):
    workdir, result = watched
    for options, name in (([], 'ema_loss'), (['--no-ema'], 'loss')):
        status, out, _ = run(capsys, 'evaluate', workdir, '--json', *options)
        assert status == 0
        assert json.loads(out)['loss'] == pytest.approx(result.last[name], rel=1e-5)
        status, out, _ = run(capsys, 'convert', workdir, tmp_path / f'{name}.pth.tar', *options)
        assert status == 0
        assert (', moving averages' in out) == (name == 'ema_loss')
        assert ('with optimizer state' in out) == (name == 'loss')
