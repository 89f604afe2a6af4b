"""Optimizers and learning-rate schedules."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from epsanet_jax.errors import InputError
from epsanet_jax.training.config import OptimizerConfig, ScheduleConfig


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, freeze: str = ''
) -> optax.GradientTransformation:
    """Makes the optimizer of a run.

    With g the gradient, scaled down to `clip_norm` if it is longer, and d the weight decay:

        sgd (as torch.optim.SGD)      g <- g + d p;  b <- momentum b + g;  p <- p - lr b
                                      with `nesterov`: p <- p - lr (g + momentum b)
        lars (arXiv:1708.03888)       g <- g + d p;  g <- g trust_coefficient |p| / |g|;
                                      b <- momentum b + lr g;  p <- p - b
        adamw (as torch.optim.AdamW)  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
                                      u <- (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps);
                                      p <- p - lr (u + d p)
        lamb (arXiv:1904.00962)       u as above;  u <- u + d p;  p <- p - lr u |p| / |u|

    Norms of LARS and LAMB are taken over each array; if one is 0, the ratio is 1.

    Args:
        config: the settings.
        schedule: maps the step to the learning rate.
        freeze: regular expression; parameters whose names match do not change.
    """
    kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731 (no BatchNorm, no biases)
    mask = None if config.decay_norm_and_bias else kernels
    decay = config.weight_decay
    if config.name == 'sgd':
        optimizer = optax.chain(
            optax.add_decayed_weights(decay, mask),
            optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity(),
            optax.scale_by_learning_rate(schedule),
        )
    elif config.name == 'lars':
        optimizer = optax.lars(
            schedule,
            decay,
            weight_decay_mask=mask or True,
            trust_coefficient=config.trust_coefficient,
            trust_ratio_mask=mask or True,
            momentum=config.momentum,
            nesterov=config.nesterov,
        )
    else:
        make = {'adamw': optax.adamw, 'lamb': optax.lamb}[config.name]
        optimizer = make(schedule, config.b1, config.b2, config.eps, weight_decay=decay, mask=mask)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if not freeze:
        return optimizer

    def kind(params: Any) -> Any:
        return jax.tree.map(lambda frozen: 'frozen' if frozen else 'trained', frozen_mask(params, freeze))

    return optax.multi_transform({'trained': optimizer, 'frozen': optax.set_to_zero()}, kind)


def frozen_mask(params: Any, freeze: str) -> Any:
    """Returns a tree like the parameters: whether each one's name, such as 'bn1/scale', matches `freeze`.

    Raises:
        InputError: no name matches, or all names match.
    """

    def is_frozen(path: Any, _: Any) -> bool:
        return re.search(freeze, '/'.join(key.key for key in path)) is not None

    mask = jax.tree_util.tree_map_with_path(is_frozen, params)
    found = jax.tree.leaves(mask)
    if not any(found):
        raise InputError(f'config.freeze={freeze!r} matches no parameter; a name is for example "bn1/scale"')
    if all(found):
        raise InputError(f'config.freeze={freeze!r} matches all parameters')
    return mask


def make_schedule(
    config: ScheduleConfig, lr: float, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    After a linear warm-up that starts at lr / warm-up steps: 'constant' stays at lr; 'step' multiplies it by
    `step_factor` every `step_epochs` epochs, counted from the start of training; 'cosine' and 'linear'
    decrease to lr * `end_factor` at `total_steps`, along half a cosine or a line.

    Args:
        config: the settings.
        lr: peak learning rate.
        total_steps: length of the training.
        steps_per_epoch: possibly a fraction.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)

    def schedule(step):
        step = jnp.asarray(step, jnp.result_type(float))
        # The other schedules do not use total_steps: a longer run is the same compiled program.
        if config.name in ('cosine', 'linear'):
            progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0, 1)
            falling = 1 - progress if config.name == 'linear' else 0.5 * (1 + jnp.cos(jnp.pi * progress))
            value = lr * (config.end_factor + (1 - config.end_factor) * falling)
        elif config.name == 'step':
            value = lr * config.step_factor ** _periods(step, config.step_epochs * steps_per_epoch)
        else:
            value = jnp.full((), lr, step.dtype)
        return jnp.where(step < warmup, lr * (step + 1) / max(1, warmup), value)

    return schedule


def _periods(step: jax.Array, period: float) -> jax.Array:
    """Returns the number of whole periods before a step.

    Compiled programs divide by multiplying with the reciprocal; 330 * (1 / 330) is below 1 in float32.
    """
    count = jnp.floor(step / period)
    return count + (step >= (count + 1) * period) - (step < count * period)
