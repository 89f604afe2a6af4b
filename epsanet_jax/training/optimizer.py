"""SGD as PyTorch's, and learning-rate schedules."""

import jax.numpy as jnp
import optax

from epsanet_jax.training.config import OptimizerConfig, ScheduleConfig


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Makes SGD with momentum and coupled weight decay on all parameters, as `torch.optim.SGD`.

        g <- g + weight_decay * p;  b <- momentum * b + g;  p <- p - lr * b

    With `nesterov`, p <- p - lr * (g + momentum * b).

    Args:
        config: momentum, nesterov, weight_decay.
        schedule: maps the step to the learning rate.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def make_schedule(
    config: ScheduleConfig, lr: float, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    After a linear warm-up from lr / warm-up steps: 'constant' stays at lr; 'step' multiplies it by
    `step_factor` every `step_epochs` epochs, counted from the start of training; 'cosine' goes down to 0 at
    `total_steps` along half a cosine.

    Args:
        config: name, warmup_epochs, step_epochs, step_factor.
        lr: the peak.
        total_steps: length of the training.
        steps_per_epoch: need not be whole.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)

    def schedule(step):
        step = jnp.asarray(step, jnp.result_type(float))
        if config.name == 'cosine':
            progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0, 1)
            rate = lr * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.name == 'step':
            rate = lr * config.step_factor ** jnp.floor(step / (config.step_epochs * steps_per_epoch))
        else:
            rate = jnp.full((), lr, step.dtype)
        return jnp.where(step < warmup, lr * (step + 1) / max(1, warmup), rate)

    return schedule
