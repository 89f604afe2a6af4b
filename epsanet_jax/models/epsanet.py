"""EPSANet, and ResNet as a variant of it."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from epsanet_jax.errors import InputError, suggest
from epsanet_jax.models.block import EPSABlock, dtypes_of, parts
from epsanet_jax.models.conv import Linear
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.pool import max_pool
from epsanet_jax.models.settings import Settings, of_stage, settings_of

STEM_WIDTH = 64
MIN_SIZE = 32  # the network's total stride: the last stage cannot halve a smaller image


class EPSANet(nn.Module, Settings):
    """The network; `epsanet_jax.create_model` creates the published variants.

    The options are the fields of `models.settings.Settings`.

    Attributes:
        middle: 'psa', or 'conv3x3' for ResNet; `models.pyconv` has the network with 'pyconv'.
        use_se: whether each block ends in a squeeze-and-excitation module, as in SE-ResNet.
        bn_axis: mesh axis over which one BatchNorm group is spread; `training.sharding` sets it.
        folded: whether the convolutions have biases instead of a BatchNorm after them; for inference, with
            the variables that `models.fold_batch_norm` returns.
    """

    middle: str = 'psa'
    use_se: bool = False
    bn_axis: str | None = None
    folded: bool = False

    block_type: ClassVar[type[EPSABlock]] = EPSABlock
    pools_stem: ClassVar[bool] = True  # otherwise the first block of stage 1 has stride 2

    def setup(self):
        settings = settings_of(self)
        conv, norm = parts(settings, self.bn_axis, self.folded)
        self.conv1, self.bn1 = conv(STEM_WIDTH, 7, stride=2), norm()
        block = functools.partial(
            nn.remat(self.block_type, static_argnums=(2,)) if self.remat else self.block_type,
            middle=self.middle,
            use_se=self.use_se,
            bn_axis=self.bn_axis,
            folded=self.folded,
        )
        width, reached, dilation = STEM_WIDTH, 4 if self.pools_stem else 2, 1
        for stage, (count, planes) in enumerate(zip(self.layers, self.planes, strict=True)):
            blocks = []
            for i in range(count):
                halves = i == 0 and (stage > 0 or not self.pools_stem)
                # At the output stride a stage keeps its size, and the following blocks are dilated instead.
                kept = halves and self.output_stride < 32 and reached >= self.output_stride
                stride = 2 if halves and not kept else 1
                downsample = halves or width != planes * self.expansion
                blocks.append(block(planes, stride, downsample, dilation, of_stage(settings, stage)))
                width = planes * self.expansion
                dilation, reached = dilation * (2 if kept else 1), reached * stride
            setattr(self, f'layer{stage + 1}', blocks)
        if self.num_classes:
            self.fc = Linear(self.num_classes, **dtypes_of(settings))

    def features(
        self, images: jax.Array, train: bool = False, keep: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the activations after the stem and each stage.

        Args:
            images: [N, H, W, in_channels], normalised; H and W at least 32.
            train: whether BatchNorm normalises by the batch (and updates 'batch_stats').
            keep: factors of the residual branches, [N, blocks], for stochastic depth, see
                `training.steps.draw_keep`; None: all are 1.

        Returns:
            'stem' [N, H/4, W/4, 64] (in a PyConvResNet [N, H/2, W/2, 64]), and 'layer1' .. 'layer4'
            [N, H/s, W/s, planes * expansion] with s = 4, 8, 16, 32, but at most `output_stride` (sizes
            rounded up).

        Raises:
            InputError: the images have a wrong rank, type or number of channels, or are too small.
        """
        check_images(images, self.in_channels)
        x = images.astype(self.dtype)  # [N, H, W, in_channels]
        x = nn.relu(self.bn1(self.conv1(x), train))  # [N, H/2, W/2, 64]
        x = max_pool(x) if self.pools_stem else x  # [N, H/4, W/4, 64]
        outputs = {'stem': x}
        number = 0
        for stage in range(1, len(self.layers) + 1):
            for block in getattr(self, f'layer{stage}'):
                x = block(x, train, None if keep is None else keep[:, number])
                number += 1
            outputs[f'layer{stage}'] = x
        return outputs

    def __call__(self, images: jax.Array, train: bool = False, keep: jax.Array | None = None) -> jax.Array:
        """Returns logits [N, num_classes], in `dtype` or float32 if that is wider.

        Arguments and errors are those of `features`. Without a classifier (`num_classes` 0) it returns the
        pooled features [N, planes * expansion].
        """
        last = f'layer{len(self.layers)}'
        return self.logits_from(self.features(images, train, keep)[last], last, train)

    def logits_from(self, x: jax.Array, stage: str, train: bool = False) -> jax.Array:
        """Returns the logits [N, num_classes] from the activations of a stage, for Grad-CAM.

        Args:
            x: activations that `features` returns for `stage`.
            stage: 'stem', 'layer1', ...
            train: whether BatchNorm normalises by the batch.

        Raises:
            InputError: there is no such stage.
        """
        check_stage(self, stage)
        for later in range(stages(self).index(stage), len(self.layers)):
            for block in getattr(self, f'layer{later + 1}'):
                x = block(x, train)
        wide = at_least_float32(self.dtype)  # x: [N, H/32, W/32, C]
        x = x.mean(axis=(1, 2), dtype=wide)  # [N, C]
        return self.fc(x).astype(wide) if self.num_classes else x


def abstract_images(model: EPSANet, size: int = MIN_SIZE) -> jax.ShapeDtypeStruct:
    """Returns the shape and type of one image, [1, size, size, in_channels]."""
    return jax.ShapeDtypeStruct((1, size, size, model.in_channels), model.dtype)


def abstract_variables(model: EPSANet) -> Any:
    """Returns the shapes and types of a network's variables, without computing them."""
    return jax.eval_shape(model.init, jax.random.key(0), abstract_images(model))


def stages(model: EPSANet) -> list[str]:
    """Returns the names of a network's stages, 'stem' first."""
    return ['stem', *(f'layer{i + 1}' for i in range(len(model.layers)))]


def check_stage(model: EPSANet, stage: str) -> None:
    """Raises InputError if a network has no such stage."""
    if stage not in stages(model):
        known = stages(model)
        raise InputError(f'no stage {stage!r}{suggest(stage, known)}; stages: {", ".join(known)}')


def check_images(images: jax.Array, channels: int = 3) -> None:
    """Raises InputError unless `images` is a floating-point array [N, H, W, channels] with H, W >= 32."""
    shape = tuple(images.shape)
    if len(shape) != 4:
        raise InputError(f'images must be [N, H, W, {channels}], got shape {shape}')
    if shape[3] != channels:
        hint = ' (channels come last, unlike in PyTorch)' if shape[1] == channels else ''
        raise InputError(f'images must have {channels} channels, got shape {shape}{hint}')
    if min(shape[1:3]) < MIN_SIZE:
        raise InputError(f'images must be at least {MIN_SIZE}x{MIN_SIZE} pixels, got shape {shape}')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f'images must be normalised floating-point numbers, got {images.dtype}; '
            'see epsanet_jax.data.augment.normalize'
        )
