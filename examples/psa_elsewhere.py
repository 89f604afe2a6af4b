"""PSA in another network: a small MobileNetV2 whose depthwise convolutions are replaced by pyramids.

    python examples/psa_elsewhere.py [--steps 150]

`PSAModule` is an ordinary Flax module: it maps [N, H, W, C] to [N, H / stride, W / stride, planes], rounded
up, and sows its attention into 'intermediates' in any network. Here it is combined with Flax's own layers.

Output with 150 steps (the pyramid has ten times the parameters; its attention is still close to 1 / 4):

    depthwise 3x3: 7,674 parameters, top-1 95.3 %
    pyramid: 74,146 parameters, top-1 99.4 %
    InvertedResidual_2: mean attention to kernels 3, 5, 7, 9: 0.250 0.241 0.237 0.273
"""

import argparse
import functools
from typing import Any

import digits
import flax.linen as nn
import jax
import numpy as np

from epsanet_jax.models.psa import PSAModule

PADDING = ((1, 1), (1, 1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen by a 1x1 convolution, convolve in space, narrow by a 1x1 convolution.

    Attributes:
        features: number of output channels.
        stride: step of the spatial convolution in both directions.
        pyramid: whether the spatial convolution is a PSA module instead of a depthwise 3x3 convolution.
    """

    features: int
    stride: int = 1
    pyramid: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, features]."""

        def norm(y):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        width = 2 * self.features
        y = nn.relu6(norm(nn.Conv(width, (1, 1), use_bias=False)(x)))  # [N, H, W, 2F]
        if self.pyramid:
            y = PSAModule(width, self.stride, groups=(1, 2, 4, 8), reduction=4)(y)  # [N, H/s, W/s, 2F]
        else:
            depthwise = nn.Conv(
                width, (3, 3), self.stride, PADDING, feature_group_count=width, use_bias=False
            )
            y = depthwise(y)  # [N, H/s, W/s, 2F]
        y = norm(nn.Conv(self.features, (1, 1), use_bias=False)(nn.relu6(norm(y))))  # [N, H/s, W/s, F]
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """A stem, three blocks and a classifier for ten classes."""

    pyramid: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, 32, 32, 3] to logits [N, 10]."""
        x = nn.Conv(16, (3, 3), 4, PADDING, use_bias=False)(images)  # [N, 8, 8, 16]
        for features, stride in ((16, 1), (16, 1), (32, 2)):
            x = InvertedResidual(features, stride, self.pyramid)(x, train)
        return nn.Dense(10)(x.mean(axis=(1, 2)))  # [N, 4, 4, 32] -> [N, 10]


def main(argv: list[str] | None = None) -> None:
    """Trains the network with both kinds of block; prints accuracy and mean attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--steps', type=int, default=150, help='number of training steps')
    steps = parser.parse_args(argv).steps

    data, test = digits.load()
    for name, model in (('depthwise 3x3', MobileNet()), ('pyramid', MobileNet(pyramid=True))):
        variables = digits.train(model, data, steps)
        accuracy = digits.top1(model, variables, test)
        print(f'{name}: {digits.count(variables["params"]):,} parameters, top-1 {accuracy:.1f} %')
    observe = jax.jit(functools.partial(model.apply, mutable=['intermediates']))
    state: Any = observe(variables, test[0])[1]
    for block, sown in state['intermediates'].items():
        (attention,) = sown['PSAModule_0']['attention']  # [N, 4, C]
        shares = np.asarray(attention).mean(axis=(0, 2))
        print(f'{block}: mean attention to kernels 3, 5, 7, 9:', *(f'{share:.3f}' for share in shares))


if __name__ == '__main__':
    main()
