"""Infers the settings of a network from the names and shapes of its state dict."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from epsanet_jax.errors import InputError, one_line
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
        reason, names = str(e) or 'its shapes', one_line(', '.join(sorted(shapes)[:3]) or 'none', 150)
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
        'middle': _middle(shapes),
        'use_se': 'layer1.0.se.fc1.weight' in shapes,
    }
    if settings['middle'] == 'conv3x3':
        if settings['use_se']:
            settings['reduction'] = _reduction(shapes, 'se.fc1.weight', stages)
        return settings
    pyramids = [_pyramid(shapes, f'layer{s}.0.conv2', planes[s - 1]) for s in stages]
    for field, per_stage in zip(('kernels', 'groups'), zip(*pyramids, strict=True), strict=True):
        settings[field] = per_stage[0] if len(set(per_stage)) == 1 else per_stage
    if settings['middle'] == 'psa':
        settings['psa_bias'] = 'layer1.0.conv2.conv_1.bias' in shapes
        settings['reduction'] = _reduction(shapes, 'conv2.se.fc1.weight', stages)
    return settings


def _middle(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if 'layer1.0.downsample.2.weight' in shapes:  # a shortcut that begins with pooling
        return 'pyconv'
    return 'conv3x3' if 'layer1.0.conv2.weight' in shapes else 'psa'


def _pyramid(shapes: Mapping[str, tuple[int, ...]], conv2: str, planes: int) -> tuple[Any, Any]:
    """Returns kernels and groups of the pyramid at `conv2`, in which a PyConv of one branch has no number."""
    pattern = re.compile(rf'{re.escape(conv2)}(?:\.conv2?_(\d+))?\.weight')
    found = sorted(
        (int(m[1] or 1), shape) for name, shape in shapes.items() if (m := pattern.fullmatch(name))
    )
    if not found:
        raise KeyError(f'{conv2}.conv_1.weight')
    return tuple(shape[2] for _, shape in found), tuple(planes // shape[1] for _, shape in found)


def _reduction(shapes: Mapping[str, tuple[int, ...]], name: str, stages: range) -> int:
    squeezes = [shapes[f'layer{s}.0.{name}'][:2] for s in stages]  # (hidden, channels)
    # Hidden widths are rounded down, so several reductions may fit: the default, 16, comes first.
    reductions = [16, *(c // h for h, c in reversed(squeezes))]
    fitting = [r for r in reductions if all(c // r == h for h, c in squeezes)]
    if not fitting:
        raise ValueError('the hidden width of se.fc1')
    return fitting[0]
