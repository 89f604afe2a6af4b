"""The table of published networks, and `create_model`."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from epsanet_jax.errors import InputError, suggest
from epsanet_jax.models.dtypes import Dtype
from epsanet_jax.models.epsanet import MIDDLES, EPSANet
from epsanet_jax.ops.algorithms import check_name


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What pictures go through before the network.

    Attributes:
        image_size: side of the square that the network sees, pixels.
        resize_size: length of the shorter side before the centre crop, pixels.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        exif_orientation: whether pictures are turned as their EXIF tag says.
    """

    image_size: int = 224
    resize_size: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    exif_orientation: bool = True


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        layers, planes, expansion, kernels, groups, middle, use_se: see `EPSANet`.
        published_params: millions of parameters, 1000 classes, as published.
        published_flops: billions of multiply-adds at 224 px, as published.
        published_top1: ImageNet accuracy in percent, as published. Not reproduced here: no weights exist.
        published_top5: likewise.
        preprocessing: the reference's.
    """

    layers: tuple[int, ...]
    planes: tuple[int, ...] = (64, 128, 256, 512)
    expansion: int = 4
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    groups: tuple[int, ...] = (1, 4, 8, 16)
    middle: str = 'psa'
    use_se: bool = False
    published_params: float | None = None
    published_flops: float | None = None
    published_top1: float | None = None
    published_top5: float | None = None
    preprocessing: Preprocessing = Preprocessing()


_LARGE: dict[str, Any] = {
    # Never released as code. Inferred: all published parameter and multiply-add counts are met to the last
    # digit by these settings, and (3, 5, 5, 7) is the only pyramid of kernels that does.
    'planes': (128, 256, 512, 1024),
    'expansion': 2,
    'kernels': (3, 5, 5, 7),
    'groups': (32, 32, 32, 32),
}

VARIANTS: dict[str, Variant] = {
    'epsanet50_small': Variant(
        (3, 4, 6, 3),
        published_params=22.56,
        published_flops=3.62,
        published_top1=77.49,
        published_top5=93.54,
    ),
    'epsanet50_large': Variant(
        (3, 4, 6, 3),
        **_LARGE,
        published_params=27.90,
        published_flops=4.72,
        published_top1=78.64,
        published_top5=94.18,
    ),
    'epsanet101_small': Variant(
        (3, 4, 23, 3),
        published_params=38.90,
        published_flops=6.82,
        published_top1=78.43,
        published_top5=94.11,
    ),
    'epsanet101_large': Variant(
        (3, 4, 23, 3),
        **_LARGE,
        published_params=49.59,
        published_flops=8.97,
        published_top1=79.38,
        published_top5=94.58,
    ),
    'resnet50': Variant((3, 4, 6, 3), middle='conv3x3'),
    'resnet101': Variant((3, 4, 23, 3), middle='conv3x3'),
    'seresnet50': Variant((3, 4, 6, 3), middle='conv3x3', use_se=True),
    'seresnet101': Variant((3, 4, 23, 3), middle='conv3x3', use_se=True),
}


def list_models() -> list[str]:
    """Returns the names that `create_model` knows."""
    return list(VARIANTS)


def get_variant(name: str) -> Variant:
    """Returns the row of the table; InputError names the nearest name if there is none."""
    if name not in VARIANTS:
        raise InputError(
            f'unknown model {name!r}{suggest(name, list_models())}; known: {", ".join(VARIANTS)}'
        )
    return VARIANTS[name]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    layers: tuple[int, ...] | None = None,
    planes: tuple[int, ...] | None = None,
    expansion: int | None = None,
    kernels: tuple[int, ...] | None = None,
    groups: tuple[int, ...] | None = None,
    reduction: int = 16,
    psa_bias: bool = False,
    output_stride: int = 32,
    bn_group: int | None = None,
    frozen_bn: str = '',
    conv: str = 'auto',
    remat: bool = False,
) -> EPSANet:
    """Makes a published network, or one changed from it.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        dtype: of the computation; logits are of this type or float32 if that is wider.
        param_dtype: of the parameters.
        layers: blocks in each stage.
        planes: bottleneck width of each stage.
        expansion: a stage's output channels are planes * expansion.
        kernels: kernel size of each branch of the pyramid.
        groups: number of groups of each branch.
        reduction: of the squeeze-and-excitation modules.
        psa_bias: whether the pyramid's convolutions have biases (as in the paper's listing; the reference
            repository has none).
        output_stride: 32, or 16 or 8 for dense predictions: the last stages keep their size and dilate.
        bn_group: examples in a BatchNorm group, consecutive rows of the batch; None: the whole batch.
        frozen_bn: regular expression for the BatchNorms that keep to their running statistics in training,
            by the name of their scale, as 'layer1_0/bn1/scale'; '.' for all.
        conv: 'auto', or one convolution algorithm for all (`epsanet_jax.ops.ALGORITHMS`).
        remat: recompute each block's activations in the backward pass, for less memory.

    Returns:
        A flax Module: `model.init(key, images)`, `model.apply(variables, images, train=False)`.

    Raises:
        InputError: the name is unknown, or the settings do not fit together.
    """
    variant = get_variant(name)
    if variant.middle != 'psa' and (kernels is not None or groups is not None or psa_bias):
        raise InputError(f'{name} has no pyramid: kernels, groups and psa_bias do not apply')
    model = EPSANet(
        num_classes=num_classes,
        layers=tuple(variant.layers if layers is None else layers),
        planes=tuple(variant.planes if planes is None else planes),
        expansion=variant.expansion if expansion is None else expansion,
        middle=variant.middle,
        use_se=variant.use_se,
        kernels=tuple(variant.kernels if kernels is None else kernels),
        groups=tuple(variant.groups if groups is None else groups),
        reduction=reduction,
        psa_bias=psa_bias,
        output_stride=output_stride,
        bn_group=bn_group,
        frozen_bn=frozen_bn,
        conv=conv,
        remat=remat,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    check_settings(model)
    return model


def check_settings(model: EPSANet) -> None:
    """Raises InputError if a network cannot be built with these settings."""
    check_name(model.conv)
    if model.middle not in MIDDLES:
        raise InputError(f'middle must be one of {MIDDLES}, got {model.middle!r}')
    for field in ('dtype', 'param_dtype'):
        if not jnp.issubdtype(getattr(model, field), jnp.floating):
            raise InputError(f'{field} must be a floating-point type, got {getattr(model, field)}')
    for field in ('num_classes', 'expansion', 'reduction'):
        if getattr(model, field) < 1:
            raise InputError(f'{field} must be at least 1, got {getattr(model, field)}')
    for field in ('layers', 'planes', 'kernels', 'groups'):
        value = getattr(model, field)
        if not value or min(value) < 1:
            raise InputError(f'{field} must hold numbers of at least 1, got {value}')
    if model.bn_group is not None and model.bn_group < 1:
        raise InputError(f'bn_group must be at least 1, or None for the whole batch, got {model.bn_group}')
    try:
        re.compile(model.frozen_bn)
    except re.error as e:
        raise InputError(f'frozen_bn must be a regular expression, got {model.frozen_bn!r}: {e}') from e
    if len(model.layers) != len(model.planes):
        raise InputError(
            f'layers and planes must have one number a stage each, got {model.layers} and {model.planes}'
        )
    if model.output_stride not in (8, 16, 32):
        raise InputError(f'output_stride must be 8, 16 or 32, got {model.output_stride}')
    if model.use_se and min(model.planes) * model.expansion < model.reduction:
        raise InputError(
            f'reduction must be at most {min(model.planes) * model.expansion}, got {model.reduction}'
        )
    if model.middle == 'psa':
        _check_pyramid(model)


def _check_pyramid(model: EPSANet) -> None:
    kernels, groups = model.kernels, model.groups
    if len(kernels) != len(groups):
        raise InputError(f'kernels and groups must have one number a branch each, got {kernels} and {groups}')
    if any(k % 2 == 0 for k in kernels):
        raise InputError(f'kernels must be odd, got {kernels}')
    for planes in model.planes:
        width, rest = divmod(planes, len(kernels))
        if rest:
            raise InputError(f'planes must divide by the {len(kernels)} branches, got {planes}')
        for g in groups:
            if planes % g or width % g:
                raise InputError(
                    f'groups must divide planes and a branch of planes / {len(kernels)}: {g} groups do not '
                    f'divide {planes} and {width}'
                )
        if width < model.reduction:
            raise InputError(
                f'reduction {model.reduction} leaves the squeeze-and-excitation module of a branch with '
                f'{width} channels without a hidden unit; use at most {width}'
            )
