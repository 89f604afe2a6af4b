"""Whole runs on a small network: what lies in the workdir, and that interrupted equals uninterrupted."""

import itertools
import json
import math

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.errors import Interrupted, TrainingError
from epsanet_jax.training import checkpoint, inputs, loop
from epsanet_jax.training.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from epsanet_jax.weights import load

TIMING = ('images_per_s', 'data_wait', 'pipeline_images_per_s')


def recipe(**changes):
    config = Config(
        batch_size=16,
        steps=6,
        log_every_steps=2,
        eval_every_epochs=0.1,
        model=ModelConfig(
            layers=(1,), planes=(8,), expansion=2, kernels=(3, 5), groups=(1, 2), reduction=2, bn_group=4
        ),
        data=DataConfig(
            source='synthetic', image_size=32, resize_size=32, synthetic_examples=300, synthetic_classes=4
        ),
        optimizer=OptimizerConfig(lr=0.05),
        # It does not depend on the number of steps: runs of any length share what is compiled.
        schedule=ScheduleConfig(name='step', step_epochs=0.25, warmup_epochs=0.1),
        checkpoint=CheckpointConfig(every_minutes=0, keep=3),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def saved_state(workdir, step):
    """The whole checkpoint as arrays."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
        items = {item: ocp.args.StandardRestore() for item in ('model', 'optimizer')}
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    return jax.tree.map(np.asarray, {item: restored[item] for item in items})


class Killed(BaseException):
    """Stands for whatever ends a process."""


def kill_after(monkeypatch, batches):
    """Makes the next run die when it asks for its n-th batch."""
    original = inputs.train_batches

    def dying(*args):
        yield from itertools.islice(original(*args), batches)
        raise Killed

    monkeypatch.setattr(inputs, 'train_batches', dying)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
    result = loop.train(recipe(), str(workdir))
    return workdir, result


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
    assert set(written[1]) == {'split', 'step', 'loss', 'top1', 'top5', 'examples'}
    assert all(line['examples'] == 300 for line in written if line['split'] == 'eval')
    assert all(math.isfinite(line['images_per_s']) and 0 <= line['data_wait'] <= 1 for line in written[::2])
    assert written[2]['lr'] > written[4]['lr'] > 0
    assert result.step == 6
    assert result.last == written[-1]
    assert result.best['top1'] == max(line['top1'] for line in written[1::2])
    assert json.loads((workdir / 'config.json').read_text())['config']['optimizer']['lr'] == 0.05


def test_a_finished_run_is_left_as_it_is(uninterrupted, capsys):
    workdir, result = uninterrupted
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
    assert loop.train(recipe(), str(workdir)) == result
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('kills', [[3], [1, 1, 2]])
def test_interrupted_equals_uninterrupted_bit_for_bit(uninterrupted, tmp_path, monkeypatch, kills):
    """Deaths at several steps, checkpoints at every second and at odd ones."""
    config = recipe(checkpoint=CheckpointConfig(every_steps=1, every_minutes=0, keep=3))
    for batches in kills:
        with monkeypatch.context() as patch:
            kill_after(patch, batches)
            with pytest.raises(Killed):
                loop.train(config, str(tmp_path))
    loop.train(config, str(tmp_path))
    workdir, _ = uninterrupted
    chex.assert_trees_all_equal(saved_state(tmp_path, 6), saved_state(workdir, 6))
    timing = TIMING
    evaluations, expected = ([x for x in lines(w) if x['split'] == 'eval'] for w in (tmp_path, workdir))
    assert evaluations == expected
    steps = [[(x['split'], x['step']) for x in lines(w)] for w in (tmp_path, workdir)]
    assert steps[0] == steps[1]
    last = [{k: v for k, v in lines(w)[-2].items() if k not in timing} for w in (tmp_path, workdir)]
    assert last[0]['lr'] == last[1]['lr']


def test_lines_after_the_last_checkpoint_are_written_anew_not_twice(tmp_path, monkeypatch):
    config = recipe(eval_every_epochs=0.0, checkpoint=CheckpointConfig(every_steps=3, every_minutes=0))
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            loop.train(config, str(tmp_path))
    assert [line['step'] for line in lines(tmp_path)] == [2, 4]
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"split": "train", "st')  # a line cut off by the crash
    loop.train(config, str(tmp_path))
    assert [(x['split'], x['step']) for x in lines(tmp_path)] == [
        ('train', 2), ('train', 4), ('train', 6), ('eval', 6)
    ]  # fmt: skip


def test_a_run_that_died_in_its_last_evaluation_is_evaluated(uninterrupted, tmp_path, monkeypatch):
    config = recipe(eval_every_epochs=0.0, checkpoint=CheckpointConfig(every_steps=6, every_minutes=0))
    with monkeypatch.context() as patch:
        patch.setattr(loop, '_evaluation_due', lambda run, step: False)
        with pytest.raises(ValueError, match='empty'):  # no evaluation to tell of
            loop.train(config, str(tmp_path))
    assert [line['split'] for line in lines(tmp_path)] == ['train'] * 3
    result = loop.train(config, str(tmp_path))
    assert result.last == uninterrupted[1].last


def test_more_epochs_may_be_asked_for(tmp_path):
    loop.train(recipe(steps=2), str(tmp_path))
    result = loop.train(recipe(steps=4), str(tmp_path))
    assert [line['step'] for line in lines(tmp_path) if line['split'] == 'eval'] == [2, 4]
    assert result.step == 4


def test_another_run_in_the_workdir_is_refused_by_field(uninterrupted):
    workdir, _ = uninterrupted
    config = recipe(seed=7, optimizer=OptimizerConfig(lr=0.01))
    with pytest.raises(InputError) as e:
        loop.train(config, str(workdir))
    assert 'optimizer.lr: 0.05 -> 0.01' in str(e.value)
    assert 'seed: 0 -> 7' in str(e.value)
    assert 'momentum' not in str(e.value)


def test_checkpoints_carry_what_use_needs(uninterrupted):
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


def test_the_latest_and_the_best_are_kept(tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.2, 0.2])
    original = loop.evaluate
    monkeypatch.setattr(loop, 'evaluate', lambda *a, **k: {**original(*a, **k), 'top1': next(scores)})
    config = recipe(eval_every_epochs=0.05, checkpoint=CheckpointConfig(every_minutes=0, keep=2))
    result = loop.train(config, str(tmp_path))
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [2, 5, 6]
    assert result.best['step'] == 2


def test_the_best_is_kept_though_its_evaluation_came_late(tmp_path, monkeypatch):
    scores = iter([0.9, 0.3, 0.2, 0.2, 0.2, 0.2])
    original = loop.evaluate
    config = recipe(checkpoint=CheckpointConfig(every_minutes=0, keep=2), eval_every_epochs=0.05)
    with monkeypatch.context() as patch:

        def interrupted(*args, **kwargs):
            raise Interrupted

        patch.setattr(loop, 'evaluate', interrupted)
        with pytest.raises(Interrupted):
            loop.train(config, str(tmp_path))
    monkeypatch.setattr(loop, 'evaluate', lambda *a, **k: {**original(*a, **k), 'top1': next(scores)})
    result = loop.train(config, str(tmp_path))
    first = result.best['step']
    assert result.best['top1'] == 0.9
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [first, 5, 6]
    assert load(str(tmp_path), 'best').source.step == first


def test_a_loss_that_is_not_finite_stops_the_run_at_that_step(tmp_path):
    config = recipe(optimizer=OptimizerConfig(lr=1e30), schedule=ScheduleConfig(name='constant'))
    with pytest.raises(TrainingError, match=r'the loss is (nan|inf|not finite) at step [2-6]'):
        loop.train(config, str(tmp_path))


def test_an_evaluation_that_is_not_finite_is_no_result(tmp_path):
    config = recipe(steps=1, optimizer=OptimizerConfig(lr=1e30), schedule=ScheduleConfig(name='constant'))
    with pytest.raises(TrainingError, match='not finite|nan|inf'):
        loop.train(config, str(tmp_path))
    assert [line['split'] for line in lines(tmp_path)] == ['train']
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_a_run_given_up_before_its_first_checkpoint_does_not_keep_the_workdir(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            loop.train(recipe(), str(tmp_path))
    assert loop.train(recipe(seed=3, steps=2), str(tmp_path)).step == 2


def test_a_workdir_of_an_older_version_lacks_fields_that_are_new(uninterrupted, tmp_path):
    import shutil

    workdir, result = uninterrupted
    shutil.copytree(workdir, tmp_path / 'run')
    path = tmp_path / 'run' / 'config.json'
    content = json.loads(path.read_text())
    del content['identity']['init_from'], content['identity']['data.flip']
    path.write_text(json.dumps(content))
    assert loop.train(recipe(), str(tmp_path / 'run')).last == result.last


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
    """Process 0 asks with the batch of a step; all processes know after the next."""
    checkpoint = CheckpointConfig(every_minutes=1e-9, keep=9)
    config = recipe(eval_every_epochs=0.0, checkpoint=checkpoint, tensorboard=False)
    loop.train(config, str(tmp_path))
    assert not (tmp_path / 'tensorboard').exists()
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [2, 4, 6]


def test_a_group_with_one_value_is_refused_before_anything_is_compiled(tmp_path):
    config = recipe()
    config.model.layers, config.model.planes, config.model.bn_group = (1,) * 4, (8,) * 4, 1
    with pytest.raises(InputError, match='one value a channel in the last stage'):
        loop.train(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_more_classes_in_the_data_than_in_the_model(tmp_path):
    config = recipe()
    config.model.num_classes = 3
    with pytest.raises(InputError, match='4 classes, more than config.model.num_classes=3'):
        loop.train(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def bad_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 5)):
        for i in range(count):
            folder = tmp_path / 'data' / split / 'ab'[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    (tmp_path / 'data/val/b/3.png').write_bytes(b'no picture')
    data = DataConfig(source='folder', dir=str(tmp_path / 'data'), image_size=32, resize_size=32)
    return recipe(data=data, batch_size=8, steps=2, eval_every_epochs=0.0), tmp_path


def test_a_bad_picture_stops_the_run_and_costs_no_step(bad_folder):
    config, path = bad_folder
    with pytest.raises(InputError, match=r'val/b/3.png: cannot decode.*on_bad=skip; .* continues at step 2'):
        loop.train(config, str(path / 'run'))
    assert load(str(path / 'run')).source.step == 2
    config.data.on_bad = 'skip'
    result = loop.train(config, str(path / 'run'))
    assert (result.last['examples'], result.last['skipped']) == (4, 1)


def test_too_many_bad_pictures_to_evaluate_cost_no_step(bad_folder):
    config, path = bad_folder
    config.data.on_bad, config.data.max_bad_images = 'skip', 0
    with pytest.raises(InputError, match=r'1 pictures to evaluate cannot .* continues at step 2'):
        loop.train(config, str(path / 'run'))
    assert load(str(path / 'run')).source.step == 2


def test_what_a_bad_picture_asks_for_makes_the_run_continue(bad_folder):
    config, path = bad_folder
    picture = path / 'data/train/a/4.png'
    whole = picture.read_bytes()
    (path / 'data/val/b/3.png').write_bytes(whole)
    picture.write_bytes(b'no picture')
    config.steps = 4
    with pytest.raises(InputError, match='a/4.png: cannot decode.*; mend it under its name, or set'):
        loop.train(config, str(path / 'run'))
    picture.write_bytes(whole)
    assert loop.train(config, str(path / 'run')).step == 4


def test_bad_pictures_skipped_in_training_are_named_and_counted(bad_folder, capsys):
    config, path = bad_folder
    (path / 'data/train/a/4.png').write_bytes(b'no picture')
    config.data.on_bad = 'skip'
    loop.train(config, str(path / 'run'))
    output = capsys.readouterr().out
    assert output.count('train/a/4.png: cannot decode') == 1
    assert '(1 so far)' in output
    assert 'skipped: ' in output


def test_too_many_bad_pictures_stop_the_run(bad_folder):
    config, path = bad_folder
    for name in ('a/0.png', 'a/4.png', 'b/1.png'):
        (path / 'data/train' / name).write_bytes(b'no picture')
    config.data.on_bad, config.data.max_bad_images, config.steps = 'skip', 2, 4
    config.log_every_steps = 1
    with pytest.raises(
        InputError, match=r'3 pictures cannot .* config.data.max_bad_images=2; look at the data'
    ):
        loop.train(config, str(path / 'run'))
    config.data.max_bad_images = 3
    loop.train(config, str(path / 'run'))
    loop.train(config, str(path / 'whole'))
    shown = [
        [(x['step'], x['loss']) for x in lines(path / name) if x['split'] == 'train']
        for name in ('run', 'whole')
    ]
    assert shown[0] == shown[1]


def test_splits_with_different_classes_are_refused(bad_folder):
    config, path = bad_folder
    (path / 'data/val/b').rename(path / 'data/val/c')
    with pytest.raises(InputError, match=r'have different classes: b, c'):
        loop.train(config, str(path / 'run'))


@pytest.mark.parametrize('content', ['{"architectures": ["EPSANet"]}', 'no json', '[]'])
def test_a_config_of_something_else_is_not_written_over(tmp_path, content):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(InputError, match='config.json is not the config.json of a run; choose another'):
        loop.train(recipe(), str(tmp_path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('config.json', content)]


def test_a_checkpoint_that_is_not_complete_is_none(tmp_path, monkeypatch):
    (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
    assert checkpoint.has_checkpoint(tmp_path)
    monkeypatch.setattr('orbax.checkpoint.utils.is_checkpoint_finalized', lambda path: False)
    assert not checkpoint.has_checkpoint(tmp_path)


def test_a_workdir_that_cannot_be_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='is a file, not a folder'):
        loop.train(recipe(), str(tmp_path / 'file'))
    with pytest.raises(InputError, match='cannot write to --workdir='):
        loop.train(recipe(), str(tmp_path / 'file' / 'run'))
    (tmp_path / 'other' / 'checkpoints' / '3').mkdir(parents=True)
    (tmp_path / 'other' / 'config.json').write_text('{}')
    with pytest.raises(InputError, match=r'is not the config\.json of a run'):
        loop.train(recipe(), str(tmp_path / 'other'))
