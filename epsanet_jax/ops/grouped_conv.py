"""Grouped 2-D convolution, with the algorithm chosen for the platform that is compiled for.

XLA's own lowering of a grouped convolution (`feature_group_count`) is at its worst on thin groups with
large kernels, which is what the pyramid of EPSANet consists of. On the CPU the weight gradient of a single
5x5 convolution with 4 groups takes 100 times as long as PyTorch's. A grouped convolution is a dense one
whose kernel is block-diagonal, so there are other ways to compute it:

    stock    one convolution with `feature_group_count = groups`
    merged   neighbouring groups merged until each has at least `MERGED_CHANNELS` input channels, a dense
             convolution with a block-diagonal kernel for each merged group
    dense    all groups merged: one dense convolution with a block-diagonal kernel

All of them are equal up to rounding, in value and in both gradients. 'auto' takes one of them for each of
forward pass, input gradient and weight gradient (`choose`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.errors import InputError, suggest

MERGED_CHANNELS = 64  # below this many input channels a dense convolution leaves vector units idle
_PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def grouped_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, groups: int = 1, algorithm: str = 'auto'
) -> jax.Array:
    """Convolves images with a kernel whose input channels are split into groups.

    Padding is `k // 2` zeros on both sides, as PyTorch's `padding=k // 2`; at stride 2 this differs from
    XLA's 'SAME'.

    Args:
        x: images, [N, H, W, C_in].
        kernel: [k, k, C_in / groups, C_out] with odd k, of the same dtype as `x`; output channel j reads
            the input channels of group `j // (C_out / groups)`.
        stride: step in both directions.
        groups: number of groups; divides C_in and C_out.
        algorithm: 'auto' or one of `ALGORITHMS`.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out], of the dtype of `x`.

    Raises:
        InputError: the shapes do not fit together, or the algorithm is unknown.
    """
    _check(x, kernel, groups, algorithm)
    if algorithm == 'auto':
        return _auto(x, kernel, stride, groups)
    return ALGORITHMS[algorithm](x, kernel, stride, groups)


class Choice(NamedTuple):
    """The algorithm for each direction; a gradient's is the transpose of the algorithm named."""

    forward: str
    input_gradient: str
    weight_gradient: str


def choose(platform: str, kernel_shape: tuple[int, ...], groups: int) -> Choice:
    """Returns the algorithms that 'auto' takes on a platform.

    Sources: measurements on 2 CPU cores (merged groups: 4 times stock's speed forward, stock's weight
    gradient unusable); the TPU compiler's own cost for v5e (dense pays while there are at most 128 input
    channels, stages 1 and 2 of the published networks). GPUs: not measured yet, so the stock lowering.
    """
    channels = kernel_shape[2] * groups
    if groups == 1:
        name = 'stock'
    elif platform == 'cpu':
        name = 'merged'
    elif platform == 'tpu' and channels <= 128:
        name = 'dense'
    else:
        name = 'stock'
    return Choice(name, name, name)


def _stock(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def _block_diagonal(kernel: jax.Array, groups: int, blocks: int) -> jax.Array:
    """Turns [k, k, I, O], with I inputs for each of `groups`, into `blocks` kernels for merged groups.

    Returns:
        [blocks, k, k, groups / blocks * I, O / blocks]: zero where input and output are of different groups.
    """
    kh, kw, inputs, outputs = kernel.shape
    merge = groups // blocks
    k = kernel.reshape(kh, kw, inputs, blocks, merge, outputs // groups)
    k = k.transpose(3, 0, 1, 4, 2, 5)[..., None, :]  # [blocks, kh, kw, merge, I, 1, o]
    same_group = jnp.eye(merge, dtype=bool)[:, None, :, None]  # [merge, 1, merge, 1]
    # A selection, not a product: an infinite weight must not put NaN into the other groups.
    k = jnp.where(same_group, k, jnp.zeros((), kernel.dtype))  # [blocks, kh, kw, merge, I, merge, o]
    return k.reshape(blocks, kh, kw, merge * inputs, outputs // blocks)


def _blocks(x: jax.Array, kernel: jax.Array, stride: int, groups: int, blocks: int) -> jax.Array:
    kernels = _block_diagonal(kernel, groups, blocks)
    width = x.shape[3] // blocks
    parts = [
        _stock(lax.slice_in_dim(x, i * width, (i + 1) * width, axis=3), kernels[i], stride, 1)
        for i in range(blocks)
    ]
    return parts[0] if blocks == 1 else jnp.concatenate(parts, axis=3)


def _merged(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    return _blocks(x, kernel, stride, groups, merged_groups(kernel.shape[2], groups))


def _dense(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    return _blocks(x, kernel, stride, groups, 1)


def merged_groups(channels: int, groups: int) -> int:
    """Returns how many groups remain when groups of `channels` inputs are merged by 'merged'."""
    merge = next((m for m in range(1, groups) if groups % m == 0 and m * channels >= MERGED_CHANNELS), groups)
    return groups // merge


ALGORITHMS: dict[str, Callable[..., jax.Array]] = {
    'stock': _stock,
    'merged': _merged,
    'dense': _dense,
}


def _for_platform(x: jax.Array, kernel: jax.Array, stride: int, groups: int, direction: str) -> jax.Array:
    """Computes the convolution by the algorithm chosen for `direction` on the platform compiled for."""
    by_platform = {p: getattr(choose(p, kernel.shape, groups), direction) for p in _PLATFORMS}
    names = set(by_platform.values())
    if len(names) == 1:
        return ALGORITHMS[names.pop()](x, kernel, stride, groups)
    branches = {
        p: functools.partial(ALGORITHMS[name], stride=stride, groups=groups)
        for p, name in by_platform.items()
    }
    default = functools.partial(_stock, stride=stride, groups=groups)
    return lax.platform_dependent(x, kernel, default=default, **branches)


# A custom JVP instead of a custom VJP: the convolution is linear in each argument, so each tangent may be
# computed by the algorithm whose *transpose* is the gradient wanted, and every mode of differentiation
# (jvp, vjp, jacfwd, Hessian-vector products, vmap of them) goes on working. It also keeps the residuals to
# x and kernel: differentiating through platform_dependent would store those of every platform's branch.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _auto(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    return _for_platform(x, kernel, stride, groups, 'forward')


@_auto.defjvp
def _auto_jvp(stride, groups, primals, tangents):
    x, kernel = primals
    dx, dkernel = tangents
    y = _auto(x, kernel, stride, groups)
    dy_x = _for_platform(dx, kernel, stride, groups, 'input_gradient')
    dy_kernel = _for_platform(x, dkernel, stride, groups, 'weight_gradient')
    return y, dy_x + dy_kernel


def _check(x: jax.Array, kernel: jax.Array, groups: int, algorithm: str) -> None:
    check_algorithm(algorithm)
    if x.ndim != 4 or kernel.ndim != 4:
        raise InputError(
            'grouped_conv: expected x [N, H, W, C] and kernel [k, k, C / groups, O], '
            f'got shapes {x.shape} and {kernel.shape}'
        )
    kh, kw, inputs, outputs = kernel.shape
    if kh != kw or kh % 2 == 0:
        raise InputError(f'grouped_conv: the kernel must be square and of odd size, got {kh}x{kw}')
    if groups < 1 or x.shape[3] != inputs * groups or outputs % groups:
        raise InputError(
            f'grouped_conv: {groups} groups do not fit {x.shape[3]} input channels and a kernel of '
            f'{inputs} inputs a group and {outputs} outputs'
        )


def check_algorithm(algorithm: str) -> None:
    """Raises InputError if there is no such algorithm."""
    known = ('auto', *ALGORITHMS)
    if algorithm not in known:
        raise InputError(
            f'unknown convolution algorithm {algorithm!r}{suggest(algorithm, known)}; '
            f'known: {", ".join(known)}'
        )
