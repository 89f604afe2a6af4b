"""Programs for TPUs, compiled by libtpu without a TPU: `make test-tpu`. Each needs a process of its own."""

import json
import os
import subprocess
import sys

import pytest

STEP = """
import json, sys
from epsanet_jax.analysis import schedule, topology
from epsanet_jax.training import tracing
from epsanet_jax.training.config import Config, DataConfig, ModelConfig

name, folder = sys.argv[1:]
schedule.write_schedules(folder)
place = topology.open_topology(name)
model = ModelConfig(layers=(1,), planes=(64,), dtype='bfloat16', conv='pallas')
data = DataConfig(image_size=64, resize_size=64)
config = Config(batch_size=len(place.devices) * 128, model=model, data=data)
text = tracing.lower_train_step(config, place.devices, place.platform).compile().as_text()
found = schedule.roofline(text, schedule.read_kernels(folder), bytes_per_cycle=500)
names = ('toeplitz_convolution', 'toeplitz_input_gradient', 'toeplitz_weight_gradient')
kernels = {name: [op.cycles for op in found.ops if name in op.name] for name in names}
print(json.dumps({'kernels': kernels, 'cycles': found.schedule_cycles, 'bytes': found.hbm_bytes,
                  'roofline': found.roofline_cycles, 'unscheduled': found.unscheduled}))
"""


@pytest.mark.tpu
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_step_with_kernels_compiles_and_its_schedules_are_read(topology, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
    done = subprocess.run(
        [sys.executable, '-c', STEP, topology, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    cycles = [each for kernels in found['kernels'].values() for each in kernels]
    assert len(cycles) == 3  # one kernel of each kind for the four convolutions of the pyramid
    assert min(cycles) > 1000
    assert found['cycles'] > sum(cycles)
    assert found['roofline'] >= found['bytes'] / 500 > 0
    assert not {'fusion', 'convolution'} & set(found['unscheduled'])  # small operations may share a schedule
