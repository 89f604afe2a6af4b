"""A feature pyramid network (FPN) that labels the pixels of circles, squares and triangles.

    python examples/dense_prediction.py [--steps 150] [--output-stride 16] [--out dense_prediction.png]

The backbone's `features` gives four maps. 1x1 convolutions bring them to one width, coarse maps are enlarged
and added to finer ones, and a small head predicts a class for each pixel. `output_stride` 16 or 8 keeps the
last stages larger, with the same parameters. With `frozen_bn` all weights are trained, but BatchNorm uses its
running statistics, as is common with few large images and a pretrained backbone. Here nothing is pretrained,
so the running statistics are first computed from the images.

Draws the predictions. 150 steps: loss 1.2873 -> 0.0188, mean IoU 0.974 (output stride 32: 0.907, 8: 0.876).
"""

import argparse
from typing import Any

import digits
import flax.linen as nn
import jax
import numpy as np
import optax
import shapes
from matplotlib.figure import Figure

from epsanet_jax.models.epsanet import EPSANet


class Segmenter(nn.Module):
    """A backbone with an FPN and a dense head."""

    backbone: EPSANet
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, H, W, 3] to the logits of each pixel, [N, H, W, classes]."""
        maps = self.backbone.features(images, train)
        levels = [nn.Conv(self.width, (1, 1))(maps[f'layer{i}']) for i in (4, 3, 2, 1)]  # coarse to fine
        x = levels[0]  # [N, H/s, W/s, width], s = output stride
        for level in levels[1:]:
            x = level + jax.image.resize(x, level.shape, 'nearest')  # finally [N, H/4, W/4, width]
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.Conv(shapes.CLASSES, (1, 1))(x)  # [N, H/4, W/4, classes]
        return jax.image.resize(x, (*images.shape[:3], shapes.CLASSES), 'bilinear')


def collect_statistics(model: Segmenter, variables: Any, images: np.ndarray, passes: int = 30) -> Any:
    """Returns variables whose running statistics are those of the images, from forward passes."""
    free = model.clone(backbone=model.backbone.clone(frozen_bn=''))
    forward = jax.jit(lambda v: free.apply(v, images, train=True, mutable=['batch_stats'])[1])
    for _ in range(passes):  # each pass closes a tenth of the remaining difference
        variables = {**variables, **forward(variables)}
    return variables


def train(model: Segmenter, variables: Any, images: np.ndarray, masks: np.ndarray, steps: int):
    """Returns the trained variables and the loss before each step."""
    optimizer = optax.adam(3e-3)
    params, batch_stats = variables['params'], variables['batch_stats']
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, batch_stats, opt_state):
        def loss_fn(params):
            both = {'params': params, 'batch_stats': batch_stats}
            logits, new = model.apply(both, images, train=True, mutable=['batch_stats'])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, masks)  # [N, H, W]
            return losses.mean(), new['batch_stats']  # frozen: unchanged

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), batch_stats, opt_state, loss

    losses = [0.0] * steps
    for i in range(steps):
        params, batch_stats, opt_state, losses[i] = step(params, batch_stats, opt_state)
    return {'params': params, 'batch_stats': batch_stats}, losses


def mean_iou(predicted: np.ndarray, masks: np.ndarray) -> float:
    """Returns the intersection over union, averaged over the classes."""
    pairs = [(predicted == c, masks == c) for c in range(shapes.CLASSES)]
    return float(np.mean([(p & m).sum() / max(1, (p | m).sum()) for p, m in pairs]))


def draw(path: str, **rows: np.ndarray) -> None:
    """Writes a PNG with one row for each argument: images [N, H, W, 3] or classes [N, H, W]."""
    figure = Figure(figsize=(9, 4.6), layout='constrained')
    number = len(next(iter(rows.values())))
    grid = figure.subplots(len(rows), number, squeeze=False, subplot_kw={'xticks': [], 'yticks': []})
    for axes, (name, row) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(name)
        for axis, array in zip(axes, row, strict=True):
            shown = np.clip(0.5 + array / 4, 0, 1) if array.ndim == 3 else array
            axis.imshow(shown, vmin=0, vmax=shapes.CLASSES - 1)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """Trains on a few images, overfitting them, and draws the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--steps', type=int, default=150, help='number of training steps')
    parser.add_argument('--output-stride', type=int, default=16, choices=(32, 16, 8))
    parser.add_argument('--out', default='dense_prediction.png', help='image to write')
    options = parser.parse_args(argv)

    shape = {'layers': (1, 1, 1, 1), 'planes': (8, 16, 16, 32), 'output_stride': options.output_stride}
    model = Segmenter(digits.small_model(frozen_bn='.', **shape))
    images, masks = shapes.draw()
    variables = collect_statistics(model, digits.init(model, jax.random.key(0), images), images)
    variables, losses = train(model, variables, images, masks, options.steps)
    predicted = np.asarray(digits.predict(model, variables, images)).argmax(axis=3)  # [N, H, W]
    draw(options.out, image=images, target=masks, prediction=predicted)
    print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f} in {options.steps} steps; written: {options.out}')
    print(f'mean IoU of {shapes.CLASSES} classes: {mean_iou(predicted, masks):.3f}')


if __name__ == '__main__':
    main()
