"""Data parallelism: the mesh, and the place of each row of a global batch. Only here mesh axes are named.

The devices form a matrix, processes in order. A BatchNorm group (`bn_group` consecutive rows of the global
batch) is on one device, or spread over one row of the matrix:

    axis 'group':  each entry holds one or several whole BatchNorm groups
    axis 'member': the devices that share a BatchNorm group; one device if groups fit on a device
"""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from epsanet_jax.errors import InputError, some
from epsanet_jax.models.epsanet import EPSANet

Device = Any  # jax.Device, which type checkers consider a variable
_GROUP, _MEMBER = 'group', 'member'
_AXES = (_GROUP, _MEMBER)


def microbatch_size(batch_size: int, bn_group: int | None, microbatches: int) -> int:
    """Returns the number of rows in each microbatch of a global batch.

    Raises:
        InputError: the batch does not divide into microbatches with whole BatchNorm groups.
    """
    if batch_size % microbatches:
        raise InputError(f'batch_size {batch_size} does not divide into {microbatches} microbatches')
    rows = batch_size // microbatches
    if microbatches > 1 and (bn_group is None or rows % bn_group):
        groups = 'over the whole batch' if bn_group is None else f'groups of {bn_group}'
        raise InputError(
            f'{microbatches} microbatches of {rows} rows do not hold whole BatchNorm groups ({groups}): set '
            f'model.bn_group to a divisor of {rows}, or lower gradient_accumulation_steps'
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
        batch_size: size of the global batch.
        bn_group: number of examples in a BatchNorm group; None: the whole batch.
        devices: the devices to use; None: all.
        microbatches: number of microbatches.

    Raises:
        InputError: batch, microbatches, BatchNorm groups and devices do not divide evenly.
    """
    batch_size = microbatch_size(batch_size, bn_group, microbatches)
    devices = jax.devices() if devices is None else devices
    count, group = len(devices), bn_group or batch_size
    _check_equal_counts(devices)
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
            f'BatchNorm groups of {group} do not fit devices with {rows} rows each (batch_size {batch_size} '
            f'on {count} devices): one must divide the other'
        )
    members = max(1, group // rows)
    # A process holds contiguous rows, so its devices must be neighbours.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    matrix = np.asarray(devices).reshape(count // members, members)
    return Mesh(matrix, _AXES, axis_types=(AxisType.Auto,) * 2)


def _check_equal_counts(devices: Sequence[Device]) -> None:
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        listed = some([f'process {process}: {n}' for process, n in sorted(counts.items())])
        raise InputError(f'every process needs the same number of devices, got {listed}')


def bind(model: EPSANet, mesh: Mesh) -> EPSANet:
    """Returns the model for one device: its BatchNorm reduces over the devices that share a group."""
    return model.clone(bn_axis=_MEMBER if mesh.shape[_MEMBER] > 1 else None)


def shard_step(
    step: Callable[..., Any], mesh: Mesh, replicated_args: int, microbatches: int = 1
) -> Callable[..., Any]:
    """Turns `step(*replicated, batch)`, a function of one device's rows, into one of global arrays.

    Its results must be the same on every device. `replicated_args` is the number of arguments before the
    batch, which is placed `by_rows`.
    """
    # check_vma=False: gradients of replicated parameters stay local, and `mean` and `total` are the only
    # reductions besides BatchNorm's.
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


def all_rows(tree: Any) -> Any:
    """Joins the rows of all devices, within a sharded step."""
    return lax.all_gather(tree, _AXES, tiled=True)


def global_rows(count: int, microbatch: jax.Array | int = 0) -> jax.Array:
    """Returns the indices [count] in the global batch of this device's rows in a microbatch.

    To be called within a sharded step.
    """
    device, devices = lax.axis_index(_AXES), lax.axis_size(_AXES)
    return (microbatch * devices + device) * count + lax.iota(jnp.int32, count)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of parameters: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, microbatches: int = 1) -> NamedSharding:
    """Returns the sharding of a batch: every device holds contiguous rows.

    The batch is [N, ...], or [microbatches, N / microbatches, ...] if there are several microbatches.
    """
    return NamedSharding(mesh, _rows(microbatches))


def _rows(microbatches: int) -> PartitionSpec:
    return PartitionSpec(None, _AXES) if microbatches > 1 else PartitionSpec(_AXES)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """Returns global arrays made from this process's rows, in the order of the microbatches."""
    sharding = by_rows(mesh, microbatches)
    if microbatches > 1:
        batch = {k: v.reshape(microbatches, -1, *v.shape[1:]) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def round_up_to_devices(batch_size: int, devices: Iterable[Device] | None = None) -> int:
    """Returns the smallest multiple of the number of devices that is at least `batch_size`."""
    count = len(jax.devices() if devices is None else list(devices))
    return -(-batch_size // count) * count
