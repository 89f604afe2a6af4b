"""The steps of a run, traced for its batches and devices."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training import inputs, sharding, steps
from epsanet_jax.training.config import Config, mixing, with_frozen_bn
from epsanet_jax.training.optimizer import make_optimizer, make_schedule
from epsanet_jax.training.state import TrainState, create_state
from epsanet_jax.training.validation import validate

_ASKED_IN_TRAINING, _ASKED_IN_EVALUATION = 2, 1  # requests of a process: to stop, to save; to stop


def run_mesh(config: Config, bn_group: int, devices: Sequence[sharding.Device] | None = None) -> Mesh:
    """Arranges devices for a run's batches.

    Args:
        config: of the run.
        bn_group: examples in a BatchNorm group; 0: the whole batch.
        devices: None: all that there are.

    Raises:
        InputError: the batch does not divide among devices, microbatches, groups, or into pairs to be mixed.
    """
    microbatches = config.gradient_accumulation_steps
    mesh = sharding.make_mesh(config.batch_size, bn_group or None, devices, microbatches)
    rows = config.batch_size // microbatches // mesh.size
    if mixing(config) and rows % 2:
        raise InputError(
            f'mixup and cutmix mix neighbours, and {rows} rows a device at once are odd: '
            f'batch_size {config.batch_size} on {mesh.size} devices'
        )
    return mesh


def trace_train_step(
    config: Config, model: EPSANet, optimizer: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> Any:
    """Returns the training step of a run, traced for its batches: `.lower().compile()` it.

    Args:
        config: of the run.
        model: the network.
        optimizer: of the run.
        mesh: the devices, at hand or not.
        state: arrays or their shapes.
    """
    data, microbatches = config.data, config.gradient_accumulation_steps
    step: Any = steps.make_train_step(
        model,
        optimizer,
        mesh,
        smoothing=config.label_smoothing,
        mean=data.mean,
        std=data.std,
        microbatches=microbatches,
        mixing=mixing(config),
        stochastic_depth=config.stochastic_depth,
        ema_decay=config.ema_decay,
        seed=config.seed,
    )
    rows = inputs.abstract_batch(config.batch_size, data.image_size, microbatches, _ASKED_IN_TRAINING)
    return step.trace(state, rows)


def trace_eval_step(config: Config, model: EPSANet, mesh: Mesh, variables: Any, batch_size: int) -> Any:
    """Returns the evaluation step of a run, likewise.

    Args:
        config: of the run.
        model: the network.
        mesh: the devices.
        variables: arrays or their shapes.
        batch_size: of evaluation.
    """
    data = config.data
    step: Any = steps.make_eval_step(
        model, mesh, smoothing=config.label_smoothing, mean=data.mean, std=data.std
    )
    rows = inputs.abstract_batch(batch_size, data.size_in_use, requests=_ASKED_IN_EVALUATION, mask=True)
    return step.trace(variables, rows)


def lower_train_step(config: Config, devices: Sequence[sharding.Device], platform: str) -> Any:
    """Returns the training step of a configuration lowered for devices that need not be there.

    Args:
        config: of the run; if it leaves the number of classes to the data, they are 1000.
        devices: to lower for.
        platform: 'cpu', 'tpu' or 'cuda'.

    Raises:
        InputError: the configuration is invalid, or the batch does not divide among the devices.
    """
    validate(config, with_data=False)
    model = build_model(with_frozen_bn(config), 1000)
    mesh = run_mesh(config, model.bn_group, devices)
    schedule = make_schedule(config.schedule, config.optimizer.lr, total_steps=1000, steps_per_epoch=100)
    optimizer = make_optimizer(config.optimizer, schedule, config.freeze)
    size, ema = config.data.image_size, config.ema_decay > 0
    state = jax.eval_shape(lambda key: create_state(model, optimizer, key, size, ema), jax.random.key(0))
    return trace_train_step(config, model, optimizer, mesh, state).lower(lowering_platforms=(platform,))


def divides(config: Config, devices: Sequence[sharding.Device]) -> bool:
    """Whether the batch of a configuration divides among devices, microbatches and BatchNorm groups."""
    try:
        run_mesh(config, config.model.bn_group, devices)
    except InputError:
        return False
    return True
