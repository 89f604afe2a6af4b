"""Checks and builds what a run needs, before it compiles or writes anything."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from epsanet_jax.convert.files import is_weights_file
from epsanet_jax.data.sources import Source
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet, abstract_variables
from epsanet_jax.models.zoo import build_model
from epsanet_jax.paths import is_remote, replacing, resolve
from epsanet_jax.platform import check_platform
from epsanet_jax.training import datasets, distributed, sharding
from epsanet_jax.training.checkpoint import has_checkpoint
from epsanet_jax.training.config import Config, flatten, identity, with_frozen_bn
from epsanet_jax.training.init_from import InitialState, Start, make_initial_state, read_start
from epsanet_jax.training.optimizer import frozen_mask, make_optimizer, make_schedule
from epsanet_jax.training.report import log
from epsanet_jax.training.tracing import run_mesh
from epsanet_jax.training.tracker import check_installed
from epsanet_jax.training.validation import validate
from epsanet_jax.weights import Network, load
from epsanet_jax.weights.metadata import make_metadata, name_outputs
from epsanet_jax.workdir import CONFIG_FILE


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything about a run that is fixed before its first step.

    Attributes:
        config: the configuration.
        workdir: folder of the run.
        train_source: training images.
        eval_source: images for evaluation.
        remarks: what was assumed or skipped in the data, a line each.
        model: the network.
        mesh: the devices.
        schedule: maps the step to the learning rate.
        optimizer: the optimizer with that schedule.
        metadata: metadata of the checkpoints, with the fields that identify the run.
        initial: weights to start from; None: random ones, or a checkpoint of the run itself.
        start: where the training that this run continues has stopped; None: it continues none.
        steps_per_epoch: possibly a fraction.
        total_steps: length of the run.
        eval_every: steps between evaluations.
        eval_batch_size: a multiple of the number of devices.
    """

    config: Config
    workdir: epath.Path
    train_source: Source
    eval_source: Source
    remarks: list[str]
    model: EPSANet
    mesh: Mesh
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    metadata: dict[str, Any]
    initial: InitialState | None
    start: Start | None
    steps_per_epoch: float
    total_steps: int
    eval_every: int
    eval_batch_size: int

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of the update after `step` updates."""
        return np.asarray(self.schedule(step)).item()

    def metadata_at(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a checkpoint after `step` updates."""
        lr = self.learning_rate(max(0, step - 1))
        return {**self.metadata, 'epoch': step / self.steps_per_epoch, 'lr': lr}

    def write_config(self) -> None:
        """Writes config.json into the workdir, unless the same file exists already."""
        if jax.process_index() != 0:
            return
        _check_identity(self.workdir, self.metadata['identity'])  # again, now that no other process trains
        content = {k: self.metadata[k] for k in ('identity', 'config')}
        content['start'] = None if self.start is None else dataclasses.asdict(self.start)
        content['validation'] = self.eval_source.fingerprint
        text, path = json.dumps(content, indent=2) + '\n', self.workdir / CONFIG_FILE
        try:
            before = path.read_text() if path.exists() else ''
            if before != text:
                if has_checkpoint(self.workdir):
                    _warn_of_other_validation(json.loads(before).get('validation'), content['validation'])
                with replacing(path) as temporary:
                    temporary.write_text(text)
        except OSError as e:
            raise InputError(f'cannot write to --workdir={self.workdir}: {e}') from e


def _warn_of_other_validation(before: str | None, now: str) -> None:
    if before not in (None, now):  # None: written by an older version
        log(
            'warning: the validation images have changed since this run was started; its earlier accuracies, '
            'and the best checkpoint, are not comparable with those that follow'
        )


# Fields that may differ between the processes of a run.
_OF_A_HOST = ('data.dir', 'data.workers', 'data.threads', 'data.on_bad', 'data.max_bad_images')


def prepare(config: Config, workdir: str, init_from: Network | None = None) -> Run:
    """Checks a configuration against the data, the devices and the workdir, and builds the run.

    The arguments are those of `loop.train`.

    Raises:
        InputError: one of them is invalid; nothing has been compiled or written.
    """
    validate(config)
    check_installed(config.tracker)
    check_platform()
    folder = _folder(workdir)
    train_source, eval_source, remarks = datasets.open_splits(config.data)
    model = _model(config, len(train_source.class_names))
    mesh = run_mesh(config, model.bn_group)
    fields = identity(config, train_source.fingerprint, model.num_classes)
    shared = {k: v for k, v in flatten(config).items() if k not in _OF_A_HOST}
    data = [fields, shared, eval_source.fingerprint, len(eval_source)]
    distributed.check_agreement({'configuration or data': data, 'workdir': str(folder)})
    _check_identity(folder, fields)
    distributed.check_shared(folder)

    steps_per_epoch = len(train_source) / config.batch_size
    total = config.steps or max(1, round(config.epochs * steps_per_epoch))
    _check_profile(config, folder, total)
    network, start = _read_network(config, folder, init_from)
    start_step = None if start is None else start.step(steps_per_epoch)
    if start_step is not None and start_step >= total:
        end = f'the run ends at step {total}: increase epochs'
        raise InputError(f'{config.init_from} is at step {start_step}, but {end}')
    initial = None
    if network is not None:
        key, momentum = jax.random.key(config.seed), config.optimizer.momentum > 0
        names = name_outputs(train_source.class_names, model.num_classes)
        initial = make_initial_state(network, model, names, key, start_step, momentum, config.init_partial)
    if start is None or start_step is None:
        peak = config.optimizer.lr * (config.batch_size / (config.optimizer.lr_batch or config.batch_size))
    else:  # the peak with which the schedule continues at the last learning rate of the training before
        factor = make_schedule(config.schedule, 1.0, total, steps_per_epoch)(max(0, start_step - 1))
        peak = start.last_lr / np.asarray(factor).item()
    schedule = make_schedule(config.schedule, peak, total, steps_per_epoch)
    every = max(1, round(config.eval_every_epochs * steps_per_epoch)) if config.eval_every_epochs else total
    metadata = make_metadata(
        dataclasses.replace(config.model, num_classes=model.num_classes),
        train_source.class_names,
        config.data.preprocessing,
        dataclasses.asdict(config),
        fields,
    )
    return Run(
        config=config,
        workdir=folder,
        train_source=train_source,
        eval_source=eval_source,
        remarks=remarks,
        model=model,
        mesh=mesh,
        schedule=schedule,
        optimizer=make_optimizer(config.optimizer, schedule, config.freeze),
        metadata=metadata,
        initial=initial,
        start=start,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        eval_every=every,
        eval_batch_size=sharding.round_up_to_devices(config.eval_batch_size or config.batch_size),
    )


def _folder(workdir: str) -> epath.Path:
    folder = resolve(workdir)
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f'--workdir={workdir} is a file, not a folder')
    except (ImportError, OSError) as e:  # the library for buckets is not installed, or there is no bucket
        raise InputError(f'cannot reach --workdir={workdir}: {one_line(e)}') from e
    return folder


def _model(config: Config, classes: int) -> EPSANet:
    most = config.model.num_classes
    if most and most < classes:
        raise InputError(f'the data has {classes} classes, more than config.model.num_classes={most}')
    model = build_model(with_frozen_bn(config), classes)
    _check_last_stage(config, model)
    if config.freeze or config.model.frozen_bn:
        params = abstract_variables(model)['params']
        if config.freeze:
            frozen_mask(params, config.freeze)
        scales = (name for name in traverse_util.flatten_dict(params, sep='/') if name.endswith('scale'))
        pattern = config.model.frozen_bn
        if pattern and not any(re.search(pattern, name) for name in scales):
            raise InputError(
                f'config.model.frozen_bn={pattern!r} matches no scale of a BatchNorm; a name is for example '
                '"layer1_0/bn1/scale"'
            )
    return model


def _read_network(
    config: Config, workdir: epath.Path, given: Network | None
) -> tuple[Network | None, Start | None]:
    """Returns the network to start from and, for `init_optimizer`, epoch and learning rate."""
    if given is None and not config.init_from:
        return None, None
    if has_checkpoint(workdir):  # the run does not need the file again
        start = json.loads((workdir / CONFIG_FILE).read_text()).get('start')
        return None, None if start is None else Start(**start)
    if given is None:
        # Momentum belongs to the weights, not to their averages. Most files hold one set of weights.
        ema = not config.init_optimizer or is_weights_file(config.init_from)
        given = load(config.init_from, ema=ema, with_checkpoint=True)
        if config.init_optimizer and ema and given.source.no_optimizer:
            given = load(config.init_from, ema=False, with_checkpoint=True)
    return given, read_start(given, config.optimizer) if config.init_optimizer else None


def _check_last_stage(config: Config, model: EPSANet) -> None:
    """Raises InputError if BatchNorm gets only one value per channel in the last stage."""
    stages = len(model.layers)
    scales = [f'layer{stages}_{i}/bn{k}/scale' for i in range(model.layers[-1]) for k in (1, 2, 3)]
    if model.frozen_bn and all(re.search(model.frozen_bn, name) for name in scales):
        return
    group, side = model.bn_group or config.batch_size, config.data.image_size
    stride = 2 ** (stages + 1)
    if model.output_stride < 32:
        stride = min(stride, model.output_stride)
    if group * math.ceil(side / stride) ** 2 < 2:
        raise InputError(
            f'BatchNorm over {group} image of {side} px has one value per channel in the last stage: '
            'increase config.model.bn_group, config.batch_size or config.data.image_size'
        )


def _check_profile(config: Config, workdir: epath.Path, total: int) -> None:
    if not config.profile.steps:
        return
    end = config.profile.start + config.profile.steps
    if end > total:
        raise InputError(f'config.profile ends at step {end}, after the end of the run at step {total}')
    if is_remote(workdir):
        raise InputError(f'config.profile needs a --workdir on a local disk, got {workdir}')


def _check_identity(workdir: epath.Path, fields: dict[str, Any]) -> None:
    """Raises InputError if the workdir holds another run."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        if has_checkpoint(workdir):
            raise InputError(f'{workdir} holds checkpoints but no {CONFIG_FILE}; choose another --workdir')
        return
    try:
        # In a run of an older version, fields that are new have their default values.
        old = {**flatten(Config()), **json.loads(path.read_text())['identity']}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f'{path} is not the {CONFIG_FILE} of a run; choose another --workdir') from e
    if not has_checkpoint(workdir):
        return  # a run without a checkpoint has nothing to protect
    pairs = {k: (old.get(k), fields[k]) for k in sorted(fields)}
    differing = '; '.join(f'{k}: {a!r} -> {b!r}' for k, (a, b) in pairs.items() if a != b)
    if differing:
        raise InputError(f'{workdir} holds another run; choose another --workdir or undo {differing}')
