"""Trains eight networks from eight seeds together: `vmap` turns the step of one into the step of all.

    python examples/ensemble.py [--steps 150] [--seeds 8]

Each member has its own initial weights and its own order of the images. The network needs no change:
parameters, running statistics, optimizer state and batch get a leading axis, [seeds, ...].

Output with 150 steps (`vmap` turns the convolutions of several members into grouped convolutions, which are
slow on a CPU):

    a step of 8 members at once: 1.289 CPU s; of one alone: 0.089
    after 5 steps, member 0 against one trained alone: parameters differ by 6.8e-06
    members: top-1 97.4 % (from 96.7 to 98.3)
    ensemble: top-1 98.9 %
"""

import argparse
import functools
import time
from typing import Any

import digits
import jax
import numpy as np
import optax

from epsanet_jax.training.steps import loss_and_updates, smoothed_targets

BATCH = 64
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def init(model: Any, seed: jax.Array) -> Any:
    """Returns the initial state of one member: parameters, running statistics, optimizer state."""
    variables = model.init(jax.random.key(seed), np.zeros((1, 32, 32, 3), np.float32))
    return variables['params'], variables['batch_stats'], OPTIMIZER.init(variables['params'])


def step(model: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Returns the next state of one member; images [N, 32, 32, 3], labels [N]."""
    params, batch_stats, opt_state = state
    targets = smoothed_targets(labels, model.num_classes, 0.1, images.dtype)
    gradient = jax.grad(loss_and_updates, argnums=1, has_aux=True)
    grads, (batch_stats, _, _) = gradient(model, params, batch_stats, images, targets)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state


@functools.cache
def compiled(model: Any, together: bool) -> tuple[Any, Any]:
    """Returns `init` and `step` of this network, for one member or for all of them."""
    one_init, one_step = functools.partial(init, model), functools.partial(step, model)
    if together:
        return jax.jit(jax.vmap(one_init)), jax.jit(jax.vmap(one_step))
    return jax.jit(one_init), jax.jit(one_step)


def train(model: Any, data: digits.Arrays, steps: int, seeds: np.ndarray) -> tuple[Any, float]:
    """Trains one member (seeds: a number) or several members at once (seeds [S]).

    Returns the state, whose leaves have a leading axis S for several members, and the CPU seconds per step.
    """
    images, labels = data
    start, one_more = compiled(model, seeds.ndim > 0)
    state = start(seeds)
    times = []
    for i in range(steps):
        chosen = [digits.rows(i, BATCH, len(labels), seed) for seed in seeds.ravel()]
        chosen = np.reshape(chosen, (*seeds.shape, BATCH))  # [S, N], or [N] for one
        state = jax.block_until_ready(one_more(state, images[chosen], labels[chosen]))
        times.append(time.process_time())
    return state, (times[-1] - times[0]) / max(1, steps - 1)


def predict(model: Any, states: Any, images: np.ndarray) -> np.ndarray:
    """Returns the probabilities of each member, [S, N, K]."""

    def one(params, batch_stats):
        return jax.nn.softmax(model.apply({'params': params, 'batch_stats': batch_stats}, images))

    return np.asarray(jax.jit(jax.vmap(one))(*states[:2]))


def main(argv: list[str] | None = None) -> None:
    """Trains the members together and one alone, and prints accuracy and speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--steps', type=int, default=150, help='number of training steps')
    parser.add_argument('--seeds', type=int, default=8, help='number of members')
    options = parser.parse_args(argv)

    data, (images, labels) = digits.load()
    model, seeds = digits.small_model(), np.arange(options.seeds)
    few = min(5, options.steps)  # rounding differences grow with every step
    (states, _), (alone, seconds) = (train(model, data, few, which) for which in (seeds, seeds[0]))
    pairs = zip(*map(jax.tree.leaves, (states[0], alone[0])), strict=True)
    error = max(np.abs(member[0] - single).max() for member, single in pairs)
    states, together = train(model, data, options.steps, seeds)

    probabilities = predict(model, states, images)  # [S, N, K]
    members = 100 * (probabilities.argmax(axis=2) == labels).mean(axis=1)  # [S]
    mixture = 100 * (probabilities.mean(axis=0).argmax(axis=1) == labels).mean()
    print(f'a step of {len(seeds)} members at once: {together:.3f} CPU s; of one alone: {seconds:.3f}')
    print(f'after {few} steps, member 0 against one trained alone: parameters differ by {error:.1e}')
    print(f'members: top-1 {members.mean():.1f} % (from {members.min():.1f} to {members.max():.1f})')
    print(f'ensemble: top-1 {mixture:.1f} %')


if __name__ == '__main__':
    main()
