"""Data parallelism: the mesh, and which rows of a global batch lie where. Nothing else names a mesh axis.

The devices form a matrix, processes in order. A BatchNorm group (`bn_group` consecutive rows of the global
batch) lies within one device, or is spread over one row of the matrix:

    axis 'group':  one or several whole BatchNorm groups each
    axis 'member': the devices that share one BatchNorm group; a single one where groups fit into a device
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet

Device = Any  # jax.Device, which type checkers take for a variable
_GROUP, _MEMBER = 'group', 'member'
_AXES = (_GROUP, _MEMBER)


def microbatch_size(batch_size: int, bn_group: int | None, microbatches: int) -> int:
    """Returns the rows of a global batch's microbatches, each of which holds whole BatchNorm groups.

    Raises:
        InputError: the batch or its groups do not divide among microbatches.
    """
    if batch_size % microbatches:
        raise InputError(f'batch_size {batch_size} does not divide into {microbatches} microbatches')
    rows = batch_size // microbatches
    if microbatches > 1 and (bn_group is None or rows % bn_group):
        groups = 'over the whole batch' if bn_group is None else f'groups of {bn_group}'
        raise InputError(
            f'{microbatches} microbatches of {rows} rows do not hold whole BatchNorm groups ({groups}): set '
            f'model.bn_group to a divisor of {rows}, or gradient_accumulation_steps to fewer'
        )
    return rows


def make_mesh(
    batch_size: int,
    bn_group: int | None = None,
    devices: Sequence[Device] | None = None,
    microbatches: int = 1,
) -> Mesh:
    """Arranges devices for a global batch, or its microbatches, and their BatchNorm groups.

    Args:
        batch_size: of the global batch.
        bn_group: examples in a BatchNorm group; None: the whole batch.
        devices: None: all of them.
        microbatches: into which the batch is cut.

    Raises:
        InputError: the batch does not divide among devices or groups, or groups would straddle devices.
    """
    batch_size = microbatch_size(batch_size, bn_group, microbatches)
    devices = jax.devices() if devices is None else devices
    count, group = len(devices), bn_group or batch_size
    if batch_size % count:
        raise InputError(
            f'batch_size {batch_size} does not divide among {count} devices; the next that does is '
            f'{-(-batch_size // count) * count}'
        )
    if batch_size % group:
        raise InputError(f'batch_size {batch_size} does not divide into BatchNorm groups of {group}')
    rows = batch_size // count
    if rows % group and group % rows:
        raise InputError(
            f'BatchNorm groups of {group} straddle devices with {rows} rows each (batch_size {batch_size} on '
            f'{count} devices): one must divide the other'
        )
    members = max(1, group // rows)
    # A process holds contiguous rows, so its devices must be neighbours.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    matrix = np.asarray(devices).reshape(count // members, members)
    return Mesh(matrix, _AXES, axis_types=(AxisType.Auto,) * 2)


def bind(model: EPSANet, mesh: Mesh) -> EPSANet:
    """Returns the model as one device runs it: BatchNorm reduces over the devices that share a group."""
    return model.clone(bn_axis=_MEMBER if mesh.shape[_MEMBER] > 1 else None)


def shard_step(
    step: Callable[..., Any], mesh: Mesh, replicated_args: int, microbatches: int = 1
) -> Callable[..., Any]:
    """Turns a function of one device's rows into one of global arrays.

    Args:
        step: `step(*replicated, batch)`; its results must be the same on every device.
        mesh: from `make_mesh`.
        replicated_args: number of arguments before the batch.
        microbatches: in which the batch comes, see `by_rows`.
    """
    # check_vma=False: gradients of replicated parameters come out local, and `mean` and `total` are the only
    # reductions there are besides BatchNorm's.
    specs = (PartitionSpec(),) * replicated_args
    return jax.shard_map(
        step, mesh=mesh, in_specs=(*specs, _rows(microbatches)), out_specs=PartitionSpec(), check_vma=False
    )


def mean(tree: Any) -> Any:
    """Averages over all devices, within a sharded step."""
    return lax.pmean(tree, _AXES)


def total(tree: Any) -> Any:
    """Sums over all devices, within a sharded step."""
    return lax.psum(tree, _AXES)


def global_rows(count: int, microbatch: jax.Array | int = 0) -> jax.Array:
    """Returns the places [count] in the global batch of this device's rows, within a sharded step.

    Args:
        count: of its rows in each microbatch.
        microbatch: which of them.
    """
    device, devices = lax.axis_index(_AXES), lax.axis_size(_AXES)
    return (microbatch * devices + device) * count + lax.iota(jnp.int32, count)


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of parameters: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, microbatches: int = 1) -> NamedSharding:
    """The placement of a batch [N, ...], or [microbatches, N / microbatches, ...] if they are several.

    Every device holds contiguous rows of each.
    """
    return NamedSharding(mesh, _rows(microbatches))


def _rows(microbatches: int) -> PartitionSpec:
    return PartitionSpec(None, _AXES) if microbatches > 1 else PartitionSpec(_AXES)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows, those of the first microbatch first."""
    sharding = by_rows(mesh, microbatches)
    if microbatches > 1:
        batch = {k: v.reshape(microbatches, -1, *v.shape[1:]) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def round_up_to_devices(batch_size: int, devices: Iterable[Device] | None = None) -> int:
    """Returns the smallest batch of at least `batch_size` that divides among the devices."""
    count = len(jax.devices() if devices is None else list(devices))
    return -(-batch_size // count) * count
