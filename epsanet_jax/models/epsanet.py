"""EPSANet, and ResNet from the same parts."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from epsanet_jax.errors import InputError, suggest
from epsanet_jax.models.conv import Conv, Linear
from epsanet_jax.models.dtypes import Dtype, at_least_float32
from epsanet_jax.models.norm import Affine, BatchNorm
from epsanet_jax.models.pool import max_pool
from epsanet_jax.models.psa import PSAModule, SEWeightModule
from epsanet_jax.ops.materialize import materialize

STEM_WIDTH = 64
Norm = Callable[[Any, bool], jax.Array]  # an activation, or a `Weighted`; training mode
MIN_SIZE = 32  # the network's total stride: below it the last stage has nothing left to halve
MIDDLES = ('psa', 'conv3x3')


class EPSABlock(nn.Module):
    """A bottleneck block: 1x1 conv, PSA module, 1x1 conv, each with BatchNorm, and a shortcut.

    Attributes:
        planes: width of the bottleneck.
        expansion: output channels are planes * expansion.
        stride: of the PSA module (and of the shortcut).
        dilation: of the PSA module.
        downsample: whether the shortcut is a 1x1 conv with BatchNorm instead of the input itself.
        middle: 'psa', or 'conv3x3' for ResNet's plain bottleneck.
        use_se: whether a squeeze-and-excitation module weighs what the last convolution gives.
        kernels, groups, reduction, psa_bias: of the PSA module; reduction is that of `use_se` too.
        bn_group, bn_axis, frozen_bn: of BatchNorm (`group`, `axis_name`, `frozen`).
        folded: no BatchNorm, see `EPSANet`.
        conv: algorithm, see `epsanet_jax.ops.grouped_conv`.
        dtype: of the computation and the result.
        param_dtype: of the parameters.
    """

    planes: int
    expansion: int = 4
    stride: int = 1
    downsample: bool = False
    middle: str = 'psa'
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    groups: tuple[int, ...] = (1, 4, 8, 16)
    reduction: int = 16
    psa_bias: bool = False
    use_se: bool = False
    dilation: int = 1
    bn_group: int | None = None
    bn_axis: str | None = None
    frozen_bn: str = ''
    folded: bool = False
    conv: str = 'auto'
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        conv = functools.partial(Conv, conv=self.conv, use_bias=self.folded, **dtypes)
        norm = functools.partial(
            BatchNorm, group=self.bn_group, axis_name=self.bn_axis, frozen=self.frozen_bn, **dtypes
        )
        if self.folded:
            norm = _no_norm
        width = self.planes * self.expansion
        self.conv1, self.bn1 = conv(self.planes, 1), norm()
        if self.middle == 'psa':
            self.conv2 = PSAModule(
                self.planes,
                self.stride,
                self.kernels,
                self.groups,
                self.reduction,
                use_bias=self.psa_bias,
                dilation=self.dilation,
                conv=self.conv,
                **dtypes,
            )
        else:
            self.conv2 = conv(self.planes, 3, stride=self.stride, dilation=self.dilation)
        self.bn2: Norm = Affine(**dtypes) if self.folded and self.middle == 'psa' else norm()
        self.conv3, self.bn3 = conv(width, 1), norm()
        if self.use_se:
            self.se = SEWeightModule(width, self.reduction, **dtypes)
        if self.downsample:
            self.downsample_0, self.downsample_1 = conv(width, 1, stride=self.stride), norm()

    def __call__(self, x: jax.Array, train: bool = False, keep: jax.Array | None = None) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), planes * expansion].

        Args:
            x: the activation.
            train: whether BatchNorm normalises by the batch.
            keep: factor [N] of each row's residual branch, for stochastic depth.
        """
        y = nn.relu(self.bn1(self.conv1(x), train))  # [N, H, W, P]
        y = self.conv2.weighted(y) if self.middle == 'psa' else self.conv2(y)
        y = nn.relu(self.bn2(y, train))  # [N, H/s, W/s, P]
        y = self.bn3(self.conv3(y), train)  # [N, H/s, W/s, P*e]
        if self.use_se:
            y = y * self.se(y).astype(y.dtype)
        if keep is not None:
            y = y * keep.astype(y.dtype)[:, None, None, None]
        shortcut = self.downsample_1(self.downsample_0(x), train) if self.downsample else x
        return materialize(nn.relu(y + shortcut))


class EPSANet(nn.Module):
    """The network; `epsanet_jax.create_model` makes the published variants.

    Attributes:
        num_classes: outputs of the classifier.
        layers: blocks in each of the four stages.
        planes: bottleneck width of each stage.
        expansion: a stage's output channels are planes * expansion.
        middle: 'psa', or 'conv3x3' for ResNet.
        use_se: squeeze-and-excitation at the end of each block, as in SE-ResNet.
        kernels, groups, reduction, psa_bias: of the PSA modules; reduction is that of `use_se` too.
        output_stride: 32, or 16 or 8: the last stages then keep their size and dilate their convolutions,
            with the same parameters, for dense predictions.
        bn_group: examples in a BatchNorm group (consecutive rows of the batch); None: the whole batch.
        bn_axis: mesh axis over which one BatchNorm group is spread; set by `training.sharding`.
        frozen_bn: regular expression for the BatchNorms that keep to their running statistics in training,
            by the name of their scale: '^bn1|^layer1' the first ones, '.' all.
        folded: the convolutions have biases instead of a BatchNorm behind them; for inference, with what
            `models.fold_batch_norm` makes of the variables.
        conv: algorithm of the convolutions, see `epsanet_jax.ops.grouped_conv`.
        remat: recompute each block's activations in the backward pass instead of storing them.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    num_classes: int = 1000
    layers: tuple[int, ...] = (3, 4, 6, 3)
    planes: tuple[int, ...] = (64, 128, 256, 512)
    expansion: int = 4
    middle: str = 'psa'
    use_se: bool = False
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    groups: tuple[int, ...] = (1, 4, 8, 16)
    reduction: int = 16
    psa_bias: bool = False
    output_stride: int = 32
    bn_group: int | None = None
    bn_axis: str | None = None
    frozen_bn: str = ''
    folded: bool = False
    conv: str = 'auto'
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        self.conv1 = Conv(STEM_WIDTH, 7, stride=2, conv=self.conv, use_bias=self.folded, **dtypes)
        if self.folded:
            self.bn1 = _no_norm()
        else:
            self.bn1 = BatchNorm(group=self.bn_group, axis_name=self.bn_axis, frozen=self.frozen_bn, **dtypes)
        block = nn.remat(EPSABlock, static_argnums=(2,)) if self.remat else EPSABlock
        width, reached, dilation = STEM_WIDTH, 4, 1
        for stage, (count, planes) in enumerate(zip(self.layers, self.planes, strict=True)):
            blocks = []
            for i in range(count):
                halves = stage > 0 and i == 0
                # Dilated instead, from the next block on.
                kept = halves and self.output_stride < 32 and reached >= self.output_stride
                blocks.append(
                    block(
                        planes,
                        self.expansion,
                        stride=2 if halves and not kept else 1,
                        dilation=dilation,
                        downsample=halves or width != planes * self.expansion,
                        middle=self.middle,
                        use_se=self.use_se,
                        kernels=self.kernels,
                        groups=self.groups,
                        reduction=self.reduction,
                        psa_bias=self.psa_bias,
                        bn_group=self.bn_group,
                        bn_axis=self.bn_axis,
                        frozen_bn=self.frozen_bn,
                        folded=self.folded,
                        conv=self.conv,
                        **dtypes,
                    )
                )
                width = planes * self.expansion
                dilation, reached = dilation * (2 if kept else 1), reached * (2 if halves and not kept else 1)
            setattr(self, f'layer{stage + 1}', blocks)
        self.fc = Linear(self.num_classes, **dtypes)

    def features(
        self, images: jax.Array, train: bool = False, keep: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the activations after the stem and each stage.

        Args:
            images: [N, H, W, 3], normalised; H and W at least 32.
            train: whether BatchNorm normalises by the batch (and updates 'batch_stats').
            keep: factors [N, blocks] of the residual branches, for stochastic depth
                (`training.stochastic_depth.draw_keep`); None: all are kept as they are.

        Returns:
            'stem' [N, H/4, W/4, 64], and 'layer1' .. 'layer4' [N, H/s, W/s, planes * expansion] with
            s = 4, 8, 16, 32, or `output_stride` where that is less (sizes rounded up).

        Raises:
            InputError: the images are of the wrong rank, type, number of channels or too small.
        """
        check_images(images)
        x = images.astype(self.dtype)  # [N, H, W, 3]
        x = nn.relu(self.bn1(self.conv1(x), train))  # [N, H/2, W/2, 64]
        x = max_pool(x)  # [N, H/4, W/4, 64]
        outputs = {'stem': x}
        number = 0
        for stage in range(1, len(self.layers) + 1):
            for block in getattr(self, f'layer{stage}'):
                x = block(x, train, None if keep is None else keep[:, number])
                number += 1
            outputs[f'layer{stage}'] = x
        return outputs

    def __call__(self, images: jax.Array, train: bool = False, keep: jax.Array | None = None) -> jax.Array:
        """Returns logits [N, num_classes], of `dtype` or float32 if that is wider.

        Args and errors are those of `features`.
        """
        last = f'layer{len(self.layers)}'
        return self.logits_from(self.features(images, train, keep)[last], last, train)

    def logits_from(self, x: jax.Array, stage: str, train: bool = False) -> jax.Array:
        """Returns the logits [N, num_classes] of a stage's activations, by what comes after that stage.

        Args:
            x: what `features` gives for `stage`; its gradient is what Grad-CAM needs.
            stage: 'stem', 'layer1', ...
            train: as `features`.

        Raises:
            InputError: there is no such stage.
        """
        check_stage(self, stage)
        for later in range(stages(self).index(stage), len(self.layers)):
            for block in getattr(self, f'layer{later + 1}'):
                x = block(x, train)
        wide = at_least_float32(self.dtype)  # x: [N, H/32, W/32, C]
        x = x.mean(axis=(1, 2), dtype=wide)  # [N, C]
        return self.fc(x).astype(wide)


def _no_norm() -> Norm:
    """In the place of a BatchNorm that is folded into the convolution before it."""
    return lambda x, train: x


def stages(model: EPSANet) -> list[str]:
    """Returns the names of a network's stages, 'stem' first."""
    return ['stem', *(f'layer{i + 1}' for i in range(len(model.layers)))]


def check_stage(model: EPSANet, stage: str) -> None:
    """Raises InputError if a network has no such stage."""
    if stage not in stages(model):
        raise InputError(
            f'no stage {stage!r}{suggest(stage, stages(model))}; there are {", ".join(stages(model))}'
        )


def check_images(images: jax.Array) -> None:
    """Raises InputError unless `images` is a floating-point array [N, H, W, 3] with H, W >= 32."""
    shape = tuple(images.shape)
    if len(shape) != 4:
        raise InputError(f'images must be [N, H, W, 3], got shape {shape}')
    if shape[3] != 3:
        hint = ' (channels come last, unlike in PyTorch)' if shape[1] == 3 else ''
        raise InputError(f'images must have 3 channels, got shape {shape}{hint}')
    if min(shape[1:3]) < MIN_SIZE:
        raise InputError(f'images must be at least {MIN_SIZE}x{MIN_SIZE} pixels, got shape {shape}')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f'images must be normalised floating-point numbers, got {images.dtype}; '
            'see epsanet_jax.data.augment.normalize'
        )
