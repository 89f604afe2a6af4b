"""Whole runs: the files in the workdir, and that an interrupted run equals an uninterrupted one."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import pytest
from runs import (
    TIMING,
    Killed,
    kill_after,
    lines,
    recipe,
    saved_state,
    saved_steps,
)

from epsanet_jax import InputError
from epsanet_jax.errors import TrainingError
from epsanet_jax.training import loop
from epsanet_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from epsanet_jax.weights import load


def test_a_workdir_holds_configuration_metrics_and_checkpoints(uninterrupted):
    workdir, result = uninterrupted
    assert {p.name for p in workdir.iterdir()} == {
        'config.json',
        'metrics.jsonl',
        'checkpoints',
        'tensorboard',
    }
    written = lines(workdir)
    assert [(line['split'], line['step']) for line in written] == [
        ('train', 2), ('eval', 2), ('train', 4), ('eval', 4), ('train', 6), ('eval', 6)
    ]  # fmt: skip
    assert set(written[0]) == {'split', 'step', 'loss', 'top1', 'top5', 'lr', *TIMING}
    names = {'loss', 'top1', 'top5', 'examples', 'mean_class_accuracy'}
    assert set(written[1]) == {'split', 'step', *names}
    assert all(line['examples'] == 300 for line in written if line['split'] == 'eval')
    assert all(math.isfinite(line['images_per_s']) and 0 <= line['data_wait'] <= 1 for line in written[::2])
    assert written[2]['lr'] > written[4]['lr'] > 0
    assert result.step == 6
    assert result.last == written[-1]
    assert result.best['top1'] == max(line['top1'] for line in written[1::2])
    assert json.loads((workdir / 'config.json').read_text())['config']['optimizer']['lr'] == 0.05


@pytest.mark.parametrize('kills', [[3], pytest.param([1, 1, 2], marks=pytest.mark.slow)])
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(
    uninterrupted, tmp_path, monkeypatch, kills
):
    """Interruptions at several steps, checkpoints at even and odd steps."""
    config = recipe(checkpoint=CheckpointConfig(every_steps=1, every_minutes=0, keep=3))
    for batches in kills:
        with monkeypatch.context() as patch:
            kill_after(patch, batches)
            with pytest.raises(Killed):
                loop.train(config, str(tmp_path))
    loop.train(config, str(tmp_path))
    workdir, _ = uninterrupted
    chex.assert_trees_all_equal(saved_state(tmp_path, 6), saved_state(workdir, 6))
    evaluations, expected = ([x for x in lines(w) if x['split'] == 'eval'] for w in (tmp_path, workdir))
    assert evaluations == expected
    steps = [[(x['split'], x['step']) for x in lines(w)] for w in (tmp_path, workdir)]
    assert steps[0] == steps[1]
    last = [{k: v for k, v in lines(w)[-2].items() if k not in TIMING} for w in (tmp_path, workdir)]
    assert last[0]['lr'] == last[1]['lr']


@pytest.mark.slow
@pytest.mark.parametrize(('steps', 'cut_at'), [(8, 3), (200, 73)])
def test_an_interrupted_run_with_all_options_equals_an_uninterrupted_one(tmp_path, steps, cut_at):
    config = recipe(
        steps=steps,
        log_every_steps=4,
        eval_every_epochs=0.0,
        gradient_accumulation_steps=2,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        stochastic_depth=0.3,
        ema_decay=0.99,
        model=ModelConfig(
            layers=(1, 1), planes=(8, 16), expansion=2, kernels=(3, 5), groups=(1, 2), reduction=2,
            bn_group=8, dtype='bfloat16', remat=True,
        ),
        data=DataConfig(
            source='synthetic', image_size=32, resize_size=32, synthetic_examples=64, randaugment_ops=2,
            color_jitter=(0.4, 0.4, 0.4, 0.1), random_erasing=0.5,
        ),
        optimizer=OptimizerConfig(0.003, name='adamw', weight_decay=0.05, clip_norm=1.0),
        schedule=ScheduleConfig('constant', warmup_epochs=3),
    )  # fmt: skip
    config.batch_size = 32
    loop.train(config, str(tmp_path / 'whole'))
    for until in (cut_at, steps):
        config.steps = until
        loop.train(config, str(tmp_path / 'cut'))
    whole, cut = (saved_state(tmp_path / name, steps) for name in ('whole', 'cut'))
    chex.assert_trees_all_equal(cut, whole)
    averages = [load(str(tmp_path / name)) for name in ('whole', 'cut')]
    assert all(loaded.source.averaged for loaded in averages)
    chex.assert_trees_all_equal(*(loaded.variables for loaded in averages))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(whole['model']))
    losses = [line['loss'] for line in lines(tmp_path / 'whole') if line['split'] == 'train']
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_an_interrupted_run_with_frozen_parameters_equals_an_uninterrupted_one(tmp_path):
    config = recipe(
        steps=4,
        eval_every_epochs=0.0,
        freeze='(?i)^CONV1|^layer1_0/conv1',
        optimizer=OptimizerConfig(0.01, name='lars', clip_norm=1.0),
        schedule=ScheduleConfig('constant'),
    )
    loop.train(config, str(tmp_path / 'whole'))
    for steps in (2, 4):
        config.steps = steps
        loop.train(config, str(tmp_path / 'cut'))
    chex.assert_trees_all_equal(saved_state(tmp_path / 'cut', 4), saved_state(tmp_path / 'whole', 4))
    source = load(str(tmp_path / 'cut'), with_checkpoint=True).source
    assert (source.checkpoint.optimizer, source.no_optimizer) == (None, 'it belongs to lars')


@pytest.mark.slow
def test_a_run_that_stopped_before_its_last_evaluation_is_evaluated(uninterrupted, tmp_path, monkeypatch):
    config = recipe(eval_every_epochs=0.0, checkpoint=CheckpointConfig(every_steps=6, every_minutes=0))
    with monkeypatch.context() as patch:
        patch.setattr(loop, '_evaluation_due', lambda run, step: False)
        with pytest.raises(ValueError, match='empty'):  # there is no evaluation
            loop.train(config, str(tmp_path))
    assert [line['split'] for line in lines(tmp_path)] == ['train'] * 3
    result = loop.train(config, str(tmp_path))
    assert result.last == uninterrupted[1].last


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(tmp_path):
    loop.train(recipe(steps=2), str(tmp_path))
    result = loop.train(recipe(steps=4), str(tmp_path))
    assert [line['step'] for line in lines(tmp_path) if line['split'] == 'eval'] == [2, 4]
    assert result.step == 4


@pytest.mark.slow
def test_the_number_of_devices_may_change(uninterrupted, tmp_path, monkeypatch):
    """Half the steps on 8 devices, half on 2: the same batches and groups, equal up to rounding."""
    loop.train(recipe(steps=6, eval_every_epochs=0.0), str(tmp_path / 'eight'))
    config = recipe(eval_every_epochs=0.0, checkpoint=CheckpointConfig(every_steps=3, every_minutes=0))
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            loop.train(config, str(tmp_path / 'both'))
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, 'devices', lambda: two)
    loop.train(config, str(tmp_path / 'both'))
    both, eight = (load(str(tmp_path / name)).variables for name in ('both', 'eight'))
    chex.assert_trees_all_close(both, eight, rtol=1e-3, atol=1e-4)


def test_checkpoints_are_saved_by_time(tmp_path):
    """Process 0 requests it with the batch of a step; all processes know after the next step."""
    saving = CheckpointConfig(every_minutes=1e-9, keep=9)
    config = recipe(eval_every_epochs=0.0, checkpoint=saving, tensorboard=False)
    loop.train(config, str(tmp_path))
    assert not (tmp_path / 'tensorboard').exists()
    assert saved_steps(tmp_path) == [2, 4, 6]


def test_a_non_finite_loss_stops_the_run_at_that_step(tmp_path):
    config = recipe(optimizer=OptimizerConfig(lr=1e30), schedule=ScheduleConfig(name='constant'))
    with pytest.raises(TrainingError, match=r'the loss is (nan|inf|not finite) at step [2-6]'):
        loop.train(config, str(tmp_path))


def test_a_bad_image_stops_the_run_and_loses_no_step(bad_folder):
    config, path = bad_folder
    with pytest.raises(InputError, match=r'val/b/3.png: cannot decode.*on_bad=skip; .* continues at step 2'):
        loop.train(config, str(path / 'run'))
    assert load(str(path / 'run')).source.step == 2
    config.data.on_bad = 'skip'
    result = loop.train(config, str(path / 'run'))
    assert (result.last['examples'], result.last['skipped']) == (4, 1)


def test_a_run_continues_after_a_bad_image_is_replaced(bad_folder):
    config, path = bad_folder
    image = path / 'data/train/a/4.png'
    whole = image.read_bytes()
    (path / 'data/val/b/3.png').write_bytes(whole)
    image.write_bytes(b'no image')
    config.steps = 4
    with pytest.raises(
        InputError,
        match='a/4.png: cannot decode.*; replace the file by a valid image of the same name, or set',
    ):
        loop.train(config, str(path / 'run'))
    image.write_bytes(whole)
    assert loop.train(config, str(path / 'run')).step == 4


def test_a_run_from_a_network_equals_one_from_its_file(uninterrupted, tmp_path):
    config = recipe(steps=1, eval_every_epochs=0.0)
    loop.train(config, str(tmp_path / 'network'), init_from=load(str(uninterrupted[0])))
    config.init_from = str(uninterrupted[0])
    loop.train(config, str(tmp_path / 'file'))
    states = (saved_state(tmp_path / name, 1) for name in ('network', 'file'))
    chex.assert_trees_all_equal(*states)


@pytest.mark.slow
@pytest.mark.parametrize('param_dtype', ['float32', 'narrow'])
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_narrow_types_train_to_the_end_and_continue(tmp_path, dtype, param_dtype):
    for steps in (3, 6):
        config = recipe(steps=steps)
        config.model.dtype, config.model.param_dtype = (
            dtype,
            dtype if param_dtype == 'narrow' else param_dtype,
        )
        result = loop.train(config, str(tmp_path))
    assert (result.step, math.isfinite(result.last['loss'])) == (6, True)
    assert load(str(tmp_path)).variables['params']['fc']['kernel'].dtype == config.model.param_dtype
