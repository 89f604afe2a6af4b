"""Options of training: moving averages, stochastic depth, freezing, other sizes, all of them at once."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from test_loop import lines, recipe, saved_state

from epsanet_jax import InputError, from_pretrained
from epsanet_jax.commands.main import main
from epsanet_jax.data.augment import row_keys
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training import init_from, loop, run
from epsanet_jax.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    ScheduleConfig,
)
from epsanet_jax.training.steps import draw_keep, update_average
from epsanet_jax.weights import load
from epsanet_jax.weights.metadata import make_metadata, read_metadata
from epsanet_jax.weights.orbax import save_weights


@pytest.mark.parametrize(('steps', 'cut_at'), [(8, 3), pytest.param(200, 73, marks=pytest.mark.slow)])
def test_everything_switched_on_and_interrupted_equals_uninterrupted(tmp_path, steps, cut_at):
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
    assert all(loaded.averaged for loaded in averages)
    chex.assert_trees_all_equal(*(loaded.variables for loaded in averages))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(whole['model']))
    losses = [line['loss'] for line in lines(tmp_path / 'whole') if line['split'] == 'train']
    assert losses[-1] < losses[0]


def test_both_sets_are_evaluated_and_the_averages_are_what_is_used(tmp_path):
    config = recipe(ema_decay=0.9, steps=4, eval_every_epochs=0.0)
    result = loop.train(config, str(tmp_path))
    assert {'ema_loss', 'ema_top1', 'ema_top5'} <= set(result.last)
    assert result.last['ema_loss'] != result.last['loss']
    averages, raw = (load(str(tmp_path), ema=ema) for ema in (True, False))
    assert (averages.source.averaged, raw.source.averaged) == (True, False)
    assert not np.allclose(
        averages.variables['params']['conv1']['kernel'], raw.variables['params']['conv1']['kernel']
    )
    both = [load(str(tmp_path), ema=ema, with_checkpoint=True).source.checkpoint for ema in (True, False)]
    assert both[0].optimizer is None  # it belongs to the weights that are not averaged
    assert both[1].optimizer is not None


def test_an_average_by_its_formula():
    average, decay = 3.0, 0.9
    tree = {'a': jnp.asarray(average)}
    for step, value in enumerate([1.0, 2.0, -1.0, 0.5] * 30):
        share = min(decay, (1 + step) / (10 + step))
        average = share * average + (1 - share) * value
        tree = update_average(tree, {'a': jnp.asarray(value)}, jnp.asarray(step), decay)
    assert float(tree['a']) == pytest.approx(average, rel=1e-12)


def test_blocks_are_skipped_by_row_and_more_often_the_deeper_they_are():
    keys = row_keys(0, 5, jnp.arange(4000))
    keep = np.asarray(draw_keep(keys, 0.6, 4))
    np.testing.assert_allclose((keep == 0).mean(axis=0), [0, 0.2, 0.4, 0.6], atol=0.03)
    np.testing.assert_allclose(keep.mean(axis=0), 1, atol=0.08)
    np.testing.assert_array_equal(draw_keep(keys[7:9], 0.6, 4), keep[7:9])


def test_a_skipped_block_is_its_shortcut(rng):
    model = small.model(layers=(2, 1), planes=(8, 16))
    variables, images = small.random_variables(model), small.images(rng)

    def run(keep):
        return model.apply(variables, images, keep=jnp.asarray(keep), method='features')

    kept = run(np.ones((2, 3)))
    chex.assert_trees_all_equal(kept, model.apply(variables, images, method='features'))
    one = run([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    first = small.model(layers=(1, 1), planes=(8, 16))
    outputs = first.apply(_without(variables, 'layer1_1'), images, method='features')
    np.testing.assert_allclose(one['layer1'][0], outputs['layer1'][0], rtol=1e-6)
    np.testing.assert_allclose(one['layer1'][1], kept['layer1'][1], rtol=1e-6)


def _without(variables, name):
    return {k: {n: v for n, v in tree.items() if n != name} for k, tree in variables.items()}


def test_frozen_batchnorms_keep_to_their_statistics(rng):
    images = small.images(rng, n=4)
    for pattern, frozen in (('^bn1|^layer1', {'bn1', 'layer1_0', 'layer1_1'}), ('.', None), ('', set())):
        model = small.model(layers=(2, 1), planes=(8, 16), frozen_bn=pattern)
        variables = small.random_variables(model)
        logits, new = model.apply(variables, images, train=True, mutable=['batch_stats'])
        for name, before in variables['batch_stats'].items():
            same = chex_equal(new['batch_stats'][name], before)
            assert same == (frozen is None or name in frozen), (pattern, name)
        if frozen is None:
            np.testing.assert_array_equal(logits, model.apply(variables, images))


def chex_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_fine_tuning_a_part_at_another_size(tmp_path):
    """Other classes, larger pictures, the stem and the first stage as they were; class names are kept."""
    first = recipe(steps=3, eval_every_epochs=0.0)
    first.model = dataclasses.replace(first.model, layers=(1, 1), planes=(8, 16))
    loop.train(first, str(tmp_path / 'first'))
    config = recipe(
        steps=3,
        eval_every_epochs=0.0,
        model=first.model,
        init_from=str(tmp_path / 'first'),
        freeze='^conv1|^bn1|^layer1',
        data=DataConfig(
            source='synthetic', image_size=40, eval_image_size=48, resize_size=56, synthetic_examples=64,
            synthetic_classes=3,
        ),
    )  # fmt: skip
    loop.train(config, str(tmp_path / 'second'))
    before, after = (load(str(tmp_path / name)) for name in ('first', 'second'))
    for collection in ('params', 'batch_stats'):
        for name, old in before.variables[collection].items():
            if name != 'fc':
                same = chex_equal(old, after.variables[collection][name])
                assert same == name.startswith(('conv1', 'bn1', 'layer1')), (collection, name)
    assert after.class_names == ('class0', 'class1', 'class2')
    assert after.preprocessing.image_size == 48
    assert after.variables['params']['fc']['kernel'].shape[-1] == 3


@pytest.mark.parametrize(
    ('names', 'said'),
    [
        (('class0', 'class1'), 'classifier of 2 classes replaced by a new one of 4'),
        (('a', 'b', 'c', 'd'), 'classifier of other classes (a, b, c and 1 more) replaced by a new one'),
        (('class1', 'class0', 'class2', 'class3'), 'classifier of other classes (class1, class0, class2'),
        (('class0', 'class1', 'class2', 'class3'), ''),
        ((), 'classifier of 4 classes kept: the weights come without class names'),
    ],
)
def test_the_classifier_is_kept_for_the_same_classes_alone(tmp_path, names, said):
    net = dataclasses.replace(recipe().model, layers=(1,), planes=(8,), num_classes=len(names) or 4)
    variables = small.random_variables(build_model(net, 0), dtype=np.float32)
    save_weights(str(tmp_path / 'weights'), variables, make_metadata(net, names, DataConfig().preprocessing))
    config = recipe(init_from=str(tmp_path / 'weights'))
    config.model = dataclasses.replace(net, num_classes=0)
    initial = run.prepare(config, str(tmp_path / 'run')).initial
    assert [line[: len(said)] for line in initial.report] == ([said] if said else [])
    before, after = (v['params']['fc']['kernel'] for v in (variables, initial.variables))
    kept = np.array_equal(before, after)
    assert kept == (not said or 'kept' in said)
    network, model = load(str(tmp_path / 'weights')), build_model(config.model, 4)
    classes = [f'class{i}' for i in range(4)]
    if not kept:
        with pytest.raises(InputError, match='cannot continue with other classes: the weights are for'):
            init_from.make_initial_state(network, model, classes, jax.random.key(0), 3, True)


def test_outputs_that_no_class_has_are_called_by_their_numbers(tmp_path, capsys):
    config = recipe(steps=1, eval_every_epochs=0.0)
    config.model = dataclasses.replace(config.model, layers=(1,), planes=(8,), num_classes=6)
    loop.train(config, str(tmp_path / 'run'))
    names = [*(f'class{i}' for i in range(4)), '4', '5']
    assert list(load(str(tmp_path / 'run')).class_names) == names
    assert main(['export', str(tmp_path / 'run'), str(tmp_path / 'hub')]) == 0
    assert list(from_pretrained(tmp_path / 'hub').class_names) == names
    old = {
        **make_metadata(dataclasses.replace(config.model), (), DataConfig().preprocessing),
        'class_names': names[:4],
    }
    assert list(read_metadata(old, 'old')[1]) == names
    with pytest.raises(InputError, match='class_names has 7 names for 6 classes'):
        read_metadata({**old, 'class_names': [*names, 'x']}, 'old')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'freeze': '('}, r"config.freeze must be a regular expression, got '\('"),
        ({'freeze': 'conv9'}, "config.freeze='conv9' is found in the name of no parameter"),
        ({'init_from': 'x', 'init_optimizer': True, 'freeze': 'fc'}, 'config.init_optimizer is for'),
        ({'optimizer': OptimizerConfig(name='adam')}, "config.optimizer.name must be one of .* got 'adam'"),
        ({'optimizer': OptimizerConfig(name='adamw', nesterov=True)}, 'config.optimizer.nesterov needs'),
        ({'model': ModelConfig(frozen_bn='nosuch')}, "config.model.frozen_bn='nosuch' is found in"),
        (
            {'model': ModelConfig(param_dtype='bfloat16'), 'ema_decay': 0.999},
            'config.ema_decay needs config.model.param_dtype=float32: steps of 0.001 vanish in bfloat16',
        ),
        ({'profile': ProfileConfig(5, 2)}, 'config.profile ends at step 7, after the run, which has 6 steps'),
        ({'ema_decay': 1.0}, r'config.ema_decay must be in \[0, 1\), got 1.0'),
        (
            {'data': DataConfig(dir='x', mean=(123.675, 116.28, 103.53))},
            r'config.data.mean must be three numbers from 0 to 1, of pixels / 255, got \(123.675',
        ),
        ({'data': DataConfig(dir='x', mean=(0.5,))}, r'config.data.mean must be three .* got \(0.5,'),
        ({'data': DataConfig(dir='x', std=(0.2, 0.0, 0.2))}, 'config.data.std must be three numbers above 0'),
        ({'data': DataConfig(dir='x', std=(58.4, 57.1, 57.4))}, r'config.data.std must be .* got \(58.4'),
        ({'stochastic_depth': -0.1}, r'config.stochastic_depth must be in \[0, 1\), got -0.1'),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        loop.train(recipe(**changes), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_the_rate_is_scaled_with_the_batch_where_asked(tmp_path):
    config = recipe(schedule=ScheduleConfig('constant'), optimizer=OptimizerConfig(0.1, lr_batch=64))
    assert run.prepare(config, str(tmp_path)).learning_rate(0) == pytest.approx(0.1 * 16 / 64)


def test_a_run_with_frozen_parameters_continues_as_if_it_had_not_stopped(tmp_path):
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


def test_one_picture_at_a_time_where_batchnorm_is_frozen_or_the_maps_are_large(tmp_path):
    config = recipe(batch_size=8)
    config.model = dataclasses.replace(config.model, layers=(1,) * 4, planes=(8,) * 4, bn_group=1)
    for changes in ({'frozen_bn': '.'}, {'output_stride': 16}):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        assert run.prepare(changed, str(tmp_path / 'run')).total_steps == 6
    with pytest.raises(InputError, match='one value a channel in the last stage'):
        run.prepare(config, str(tmp_path / 'run'))
