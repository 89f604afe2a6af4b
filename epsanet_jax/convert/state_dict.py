"""One table of names, read both ways: the reference's state dict <-> the variables of a model.

layer1.0.conv2.conv_3.weight   [O, I, k, k]  <->  params/layer1_0/conv2/conv_3/kernel   [k, k, I, O]
layer1.0.bn1.weight            [C]           <->  params/layer1_0/bn1/scale             [C]
layer1.0.bn1.running_var       [C]           <->  batch_stats/layer1_0/bn1/var          [C]
layer1.0.downsample.1.bias     [C]           <->  params/layer1_0/downsample_1/bias     [C]
fc.weight                      [K, C]        <->  params/fc/kernel                      [C, K]
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from epsanet_jax.convert.infer import differences, infer_settings
from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet, abstract_images, abstract_variables

Path = tuple[str, ...]
_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
_COUNTER = 'num_batches_tracked'
_PREFIXES = ('module.', '_orig_mod.')  # DataParallel's, torch.compile's
_HEAD = ('fc.weight', 'fc.bias')


def name_table(model: EPSANet) -> dict[str, tuple[Path, jax.ShapeDtypeStruct]]:
    """Returns, for each name of the state dict, the path and shape of its leaf among the variables."""
    flat = _flatten(abstract_variables(model))
    return {_torch_name(path): (path, leaf) for path, leaf in flat.items()}


def from_torch(
    state_dict: Mapping[str, Any], model: EPSANet, *, new_head: jax.Array | None = None
) -> dict[str, Any]:
    """Turns a PyTorch state dict into variables for `model.apply`.

    Prefixes of DataParallel and torch.compile are taken off; `num_batches_tracked` is not needed.

    Args:
        state_dict: name -> tensor or array of any floating-point type; all of the model's names, each once.
        model: whose variables they become, of the types that `model.init` gives.
        new_head: a random key, to leave out the state dict's classifier and draw a new one.

    Returns:
        {'params': ..., 'batch_stats': ...}.

    Raises:
        InputError: names are missing or unexpected, shapes differ, or values are not finite numbers; the one
            message lists all of them and, where it can, what the state dict would fit.
    """
    table = name_table(model)
    given = dict(strip_prefix(state_dict))
    if new_head is not None:
        given = {k: v for k, v in given.items() if k not in _HEAD} | _draw_head(model, new_head)
    counters = {name.removesuffix('running_var') + _COUNTER for name in table if name.endswith('running_var')}
    problems = [f'missing {name}' for name in table if name not in given]
    problems += [f'unexpected {name}' for name in given if name not in table and name not in counters]
    flat = {}
    for name, (path, leaf) in table.items():
        if name in given:
            shape, expected = tuple(getattr(given[name], 'shape', ())), _torch_shape(leaf.shape)
            array, problem = read_values(name, given[name], leaf.dtype)
            if shape != expected:
                problems.append(f'shape {shape} instead of {expected} of {name}')
            elif array is None or problem:
                problems.append(f'{problem} in {name}')
            else:
                # A copy: on the CPU asarray may share the memory of the tensor, which its owner may change.
                flat[path] = jnp.array(to_jax_layout(array), copy=True)
    if problems:
        raise InputError(_describe(problems, given, model))
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any], model: EPSANet) -> dict[str, np.ndarray]:
    """Turns variables into a state dict that loads with `strict=True`; the batch counters are zeros.

    Raises:
        InputError: the variables are not those of the model.
    """
    table = name_table(model)
    flat = _flatten(jax.tree.map(np.asarray, dict(variables)))
    paths = {path: leaf.shape for path, leaf in table.values()}
    shapes = {path: array.shape for path, array in flat.items()}
    if shapes != paths:
        differing = sorted('/'.join(p) for p in {*flat, *paths} if shapes.get(p) != paths.get(p))
        raise InputError(f'the variables do not fit the model: {", ".join(differing)}')
    state_dict = {}
    for name in torch_order(table):
        state_dict[name] = to_torch_layout(flat[table[name][0]])
        if name.endswith('running_var'):
            state_dict[name.removesuffix('running_var') + _COUNTER] = np.zeros((), np.int64)
    return state_dict


def strip_prefix(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Takes a wrapper's prefix off the names if all of them have it."""
    while state_dict:
        first = next(iter(state_dict))
        prefix = next((p for p in _PREFIXES if first.startswith(p)), None)
        if prefix is None or not all(name.startswith(prefix) for name in state_dict):
            break
        state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict


def torch_order(names: Mapping[str, Any]) -> list[str]:
    """Sorts names into the order in which PyTorch registers parameters; optimisers number them by it.

    A block's modules come as the reference makes them: conv1, bn1, conv2 (conv_1 .. conv_4, se), bn2,
    conv3, bn3, se, downsample; in a module weight, bias, running_mean, running_var.
    """
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    modules = ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3')
    last = ('downsample', 'fc')

    def rank(part: str) -> tuple[int, int | str]:
        if part.isdigit():
            return 0, int(part)
        if part in leaves:
            return 1, leaves.index(part)
        if part in modules:
            return 2, modules.index(part)
        return (4 if part in last else 3), part

    return sorted(names, key=lambda name: [rank(part) for part in name.split('.')])


def as_numpy(value: Any) -> np.ndarray:
    """Returns a tensor or array as a numpy array; bfloat16 tensors, which numpy lacks, as float32."""
    if hasattr(value, 'detach'):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == 'torch.bfloat16' else value).numpy()
    return np.asarray(value)


def to_jax_layout(array: np.ndarray) -> np.ndarray:
    """[O, I, k, k] -> [k, k, I, O], [K, C] -> [C, K]."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """[k, k, I, O] -> [O, I, k, k], [C, K] -> [K, C]; a copy, which PyTorch may write to."""
    return np.array(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T, order='C')


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _flatten(variables: Mapping[str, Any]) -> dict[Path, Any]:
    return cast(dict[Path, Any], traverse_util.flatten_dict(dict(variables)))


def _torch_name(path: Path) -> str:
    _, *modules, leaf = path
    # 'layer1_0' and 'downsample_0' are members of a list in PyTorch; 'conv_1' is a name.
    parts = [m.replace('_', '.') if m.startswith(('layer', 'downsample')) else m for m in modules]
    return '.'.join([*parts, _LEAVES[leaf]])


def read_values(name: str, value: Any, dtype: Any) -> tuple[np.ndarray | None, str]:
    """Returns the values as `dtype`, or what is wrong with them."""
    try:
        array = as_numpy(value)
    except Exception:  # sparse, quantized, float8 and meta tensors each raise something else
        return None, f'values of a type that cannot be read ({getattr(value, "dtype", type(value).__name__)})'
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return None, f'values of type {array.dtype}'
    with np.errstate(over='ignore'):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        return None, f'values that are not finite as {np.dtype(dtype)}'
    if name.endswith('running_var') and (array < 0).any():
        return None, 'negative values'
    return array, ''


def draw_classifier(model: EPSANet, key: jax.Array) -> dict[str, jax.Array]:
    """Draws 'kernel' [C, K] and 'bias' [K] of a classifier as a new model would."""
    images = jnp.zeros(abstract_images(model).shape, model.dtype)
    return jax.jit(lambda k: model.init(k, images)['params']['fc'])(key)


def _draw_head(model: EPSANet, key: jax.Array) -> dict[str, np.ndarray]:
    head = draw_classifier(model, key)
    return {
        'fc.weight': to_torch_layout(np.asarray(head['kernel'])),
        'fc.bias': np.asarray(head['bias']),
    }


def _describe(problems: list[str], given: Mapping[str, Any], model: EPSANet) -> str:
    message = f'the state dict does not fit the model in {len(problems)} places: {"; ".join(problems)}'
    try:
        different = differences(infer_settings(given), model)
    except InputError:
        return message
    if different:
        return f'{message}; its shapes are those of {different}'
    return message
