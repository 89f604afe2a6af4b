"""Every recipe is built and validated, and its training step is lowered without data."""

import pathlib
import re
import runpy

import jax
import pytest

from epsanet_jax.models.zoo import build_model
from epsanet_jax.training import sharding
from epsanet_jax.training.config import with_frozen_bn
from epsanet_jax.training.optimizer import make_optimizer, make_schedule
from epsanet_jax.training.state import create_state
from epsanet_jax.training.tracing import trace_train_step
from epsanet_jax.training.validation import validate

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))
LOWERED = ['digits.py', 'imagenet_modern.py']
LOWERED_SLOWLY = [
    'image_folder.py',
    'image_folder.py:finetune',
    'imagenet.py',
    'imagenet.py:epsanet50_large',
    'imagenet.py:epsanet101_small',
    'imagenet.py:epsanet101_large',
    'tpu_pod.py',
]


def load(recipe):
    name, _, argument = recipe.partition(':')
    get_config = runpy.run_path(str(ROOT / 'configs' / name))['get_config']
    config = get_config(argument) if argument else get_config()
    config.data.dir = config.data.dir or 'images'
    return config


@pytest.mark.slow
@pytest.mark.parametrize('shortened', [True, False])
@pytest.mark.parametrize('recipe', [*LOWERED, *LOWERED_SLOWLY])
def test_the_training_step_of_a_recipe_can_be_lowered(recipe, shortened):
    config = load(recipe)
    validate(config)
    if shortened:
        config.model.layers = (1, 1, 1, 1)
    model = build_model(with_frozen_bn(config), 10 if 'digits' in recipe else 1000)
    mesh = sharding.make_mesh(config.batch_size, model.bn_group)
    schedule = make_schedule(config.schedule, config.optimizer.lr, 100, 10)
    optimizer, ema = make_optimizer(config.optimizer, schedule, config.freeze), config.ema_decay > 0
    state = jax.eval_shape(lambda key: create_state(model, optimizer, key, 64, ema), jax.random.key(0))
    lowered = trace_train_step(config, model, optimizer, mesh, state).lower()
    new, sums = lowered.out_info
    assert jax.tree.map(lambda a: a.shape, new) == jax.tree.map(lambda a: a.shape, state)
    assert sums['loss'].shape == ()


def test_every_recipe_is_tested():
    assert {name.partition(':')[0] for name in (*LOWERED, *LOWERED_SLOWLY)} == set(RECIPES)


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_names_its_command_hardware_and_expected_result(recipe):
    header = (ROOT / 'configs' / recipe).read_text().split('"""')[1]
    assert re.search(rf'Command.*: python train\.py --config=configs/{recipe}', header)
    for field in ('Hardware: ', 'Expected result: '):
        assert field in header
