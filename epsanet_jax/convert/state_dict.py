"""Converts between the reference's state dict and the variables of a model, by one table of names.

layer1.0.conv2.conv_3.weight   [O, I, k, k]  <->  params/layer1_0/conv2/conv_3/kernel   [k, k, I, O]
layer1.0.bn1.weight            [C]           <->  params/layer1_0/bn1/scale             [C]
layer1.0.bn1.running_var       [C]           <->  batch_stats/layer1_0/bn1/var          [C]
layer1.0.downsample.1.bias     [C]           <->  params/layer1_0/downsample_1/bias     [C]
fc.weight                      [K, C]        <->  params/fc/kernel                      [C, K]
"""

import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from epsanet_jax.convert.contents import strip_prefix
from epsanet_jax.convert.infer import differences, infer_settings
from epsanet_jax.errors import InputError, one_line, some
from epsanet_jax.models.epsanet import EPSANet, abstract_images, abstract_variables

Path = tuple[str, ...]
Table = dict[str, tuple[Path, jax.ShapeDtypeStruct]]
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
_COUNTER = 'num_batches_tracked'


def name_table(model: EPSANet) -> Table:
    """Returns name of the state dict -> path, shape and type of the leaf in the variables.

    The names are in the order in which PyTorch registers parameters, and numbers them in optimizers.
    """
    flat = {_torch_name(path): (path, leaf) for path, leaf in flatten(abstract_variables(model)).items()}
    return {name: flat[name] for name in sorted(flat, key=_rank)}


def from_torch(
    state_dict: Mapping[str, Any], model: EPSANet, *, new_head: jax.Array | None = None
) -> dict[str, Any]:
    """Returns the variables for `model.apply`, {'params', 'batch_stats'}, from a PyTorch state dict.

    The prefix of a wrapper is removed. `num_batches_tracked` is not needed.

    Args:
        state_dict: name -> tensor or array of any floating-point type, for every name of the model.
        model: the network. The variables get the types that `model.init` gives.
        new_head: a random key to ignore the classifier in the state dict and draw a new one.

    Raises:
        InputError: names are missing or unexpected, shapes differ, or values are not finite. The message
            names some problems of each kind and, if known, the model that the state dict fits.
    """
    table = name_table(model)
    given = dict(strip_prefix(state_dict))
    if new_head is not None:
        given = {k: v for k, v in given.items() if not k.startswith('fc.')}
        given |= draw_classifier(model, new_head)
    counters = {name.removesuffix('running_var') + _COUNTER for name in table if name.endswith('running_var')}
    missing = [f'missing {name}' for name in table if name not in given]
    unexpected = [name for name in given if name not in table and name not in counters]
    flat, wrong = read_tensors(given, table)
    if missing or unexpected or wrong:
        raise InputError(_describe(missing, unexpected, wrong, given, model))
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any], model: EPSANet) -> dict[str, np.ndarray]:
    """Returns a state dict that PyTorch loads with `strict=True`. `num_batches_tracked` is zero.

    Raises:
        InputError: the variables do not fit the model.
    """
    table = name_table(model)
    flat = flatten(jax.tree.map(np.asarray, dict(variables)))
    expected = {path: leaf.shape for path, leaf in table.values()}
    shapes = {path: array.shape for path, array in flat.items()}
    if shapes != expected:
        differing = sorted('/'.join(p) for p in {*flat, *expected} if shapes.get(p) != expected.get(p))
        raise InputError(f'the variables do not fit the model: {", ".join(differing)}')
    state_dict = {}
    for name, (path, _) in table.items():
        state_dict[name] = to_torch_layout(flat[path])
        if name.endswith('running_var'):
            state_dict[name.removesuffix('running_var') + _COUNTER] = np.zeros((), np.int64)
    return state_dict


def _rank(name: str) -> list[tuple[int, int | str]]:
    """Returns the sort key of a name, by the order in which the reference defines its modules."""
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    modules = ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3')

    def rank(part: str) -> tuple[int, int | str]:
        if part.isdigit():
            return 0, int(part)
        if part in leaves:
            return 1, leaves.index(part)
        if part in modules:
            return 2, modules.index(part)
        return (4 if part in ('downsample', 'fc') else 3), part

    return [rank(part) for part in name.split('.')]


def as_numpy(value: Any) -> np.ndarray:
    """Returns a tensor or array as a numpy array; bfloat16 tensors become float32."""
    if hasattr(value, 'detach'):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == 'torch.bfloat16' else value).numpy()
    return np.asarray(value)


def to_jax_layout(array: np.ndarray) -> np.ndarray:
    """Transposes [O, I, k, k] to [k, k, I, O] and [K, C] to [C, K]."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """Transposes [k, k, I, O] to [O, I, k, k] and [C, K] to [K, C]; a copy that PyTorch may modify."""
    return np.array(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T, order='C')


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a leaf's tensor in PyTorch."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def flatten(variables: Mapping[str, Any]) -> dict[Path, Any]:
    """Returns the leaves of a tree by their paths."""
    return cast(dict[Path, Any], traverse_util.flatten_dict(dict(variables)))


def _torch_name(path: Path) -> str:
    _, *modules, leaf = path
    # 'layer1_0' and 'downsample_0' are items of a list in PyTorch, but 'conv_1' is an attribute.
    parts = [m.replace('_', '.') if m.startswith(('layer', 'downsample')) else m for m in modules]
    return '.'.join([*parts, _LEAVES.get(leaf, leaf)])


def read_tensors(tensors: Mapping[str, Any], table: Table) -> tuple[dict[Path, jax.Array], list[str]]:
    """Returns path -> array for the tensors that are in a table, and what is wrong with the others."""
    flat, problems = {}, []
    for name, (path, leaf) in table.items():
        if name in tensors:
            try:
                flat[path] = jnp.asarray(to_jax_layout(_read_values(name, tensors[name], leaf)))
            except InputError as e:
                problems.append(f'{e} in {name}')
    return flat, problems


def _read_values(name: str, value: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns a copy of the values with the type of a leaf, or raises InputError."""
    try:
        array = as_numpy(value)
    except Exception as e:  # sparse, quantized, float8 and meta tensors raise different errors
        kind = getattr(value, 'dtype', type(value).__name__)
        raise InputError(f'values of a type that cannot be read ({kind})') from e
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f'values of type {array.dtype}')
    if array.shape != torch_shape(leaf.shape):
        raise InputError(f'shape {array.shape} instead of {torch_shape(leaf.shape)}')
    with np.errstate(over='ignore'):
        array = array.astype(leaf.dtype)
    if not np.isfinite(array).all():
        raise InputError(f'values that are not finite as {leaf.dtype}')
    if name.endswith('running_var') and (array < 0).any():
        raise InputError('negative values')
    return array


def draw_classifier(model: EPSANet, key: jax.Array) -> dict[str, np.ndarray]:
    """Draws 'fc.weight' [K, C] and 'fc.bias' [K] as `model.init` does."""
    images = jnp.zeros(abstract_images(model).shape, model.dtype)
    fc = jax.jit(lambda k: model.init(k, images)['params']['fc'])(key)
    return {'fc.weight': to_torch_layout(np.asarray(fc['kernel'])), 'fc.bias': np.asarray(fc['bias'])}


def _describe(
    missing: list[str], unexpected: list[str], wrong: list[str], given: Mapping[str, Any], model: EPSANet
) -> str:
    """Returns a message of at most about 400 characters."""
    kinds = (missing, [f'unexpected {name}' for name in unexpected], wrong)
    shown = '; '.join(some([one_line(p, 90) for p in kind], 2) for kind in kinds if kind)
    message = (
        f'the state dict does not fit the model in {sum(map(len, kinds))} places: {one_line(shown, 290)}'
    )
    try:
        different = differences(infer_settings(given), model)
    except InputError:
        different = ''
    if different:
        return one_line(f'{message}; its shapes are those of {different}', 420)
    if missing or wrong:
        return message
    last = sorted({re.escape(name.rpartition('.')[2]) for name in unexpected})
    pattern = f'({"|".join(last)})$'
    needed = given.keys() - set(unexpected)
    if len(pattern) > 60 or any(re.search(pattern, name) for name in needed):
        pattern = 'REGEX'
    return f"{message}; to leave entries out: epsanet convert SRC DST --ignore '{pattern}'"
