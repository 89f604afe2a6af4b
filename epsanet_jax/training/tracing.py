"""The steps of a run, traced for its batches and devices."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.zoo import build_model
from epsanet_jax.ops import generation
from epsanet_jax.training import inputs, sharding, steps
from epsanet_jax.training.config import Config, mixing, with_frozen_bn
from epsanet_jax.training.optimizer import make_optimizer, make_schedule
from epsanet_jax.training.state import TrainState, create_state
from epsanet_jax.training.validation import validate

_TRAIN_REQUESTS, _EVAL_REQUESTS = 2, 1  # of each process: stop and save; stop


def run_mesh(config: Config, bn_group: int, devices: Sequence[sharding.Device] | None = None) -> Mesh:
    """Arranges devices (None: all) for a run's batches, in BatchNorm groups of `bn_group` (0: one group).

    Raises:
        InputError: the batch does not divide evenly among devices, microbatches, groups or mixed pairs.
    """
    microbatches = config.gradient_accumulation_steps
    mesh = sharding.make_mesh(config.batch_size, bn_group or None, devices, microbatches)
    rows = config.batch_size // microbatches // mesh.size
    if mixing(config) and rows % 2:
        raise InputError(
            f'mixup and cutmix need an even number of rows per device, got {rows}: change batch_size '
            f'{config.batch_size} (on {mesh.size} devices)'
        )
    return mesh


def trace_train_step(
    config: Config, model: EPSANet, optimizer: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> Any:
    """Returns the training step of a run, traced for its batches; compile it with `.lower().compile()`.

    The devices of the mesh need not be available; `state` holds arrays or shapes.
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
    rows = inputs.abstract_batch(
        config.batch_size, data.image_size, microbatches, _TRAIN_REQUESTS, channels=model.in_channels
    )
    return step.trace(state, rows)


def trace_eval_step(config: Config, model: EPSANet, mesh: Mesh, variables: Any, batch_size: int) -> Any:
    """Returns the evaluation step of a run, traced for variables (arrays or shapes) and a batch size."""
    data, smoothing = config.data, config.label_smoothing
    step: Any = steps.make_eval_step(model, mesh, smoothing=smoothing, mean=data.mean, std=data.std)
    rows = inputs.abstract_batch(
        batch_size, data.size_in_use, requests=_EVAL_REQUESTS, mask=True, channels=model.in_channels
    )
    return step.trace(variables, rows)


def lower_train_step(config: Config, devices: Sequence[sharding.Device], platform: str) -> Any:
    """Returns the training step of a configuration, lowered for devices that need not be available.

    Args:
        config: the configuration; if it does not set the number of classes, it is 1000.
        devices: the devices to lower for.
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
    traced = trace_train_step(config, model, optimizer, mesh, state)
    with generation.lowering_for(devices[0].device_kind):
        return traced.lower(lowering_platforms=(platform,))


def divides(config: Config, devices: Sequence[sharding.Device]) -> bool:
    """Whether a configuration's batch divides evenly among devices, microbatches and BatchNorm groups."""
    try:
        run_mesh(config, config.model.bn_group, devices)
    except InputError:
        return False
    return True
