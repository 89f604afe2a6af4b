"""What network a state dict is of, by its names and shapes."""

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from epsanet_jax.errors import InputError
from epsanet_jax.models import create_model
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.zoo import VARIANTS

_DEFAULT_REDUCTION = 16
STRUCTURE = ('layers', 'planes', 'expansion', 'kernels', 'groups')


def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns 'name' and the overrides of `create_model` that give these names and shapes.

    'num_classes' is 0 where there is no classifier.

    Args:
        state_dict: name -> tensor or array, without a wrapper's prefix.

    Raises:
        InputError: it is not of an EPSANet or ResNet with bottleneck blocks.
    """
    shapes = {name: tuple(getattr(value, 'shape', ())) for name, value in state_dict.items()}
    try:
        settings = _read_shapes(shapes)
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as e:
        some = ', '.join(sorted(shapes)[:3]) or 'nothing'
        raise InputError(
            f'not the state dict of an EPSANet: {str(e) or "its shapes"} does not fit; it holds {some} ...'
        ) from e
    return _as_overrides(settings)


def settings_of(model: EPSANet) -> dict[str, Any]:
    """Returns 'name' and the overrides of `create_model` that give this network, types as their names.

    Raises:
        InputError: it is none that `create_model` makes.
    """
    fields = ('num_classes', 'layers', 'planes', 'expansion', 'middle', 'use_se')
    if model.middle == 'psa':
        fields = (*fields, 'kernels', 'groups', 'reduction', 'psa_bias')
    elif model.use_se:
        fields = (*fields, 'reduction')
    settings = {field: getattr(model, field) for field in (*fields, 'output_stride', 'conv', 'remat')}
    settings |= {field: np.dtype(getattr(model, field)).name for field in ('dtype', 'param_dtype')}
    return _as_overrides({**settings, 'bn_group': model.bn_group or 0, 'frozen_bn': model.frozen_bn})


def _as_overrides(settings: dict[str, Any]) -> dict[str, Any]:
    """Puts the name of the nearest variant in place of what that variant has of its own."""
    kind = settings['middle'], settings['use_se']
    candidates = {name: v for name, v in VARIANTS.items() if (v.middle, v.use_se) == kind}
    if not candidates:
        raise InputError(
            'a pyramid and a squeeze-and-excitation module in one block: no network of this package'
        )

    def distance(name: str) -> int:
        return sum(getattr(candidates[name], f) != settings.get(f) for f in STRUCTURE if f in settings)

    name = min(candidates, key=distance)
    own = {f for f in STRUCTURE if getattr(candidates[name], f) == settings.get(f)} | {'middle', 'use_se'}
    return {'name': name, **{k: v for k, v in settings.items() if k not in own}}


def model_from_settings(settings: Mapping[str, Any], **changes: Any) -> EPSANet:
    """Makes the network that `infer_settings` describes."""
    kwargs = {**settings, **changes}
    return create_model(kwargs.pop('name'), **kwargs)


def differences(settings: Mapping[str, Any], model: EPSANet) -> str:
    """Returns in words what network the settings mean if it is another than `model`, else ''."""
    try:
        meant = model_from_settings(settings)
    except InputError:
        return ''
    fields = ('middle', *STRUCTURE, 'reduction', 'psa_bias', 'num_classes')
    if meant.middle != 'psa':
        fields = ('middle', 'use_se', 'layers', 'planes', 'expansion', 'num_classes')
        fields = (*fields, 'reduction') if meant.use_se else fields
    if all(getattr(meant, f) == getattr(model, f) for f in fields):
        return ''
    overrides = ', '.join(f'{k}={v}' for k, v in settings.items() if k != 'name')
    return f"create_model('{settings['name']}'{', ' if overrides else ''}{overrides})"


def _read_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    counts = collections.Counter(
        int(m.group(1)) for name in shapes if (m := re.fullmatch(r'layer(\d+)\.\d+\.conv1\.weight', name))
    )
    stages = range(1, len(counts) + 1)
    planes = tuple(shapes[f'layer{s}.0.conv1.weight'][0] for s in stages)
    settings: dict[str, Any] = {
        'num_classes': shapes['fc.weight'][0] if 'fc.weight' in shapes else 0,
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
    # Hidden widths are rounded down, so several reductions may give the same.
    reductions = [_DEFAULT_REDUCTION, *(c // h for h, c in reversed(squeezes))]
    fitting = [r for r in reductions if all(c // r == h for h, c in squeezes)]
    if not fitting:
        raise ValueError('the hidden width of se.fc1')
    return fitting[0]
