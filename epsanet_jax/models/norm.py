"""Batch normalisation over groups of examples."""

import itertools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.models.dtypes import Dtype, at_least_float32
from epsanet_jax.ops.choice import GPUS

EPSILON = 1e-5  # PyTorch's


class Weighted(NamedTuple):
    """An activation [N, H, W, C] that is not computed yet: the concatenated parts times their weights.

    Attributes:
        parts: arrays [N, H, W, C_i] whose channels add up to C.
        means: mean of each channel of each image, before the weights; [N, C], at least float32.
        weights: weight of each channel of each image; [N, C], at least float32.
    """

    parts: tuple[jax.Array, ...]
    means: jax.Array
    weights: jax.Array

    def value(self) -> jax.Array:
        """Returns the activation [N, H, W, C] with the dtype of the parts."""
        return self.affine(self.weights, jnp.zeros_like(self.weights)).astype(self.parts[0].dtype)

    def affine(self, factor: jax.Array, offset: jax.Array) -> jax.Array:
        """Returns parts * factor + offset, [N, H, W, C], in the dtype of factor and offset [N, C]."""

        def piecewise(parts: tuple[jax.Array, ...], factor: jax.Array, offset: jax.Array) -> jax.Array:
            cut = zip(parts, *(self.by_part(a[:, None, None]) for a in (factor, offset)), strict=True)
            return jnp.concatenate([part.astype(factor.dtype) * f + o for part, f, o in cut], axis=-1)

        def whole(parts: tuple[jax.Array, ...], factor: jax.Array, offset: jax.Array) -> jax.Array:
            x = jnp.concatenate(parts, axis=-1)
            return x.astype(factor.dtype) * factor[:, None, None] + offset[:, None, None]

        # The TPU compiler would fuse `piecewise` into the convolution that reads it, for up to a sixth
        # more cycles per block. On a GPU the sums of parts with 16 or 32 channels read memory at half speed.
        # On a CPU `whole` would be another pass over memory.
        others = dict.fromkeys(('tpu', *GPUS), whole)
        return lax.platform_dependent(self.parts, factor, offset, default=piecewise, **others)

    def by_part(self, values: jax.Array) -> list[jax.Array]:
        """Splits [..., C] into the channels of each part, [..., C_i]."""
        widths = [part.shape[-1] for part in self.parts]
        ends = itertools.accumulate(widths)
        return [values[..., end - width : end] for width, end in zip(widths, ends, strict=True)]


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm2d with statistics over groups of consecutive examples.

    In training, the batch is split into groups of `group` consecutive rows. Each group is normalised by its
    own mean and (biased) variance. The running statistics are updated with the mean over the groups; like
    PyTorch's, they keep the unbiased variance, times n / (n - 1). With one group this is PyTorch's
    BatchNorm2d. With groups of 32 it is PyTorch's DataParallel with 32 images per device, for any number of
    devices.

    Statistics and normalisation are computed in at least float32.

    Attributes:
        group: number of examples in a group; None for the whole batch.
        axis_name: mesh axis whose devices share the rows of ONE group; the batch given to the layer is then
            this device's part of the group.
        momentum: fraction of the old running statistics that is kept (1 - PyTorch's momentum).
        epsilon: number added to the variance.
        dtype: type of the result.
        param_dtype: type of scale and bias; the running statistics have at least float32.
        frozen: regular expression that is searched in the name of the scale, for example
            'layer1_0/bn1/scale'. If it matches, training normalises by the running statistics and does not
            change them.
    """

    group: int | None = None
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = EPSILON
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    frozen: str = ''

    @nn.compact
    def __call__(self, x: jax.Array | Weighted, train: bool = False) -> jax.Array:
        """Normalises [N, H, W, C] per channel.

        With `train`, statistics are those of the batch, and the running statistics are updated. A `Weighted`
        input is normalised without computing it: its weights are multiplied into scale and bias, and its
        statistics come from those of each image. This saves several passes over memory.

        Raises:
            InputError: the batch is empty, does not divide into groups, or has groups with one value per
                channel, for which the variance is undefined.
        """
        parts = x.parts if isinstance(x, Weighted) else (x,)
        rows, height, width, _ = parts[0].shape
        channels = sum(part.shape[-1] for part in parts)
        stats_dtype = at_least_float32(self.param_dtype)
        if self.frozen and re.search(self.frozen, '/'.join((*self.path, 'scale'))):
            train = False
        scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), stats_dtype)
        running_var = self.variable('batch_stats', 'var', jnp.ones, (channels,), stats_dtype)

        wide = at_least_float32(parts[0].dtype, stats_dtype)
        # Close to the mean. E[x^2] - E[x]^2 takes one pass over memory, but loses precision for large means.
        shift = lax.stop_gradient(running_mean.value.astype(wide))[None]  # [1, C]
        if train:
            groups = self._groups(rows)
            x = x if isinstance(x, Weighted) else _stored(x)
            mean, var, n = self._statistics(x, shift, (groups, rows // groups, height, width))  # [G, C] each
            if not self.is_initializing():
                new_mean = (mean + shift).mean(axis=0).astype(stats_dtype)
                new_var = (var * (n / (n - 1))).mean(axis=0).astype(stats_dtype)
                m = self.momentum
                running_mean.value = m * running_mean.value + (1 - m) * new_mean
                running_var.value = m * running_var.value + (1 - m) * new_var
        else:
            mean, var = jnp.zeros((1, channels), wide), running_var.value.astype(wide)[None]

        # One multiplication and one addition per element: the backward pass then takes two sums, not three.
        factor = lax.rsqrt(var + self.epsilon) * scale.astype(wide)[None]  # [G, C]
        offset = bias.astype(wide)[None] - mean * factor
        if isinstance(x, Weighted):
            factor, offset = (_each(a, rows) for a in (factor, offset - shift * factor))  # [N, C]
            return x.affine(x.weights.astype(wide) * factor, offset).astype(self.dtype)
        shape = (len(factor), rows // len(factor), *x.shape[1:])
        grouped = x.astype(wide).reshape(shape) - _spread(shift)  # [G, n, H, W, C]
        factor, offset = _spread(factor), _spread(offset)
        return (grouped * factor + offset).reshape(x.shape).astype(self.dtype)

    def _groups(self, rows: int) -> int:
        """Returns the number of groups in `rows` rows."""
        spanning = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        if rows == 0:
            raise InputError('BatchNorm: training needs at least one example, got an empty batch')
        group = self.group or rows * spanning
        if spanning > 1 and group != rows * spanning:
            raise InputError(
                f'BatchNorm: {spanning} devices with {rows} rows each must hold one group, '
                f'but a group has {group} examples'
            )
        if spanning == 1 and rows % group:
            raise InputError(
                f'BatchNorm: a batch of {rows} examples does not divide into groups of {group} (bn_group)'
            )
        return rows * spanning // group

    def _statistics(
        self, x: jax.Array | Weighted, shift: jax.Array, shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array, int]:
        """Returns mean - shift and biased variance of each group, [G, C], and the number of values in each.

        Args:
            x: the activation, [N, H, W, C].
            shift: [1, C], close to the mean.
            shape: groups, images per group, height, width.
        """
        groups, images, height, width = shape
        n = images * height * width
        if isinstance(x, Weighted):
            first, square = (a.reshape(groups, images, a.shape[-1]).mean(axis=1) for a in _moments(x, shift))
        else:
            grouped = x.astype(shift.dtype).reshape(*shape, x.shape[-1])
            first = grouped.mean(axis=(1, 2, 3)) - shift
            square = jnp.square(grouped - _spread(shift)).mean(axis=(1, 2, 3))
        if self.axis_name is not None:
            n *= lax.axis_size(self.axis_name)
            first, square = lax.pmean((first, square), self.axis_name)
        if n <= 1 and not self.is_initializing():
            raise InputError(
                'BatchNorm: training needs more than one value per channel in a group, '
                f'got {n} from a group of shape {(*shape[1:], first.shape[-1])}: '
                'use larger groups (bn_group) or images'
            )
        return first, jnp.maximum(square - jnp.square(first), 0), n


class Affine(nn.Module):
    """The rest of a folded BatchNorm after a pyramid: a factor and an offset for each channel.

    Attributes:
        dtype: type of the result.
        param_dtype: type of the parameters.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Weighted, train: bool = False) -> jax.Array:
        """Returns x * scale + bias, [N, H, W, C]; `train` has no effect."""
        shape = (x.weights.shape[1],)
        scale = self.param('scale', nn.initializers.ones, shape, self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
        wide = at_least_float32(x.parts[0].dtype, self.param_dtype)
        factor = x.weights.astype(wide) * scale.astype(wide)[None]  # [N, C]
        return x.affine(factor, jnp.broadcast_to(bias.astype(wide)[None], factor.shape)).astype(self.dtype)


@jax.custom_jvp
def _stored(x: jax.Array) -> jax.Array:
    """Returns x, on a GPU behind a barrier; its gradient has none.

    XLA merges operations that read the same array, but not those that read a matrix product: both sums of
    BatchNorm would each read it.
    """
    gpus = dict.fromkeys(GPUS, lax.optimization_barrier)
    return lax.platform_dependent(x, default=lambda x: x, **gpus)


@_stored.defjvp
def _(primals, tangents):
    return _stored(*primals), *tangents


def _moments(x: Weighted, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each image's means of (x - shift) and (x - shift)^2, [N, C], in one pass over the parts."""
    # Close to the means of the parts: the weights of a softmax are 1 / len(parts) on average.
    near = shift * len(x.parts)
    means, weights = x.means.astype(shift.dtype), x.weights.astype(shift.dtype)
    nears = x.by_part(near[:, None, None])  # [1, 1, 1, C_i] each
    shifted = (part.astype(shift.dtype) - n for part, n in zip(x.parts, nears, strict=True))
    squares = [jnp.square(part).mean(axis=(1, 2)) for part in shifted]
    var = jnp.maximum(jnp.concatenate(squares, axis=-1) - jnp.square(means - near), 0)  # [N, C]
    first = weights * means - shift
    return first, jnp.square(weights) * var + jnp.square(first)


def _spread(per_group: jax.Array) -> jax.Array:
    """Returns values [G, C] as [G, 1, 1, 1, C], to combine them with activations [G, n, H, W, C]."""
    return per_group[:, None, None, None, :]


def _each(per_group: jax.Array, rows: int) -> jax.Array:
    """Repeats values [G, C] for the rows of each group, to [N, C]."""
    groups, channels = per_group.shape
    shape = (groups, rows // groups, channels)
    return jnp.broadcast_to(per_group[:, None], shape).reshape(rows, channels)
