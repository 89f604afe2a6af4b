"""The gradient of the loss of each image, by `vmap` of `grad`: finds wrong labels and a good batch size.

    python examples/per_example_gradients.py [--steps 200]

Trains a small EPSANet on digits with one wrong label in twenty. Then it computes a gradient for each of 256
training images. With BatchNorm in inference mode images do not influence each other, so the mean of these
gradients is the gradient of the batch. The longest gradients point to wrong labels. The spread of the
gradients gives the gradient noise scale tr(covariance) / |mean|^2, the batch size above which averaging gains
little (arXiv 1812.06162).

Output with 200 steps:

    step 0: noise scale 121.5 images
    step 0: wrong labels among the longest gradients: 1/13
    step 200: mean of 256 gradients against the batch gradient: error 5.7e-07
    step 200: noise scale 383.6 images
    step 200: wrong labels among the longest gradients: 12/13
"""

import argparse
from typing import Any

import digits
import jax
import numpy as np
import optax

WRONG = 20  # one label in 20 is wrong


def mislabel(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels [N] with every twentieth label wrong, and a mask [N] of the wrong labels."""
    rng = np.random.default_rng(0)
    wrong = np.arange(len(labels)) % WRONG == 0
    other = (labels + rng.integers(1, 10, len(labels))) % 10
    return np.where(wrong, other, labels).astype(np.int32), wrong


def loss(model: Any, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean loss of a batch, with BatchNorm in inference mode."""
    logits = model.apply({'params': params, 'batch_stats': batch_stats}, images, train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def per_example_gradients(model: Any, variables: Any, images: Any, labels: Any) -> Any:
    """Returns a tree like the parameters whose leaves have a leading axis for the images, [N, ...]."""

    def one(image, label):
        # A batch with one image: the network needs [1, H, W, 3].
        return jax.grad(loss, argnums=1)(
            model, variables['params'], variables['batch_stats'], image[None], label[None]
        )

    return jax.vmap(one)(images, labels)


def flatten(gradients: Any) -> np.ndarray:
    """Returns per-example gradients as one matrix, [N, parameters]."""
    leaves = jax.tree.leaves(gradients)
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)


def noise_scale(gradients: np.ndarray) -> float:
    """Returns tr(covariance) / |mean|^2 of gradients [N, P], both estimated without bias."""
    n = len(gradients)
    trace = gradients.var(axis=0, ddof=1).sum()
    return float(trace / max((gradients.mean(axis=0) ** 2).sum() - trace / n, 1e-30))


def main(argv: list[str] | None = None) -> None:
    """Trains, computes the gradients and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--steps', type=int, default=200, help='number of training steps')
    parser.add_argument('--images', type=int, default=256, help='number of images with a gradient')
    options = parser.parse_args(argv)

    (images, labels), _ = digits.load()
    labels, wrong = mislabel(labels)
    model = digits.small_model()
    for count in (0, options.steps):
        variables = digits.train(model, (images, labels), count)
        chosen = (images[: options.images], labels[: options.images])
        gradients = flatten(jax.jit(per_example_gradients, static_argnums=0)(model, variables, *chosen))
        whole = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(model, *variables.values(), *chosen)
        mean = flatten(jax.tree.map(lambda g: g[None], whole))[0]  # [P]
        error = np.abs(gradients.mean(axis=0) - mean).max() / np.abs(mean).max()
        longest = np.argsort(-np.linalg.norm(gradients, axis=1))[: wrong[: options.images].sum()]
        print(
            f'step {count}: mean of {len(gradients)} gradients against the batch gradient: error {error:.1e}'
        )
        print(f'step {count}: noise scale {noise_scale(gradients):.1f} images')
        print(
            f'step {count}: wrong labels among the longest gradients: {wrong[longest].sum()}/{len(longest)}'
        )


if __name__ == '__main__':
    main()
