"""Inference without BatchNorm: each BatchNorm is folded into the convolution before it."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.norm import EPSILON

# Each convolution and the BatchNorm after it.
_PAIRS = {
    'conv1': 'bn1',
    'conv2': 'bn2',
    'conv3': 'bn3',
    'downsample_0': 'downsample_1',
    'downsample_1': 'downsample_2',  # in a PyConvResNet
}


def fold_batch_norm(model: EPSANet, variables: Mapping[str, Any]) -> tuple[EPSANet, dict[str, Any]]:
    """Returns a network without BatchNorm that gives the same outputs up to rounding, for inference only.

    The factor of each BatchNorm is multiplied into the kernel of the convolution before it, and its offset
    becomes a bias. After a pyramid the factor is multiplied into the attention instead, at no cost.

    Args:
        model: the network.
        variables: 'params' and 'batch_stats' of the network; may be traced.

    Returns:
        The network with `folded` set, and its variables, which hold only 'params'.

    Raises:
        InputError: the network is already folded.
    """
    if model.folded:
        raise InputError('fold_batch_norm: the network is already folded')
    return model.clone(folded=True), {'params': _fold_tree(variables['params'], variables['batch_stats'])}


@jax.jit  # one compilation instead of one for each kernel
def _fold_tree(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    blocks = {name: _fold(params[name], stats[name]) for name in params if name.startswith('layer')}
    return _fold(params, stats) | blocks


def _fold(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    """Folds the convolutions and BatchNorms of one level of the tree."""
    folded = dict(params)
    for conv, norm in _PAIRS.items():
        if conv not in params or 'scale' not in params.get(norm, ()):
            continue
        scale, bias = params[norm]['scale'], params[norm]['bias']
        wide = at_least_float32(scale.dtype)
        factor = lax.rsqrt(stats[norm]['var'].astype(wide) + EPSILON) * scale.astype(wide)  # [C]
        offset = (bias.astype(wide) - stats[norm]['mean'].astype(wide) * factor).astype(bias.dtype)
        if 'se' in params[conv]:  # a pyramid with attention
            folded[norm] = {'scale': factor.astype(scale.dtype), 'bias': offset}
            continue
        del folded[norm]
        if 'kernel' in params[conv]:
            folded[conv] = _scaled(params[conv]['kernel'], factor, offset)
            continue
        start, folded[conv] = 0, {}
        for i in range(len(params[conv])):  # the branches of a PyConv
            kernel = params[conv][f'conv2_{i + 1}']['kernel']
            own = slice(start, start + kernel.shape[3])
            folded[conv][f'conv2_{i + 1}'] = _scaled(kernel, factor[own], offset[own])
            start = own.stop
    return folded


def _scaled(kernel: jax.Array, factor: jax.Array, offset: jax.Array) -> dict[str, jax.Array]:
    """Returns the parameters of a convolution whose outputs are multiplied by `factor`, plus `offset`."""
    return {
        'kernel': (kernel.astype(factor.dtype) * factor[None, None, None]).astype(kernel.dtype),
        'bias': offset,
    }
