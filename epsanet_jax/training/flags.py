"""The command line of train.py: --config=FILE[:ARGUMENT], --config.FIELD=VALUE, --workdir=DIR."""

import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from epsanet_jax.errors import INTERRUPTED, InputError, Interrupted, TrainingError, one_line, suggest
from epsanet_jax.training import distributed
from epsanet_jax.training.config import Config, flatten

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: made, or continued if it holds one.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, for several processes.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes share the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
_JOIN_TIMEOUT = flags.DEFINE_integer('join_timeout', distributed.TIMEOUT, 'Seconds to wait for the others.')
_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe, for example configs/digits.py.')


def run(main: Callable[[Config, str], None]) -> None:
    """Parses the command line and calls `main(config, workdir)`.

    Bad input ends the process with one line on stderr and exit status 2, a failed training with status 1, a
    run that was asked to stop with status 75.
    """

    def guarded(argv: list[str]) -> None:
        del argv
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # the libraries' INFO lines would drown the run's own
        try:
            values = _values()
            distributed.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _JOIN_TIMEOUT.value)
            main(*values)
        except InputError as e:
            _exit(e, 2)
        except TrainingError as e:
            _exit(e, 1)
        except Interrupted as e:
            print(e, file=sys.stderr)
            sys.exit(INTERRUPTED)  # in order: the others save too, and are waited for
        except jax.errors.JaxRuntimeError as e:
            if not jax.distributed.is_initialized():
                raise
            _exit(
                f'another process of this run failed or was lost ({one_line(e, 200)}); start all of them '
                'again to continue at the last checkpoint',
                1,
            )
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            distributed.leave('error: this process failed, see above', 1)

    app.run(guarded, flags_parser=_parse)


def read_config(arguments: Sequence[str]) -> Config:
    """Returns the configuration that --config=FILE[:ARGUMENT] and --config.FIELD=VALUE make.

    Raises:
        InputError: the file, a field or a value will not do.
    """
    argv = ['epsanet', *arguments]
    config = _load_recipe(argv)
    if config is None:
        raise InputError('no --config=FILE is given, for example --config=configs/digits.py')
    if not isinstance(config, Config):
        return config  # which `validate` refuses
    _check_fields(argv, config)
    values, fields = flags.FlagValues(), [a for a in argv if not re.match('--?config=', a)]
    holder = config_flags.DEFINE_config_dataclass('config', config, flag_values=values, sys_argv=fields)
    _parse_with(values, fields)
    return holder.value


def _parse(argv: list[str]) -> list[str]:
    try:
        _check_fields(argv, _load_recipe(argv))
        return _parse_with(flags.FLAGS, argv)
    except InputError as e:
        _exit(e, 2)


def _parse_with(values: flags.FlagValues, argv: list[str]) -> list[str]:
    try:
        rest = values(argv)
        if len(rest) > 1:
            raise InputError(f'unexpected argument {rest[1]!r}; options are written --config.FIELD=VALUE')
        return rest
    except InputError:
        raise
    # config_flags raises flags.Error for values, and what it happens to meet for fields.
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, IndexError, OSError) as e:
        raise InputError(str(e).strip('"\'') or type(e).__name__) from e


def _values() -> tuple[Config, str]:
    if not _CONFIG.present:
        raise InputError('no --config=FILE is given, for example --config=configs/digits.py')
    if not _WORKDIR.value:
        raise InputError('no --workdir=DIR is given')
    return _CONFIG.value, _WORKDIR.value


def _load_recipe(argv: list[str]) -> Any:
    """Runs the recipe once before config_flags does, which would hide what is wrong with it."""
    path, _, argument = (_file(argv) or '').partition(':')
    if not path:
        return None
    try:
        get_config = runpy.run_path(path).get('get_config')
        if get_config is None:
            raise InputError(f'--config={path} defines no get_config()')
        return get_config(argument) if argument else get_config()
    except InputError:
        raise
    except OSError as e:
        raise InputError(f'cannot read --config={path}: {e.strerror or e}') from e
    except Exception as e:  # whatever a recipe, somebody's own code, may raise
        own = [frame for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = own[-1].lineno if own else getattr(e, 'lineno', '?')
        raise InputError(f'the recipe {path}, line {line}: {type(e).__name__}: {e}') from e


def _check_fields(argv: list[str], default: Any) -> None:
    """Raises InputError for an override of a field that there is not; config_flags raises a bare KeyError."""
    if not isinstance(default, Config):
        return
    known = tuple(flatten(default))
    sections = {name.split('.')[0] for name in known if '.' in name}
    for argument in argv[1:]:
        match = re.match(r'--?config\.([^=]+)', argument)
        if match and match.group(1) not in known and match.group(1) not in sections:
            raise InputError(f'unknown field config.{match.group(1)}{suggest(match.group(1), known)}')


def _file(argv: list[str]) -> str | None:
    for i, argument in enumerate(argv):
        if re.fullmatch(r'--?config', argument):
            return argv[i + 1] if i + 1 < len(argv) else None
        match = re.match(r'--?config=(.*)', argument)
        if match:
            return match.group(1)
    return None


def _exit(error: Exception | str, status: int) -> NoReturn:
    distributed.leave(f'error: {one_line(error, limit=None)}', status)
