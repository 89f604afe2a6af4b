"""Events for TensorBoard."""

import pytest
from runs import (
    lines,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from epsanet_jax.training.tensorboard import Events


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


def test_old_events_of_repeated_steps_are_not_read(tmp_path):
    for start, value in ((0, 1.0), (2, 9.0)):
        events = Events(tmp_path, start)
        for step in range(start + 1, 5):
            events.write({'split': 'train', 'step': step, 'loss': value, 'data_wait': None})
        events.close()
    read = EventAccumulator(str(tmp_path / 'tensorboard'))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars('train/loss')] == [(1, 1), (2, 1), (3, 9), (4, 9)]
