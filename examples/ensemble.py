"""Eight networks from eight seeds, trained together: `vmap` turns the step for one into the step for all.

    python examples/ensemble.py [--steps 150] [--seeds 8]

Each member has its own initial weights and its own order of the pictures. Nothing in the network knows of
the ensemble: parameters, running statistics and optimizer state get an axis in front, [seeds, ...]; so
does the batch.

Prints, with 150 steps:
"""

import argparse
import functools
import time
from typing import Any

import digits
import jax
import numpy as np
import optax

from epsanet_jax.training.loss import smoothed_targets
from epsanet_jax.training.steps import loss_and_updates

BATCH = 64
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def init(model: Any, seed: jax.Array) -> Any:
    """Returns one member's state: parameters, running statistics, optimizer state."""
    variables = model.init(jax.random.key(seed), np.zeros((1, 32, 32, 3), np.float32))
    return variables['params'], variables['batch_stats'], OPTIMIZER.init(variables['params'])


def step(model: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Returns one member's next state; images [N, 32, 32, 3], labels [N]."""
    params, batch_stats, opt_state = state
    targets = smoothed_targets(labels, model.num_classes, 0.1, images.dtype)
    gradient = jax.grad(loss_and_updates, argnums=1, has_aux=True)
    grads, (batch_stats, _, _) = gradient(model, params, batch_stats, images, targets)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state


def train_together(model: Any, data: digits.Arrays, steps: int, seeds: np.ndarray) -> tuple[Any, float]:
    """Returns the state of all members, each leaf [S, ...], and the seconds of a step after the first."""
    images, labels = data
    states = jax.jit(jax.vmap(functools.partial(init, model)))(seeds)
    all_step = jax.jit(jax.vmap(functools.partial(step, model)), donate_argnums=0)
    times = []
    for i in range(steps):
        chosen = np.stack([digits.rows(i, BATCH, len(labels), seed) for seed in seeds])  # [S, N]
        states = jax.block_until_ready(all_step(states, images[chosen], labels[chosen]))  # [S, N, 32, 32, 3]
        times.append(time.perf_counter())
    return states, (times[-1] - times[0]) / max(1, steps - 1)


def train_alone(model: Any, data: digits.Arrays, steps: int, seed: int) -> tuple[Any, float]:
    """Returns the state of one member, trained by itself, and the seconds of a step after the first."""
    images, labels = data
    state = jax.jit(functools.partial(init, model))(seed)
    one_step = jax.jit(functools.partial(step, model), donate_argnums=0)
    times = []
    for i in range(steps):
        chosen = digits.rows(i, BATCH, len(labels), seed)  # [N]
        state = jax.block_until_ready(one_step(state, images[chosen], labels[chosen]))
        times.append(time.perf_counter())
    return state, (times[-1] - times[0]) / max(1, steps - 1)


def predict(model: Any, states: Any, images: np.ndarray) -> np.ndarray:
    """Returns each member's probabilities, [S, N, K]."""

    def one(params, batch_stats):
        return jax.nn.softmax(model.apply({'params': params, 'batch_stats': batch_stats}, images))

    return np.asarray(jax.jit(jax.vmap(one))(*states[:2]))


def main(argv: list[str] | None = None) -> None:
    """Trains the members together and one alone, and prints how good and how fast they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--steps', type=int, default=150, help='of training')
    parser.add_argument('--seeds', type=int, default=8, help='members')
    options = parser.parse_args(argv)

    data, (images, labels) = digits.load()
    model, seeds = digits.small_model(), np.arange(options.seeds)
    few = min(5, options.steps)  # rounding grows from step to step, until the paths part
    (states, _), (alone, seconds) = train_together(model, data, few, seeds), train_alone(model, data, few, 0)
    pairs = zip(*map(jax.tree.leaves, (states[0], alone[0])), strict=True)
    error = max(np.abs(member[0] - single).max() for member, single in pairs)
    states, together = train_together(model, data, options.steps, seeds)

    probabilities = predict(model, states, images)  # [S, N, K]
    members = 100 * (probabilities.argmax(axis=2) == labels).mean(axis=1)  # [S]
    mixture = 100 * (probabilities.mean(axis=0).argmax(axis=1) == labels).mean()
    print(f'a step of {len(seeds)} members at once: {together:.2f} s; of one alone: {seconds:.2f} s')
    print(f'after {few} steps, member 0 against one trained alone: parameters differ by {error:.1e}')
    print(f'members: top-1 {members.mean():.1f} % (from {members.min():.1f} to {members.max():.1f})')
    print(f'ensemble: top-1 {mixture:.1f} %')


if __name__ == '__main__':
    main()
