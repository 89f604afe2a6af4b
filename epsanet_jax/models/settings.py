"""Every option of a model, stated once.

`create_model`, the fields of the network, the configuration of a run, the settings inferred from a state dict
and the metadata of a checkpoint derive from `Settings`. A new option needs a field here and the module that
uses it. Values are plain JSON: numbers, strings and tuples.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from epsanet_jax.errors import InputError, suggest
from epsanet_jax.ops.algorithms import check_name

# A number for each branch of a pyramid, in all stages; or such a tuple for each stage.
Pyramid = tuple[int | tuple[int, ...], ...]
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16, 'float64': jnp.float64}


@dataclasses.dataclass(unsafe_hash=True)
class Settings:
    """The options of a model.

    Attributes:
        num_classes: outputs of the classifier; 0: no classifier, the network returns the pooled features.
        in_channels: channels of the images.
        layers: blocks in each stage.
        planes: bottleneck width of each stage.
        expansion: a stage has planes * expansion output channels.
        kernels: kernel size of each branch of the pyramid, the same in all stages, or one tuple per stage:
            ((3, 5, 7, 9), (3, 5, 7), (3, 5), (3,)).
        groups: number of groups of each branch, also for all stages or per stage.
        reduction: channels per hidden unit in the squeeze-and-excitation modules.
        psa_bias: whether the pyramid's convolutions have biases (the paper's listing has them, the reference
            repository has none).
        output_stride: 32, or 16 or 8 for dense prediction: the last stages then keep their size and dilate
            their convolutions, with the same parameters.
        bn_group: examples in a BatchNorm group, consecutive rows of the batch; 0: the whole batch.
        frozen_bn: regular expression for the BatchNorms that use their running statistics in training too. It
            is searched in the name of the scale, for example 'layer1_0/bn1/scale'; '.' freezes all.
        conv: 'auto', or one algorithm for all convolutions (`epsanet_jax.ops.ALGORITHMS`).
        remat: whether the backward pass recomputes each block's activations, which saves memory.
        dtype: floating-point type of the computation; logits are of this type, or float32 if that is wider.
        param_dtype: floating-point type of the parameters.
    """

    num_classes: int = 1000
    in_channels: int = 3
    layers: tuple[int, ...] = (3, 4, 6, 3)
    planes: tuple[int, ...] = (64, 128, 256, 512)
    expansion: int = 4
    kernels: Pyramid = (3, 5, 7, 9)
    groups: Pyramid = (1, 4, 8, 16)
    reduction: int = 16
    psa_bias: bool = False
    output_stride: int = 32
    bn_group: int = 0
    frozen_bn: str = ''
    conv: str = 'auto'
    remat: bool = False
    dtype: str = 'float32'
    param_dtype: str = 'float32'


@dataclasses.dataclass
class ModelConfig(Settings):
    """A published network by name, with changes. 0 and () stand for the variant's own value.

    In the configuration of a run, `num_classes` 0 means as many classes as the data has.

    Attributes:
        name: one of `list_models()`.
    """

    name: str = 'epsanet50_small'
    num_classes: int = 0
    layers: tuple[int, ...] = ()
    planes: tuple[int, ...] = ()
    expansion: int = 0
    kernels: Pyramid = ()
    groups: Pyramid = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:
            raise AttributeError(f'a model has no setting {name!r}{suggest(name, NAMES)}')
        super().__setattr__(name, value)


NAMES = tuple(field.name for field in dataclasses.fields(Settings))
# The settings that define a variant.
STRUCTURE = ('layers', 'planes', 'expansion', 'kernels', 'groups')
# The settings of a pyramid, and those that a network with this `middle` does not have.
PYRAMID = ('kernels', 'groups', 'psa_bias')
WITHOUT: dict[str, tuple[str, ...]] = {'psa': (), 'pyconv': ('psa_bias',), 'conv3x3': PYRAMID}


def settings_of(model: Settings) -> Settings:
    """Returns the settings of a network, as plain JSON types."""
    return Settings(**plain({name: getattr(model, name) for name in NAMES}))


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of settings as plain JSON types: tuples for lists, names for dtypes.

    None stands for the default and is left out.

    Raises:
        InputError: there is no such setting, or a dtype is unknown.
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name not in NAMES:
            raise InputError(f'unknown setting {name!r} of a model{suggest(name, NAMES)}')
        if value is None:
            continue
        if name in ('dtype', 'param_dtype'):
            try:
                value = jnp.dtype(value).name
            except TypeError as e:
                raise InputError(f'{name} must be one of {", ".join(DTYPES)}, got {value!r}') from e
        result[name] = as_tuples(value)
    return result


def as_tuples(value: Any) -> Any:
    """Returns a value with tuples for lists, which JSON has instead."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Returns the configuration of a model from JSON, which has lists for tuples.

    Raises:
        InputError: this version does not know a setting.
    """
    unknown = sorted(set(values) - {'name', *NAMES})
    if unknown:
        raise InputError(f'the model has unknown settings: {", ".join(unknown)}')
    fields: dict[str, Any] = {name: as_tuples(value) for name, value in values.items()}
    return ModelConfig(**fields)


def pyramid_of(settings: Settings, stage: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the kernels and the groups of one stage, from 0."""
    both = [v[stage] if isinstance(v[0], tuple) else v for v in (settings.kernels, settings.groups)]
    return typing.cast(Any, both)


def of_stage(settings: Settings, stage: int) -> Settings:
    """Returns settings whose kernels and groups are those of one stage, from 0."""
    kernels, groups = pyramid_of(settings, stage)
    return dataclasses.replace(settings, kernels=kernels, groups=groups)


def pyconv_widths(planes: int, count: int) -> list[int]:
    """Returns the output channels of the branches of a `PyConv`: equal ones, but the last takes the rest.

    Their number is rounded up to a power of two: three branches have 1/4, 1/4 and 1/2 of the planes.
    """
    width = planes // 2 ** (count - 1).bit_length()
    return [width] * (count - 1) + [planes - width * (count - 1)]


def check_settings(model: Settings) -> None:
    """Raises InputError if a network cannot be built with these settings."""
    check_name(model.conv)
    for field in ('dtype', 'param_dtype'):
        if getattr(model, field) not in DTYPES:
            raise InputError(f'{field} must be one of {", ".join(DTYPES)}, got {getattr(model, field)}')
    limits = {'num_classes': 0, 'in_channels': 1, 'expansion': 1, 'reduction': 1, 'bn_group': 0}
    for field, least in limits.items():
        if getattr(model, field) < least:
            raise InputError(f'{field} must be at least {least}, got {getattr(model, field)}')
    for field in ('layers', 'planes', 'kernels', 'groups'):
        value = getattr(model, field)
        if not value or not all(value) or min(_numbers(value)) < 1:
            raise InputError(f'{field} must hold numbers of at least 1, got {value}')
    try:
        re.compile(model.frozen_bn)
    except re.error as e:
        raise InputError(f'frozen_bn must be a regular expression, got {model.frozen_bn!r}: {e}') from e
    if len(model.layers) != len(model.planes):
        raise InputError(
            f'layers and planes must each have one number per stage, got {model.layers} and {model.planes}'
        )
    if model.output_stride not in (8, 16, 32):
        raise InputError(f'output_stride must be 8, 16 or 32, got {model.output_stride}')


def check_pyramid(model: Settings, attention: bool) -> None:
    """Raises InputError if pyramids, with or without attention, cannot be built with these settings."""
    for field, value in (('kernels', model.kernels), ('groups', model.groups)):
        nested = [isinstance(v, tuple) for v in value]
        if any(nested) and not (all(nested) and len(value) == len(model.layers)):
            stages = f'one tuple for each of {len(model.layers)} stages'
            raise InputError(f'{field} must be numbers, or {stages}, got {value}')
    for stage, planes in enumerate(model.planes):
        kernels, groups = pyramid_of(model, stage)
        count = len(kernels)
        if count != len(groups):
            raise InputError(
                f'kernels and groups must have one number per branch each, got {kernels} and {groups}'
            )
        if not all(k % 2 for k in kernels):
            raise InputError(f'kernels must be odd, got {kernels}')
        if attention and planes % count:
            raise InputError(f'planes must be multiples of {count}, the number of branches, got {planes}')
        widths = [planes // count] * count if attention else pyconv_widths(planes, count)
        for width, g in zip(widths, groups, strict=True):
            if not width or width % g or planes % g:
                raise InputError(f'{g} groups do not divide {planes} planes and their branch of {width}')
        if attention and widths[0] < model.reduction:
            most = f'planes / {count} = {widths[0]}'
            raise InputError(f'reduction must be at most {most}, got {model.reduction}')


def check_types(section: Any, prefix: str = 'model') -> None:
    """Raises InputError if a field of a dataclass does not have its declared type, or is not finite.

    Args:
        section: instance of a dataclass; fields that are dataclasses are checked too.
        prefix: prefix of the names of fields in messages.
    """
    for name, hint in typing.get_type_hints(type(section)).items():
        value, field = getattr(section, name), f'{prefix}.{name}'
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, typing.cast(type, hint)):
                raise InputError(f'{field} must be a section of settings, got {value!r}')
            check_types(value, field)
        elif typing.get_origin(hint) is tuple:
            kind = int if hint == Pyramid else typing.get_args(hint)[0]
            listed = isinstance(value, tuple | list)
            numbers = _numbers(value) if listed and hint == Pyramid else value
            if not listed or not all(_is(v, kind) and math.isfinite(v) for v in numbers):
                raise InputError(f'{field} must hold numbers of type {kind.__name__}, got {value!r}')
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f'{field} must be finite, got {value}')
        elif not _is(value, hint):
            raise InputError(f'{field} must be of type {hint.__name__}, got {value!r}')


def _numbers(values: Sequence[Any]) -> list[Any]:
    return [v for item in values for v in (item if isinstance(item, tuple | list) else (item,))]


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
