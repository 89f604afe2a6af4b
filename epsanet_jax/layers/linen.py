"""Faster grouped convolutions for flax.linen: a replacement for `Conv`, and an interceptor for models."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from epsanet_jax.layers.conv_general import conv_general_dilated


def _conv_general_dilated():
    return conv_general_dilated


class GroupedConv(nn.Conv):
    """`flax.linen.Conv` whose 2-D convolutions are computed by `epsanet_jax.ops.grouped_conv`.

    Arguments, parameters, initial values and results are those of `flax.linen.Conv`. XLA computes the
    convolutions that `grouped_conv` does not support, see `layers.conv_general.is_supported`.
    """

    def __post_init__(self):
        if _has_default(self):
            self.conv_general_dilated_cls = _conv_general_dilated
        super().__post_init__()


# Flax names layers after their class: with this name, parameters keep their names and initial values.
GroupedConv.__name__ = 'Conv'


def fast_convs(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Interceptor that makes every `flax.linen.Conv` of a model compute what `GroupedConv` computes.

    Use it as `with nn.intercept_methods(fast_convs): y = model.apply(variables, x)`; `init` works too.
    Parameters, initial values and results do not change. Layers with a `conv_general_dilated` of their own,
    and other layers than `nn.Conv` and its subclasses, are not changed.

    Flax runs interceptors while JAX traces the model. A function under `jax.jit` must therefore enter the
    context inside, or be called in it the first time; what is compiled stays as it was. The same holds for
    modules under `nn.jit`.
    """
    layer = context.module
    if not (isinstance(layer, nn.Conv) and context.method_name == '__call__' and _has_default(layer)):
        return next_fun(*args, **kwargs)
    # Flax freezes a module's fields. The next function is bound to this module: a clone would not be called.
    object.__setattr__(layer, 'conv_general_dilated_cls', _conv_general_dilated)
    try:
        return next_fun(*args, **kwargs)
    finally:
        object.__setattr__(layer, 'conv_general_dilated_cls', None)


def _has_default(layer: nn.Conv) -> bool:
    """Whether the user gave the layer no convolution of their own."""
    return layer.conv_general_dilated is None and layer.conv_general_dilated_cls is None
