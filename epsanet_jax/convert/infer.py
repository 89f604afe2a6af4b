"""Infers the settings of a network from the names and shapes of its state dict."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet, abstract_variables
from epsanet_jax.models.settings import ModelConfig
from epsanet_jax.models.zoo import build_model, nearest_variant


def infer_settings(state_dict: Mapping[str, Any]) -> ModelConfig:
    """Returns the configuration of the network with this state dict; without a classifier `num_classes` is 0.

    Args:
        state_dict: name -> tensor or array, without the prefix of a wrapper.

    Raises:
        InputError: the state dict is not that of an EPSANet or of a ResNet with bottleneck blocks.
    """
    shapes = {name: tuple(getattr(value, 'shape', ())) for name, value in state_dict.items()}
    try:
        settings = _read_shapes(shapes)
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as e:
        reason, names = str(e) or 'its shapes', ', '.join(sorted(shapes)[:3]) or 'none'
        raise InputError(
            f'not the state dict of an EPSANet: {reason} does not fit; names: {names} ...'
        ) from e
    return nearest_variant(settings.pop('middle'), settings.pop('use_se'), settings)


def differences(config: ModelConfig, model: EPSANet) -> str:
    """Returns the `create_model` call of a configuration; '' if it is invalid or fits `model`."""
    try:
        if _shapes(build_model(config)) == _shapes(model):
            return ''
    except InputError:
        return ''
    default = ModelConfig(name=config.name)
    changed = ''.join(f', {k}={v}' for k, v in dataclasses.asdict(config).items() if v != getattr(default, k))
    return f"create_model('{config.name}'{changed})"


def _shapes(model: EPSANet) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape, dict(abstract_variables(model)))


def _read_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    counts = collections.Counter(
        int(m.group(1)) for name in shapes if (m := re.fullmatch(r'layer(\d+)\.\d+\.conv1\.weight', name))
    )
    stages = range(1, len(counts) + 1)
    planes = tuple(shapes[f'layer{s}.0.conv1.weight'][0] for s in stages)
    settings: dict[str, Any] = {
        'num_classes': shapes['fc.weight'][0] if 'fc.weight' in shapes else 0,
        'in_channels': shapes['conv1.weight'][1],
        'layers': tuple(counts[s] for s in stages),
        'planes': planes,
        'expansion': shapes['layer1.0.conv3.weight'][0] // planes[0],
        'middle': 'conv3x3' if 'layer1.0.conv2.weight' in shapes else 'psa',
        'use_se': 'layer1.0.se.fc1.weight' in shapes,
    }
    if settings['middle'] == 'conv3x3':
        if settings['use_se']:
            settings['reduction'] = _reduction(shapes, 'se.fc1.weight', stages)
        return settings
    psa = 'layer1.0.conv2.'
    branches = sum(bool(re.fullmatch(psa + r'conv_\d+\.weight', name)) for name in shapes)
    weights = [shapes[f'{psa}conv_{i + 1}.weight'] for i in range(branches)]
    settings['kernels'] = tuple(w[2] for w in weights)
    settings['groups'] = tuple(planes[0] // w[1] for w in weights)
    settings['psa_bias'] = f'{psa}conv_1.bias' in shapes
    settings['reduction'] = _reduction(shapes, 'conv2.se.fc1.weight', stages)
    return settings


def _reduction(shapes: Mapping[str, tuple[int, ...]], name: str, stages: range) -> int:
    squeezes = [shapes[f'layer{s}.0.{name}'][:2] for s in stages]  # (hidden, channels)
    # Hidden widths are rounded down, so several reductions may fit: the default, 16, comes first.
    reductions = [16, *(c // h for h, c in reversed(squeezes))]
    fitting = [r for r in reductions if all(c // r == h for h, c in squeezes)]
    if not fitting:
        raise ValueError('the hidden width of se.fc1')
    return fitting[0]
