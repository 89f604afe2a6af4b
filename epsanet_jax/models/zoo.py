"""The table of published networks, and `create_model`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.errors import InputError, suggest
from epsanet_jax.models.dtypes import Dtype
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.pyconv import PyConvResNet
from epsanet_jax.models.settings import (
    NAMES,
    STRUCTURE,
    WITHOUT,
    ModelConfig,
    Pyramid,
    as_tuples,
    check_pyramid,
    check_settings,
    plain,
    settings_of,
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published network.

    Attributes:
        layers: blocks in each stage.
        planes: bottleneck width of each stage.
        expansion: a stage has planes * expansion output channels.
        kernels: kernel size of each branch of the pyramid, or a tuple of them per stage.
        groups: number of groups of each branch, or a tuple of them per stage.
        middle: 'psa', 'pyconv' for a PyConvResNet or 'conv3x3' for a ResNet.
        use_se: whether each block ends in a squeeze-and-excitation module.
        published_params: published number of parameters with 1000 classes, in millions.
        published_flops: published number of multiply-adds at 224 px, in billions.
        published_top1: published top-1 accuracy on ImageNet, in percent; not reproduced here.
        published_top5: published top-5 accuracy, in percent.
    """

    layers: tuple[int, ...]
    planes: tuple[int, ...] = (64, 128, 256, 512)
    expansion: int = 4
    kernels: Pyramid = (3, 5, 7, 9)
    groups: Pyramid = (1, 4, 8, 16)
    middle: str = 'psa'
    use_se: bool = False
    published_params: float | None = None
    published_flops: float | None = None
    published_top1: float | None = None
    published_top5: float | None = None


_LARGE: dict[str, Any] = {
    # Inferred, since the code was never released: these settings match all published parameter and
    # multiply-add counts to the last digit, and (3, 5, 5, 7) are the only kernels that do.
    'planes': (128, 256, 512, 1024),
    'expansion': 2,
    'kernels': (3, 5, 5, 7),
    'groups': (32, 32, 32, 32),
}


_PYCONV: dict[str, Any] = {
    'middle': 'pyconv',
    'kernels': ((3, 5, 7, 9), (3, 5, 7), (3, 5), (3,)),
    'groups': ((1, 4, 8, 16), (1, 4, 8), (1, 4), (1,)),
}
_PYCONV_HG: dict[str, Any] = {
    **_PYCONV,
    'planes': (128, 256, 512, 1024),
    'expansion': 2,
    'groups': ((32, 32, 32, 32), (32, 64, 64), (32, 64), (32,)),
}


def _published(params: float, flops: float, top1: float, top5: float) -> dict[str, Any]:
    names = ('published_params', 'published_flops', 'published_top1', 'published_top5')
    return dict(zip(names, (params, flops, top1, top5), strict=True))


VARIANTS: dict[str, Variant] = {
    'epsanet50_small': Variant((3, 4, 6, 3), **_published(22.56, 3.62, 77.49, 93.54)),
    'epsanet50_large': Variant((3, 4, 6, 3), **_LARGE, **_published(27.90, 4.72, 78.64, 94.18)),
    'epsanet101_small': Variant((3, 4, 23, 3), **_published(38.90, 6.82, 78.43, 94.11)),
    'epsanet101_large': Variant((3, 4, 23, 3), **_LARGE, **_published(49.59, 8.97, 79.38, 94.58)),
    'resnet50': Variant((3, 4, 6, 3), middle='conv3x3'),
    'resnet101': Variant((3, 4, 23, 3), middle='conv3x3'),
    'seresnet50': Variant((3, 4, 6, 3), middle='conv3x3', use_se=True),
    'seresnet101': Variant((3, 4, 23, 3), middle='conv3x3', use_se=True),
    'pyconvresnet50': Variant((3, 4, 6, 3), **_PYCONV, published_top1=77.88),
    'pyconvresnet101': Variant((3, 4, 23, 3), **_PYCONV, published_top1=79.01),
    'pyconvresnet152': Variant((3, 8, 36, 3), **_PYCONV, published_top1=79.52),
    'pyconvhgresnet50': Variant((3, 4, 6, 3), **_PYCONV_HG, published_top1=78.48),
    'pyconvhgresnet101': Variant((3, 4, 23, 3), **_PYCONV_HG, published_top1=79.22),
    'pyconvhgresnet152': Variant((3, 8, 36, 3), **_PYCONV_HG, published_top1=79.36),
}


def list_models() -> list[str]:
    """Returns the names that `create_model` knows."""
    return list(VARIANTS)


def get_variant(name: str) -> Variant:
    """Returns the published network of a name; InputError if there is none."""
    if name not in VARIANTS:
        raise InputError(
            f'unknown model {name!r}{suggest(name, list_models())}; known: {", ".join(VARIANTS)}'
        )
    return VARIANTS[name]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    dtype: Dtype = jnp.float32,
    **overrides: Any,
) -> EPSANet:
    """Creates a published network, with changes if any are given.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier; 0: no classifier, the network returns the pooled features.
        in_channels: channels of the images.
        dtype: floating-point type of the computation; logits are of this type, or float32 if that is wider.
        **overrides: any other field of `models.settings.Settings`; None stands for the variant's own value.

    Returns:
        A flax Module: `model.init(key, images)`, `model.apply(variables, images, train=False)`.

    Raises:
        InputError: the name or a setting is unknown, or the settings do not fit together.
    """
    changes = plain({'num_classes': num_classes, 'in_channels': in_channels, 'dtype': dtype, **overrides})
    return _make(ModelConfig(name=name, **changes), num_classes)


def build_model(config: ModelConfig, num_classes: int = 0) -> EPSANet:
    """Creates the network of a configuration.

    Args:
        config: name and settings.
        num_classes: number of classes if the configuration has 0.

    Raises:
        InputError: the settings are invalid, or they need float64 and JAX has it disabled.
    """
    for field in ('dtype', 'param_dtype'):
        if getattr(config, field) == 'float64' and not jax.config.jax_enable_x64:
            raise InputError(
                f'a network with {field}=float64 needs the environment variable JAX_ENABLE_X64=1'
            )
    return _make(config, config.num_classes or num_classes)


def _make(config: ModelConfig, num_classes: int) -> EPSANet:
    variant = get_variant(config.name)
    given = [field for field in WITHOUT[variant.middle] if getattr(config, field)]
    if given:
        lacks = 'pyramid' if variant.middle == 'conv3x3' else 'attention'
        raise InputError(f'{config.name} has no {lacks}: {", ".join(given)} cannot be set')
    values = {field: as_tuples(getattr(config, field)) for field in NAMES}
    values |= {field: values[field] or getattr(variant, field) for field in STRUCTURE}
    kind = PyConvResNet if variant.middle == 'pyconv' else EPSANet
    model = kind(**{**values, 'num_classes': num_classes}, middle=variant.middle, use_se=variant.use_se)
    check_settings(model)
    if model.middle != 'conv3x3':
        check_pyramid(model, attention=model.middle == 'psa')
    width = min(model.planes) * model.expansion
    if model.use_se and width < model.reduction:
        raise InputError(f'reduction must be at most planes * expansion = {width}, got {model.reduction}')
    return model


def config_of(model: EPSANet) -> ModelConfig:
    """Returns the name of the nearest variant and the settings that differ from it.

    Raises:
        InputError: `create_model` cannot create such a network.
    """
    return nearest_variant(model.middle, model.use_se, dataclasses.asdict(settings_of(model)))


def nearest_variant(middle: str, use_se: bool, settings: dict[str, Any]) -> ModelConfig:
    """Returns settings as the name of the nearest variant and the settings that differ from it.

    Args:
        middle: 'psa', 'pyconv' or 'conv3x3', see `EPSANet`.
        use_se: whether blocks have squeeze-and-excitation modules.
        settings: values of `Settings`; missing ones have their default.

    Raises:
        InputError: no variant has this `middle` and `use_se`.
    """
    candidates = {name: v for name, v in VARIANTS.items() if (v.middle, v.use_se) == (middle, use_se)}
    if not candidates:
        raise InputError('blocks with both a pyramid and a squeeze-and-excitation module are not supported')

    def equals(name: str, field: str) -> bool:
        return field not in settings or getattr(candidates[name], field) == settings[field]

    name = max(candidates, key=lambda name: sum(equals(name, field) for field in STRUCTURE))
    unset = {field for field in STRUCTURE if equals(name, field)} | set(WITHOUT[middle])
    return ModelConfig(name=name, **{k: v for k, v in settings.items() if k not in unset})
