"""The check of the Pallas kernels at the start of a run on TPUs.

The kernels were chosen by the compiler's schedules. So 'auto' uses them only after a comparison with XLA's
convolutions on the machine of the run: equal results, and less time for all of them together.
"""

import collections
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from epsanet_jax.errors import one_line
from epsanet_jax.models.epsanet import EPSANet, abstract_variables
from epsanet_jax.ops import bilinear, choice, pallas_tpu
from epsanet_jax.paths import replacing
from epsanet_jax.training import distributed, sharding

FILE = 'convolutions.json'  # in the workdir
TOLERANCE = 0.02  # distance of the results, relative to their norm; TPUs multiply with 8 bits of precision
ROUNDS, CALLS = 5, 10
EVERY = 60.0  # seconds between two lines of progress


class Call(NamedTuple):
    """Convolutions of the same images: shapes and types of the arguments, and the parameters."""

    x: jax.ShapeDtypeStruct
    kernels: tuple[jax.ShapeDtypeStruct, ...]
    spec: bilinear.Spec

    def __str__(self) -> str:
        sizes = '+'.join(f'{k.shape[0]}x{k.shape[1]}' for k in self.kernels)
        return f'{sizes} on {"x".join(map(str, self.x.shape[1:]))}, stride {self.spec.windows[0].strides[0]}'


class Outcome(NamedTuple):
    """The comparison for a call: relative distance, and seconds of the value and both gradients."""

    error: float
    auto: float
    pallas: float


def choose_conv(
    model: EPSANet,
    images: tuple[int, ...],
    device: sharding.Device,
    workdir: epath.Path,
    log: Callable[[str], None],
) -> EPSANet:
    """Returns the network of a run: with the Pallas kernels if `device` is a TPU on which they do better.

    Only a network with conv='auto' is changed. The result is kept in the workdir, so that a run that
    continues on as many devices of the same kind computes the same. All processes get the same answer. A
    kernel that fails costs a warning.

    Args:
        model: the network.
        images: shape of the images on a device, [N, H, W, C].
        device: one of this process.
        workdir: folder of the run.
        log: called with each line for the user.
    """
    if device.platform != 'tpu' or model.conv != 'auto':
        return model
    calls = calls_with_kernels(model, images)
    if not calls:
        return model
    about = {'device': device.device_kind, 'jax': jax.__version__, 'images': list(images)}
    known = _read(workdir / FILE)
    if distributed.all_agree(known is not None and about.items() <= known.items()):
        conv = known['conv'] if known else 'auto'
        log(f"convolutions: conv='{conv}', as checked before ({FILE})")
        return model.clone(conv=conv)
    log(
        f'checking the Pallas kernels of {len(calls)} kinds of convolutions against XLA on this '
        f'{device.device_kind}; once for a run, each is compiled twice; --config.check_kernels=False skips it'
    )
    outcomes = _worst_of_processes(_outcomes(list(calls), device, log))
    conv, text, record = decide(list(calls.values()), outcomes)
    log(f'convolutions: {text}')
    if jax.process_index() == 0:
        with replacing(workdir / FILE) as temporary:
            temporary.write_text(json.dumps({**about, 'conv': conv, **record}, indent=2) + '\n')
    return model.clone(conv=conv)


def calls_with_kernels(model: EPSANet, images: tuple[int, ...]) -> dict[Call, int]:
    """Returns the distinct calls with groups that have a Pallas kernel, and how often each occurs."""
    x = jax.ShapeDtypeStruct(images, model.dtype)
    jaxpr = jax.make_jaxpr(model.apply)(abstract_variables(model), x)
    found = collections.Counter(_calls(jaxpr.jaxpr))
    return {call: count for call, count in found.items() if _has_kernel(call)}


def _calls(jaxpr: Any) -> Iterator[Call]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'grouped_conv':
            x, *kernels = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars)
            yield Call(x, tuple(kernels), equation.params['spec'])
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from _calls(inner)


def _has_kernel(call: Call) -> bool:
    settings = [k.shape for k in call.kernels], call.spec.windows, call.spec.groups
    return any(pallas_tpu.taken(d, call.x.shape, call.x.dtype, *settings) for d in choice.DIRECTIONS)


def _outcomes(calls: Sequence[Call], device: sharding.Device, log: Callable[[str], None]) -> list[Outcome]:
    """Compares all calls; says from time to time how long it takes."""
    begin = shown = time.monotonic()
    outcomes = []
    for done, call in enumerate(calls, start=1):
        outcomes.append(_outcome(call, device, log))
        now = time.monotonic()
        if done < len(calls) and now - shown >= EVERY:
            left = (now - begin) / done * (len(calls) - done) / 60
            log(f'checked {done} of {len(calls)} kinds, about {left:.0f} min left')
            shown = now
    return outcomes


def _outcome(call: Call, device: sharding.Device, log: Callable[[str], None]) -> Outcome:
    try:
        return compare(call, device)
    except Exception as e:  # whatever a kernel does on a machine on which none has run
        log(f'warning: the Pallas kernels for {call} failed: {one_line(e)}')
        return Outcome(math.inf, 0.0, math.inf)


def compare(call: Call, device: sharding.Device) -> Outcome:
    """Computes a call and both its gradients on a device by 'auto' and by 'pallas', on random data."""
    shapes = (call.x, call.kernels)
    place = jax.sharding.SingleDeviceSharding(device)

    def results(algorithm: str) -> Callable[..., Any]:
        spec = call.spec._replace(algorithm=algorithm)

        def value_and_gradients(x: jax.Array, kernels: Sequence[jax.Array]) -> Any:
            outputs, pull = jax.vjp(lambda x, kernels: bilinear.forward(x, kernels, spec), x, kernels)
            return outputs, pull(outputs)

        return jax.jit(value_and_gradients, out_shardings=place)

    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
        )

    arguments = jax.jit(draw, out_shardings=place)(jax.random.key(0))
    auto, pallas = (results(name).lower(*arguments).compile() for name in ('auto', 'pallas'))
    pairs = zip(jax.tree.leaves(pallas(*arguments)), jax.tree.leaves(auto(*arguments)), strict=True)
    error = max(_distance(a, b) for a, b in pairs)
    return Outcome(error, *(_seconds(lambda f=f: f(*arguments)) for f in (auto, pallas)))


@jax.jit
def _relative(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())


def _distance(a: jax.Array, b: jax.Array) -> float:
    distance = float(_relative(a, b))
    return distance if math.isfinite(distance) else math.inf


def _seconds(run: Callable[[], Any]) -> float:
    """Returns the median seconds of a call, of calls that do not wait for each other."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        results = [run() for _ in range(CALLS)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / CALLS)
    return float(np.median(times))


def _worst_of_processes(outcomes: list[Outcome]) -> list[Outcome]:
    """Returns, for each call, the largest error and times of all processes."""
    values = np.asarray(outcomes, np.float64)
    if jax.process_count() > 1:
        values = np.asarray(multihost_utils.process_allgather(values)).max(axis=0)
    return [Outcome(*map(float, row)) for row in values]


def decide(counts: Sequence[int], outcomes: Sequence[Outcome]) -> tuple[str, str, dict[str, Any]]:
    """Returns the algorithm for all convolutions of a network, why, and the figures.

    Args:
        counts: how often each call occurs in the network.
        outcomes: the comparison for each call.
    """
    wrong = sum(not outcome.error <= TOLERANCE for outcome in outcomes)  # also if it is NaN
    if wrong:
        text = f'XLA computes all: the Pallas kernels failed or differ in {wrong} of {len(outcomes)} kinds'
        return 'auto', text, {'failed': wrong}
    error = max(outcome.error for outcome in outcomes)
    auto, pallas = (
        1e3 * sum(count * getattr(o, name) for count, o in zip(counts, outcomes, strict=True))
        for name in ('auto', 'pallas')
    )
    faster = pallas < auto
    text = (
        f'{"Pallas kernels are" if faster else "XLA is"} used: for {sum(counts)} calls, with gradients, the '
        f'kernels take {pallas:.2f} ms and XLA {auto:.2f} ms; results differ by {error:.1e}'
    )
    record = {'ms': {'auto': round(auto, 3), 'pallas': round(pallas, 3)}, 'difference': error}
    return 'pallas' if faster else 'auto', text, record


def _read(path: epath.Path) -> dict[str, Any] | None:
    """Returns the record of an earlier check, or None if there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get('conv') in ('auto', 'pallas') else None
