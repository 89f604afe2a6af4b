"""The options of a model, stated once in `Settings`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from epsanet_jax import InputError, create_model
from epsanet_jax.data.preprocessing import default_preprocessing
from epsanet_jax.models import ModelConfig, Settings
from epsanet_jax.models.settings import NAMES, check_types, model_config, settings_of
from epsanet_jax.models.zoo import build_model, config_of
from epsanet_jax.training.config import Config, flatten, identity
from epsanet_jax.weights.metadata import make_metadata, read_metadata

# For every setting a valid value that is not the default.
CHANGED = {
    'num_classes': 5,
    'in_channels': 1,
    'layers': (1, 2),
    'planes': (16, 32),
    'expansion': 2,
    'kernels': (3, 5),
    'groups': (1, 2),
    'reduction': 4,
    'psa_bias': True,
    'output_stride': 16,
    'bn_group': 2,
    'frozen_bn': 'layer1',
    'conv': 'tiled',
    'remat': True,
    'dtype': 'bfloat16',
    'param_dtype': 'bfloat16',
}


def test_every_setting_has_a_changed_value_here():
    defaults = dataclasses.asdict(Settings())
    assert CHANGED.keys() == defaults.keys()
    assert all(CHANGED[name] != defaults[name] for name in NAMES)


def test_every_setting_is_a_keyword_of_create_model_and_a_field_of_the_network():
    model = create_model('epsanet50_small', **CHANGED)
    assert dataclasses.asdict(settings_of(model)) == CHANGED
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 1)))
    assert variables['params']['fc']['kernel'].shape == (64, 5)


def test_every_setting_is_a_flag_of_the_configuration():
    fields = flatten(Config(model=ModelConfig(**CHANGED)))
    values = {name: fields[f'model.{name}'] for name in NAMES}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()} == CHANGED


def test_every_setting_is_kept_by_metadata_and_by_config_of():
    config = ModelConfig(name='epsanet50_small', **CHANGED)
    metadata = make_metadata(config, list('abcde'), default_preprocessing(config.in_channels))
    assert read_metadata(metadata, 'x')[0] == config
    model = build_model(config)
    assert settings_of(build_model(config_of(model))) == settings_of(model)
    assert dataclasses.asdict(settings_of(model)) == CHANGED


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        ('epsanet50_small', {'planes': (8, 12, 16, 32), 'reduction': 2}),
        ('pyconvresnet50', {'planes': (8, 16, 16, 32)}),
    ],
)
def test_settings_per_stage_survive_json_and_stay_the_identity_of_a_run(name, changes):
    config = ModelConfig(name=name, num_classes=5, **small.PER_STAGE, **changes)
    metadata = json.loads(json.dumps(make_metadata(config, list('abcde'), small.PREPROCESSING)))
    read = read_metadata(metadata, 'x')[0]
    assert read == config
    assert build_model(read) == build_model(config)
    now = identity(Config(model=config), 'data', 5)
    assert json.loads(json.dumps(now)) == now


@pytest.mark.parametrize('name', ['epsanet50_small', 'epsanet101_large', 'seresnet50', 'pyconvhgresnet152'])
def test_config_of_a_published_network_has_only_its_name(name):
    assert config_of(create_model(name)) == ModelConfig(name=name, num_classes=1000)


def test_wrong_names_are_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"unknown setting 'kernel' .*\(did you mean 'kernels'\?\)"):
        create_model('epsanet50_small', kernel=(3, 3, 3, 3))
    with pytest.raises(AttributeError, match=r"no setting 'dtyp' \(did you mean 'dtype'\?\)"):
        ModelConfig().dtyp = 'float32'
    with pytest.raises(InputError, match='the model has unknown settings: kernel'):
        model_config({'name': 'epsanet50_small', 'kernel': [3]})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'kernels': ((3, 5), 'x')}, 'model.kernels must hold numbers of type int, got'),
        ({'kernels': ((3, (5,)),)}, 'model.kernels must hold numbers of type int, got'),
        ({'groups': ((1, 1.5),)}, 'model.groups must hold numbers of type int, got'),
        ({'layers': ((3,),)}, 'model.layers must hold numbers of type int, got'),
        ({'layers': 3}, 'model.layers must hold numbers of type int, got 3'),
        ({'expansion': 2.0}, 'model.expansion must be of type int, got 2.0'),
        ({'remat': 1}, 'model.remat must be of type bool, got 1'),
        ({'num_classes': True}, 'model.num_classes must be of type int, got True'),
    ],
)
def test_values_of_another_type_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check_types(ModelConfig(**changes))


def test_network_without_a_classifier_returns_the_pooled_features(rng):
    model = small.model(**{**small.ONE_BLOCK, 'num_classes': 0})
    variables = small.random_variables(model, dtype=np.float32)
    assert 'fc' not in variables['params']
    images = small.images(rng, 2, 32, np.float32)
    pooled, features = jax.jit(
        lambda v, x: (model.apply(v, x), model.apply(v, x, method='features')['layer1'])
    )(variables, images)
    assert pooled.shape == (2, 16)
    np.testing.assert_allclose(pooled, features.mean(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize('channels', [1, 5])
def test_images_may_have_any_number_of_channels(channels):
    model = small.model(**small.ONE_BLOCK, in_channels=channels)
    images = jnp.zeros((2, 32, 32, channels), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert variables['params']['conv1']['kernel'].shape == (7, 7, channels, 64)
    assert jax.jit(model.apply)(variables, images).shape == (2, 7)
    with pytest.raises(InputError, match=f'images must have {channels} channels'):
        model.apply(variables, jnp.zeros((2, 32, 32, 3), jnp.float32))
