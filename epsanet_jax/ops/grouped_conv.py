"""Grouped 2-D convolution, with the algorithm chosen for the platform that is compiled for.

Each of forward pass, input gradient and weight gradient has its own algorithm (`algorithms`), chosen by
platform, shape, batch and dtype from a table of measurements (`choice`).
"""

import functools

import jax
from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.ops import algorithms, choice


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
        dilation: distance of the pixels that neighbouring values of the kernel see; beyond 1 the convolution
            is XLA's own, whatever the algorithm.
        algorithm: 'auto', or one of `algorithms.NAMES` for all directions (`algorithms.by_name`).

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out], of the dtype of `x`.

    Raises:
        InputError: the shapes do not fit together, or the algorithm is unknown.
    """
    _check(x, kernel, groups, algorithm)
    if dilation > 1 and kernel.shape[0] > 1:
        return algorithms.dilated(x, kernel, stride, groups, dilation)
    if algorithm == 'auto':
        return _auto(x, kernel, stride, groups)
    return algorithms.convolve(x, kernel, stride, groups, algorithms.by_name(algorithm, kernel.shape, groups))


# A jit, so that equal layers are traced once; inlined, because XLA:CPU brings the convolutions of gradients
# into the form that it has a fast path for only where they are part of the main computation.
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _for_platform(x: jax.Array, kernel: jax.Array, stride: int, groups: int, direction: str) -> jax.Array:
    """Computes the convolution by the algorithm chosen for `direction` on the platform compiled for."""
    n, h, w, channels = x.shape
    size, _, _, features = kernel.shape
    problem = choice.Problem(size, stride, groups, channels, features, max(h, w), n, x.dtype.name)
    by_platform = {p: getattr(choice.choose(p, problem), direction) for p in choice.PLATFORMS}

    def run(algorithm):
        return functools.partial(algorithms.convolve, stride=stride, groups=groups, algorithm=algorithm)

    if len(set(by_platform.values())) == 1:
        return run(by_platform['cpu'])(x, kernel)
    # For whatever else, and for exports to several platforms at once, the lowering that all of them know.
    default = run(algorithms.Algorithm('stock'))
    branches = {p: run(algorithm) for p, algorithm in by_platform.items()}
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
    algorithms.check_name(algorithm)
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
