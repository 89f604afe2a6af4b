"""Primitives of JAX that are computed by what they are lowered to."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive


def make_primitive(name: str, multiple_results: bool = True) -> Primitive:
    """Returns a primitive that needs a shape rule and a lowering; it can also be called outside `jit`."""
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(_run, primitive))
    return primitive


def _run(primitive: Primitive, *args: jax.Array, **params: Any) -> Any:
    """Computes the primitive outside `jit`, also while `jax.disable_jit` is in force, as JAX's own do."""
    with jax.disable_jit(False):
        return _compiled(primitive, tuple(params.items()))(*args)


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(primitive.bind, **dict(params)))
