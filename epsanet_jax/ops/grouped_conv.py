"""Grouped 2-D convolutions whose algorithm is chosen for the target platform at compile time.

The forward pass, the input gradient and the weight gradient each have their own algorithm (`algorithms`). It
is chosen by platform, shape, batch and dtype from a table of measurements (`choice`).
"""

import functools
import numbers
from collections.abc import Sequence

import jax
from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.ops import algorithms, choice, rewrites
from epsanet_jax.ops.materialize import materialize


def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    algorithm: str = 'auto',
) -> jax.Array:
    """Convolves images with a kernel whose input channels are split into groups.

    Padding is `dilation * (k // 2)` zeros on both sides, as PyTorch's `padding=k // 2`; at stride 2 this
    differs from XLA's 'SAME'.

    Args:
        x: images, [N, H, W, C_in].
        kernel: [k, k, C_in / groups, C_out] with odd k, of the same dtype as `x`; output channel j reads
            the input channels of group `j // (C_out / groups)`.
        stride: step in both directions.
        groups: number of groups; divides C_in and C_out.
        dilation: distance in pixels between neighbouring values of the kernel; with more than 1 the
            convolution is XLA's own and `algorithm` has no effect.
        algorithm: 'auto', or one of `algorithms.NAMES` for all directions (`algorithms.by_name`).

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out], with the dtype of `x`.

    Raises:
        InputError: the shapes do not fit together, the stride or the dilation is not a positive integer, or
            the algorithm is unknown.
    """
    kwargs = {'stride': stride, 'dilation': dilation, 'algorithm': algorithm}
    return pyramid_conv(x, (kernel,), groups=(groups,), **kwargs)[0]


def pyramid_conv(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    *,
    groups: Sequence[int],
    stride: int = 1,
    dilation: int = 1,
    algorithm: str = 'auto',
) -> tuple[jax.Array, ...]:
    """Convolves the same images with several kernels.

    The results equal those of `grouped_conv` with each kernel. Computing them together can be faster.

    Args:
        x: images, [N, H, W, C_in].
        kernels: arrays [k, k, C_in / groups, C_out]; k, groups and C_out may differ.
        groups: number of groups for each kernel.
        stride: step in both directions, for all kernels.
        dilation: distance in pixels between neighbouring values of each kernel.
        algorithm: as in `grouped_conv`.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out] for each kernel.

    Raises:
        InputError: the shapes do not fit together, the stride or the dilation is not a positive integer, or
            the algorithm is unknown.
    """
    if len(kernels) != len(groups):
        raise InputError(f'pyramid_conv: {len(kernels)} kernels need as many groups, got {len(groups)}')
    for name, value in {'stride': stride, 'dilation': dilation}.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise InputError(f'grouped_conv: {name} must be a positive integer, got {value!r}')
    for kernel, g in zip(kernels, groups, strict=True):
        _check(x, kernel, g, algorithm)
    if dilation > 1 and any(kernel.shape[0] > 1 for kernel in kernels):
        each = zip(kernels, groups, strict=True)
        return tuple(rewrites.dilated(x, kernel, stride, g, dilation) for kernel, g in each)
    kernels, groups = tuple(kernels), tuple(groups)
    if algorithm == 'auto':
        return _auto(x, kernels, stride, groups)
    chosen = [algorithms.by_name(algorithm, k.shape, g) for k, g in zip(kernels, groups, strict=True)]
    return algorithms.convolve_all(x, kernels, stride, groups, chosen)


# jit, so that equal layers are traced once. inline, because XLA:CPU rewrites the convolutions of gradients to
# the form that its fast path needs only if they are part of the main computation.
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _for_platform(
    x: jax.Array, kernels: tuple[jax.Array, ...], stride: int, groups: tuple[int, ...], direction: str
) -> tuple[jax.Array, ...]:
    """Computes the convolutions with the algorithms chosen for `direction` on the target platform."""
    n, h, w, channels = x.shape
    problems = [
        choice.Problem(k.shape[0], stride, g, channels, k.shape[3], max(h, w), n, x.dtype.name)
        for k, g in zip(kernels, groups, strict=True)
    ]
    by_platform = {
        platform: tuple(getattr(choice.choose(platform, problem), direction) for problem in problems)
        for platform in choice.PLATFORMS
    }

    def run(chosen):
        return functools.partial(algorithms.convolve_all, stride=stride, groups=groups, algorithms=chosen)

    if len(set(by_platform.values())) == 1:
        return run(by_platform['cpu'])(x, kernels)
    # Other platforms, and exports to several platforms at once, use the lowering that all of them support.
    default = run((algorithms.Algorithm('stock'),) * len(kernels))
    branches = {platform: run(chosen) for platform, chosen in by_platform.items()}
    return lax.platform_dependent(x, kernels, default=default, **branches)


# A custom JVP instead of a custom VJP: the convolution is linear in each argument, so each tangent can be
# computed by the algorithm whose *transpose* is the wanted gradient. Every mode of differentiation (jvp, vjp,
# jacfwd, Hessian-vector products, vmap of them) keeps working. The only residuals are x and the kernels:
# differentiating through platform_dependent would store those of every platform's branch.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _auto(
    x: jax.Array, kernels: tuple[jax.Array, ...], stride: int, groups: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    return _for_platform(x, kernels, stride, groups, 'forward')


@_auto.defjvp
def _auto_jvp(stride, groups, primals, tangents):
    x, kernels = primals
    dx, dkernels = tangents
    y = _auto(x, kernels, stride, groups)
    dy_x = _for_platform(dx, kernels, stride, groups, 'input_gradient')
    if any(kernel.shape[0] > 1 for kernel in kernels):
        x = lax.platform_dependent(x, cpu=_images_last, default=lambda x: x)
    dy_kernels = _for_platform(x, dkernels, stride, groups, 'weight_gradient')
    # The transpose of `materialize` is itself: every group of every branch reads this gradient.
    return y, tuple(materialize(a + b) for a, b in zip(dy_x, dy_kernels, strict=True))


def _images_last(x: jax.Array) -> jax.Array:
    """Returns x, stored once in the order [C, H, W, N] that all weight gradients of XLA:CPU read."""
    return materialize(x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)


def _check(x: jax.Array, kernel: jax.Array, groups: int, algorithm: str) -> None:
    algorithms.check_name(algorithm)
    if x.ndim != 4 or kernel.ndim != 4:
        raise InputError(
            'grouped_conv: expected x [N, H, W, C] and kernel [k, k, C / groups, O], '
            f'got shapes {x.shape} and {kernel.shape}'
        )
    kh, kw, inputs, outputs = kernel.shape
    if kh != kw or kh % 2 == 0:
        raise InputError(f'grouped_conv: the kernel must be square with odd size, got {kh}x{kw}')
    if groups < 1 or x.shape[3] != inputs * groups or outputs % groups or not inputs or not outputs:
        raise InputError(
            f'grouped_conv: {groups} groups do not fit {x.shape[3]} input channels and a kernel of '
            f'{inputs} inputs per group and {outputs} outputs'
        )
