"""The convolution and its two gradients as primitives of JAX, each with algorithms for every platform.

A convolution is linear in the images and in the kernels. So are its gradients, and the derivatives of all
three are these three again. Every order and mode of differentiation therefore uses the algorithms of its
direction. They are chosen when a program is lowered for a platform. Several kernels may read the same images.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from epsanet_jax.ops import algorithms, choice, generation, pallas_tpu
from epsanet_jax.ops.algorithms import DIRECT, Algorithm
from epsanet_jax.ops.choice import GPUS
from epsanet_jax.ops.materialize import materialize
from epsanet_jax.ops.plain import Window
from epsanet_jax.ops.primitive import make_primitive


class Spec(NamedTuple):
    """What the primitives need to know besides the arrays."""

    windows: tuple[Window, ...]  # for each kernel, with the same strides
    groups: tuple[int, ...]  # for each kernel
    algorithm: str  # 'auto' or a name of `algorithms.NAMES`

    def take(self, chosen: Sequence[int]) -> 'Spec':
        """Returns the same for some of the kernels."""
        windows, groups = (tuple(values[i] for i in chosen) for values in self[:2])
        return self._replace(windows=windows, groups=groups)

    def repeat(self, examples: int) -> 'Spec':
        """Returns the same for examples whose channels are side by side."""
        return self._replace(groups=tuple(g * examples for g in self.groups))


def forward(x: jax.Array, kernels: Sequence[jax.Array], spec: Spec) -> list[jax.Array]:
    """Returns the images [N, H, W, C_in] convolved with each kernel [kh, kw, C_in / groups, C_out]."""
    return _forward.bind(x, *kernels, spec=spec)


def input_gradient(
    dys: Sequence[jax.Array], kernels: Sequence[jax.Array], spec: Spec, size: tuple[int, int]
) -> jax.Array:
    """Returns the gradient of the images, of `size` (H, W), from those of the outputs."""
    return _input_gradient.bind(*dys, *kernels, spec=spec, size=size)[0]


def weight_gradient(
    x: jax.Array, dys: Sequence[jax.Array], spec: Spec, sizes: tuple[tuple[int, int], ...]
) -> list[jax.Array]:
    """Returns the gradients of the kernels, of `sizes` (kh, kw), from the images and those of the outputs."""
    return _weight_gradient.bind(x, *dys, spec=spec, sizes=sizes)


_forward = make_primitive('grouped_conv')
_input_gradient = make_primitive('grouped_conv_input_gradient')
_weight_gradient = make_primitive('grouped_conv_weight_gradient')


# Shapes. Arrays of rank 4 keep what else is known of the first argument, such as its axes in a shard_map.


@_forward.def_abstract_eval
def _(x, *kernels, spec):
    n, h, w, _ = x.shape
    each = zip(spec.windows, kernels, strict=True)
    return [x.update(shape=(n, *window.outputs((h, w), k.shape), k.shape[3])) for window, k in each]


@_input_gradient.def_abstract_eval
def _(*args, spec, size):
    dy, kernel = args[0], args[len(spec.groups)]
    return [dy.update(shape=(dy.shape[0], *size, kernel.shape[2] * spec.groups[0]))]


@_weight_gradient.def_abstract_eval
def _(x, *dys, spec, sizes):
    each = zip(sizes, spec.groups, dys, strict=True)
    return [x.update(shape=(*size, x.shape[3] // g, dy.shape[3])) for size, g, dy in each]


# Algorithms, by platform. Other platforms use XLA's own lowering.


def _choose(platform: str, direction: str, x: Any, kernels: Sequence[tuple[int, ...]], spec: Spec):
    """Returns the algorithm for each kernel shape in one direction; x has the images' shape and type."""
    each = zip(kernels, spec.windows, spec.groups, strict=True)
    if spec.algorithm not in ('auto', 'pallas'):
        return [algorithms.by_name(spec.algorithm, shape, g) for shape, _, g in each]
    rows = generation.rows_of(platform)
    problems = [choice.Problem.of(x, shape, window, g) for shape, window, g in each]
    chosen = [getattr(choice.choose(rows, problem), direction) for problem in problems]
    if spec.algorithm == 'pallas':
        for i in pallas_tpu.taken(direction, x.shape, x.dtype, kernels, spec.windows, spec.groups):
            chosen[i] = Algorithm('pallas')
    return chosen


def _lower_forward(x, *kernels, spec, platform):
    chosen = _choose(platform, 'forward', x, [k.shape for k in kernels], spec)
    outputs = algorithms.forward(x, kernels, spec.windows, spec.groups, chosen, interpret=platform != 'tpu')
    return [_store_tiles(y, a, platform) for y, a in zip(outputs, chosen, strict=True)]


def _lower_input_gradient(*args, spec, size, platform):
    dys, kernels = args[: len(spec.groups)], args[len(spec.groups) :]
    shape = (dys[0].shape[0], *size, kernels[0].shape[2] * spec.groups[0])
    x = jax.ShapeDtypeStruct(shape, dys[0].dtype)
    chosen = _choose(platform, 'input_gradient', x, [k.shape for k in kernels], spec)

    def term(members: Sequence[int]) -> jax.Array:
        some, kinds = spec.take(members), [chosen[i] for i in members]
        left, right = ([values[i] for i in members] for values in (dys, kernels))
        settings = some.windows, some.groups, kinds
        return algorithms.input_gradient(shape, left, right, *settings, interpret=platform != 'tpu')

    alone = [i for i, k in enumerate(kernels) if _is_added_slowly(k.shape, size, platform)]
    rest = [i for i in range(len(kernels)) if i not in alone]
    terms = [lax.optimization_barrier(term([i])) for i in alone] + ([term(rest)] if rest else [])
    return [functools.reduce(operator.add, terms)]


def _lower_weight_gradient(x, *dys, spec, sizes, platform):
    each = zip(sizes, spec.groups, dys, strict=True)
    shapes = [(*size, x.shape[3] // g, dy.shape[3]) for size, g, dy in each]
    chosen = _choose(platform, 'weight_gradient', x, shapes, spec)
    dys = [_store_tiles(dy, a, platform) for dy, a in zip(dys, chosen, strict=True)]
    unfolds = [
        size
        for size, a in zip(sizes, chosen, strict=True)
        if size != (1, 1) and a.name not in (*DIRECT, 'pallas') and not (a.name == 'merged' and a.split)
    ]
    if platform == 'cpu' and unfolds:
        # Stored once in the order [C, H, W, N] that all weight gradients of XLA:CPU read.
        x = materialize(x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)
    interpret = platform != 'tpu'
    return algorithms.weight_gradient(x, dys, shapes, spec.windows, spec.groups, chosen, interpret)


def _store_tiles(y: jax.Array, algorithm: Algorithm, platform: str) -> jax.Array:
    """Returns y, on a GPU written to memory if an algorithm orders its pixels by tiles.

    XLA would otherwise reorder the pixels again in each operation that reads them.
    """
    return lax.optimization_barrier(y) if platform in GPUS and algorithm.tile[0] > 1 else y


def _is_added_slowly(kernel: Sequence[int], size: Sequence[int], platform: str) -> bool:
    """Returns whether a GPU adds the input gradient of a kernel [kh, kw, ..] to others slowly.

    XLA exchanges the images, of `size`, and a kernel that is larger. It gives that convolution and the sum to
    cuDNN as one operation, which took 3.3 instead of 0.2 ms for 9x9 kernels and 7x7 images.
    """
    return platform in GPUS and kernel[0] * kernel[1] > size[0] * size[1]


for _rule, _primitive_of in (
    (_lower_forward, _forward),
    (_lower_input_gradient, _input_gradient),
    (_lower_weight_gradient, _weight_gradient),
):
    for _platform in (None, *choice.PLATFORMS):
        _lowering = mlir.lower_fun(functools.partial(_rule, platform=_platform or ''), multiple_results=True)
        mlir.register_lowering(_primitive_of, _lowering, platform=_platform)


# Derivatives. A bilinear function has two sides. Its tangent is a sum over the sides: the function, with the
# arguments of that side replaced by their tangents.


def _jvp(primitive, left, primals, tangents, **params):
    """Returns outputs and tangents; the first `left(number of kernels)` arguments are one side."""
    outputs, terms = primitive.bind(*primals, **params), []
    count = left(len(params['spec'].groups))
    for side in (range(count), range(count, len(primals))):
        if all(isinstance(tangents[i], ad.Zero) for i in side):
            continue
        mixed = [ad.instantiate_zeros(tangents[i]) if i in side else p for i, p in enumerate(primals)]
        terms.append(primitive.bind(*mixed, **params))
    # The transpose of `materialize` is itself: each output's gradient is read by many convolutions.
    return outputs, [materialize(functools.reduce(operator.add, term)) for term in zip(*terms, strict=True)]


ad.primitive_jvps[_forward] = functools.partial(_jvp, _forward, lambda n: 1)
ad.primitive_jvps[_input_gradient] = functools.partial(_jvp, _input_gradient, lambda n: n)
ad.primitive_jvps[_weight_gradient] = functools.partial(_jvp, _weight_gradient, lambda n: 1)


def _transpose(rule):
    """Returns the rule for JAX: `rule` gets the gradients of the outputs as arrays, and the arguments."""

    def transposed(cts, *args, **params):
        if all(isinstance(ct, ad.Zero) for ct in cts):
            return [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in args]
        return rule([ad.instantiate_zeros(ct) for ct in cts], *args, **params)

    return transposed


def _undefined(args: Sequence[Any]) -> list[int]:
    return [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]


def _place(results: Sequence[jax.Array], places: Sequence[int], length: int) -> list[jax.Array | None]:
    by_place = dict(zip(places, results, strict=True))
    return [by_place.get(i) for i in range(length)]


@_transpose
def _transpose_forward(dys, x, *kernels, spec):
    if ad.is_undefined_primal(x):
        return [input_gradient(dys, kernels, spec, x.aval.shape[1:3]), *([None] * len(kernels))]
    wanted = _undefined(kernels)
    sizes = tuple(kernels[i].aval.shape[:2] for i in wanted)
    gradients = weight_gradient(x, [dys[i] for i in wanted], spec.take(wanted), sizes)
    return [None, *_place(gradients, wanted, len(kernels))]


@_transpose
def _transpose_input_gradient(cts, *args, spec, size):
    del size
    (x,), count = cts, len(spec.groups)
    dys, kernels = args[:count], args[count:]
    wanted = _undefined(dys)
    if wanted:
        outputs = forward(x, [kernels[i] for i in wanted], spec.take(wanted))
        return [*_place(outputs, wanted, count), *([None] * count)]
    wanted = _undefined(kernels)
    sizes = tuple(kernels[i].aval.shape[:2] for i in wanted)
    gradients = weight_gradient(x, [dys[i] for i in wanted], spec.take(wanted), sizes)
    return [*([None] * count), *_place(gradients, wanted, count)]


@_transpose
def _transpose_weight_gradient(kernels, x, *dys, spec, sizes):
    del sizes
    if ad.is_undefined_primal(x):
        return [input_gradient(dys, kernels, spec, x.aval.shape[1:3]), *([None] * len(dys))]
    wanted = _undefined(dys)
    outputs = forward(x, [kernels[i] for i in wanted], spec.take(wanted))
    return [None, *_place(outputs, wanted, len(dys))]


ad.primitive_transposes[_forward] = _transpose_forward
ad.primitive_transposes[_input_gradient] = _transpose_input_gradient
ad.primitive_transposes[_weight_gradient] = _transpose_weight_gradient


# vmap. With the same kernels, examples become images. Otherwise each gets groups of its own or, if all read
# the same images, outputs of its own in each group.


def _examples_first(a: jax.Array, dim: int | None, size: int) -> jax.Array:
    """Returns the array with examples along axis 0 instead of `dim`, or repeated if `dim` is None."""
    return jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)


def _to_images(a: jax.Array, dim: int | None, size: int) -> jax.Array:
    """Returns [B * N, ..] from [N, ..] with examples along axis `dim`, or repeated if it is None."""
    a = _examples_first(a, dim, size)
    return a.reshape(-1, *a.shape[2:])


def _to_channels(a: jax.Array, dim: int | None, size: int, groups: int = 1) -> jax.Array:
    """Returns [.., groups * B * C] from [.., groups * C]; `dim` is as in `_to_images`."""
    a = _examples_first(a, dim, size)
    a = a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups)
    a = jnp.moveaxis(a, 0, -2)
    return a.reshape(*a.shape[:-3], -1)


def _from_channels(a: jax.Array, size: int, groups: int = 1) -> jax.Array:
    """Returns [B, .., groups * C] from [.., groups * B * C]."""
    a = jnp.moveaxis(a.reshape(*a.shape[:-1], groups, size, a.shape[-1] // (groups * size)), -2, 0)
    return a.reshape(*a.shape[:-2], -1)


def _size(args: Sequence[jax.Array], dims: Sequence[int | None]) -> int:
    return next(a.shape[dim] for a, dim in zip(args, dims, strict=True) if dim is not None)


def _batch_forward(args, dims, *, spec):
    size, count = _size(args, dims), len(spec.groups)
    x, dim, kernels, kernel_dims = args[0], dims[0], args[1:], dims[1:]
    if all(d is None for d in kernel_dims):
        outputs = forward(_to_images(x, dim, size), kernels, spec)
        return [y.reshape(size, -1, *y.shape[1:]) for y in outputs], [0] * count
    shared = dim is None
    parts = spec.groups if shared else (1,) * count
    each = zip(kernels, kernel_dims, parts, strict=True)
    kernels = [_to_channels(k, d, size, part) for k, d, part in each]
    if not shared:
        x, spec = _to_channels(x, dim, size), spec.repeat(size)
    outputs = forward(x, kernels, spec)
    return [_from_channels(y, size, part) for y, part in zip(outputs, parts, strict=True)], [0] * count


def _batch_input_gradient(args, dims, *, spec, size):
    examples, count = _size(args, dims), len(spec.groups)
    if all(d is None for d in dims[count:]):
        dys = [_to_images(dy, d, examples) for dy, d in zip(args[:count], dims[:count], strict=True)]
        dx = input_gradient(dys, args[count:], spec, size)
        return [dx.reshape(examples, -1, *dx.shape[1:])], [0]
    args = [_to_channels(a, d, examples) for a, d in zip(args, dims, strict=True)]
    spec = spec.repeat(examples)
    return [_from_channels(input_gradient(args[:count], args[count:], spec, size), examples)], [0]


def _batch_weight_gradient(args, dims, *, spec, sizes):
    size, count = _size(args, dims), len(spec.groups)
    x, shared = args[0], dims[0] is None
    parts = spec.groups if shared else (1,) * count
    dys = [_to_channels(dy, d, size, part) for dy, d, part in zip(args[1:], dims[1:], parts, strict=True)]
    if not shared:
        x, spec = _to_channels(x, dims[0], size), spec.repeat(size)
    gradients = weight_gradient(x, dys, spec, sizes)
    return [_from_channels(k, size, part) for k, part in zip(gradients, parts, strict=True)], [0] * count


batching.primitive_batchers[_forward] = _batch_forward
batching.primitive_batchers[_input_gradient] = _batch_input_gradient
batching.primitive_batchers[_weight_gradient] = _batch_weight_gradient
