"""Checkpoints: which are kept, what they hold, and what happens if one is damaged."""

import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import (
    assert_equal_runs,
    lines,
    recipe,
    saved_steps,
    signal_at,
)

from epsanet_jax import InputError
from epsanet_jax.errors import Interrupted, TrainingError
from epsanet_jax.training import checkpoint, loop
from epsanet_jax.training.config import (
    CheckpointConfig,
)
from epsanet_jax.weights import load


def test_checkpoints_hold_everything_that_use_of_the_weights_needs(uninterrupted):
    workdir, _ = uninterrupted
    loaded = load(str(workdir))
    assert loaded.source.step == 6
    meta = loaded.source.metadata
    assert loaded.class_names == ('class0', 'class1', 'class2', 'class3')
    assert loaded.preprocessing.image_size == 32
    assert meta['model']['num_classes'] == loaded.model.num_classes == 4
    assert meta['config']['optimizer']['lr'] == 0.05
    assert meta['version']
    logits = loaded.model.apply(loaded.variables, np.zeros((1, 32, 32, 3), np.float32))
    assert logits.shape == (1, 4)
    assert load(str(workdir / 'checkpoints' / '4')).source.step == 4
    assert load(str(workdir), 'best').source.step == _best_step(workdir)
    assert load(str(workdir), '2').source.step == 2
    with pytest.raises(InputError, match='no checkpoint of step 5'):
        load(str(workdir), '5')
    with pytest.raises(InputError, match='no such checkpoint'):
        load(str(workdir / 'nothing'))


def _best_step(workdir):
    return max((x for x in lines(workdir) if x['split'] == 'eval'), key=lambda x: (x['top1'], x['step']))[
        'step'
    ]


def test_the_latest_and_the_best_checkpoints_are_kept_also_after_a_resume(tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.2, 0.2])
    original = loop.run_evaluation
    monkeypatch.setattr(loop, 'run_evaluation', lambda *a, **k: {**original(*a, **k), 'top1': next(scores)})
    keep = {'eval_every_epochs': 0.05, 'checkpoint': CheckpointConfig(every_minutes=0, keep=2)}
    loop.train(recipe(steps=4, **keep), str(tmp_path))
    result = loop.train(recipe(**keep), str(tmp_path))
    assert saved_steps(tmp_path) == [2, 5, 6]
    assert load(str(tmp_path), 'best').source.step == 2
    assert result.best['step'] == 2


def test_the_best_checkpoint_is_kept_if_its_evaluation_was_late(tmp_path, monkeypatch):
    scores = iter([0.9, 0.3, 0.2, 0.2, 0.2, 0.2])
    original = loop.run_evaluation
    config = recipe(checkpoint=CheckpointConfig(every_minutes=0, keep=2), eval_every_epochs=0.05)
    with monkeypatch.context() as patch:

        def interrupted(*args, **kwargs):
            raise Interrupted

        patch.setattr(loop, 'run_evaluation', interrupted)
        with pytest.raises(Interrupted):
            loop.train(config, str(tmp_path))
    monkeypatch.setattr(loop, 'run_evaluation', lambda *a, **k: {**original(*a, **k), 'top1': next(scores)})
    result = loop.train(config, str(tmp_path))
    first = result.best['step']
    assert result.best['top1'] == 0.9
    assert saved_steps(tmp_path) == [first, 5, 6]
    assert load(str(tmp_path), 'best').source.step == first


def test_an_incomplete_checkpoint_does_not_count(tmp_path, monkeypatch):
    (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
    assert checkpoint.has_checkpoint(tmp_path)
    monkeypatch.setattr('orbax.checkpoint.utils.is_checkpoint_finalized', lambda path: False)
    assert not checkpoint.has_checkpoint(tmp_path)


def damage(workdir, step):
    for path in (workdir / 'checkpoints' / str(step) / 'model').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_run_continues_at_the_checkpoint_before_a_damaged_one(
    uninterrupted_8, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        signal_at(patch, 'train_batches', 4)
        with pytest.raises(Interrupted):
            loop.train(recipe(steps=8), str(tmp_path))
    *_, before, newest = saved_steps(tmp_path)
    damage(tmp_path, newest)
    capsys.readouterr()
    loop.train(recipe(steps=8), str(tmp_path))
    out = capsys.readouterr().out
    assert f'checkpoint {newest} is damaged, moved to checkpoints-damaged' in out
    assert f'continuing at step {before}' in out
    assert (tmp_path / 'checkpoints-damaged' / str(newest)).is_dir()
    assert_equal_runs(tmp_path, uninterrupted_8, 8)


def test_if_all_checkpoints_are_damaged_none_is_moved(tmp_path):
    config = recipe(steps=2, eval_every_epochs=0.0)
    loop.train(config, str(tmp_path))
    damage(tmp_path, 2)
    with pytest.raises(InputError, match='all checkpoints in .* are damaged; newest: 2'):
        loop.train(recipe(steps=4, eval_every_epochs=0.0), str(tmp_path))
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['2']
    assert not (tmp_path / 'checkpoints-damaged').exists()


def test_a_failed_save_in_the_background_stops_the_next_step(tmp_path, monkeypatch):
    def failing(self):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(ocp.CheckpointManager, 'check_for_errors', failing)
    with pytest.raises(TrainingError, match='cannot write a checkpoint to .*No space left'):
        loop.train(recipe(), str(tmp_path))
