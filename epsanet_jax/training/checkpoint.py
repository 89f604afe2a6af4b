"""The checkpoints of a run. Nothing but this module and `weights.orbax` knows Orbax.

A checkpoint holds the variables ('model'), their moving averages if the run keeps any ('ema'), the
optimizer's state and step ('optimizer'), and everything that use of the weights needs ('metadata'): model,
class names, preprocessing, configuration, package version.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from epsanet_jax.errors import InputError, Interrupted, TrainingError, one_line
from epsanet_jax.paths import replacing
from epsanet_jax.training import distributed
from epsanet_jax.training.state import TrainState
from epsanet_jax.weights.orbax import FirstErrorOnly
from epsanet_jax.workdir import CHECKPOINTS, DAMAGED_CHECKPOINTS, best_by


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether a workdir holds a complete checkpoint; in a bucket one may be there that is not."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(
        entry.name.isdigit() and ocp.utils.is_checkpoint_finalized(entry) for entry in folder.iterdir()
    )


class Checkpoints:
    """The checkpoints of a run: the latest few, and the one with the best top-1.

    Saving is asynchronous: `save` returns once the arrays are copied from the devices.

    Args:
        workdir: of the run; checkpoints lie in its folder 'checkpoints'.
        keep: how many of the latest to keep.
    """

    def __init__(self, workdir: epath.Path, keep: int = 2):
        policies = checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            # With best_fn alone, max_to_keep would delete the newest checkpoint if it is not among the best.
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(get_metric_fn=best_by, n=1),
                ]
            ),
            best_fn=best_by,
            best_mode='max',
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(workdir / CHECKPOINTS, options=options)
        self._first_error = FirstErrorOnly()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Saves under the state's step, unless that is saved already.

        Args:
            state: to be saved whole.
            metadata: from `weights.metadata.make_metadata`.
            metrics: of an evaluation at this very step.
        """
        step = int(state.step)
        if step == self.latest_step:
            if metrics and not self._manager.metrics(step):
                self._add_metrics(step, metrics)
            return
        items = {
            'model': ocp.args.StandardSave(state.variables),
            'optimizer': ocp.args.StandardSave({'step': state.step, 'state': state.opt_state}),
            'metadata': ocp.args.JsonSave(metadata),
        }
        if state.ema is not None:
            items['ema'] = ocp.args.StandardSave(state.ema)
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or {})

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds those of an evaluation made late, by which the best checkpoint is kept."""
        with self._saving():
            self._manager.wait_until_finished()
            if jax.process_index() == 0:  # the file that Orbax wrote without any
                file = self._manager.directory / str(step) / 'metrics' / 'metrics'
                with replacing(file) as temporary:
                    temporary.write_text(json.dumps(metrics))
        distributed.barrier('the metrics of a checkpoint are added')
        self._manager.reload()

    def check(self) -> None:
        """Raises TrainingError if what was to be written in the background could not be."""
        with self._saving():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            raise TrainingError(
                f'cannot write a checkpoint to {self._manager.directory}: {one_line(e)}; make room or give '
                'permission: the same command continues at the last complete one'
            ) from e

    def restore(self, abstract: TrainState, say: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]]:
        """Returns the newest state that is whole, placed as `abstract` says, and its metadata.

        Newer ones that are damaged are set aside, into the folder 'checkpoints-damaged'.

        Args:
            abstract: ShapeDtypeStructs with shardings.
            say: told of damaged ones.

        Raises:
            InputError: all are damaged; nothing was moved.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            saved, reason = None, 'another process could not read it'
            try:
                saved = self._restore(step, abstract)
            except Exception as e:  # damaged files make Orbax raise anything
                reason = one_line(e)
            if not distributed.all_agree(saved is not None):
                saved = None
            if saved is None:
                damaged[step] = reason
                continue
            for number, reason in damaged.items():
                say(f'checkpoint {number} is damaged and set aside: {reason}')
            self._set_aside(list(damaged))
            state = TrainState(
                step=saved['optimizer']['step'],
                params=saved['model']['params'],
                batch_stats=saved['model']['batch_stats'],
                opt_state=saved['optimizer']['state'],
                ema=saved.get('ema'),
            )
            return state, saved['metadata']
        newest = max(damaged)
        raise InputError(
            f'no checkpoint in {self._manager.directory} is whole; the newest, {newest}: {damaged[newest]}'
        )

    def _restore(self, step: int, abstract: TrainState) -> Any:
        optimizer = {'step': abstract.step, 'state': abstract.opt_state}
        items = {
            'model': ocp.args.StandardRestore(abstract.variables),
            'optimizer': ocp.args.StandardRestore(optimizer),
            'metadata': ocp.args.JsonRestore(),
        }
        if abstract.ema is not None:
            items['ema'] = ocp.args.StandardRestore(abstract.ema)
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _set_aside(self, numbers: list[int]) -> None:
        if not numbers:
            return
        if jax.process_index() == 0:
            self._move(numbers)
        distributed.barrier('damaged checkpoints are set aside')
        self._manager.reload()

    def _move(self, numbers: list[int]) -> None:
        folder = self._manager.directory.parent / DAMAGED_CHECKPOINTS
        folder.mkdir(exist_ok=True)
        for number in numbers:
            names = itertools.chain([str(number)], (f'{number}-{i}' for i in itertools.count(2)))
            free = next(folder / name for name in names if not (folder / name).exists())
            (self._manager.directory / str(number)).rename(free)

    def __enter__(self) -> Self:
        self._first_error.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Waits until everything is written."""
        if error is not None and not isinstance(error, Interrupted) and jax.process_count() > 1:
            return  # Orbax would wait for the other processes, which may be gone
        failure = None
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as e:
            failure = e
        finally:
            self._manager.close()
        self._first_error.__exit__(kind, error or failure, where)
        if failure is not None and error is None:  # else it is told already, or not what went wrong first
            with self._saving():
                raise failure
