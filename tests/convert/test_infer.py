"""The settings of a network from the shapes of its state dict."""

import numpy as np
import pytest
import small
import torch

from epsanet_jax import InputError, create_model, list_models
from epsanet_jax.convert import from_torch, torch_model
from epsanet_jax.convert.infer import infer_settings
from epsanet_jax.models.settings import settings_of
from epsanet_jax.models.zoo import build_model

TWO = {'planes': (48, 96), 'expansion': 2}


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        *[(name, {}) for name in list_models()],
        ('epsanet50_small', small.SETTINGS),
        ('epsanet101_large', {'psa_bias': True, 'num_classes': 3, 'reduction': 8}),
        (
            'epsanet50_small',
            {'kernels': (3, 5), 'groups': (1, 2), 'planes': (16, 32, 64, 64), 'reduction': 4},
        ),
        ('resnet50', {'layers': (1, 1), 'planes': (8, 16), 'expansion': 2}),
        ('seresnet50', {'layers': (1, 1), 'planes': (8, 16), 'reduction': 4}),
        ('pyconvresnet50', {'layers': (1, 1), 'kernels': ((3,), (3, 5)), 'groups': ((2,), (1, 4)), **TWO}),
        ('pyconvresnet50', {'layers': (1, 1), 'kernels': (3,), 'groups': (1,), **TWO}),
        (
            'epsanet50_small',
            {'layers': (1, 1), 'kernels': ((3, 5, 7), (3, 5)), 'groups': ((1, 2, 2), (1, 2)), **TWO},
        ),
        (
            'epsanet50_small',
            {'layers': (1, 1), 'groups': ((1, 2, 2, 2), (1, 4, 2, 4)), 'reduction': 4, **TWO},
        ),
    ],
)
def test_settings_are_inferred_from_shapes(name, changes):
    net = create_model(name, **changes)
    with torch.device('meta'):
        found = infer_settings(torch_model.EPSANet(net).state_dict())
    assert settings_of(build_model(found)) == settings_of(net)
    if not changes:
        assert found.name == name


@pytest.mark.parametrize('other', [{}, {'a': np.zeros(3)}, {'fc.weight': np.zeros((3, 4))}])
def test_other_state_dicts_are_refused(other):
    with pytest.raises(InputError, match='not the state dict of an EPSANet'):
        infer_settings(other)


@pytest.mark.parametrize(
    ('given', 'asked', 'hint'),
    [
        (('epsanet50_large', {}), 'epsanet50_small', "create_model('epsanet50_large', num_classes=1000"),
        pytest.param(
            *(('epsanet101_small', {}), 'epsanet50_small', "create_model('epsanet101_small'"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(('epsanet50_small', {}), 'epsanet101_large', "create_model('epsanet50_small'"),
            marks=pytest.mark.slow,
        ),
        (('epsanet50_small', {'psa_bias': True}), 'epsanet50_small', 'psa_bias=True'),
        (('epsanet50_small', {'num_classes': 10}), 'epsanet50_small', 'num_classes=10'),
        pytest.param(
            *(('resnet50', {}), 'epsanet50_small', "create_model('resnet50'"), marks=pytest.mark.slow
        ),
        (('seresnet50', {}), 'resnet50', "create_model('seresnet50'"),
        (('pyconvhgresnet50', {}), 'pyconvresnet50', "create_model('pyconvhgresnet50'"),
    ],
)
def test_error_names_the_variant_that_fits(given, asked, hint):
    with torch.device('meta'):
        state_dict = torch_model.EPSANet(create_model(given[0], **given[1])).state_dict()
    shapes_only = {k: np.broadcast_to(np.float32(1), v.shape) for k, v in state_dict.items()}
    with pytest.raises(InputError) as e:
        from_torch(shapes_only, create_model(asked))
    assert hint in str(e.value)
