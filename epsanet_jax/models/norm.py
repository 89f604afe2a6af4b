"""Batch normalisation over groups of examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.models.dtypes import Dtype, at_least_float32


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm2d, its statistics taken over groups of consecutive examples.

    In training, the batch is cut into groups of `group` consecutive rows and each is normalised by its own
    mean and (biased) variance. The running statistics take the mean over the groups, of the unbiased
    variance n / (n - 1) as PyTorch keeps it. With one group this is PyTorch's BatchNorm2d; with groups of 32
    it is PyTorch's DataParallel with 32 images a device, however many devices there are.

    Statistics and normalisation are computed in at least float32.

    Attributes:
        group: examples in a group; None: the whole batch.
        axis_name: mesh axis over whose devices the rows of ONE group are spread; the batch seen here is then
            this device's part of it.
        momentum: share of the old running statistics that is kept (PyTorch's momentum is 1 - this).
        epsilon: added to the variance.
        dtype: of the result.
        param_dtype: of scale and bias. The running statistics are float32, or wider if this is.
    """

    group: int | None = None
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises [N, H, W, C] per channel; with `train`, by the batch and with new running statistics.

        Raises:
            InputError: the batch does not divide into groups, or a group holds one value a channel, whose
                variance is not defined.
        """
        channels = x.shape[-1]
        stats_dtype = at_least_float32(self.param_dtype)
        scale = self.param('scale', nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), stats_dtype)
        running_var = self.variable('batch_stats', 'var', jnp.ones, (channels,), stats_dtype)

        wide = at_least_float32(x.dtype, stats_dtype)
        if not train:
            mean = running_mean.value.astype(wide)
            var = running_var.value.astype(wide)
            return self._normalise(x.astype(wide), mean, var, scale, bias).astype(self.dtype)

        groups = self._groups(x.shape[0])
        xg = x.astype(wide).reshape(groups, x.shape[0] // groups, *x.shape[1:])  # [G, n, H, W, C]
        mean, var, n = self._statistics(xg, running_mean.value.astype(wide))  # [G, C], [G, C]
        if not self.is_initializing():
            new_mean = mean.mean(axis=0).astype(stats_dtype)
            new_var = (var * (n / (n - 1))).mean(axis=0).astype(stats_dtype)
            m = self.momentum
            running_mean.value = m * running_mean.value + (1 - m) * new_mean
            running_var.value = m * running_var.value + (1 - m) * new_var
        mean, var = (s[:, None, None, None, :] for s in (mean, var))  # [G, 1, 1, 1, C]
        return self._normalise(xg, mean, var, scale, bias).reshape(x.shape).astype(self.dtype)

    def _groups(self, rows: int) -> int:
        """Returns the number of groups among `rows` rows."""
        spanning = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        group = self.group or rows * spanning
        if spanning > 1 and group != rows * spanning:
            raise InputError(
                f'BatchNorm: a group of {group} examples is not what {spanning} devices with {rows} rows hold'
            )
        if spanning == 1 and rows % group:
            raise InputError(
                f'BatchNorm: a batch of {rows} examples does not divide into groups of {group} (bn_group)'
            )
        return rows * spanning // group

    def _statistics(self, xg: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Returns mean and biased variance [G, C] of [G, n, H, W, C], and the number of values in each.

        E[x^2] - E[x]^2 takes one pass over memory, which the compiler fuses with what produced x, but cancels
        where the mean is large; the running mean as `shift` [C] keeps that from happening.
        """
        axes = (1, 2, 3)
        n = xg.shape[1] * xg.shape[2] * xg.shape[3]
        shift = lax.stop_gradient(shift)
        shifted = xg - shift
        mean = shifted.mean(axis=axes)
        square = jnp.square(shifted).mean(axis=axes)
        if self.axis_name is not None:
            n *= lax.axis_size(self.axis_name)
            mean, square = lax.pmean((mean, square), self.axis_name)
        if n == 1 and not self.is_initializing():
            raise InputError(
                'BatchNorm: training needs more than one value a channel in a group, '
                f'got 1 from a group of shape {xg.shape[1:]}; use larger groups (bn_group) or images'
            )
        return mean + shift, jnp.maximum(square - jnp.square(mean), 0), n

    def _normalise(self, x, mean, var, scale, bias):
        factor = lax.rsqrt(var + self.epsilon) * scale.astype(x.dtype)
        return (x - mean) * factor + bias.astype(x.dtype)
