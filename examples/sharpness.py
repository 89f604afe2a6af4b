"""Sharpness during training: the largest eigenvalue of the Hessian, from Hessian-vector products.

    python examples/sharpness.py [--steps 60] [--lr 0.1]

A product with the Hessian is a `jvp` through a `grad` and costs two or three gradients. Power iteration with
it finds the eigenvalue. Training is plain gradient descent on 128 digits with BatchNorm in training mode. On
a quadratic function gradient descent diverges if the sharpness is above 2 / lr; networks can continue to
train at that edge (arXiv 2103.00065).

Output with 60 steps: sharpness 0.51, 45.62, 38.97 and 28.57 at steps 0, 20, 40 and 60; 2 / lr: 20.00.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import digits
import jax
import jax.numpy as jnp

from epsanet_jax.training.steps import loss_and_updates, smoothed_targets


def hvp(loss: Callable[[Any], jax.Array], params: Any, direction: Any) -> Any:
    """Returns the Hessian of `loss` at `params` times `direction`, a tree like the parameters."""
    return jax.jvp(jax.grad(loss), (params,), (direction,))[1]


def dot(a: Any, b: Any) -> jax.Array:
    """Returns the scalar product of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # pyright: ignore


def unit(tree: Any) -> Any:
    """Returns the tree scaled to length 1."""
    length = jnp.sqrt(dot(tree, tree))
    return jax.tree.map(lambda leaf: leaf / length, tree)


def random_direction(key: jax.Array, params: Any) -> Any:
    """Returns a random tree like the parameters, of length 1."""
    leaves, structure = jax.tree.flatten(params)
    flat = jax.random.normal(key, (sum(leaf.size for leaf in leaves),), leaves[0].dtype)  # [P]
    starts = jnp.cumsum(jnp.array([leaf.size for leaf in leaves]))[:-1].tolist()
    pieces = jnp.split(flat, starts)
    return unit(
        jax.tree.unflatten(structure, [p.reshape(x.shape) for p, x in zip(pieces, leaves, strict=True)])
    )


def largest_eigenvalue(times_hessian: Any, params: Any, start: Any, iterations: int) -> tuple[jax.Array, Any]:
    """Returns the Hessian's largest eigenvalue and its direction, by power iteration from `start`.

    Power iteration finds the eigenvalue of largest magnitude. If that is negative, it is subtracted from all
    eigenvalues, so that none is negative, and the iteration is repeated.
    """
    shift = eigenvalue = jnp.zeros(())
    for _ in range(2):
        direction = start
        for _ in range(iterations):
            product = times_hessian(params, direction)
            eigenvalue = dot(direction, product)
            direction = unit(jax.tree.map(lambda h, d, s=shift: h - s * d, product, direction))
        if eigenvalue > 0:
            break
        shift = eigenvalue
    return eigenvalue, direction


def main(argv: list[str] | None = None) -> None:
    """Trains by gradient descent and prints loss and sharpness."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--steps', type=int, default=60, help='number of steps of gradient descent')
    parser.add_argument('--lr', type=float, default=0.1, help='learning rate')
    parser.add_argument('--images', type=int, default=128, help='number of images in the loss')
    parser.add_argument('--iterations', type=int, default=20, help='iterations of the power method')
    parser.add_argument('--dtype', default='float32', help='float32 or float64, which needs JAX_ENABLE_X64=1')
    options = parser.parse_args(argv)

    model = digits.small_model(dtype=options.dtype, param_dtype=options.dtype)
    (images, labels), _ = digits.load()
    images = jnp.asarray(images[: options.images], options.dtype)
    labels = jnp.asarray(labels[: options.images])
    targets = smoothed_targets(labels, 10, 0.0, options.dtype)
    variables = digits.init(model, jax.random.key(0), images[:1])
    params = variables['params']

    def loss(params: Any) -> jax.Array:
        return loss_and_updates(model, params, variables['batch_stats'], images, targets)[0]

    # A Python loop around compiled functions: convolutions inside XLA loops are slow on a CPU.
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    times_hessian = jax.jit(functools.partial(hvp, loss))
    direction = random_direction(jax.random.key(1), params)
    sharpness = jnp.nan
    if options.dtype == 'float64':  # float32 would need differences so large that they cross kinks of ReLU
        forward, backward = (
            value_and_grad(jax.tree.map(lambda p, d, s=size: p + s * d, params, direction))[1]
            for size in (1e-8, -1e-8)
        )
        product = times_hessian(params, direction)
        error = jax.tree.map(lambda h, a, b: h - (a - b) / 2e-8, product, forward, backward)
        error = jnp.sqrt(dot(error, error) / dot(product, product))
        print(f'Hessian-vector product against differences of gradients: error {error:.1e}')
    for step in range(options.steps + 1):
        value, gradient = value_and_grad(params)
        if step in (0, options.steps // 3, 2 * options.steps // 3, options.steps):
            # Start from the previous direction, which changes slowly.
            sharpness, direction = largest_eigenvalue(times_hessian, params, direction, options.iterations)
            print(f'step {step}: loss {value:.4f}, sharpness {sharpness:.2f}')
        params = jax.tree.map(lambda p, g: p - options.lr * g, params, gradient)
    print(f'sharpness at the end: {sharpness:.2f}; 2 / lr: {2 / options.lr:.2f}')


if __name__ == '__main__':
    main()
