"""Imports go one way through the package, and nothing but the commands knows argparse."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'epsanet_jax'
# A package imports itself and what comes before it.
ORDER = ('base', 'ops', 'models', 'layers', 'data', 'convert', 'weights', 'analysis', 'training', 'commands')
BASE = ('console', 'errors', 'paths', 'platform', 'version', 'workdir')
MODULES = {
    '.'.join(('epsanet_jax', *path.relative_to(PACKAGE).with_suffix('').parts)).removesuffix(
        '.__init__'
    ): path
    for path in sorted(PACKAGE.rglob('*.py'))
}


def imported_by(name):
    """The modules of this package that a module imports anywhere, also in functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= {n if n in MODULES else node.module for n in names}
    return {n for n in found if n in MODULES} - {name}


def package_of(name):
    part = name.split('.')[1]
    return 'base' if part in BASE else part


@pytest.mark.parametrize('name', [n for n in MODULES if n not in ('epsanet_jax', 'epsanet_jax.__main__')])
def test_imports_go_one_way(name):
    own = ORDER.index(package_of(name))
    upward = {n for n in imported_by(name) if n == 'epsanet_jax' or ORDER.index(package_of(n)) > own}
    assert upward == set()


def test_no_cycle():
    done, path = set(), []

    def visit(name):
        assert name not in path, ' -> '.join([*path, name])
        if name in done:
            return
        path.append(name)
        for other in sorted(imported_by(name)):
            visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)
    assert done == set(MODULES)


def test_argparse_is_known_to_the_commands_alone():
    users = {name for name, path in MODULES.items() if 'import argparse' in path.read_text()}
    assert {package_of(name) for name in users} == {'commands'}


def test_two_modules_know_orbax():
    users = {name for name, path in MODULES.items() if 'orbax.checkpoint' in path.read_text()}
    assert users == {'epsanet_jax.training.checkpoint', 'epsanet_jax.weights.orbax'}


def test_models_need_jax_and_flax_alone():
    code = (
        'import sys, epsanet_jax; epsanet_jax.create_model("epsanet50_small"); '
        'heavy = {"tensorflow", "torch", "grain", "tensorflow_datasets", "ml_collections", "PIL", "optax"}; '
        'print(sorted(heavy & set(sys.modules)))'
    )
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == '[]'


def test_tensorflow_is_not_installed():
    import importlib.util

    assert importlib.util.find_spec('tensorflow') is None


GLOBAL_STATE = """
import importlib, locale, logging, os, pkgutil, signal, sys, warnings
import absl.logging, flax.linen, flax.nnx, jax, numpy, optax, orbax.checkpoint, torch
import PIL.Image, PIL.ImageFile

def state():
    return {
        'warning filters': list(warnings.filters),
        'signal handlers': [signal.getsignal(s) for s in signal.valid_signals()],
        'environment': dict(os.environ),
        'limits of Pillow': (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
        'locale': locale.setlocale(locale.LC_ALL),
        'folder': os.getcwd(),
        'hooks': (sys.excepthook, sys.stdout, sys.stderr),
        'log level': logging.getLogger().level,
        'jax': dict(jax.config.values),
    }

import epsanet_jax
before = state()
names = [m.name for m in pkgutil.walk_packages(epsanet_jax.__path__, 'epsanet_jax.')]
names = [name for name in names if '__main__' not in name]
for name in names:
    importlib.import_module(name)
after = state()
changed = [key for key in before if before[key] != after[key]]
print(len(names), changed)
"""


def test_importing_a_module_changes_no_global_state():
    done = subprocess.run([sys.executable, '-c', GLOBAL_STATE], capture_output=True, text=True, check=True)
    number, changed = done.stdout.split(' ', 1)
    assert int(number) > 80
    assert changed.strip() == '[]'
