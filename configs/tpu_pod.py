"""ImageNet at a batch of 4,096 on a TPU slice: what changes at large batch.

Command, on every host of the slice (docs/tpu_pod.md): python train.py --config=configs/tpu_pod.py
         --config.data.source=records --config.data.dir=/mnt/BUCKET/imagenet --workdir=gs://BUCKET/runs/pod
Hardware: meant for 16 to 256 chips, as v5e-64; what a chip needs:
         epsanet plan --config=configs/tpu_pod.py --topology=v5e:8x8
Expected result: not yet run. The aim is what configs/imagenet.py reaches at a batch of 256.

Sources: "Accurate, Large Minibatch SGD" (arXiv 1706.02677): the rate of 0.1 at 256 is scaled with the
batch, 5 epochs of warm-up, BatchNorm over 32 pictures whatever the batch. Cosine instead of steps (arXiv
1812.01187), no decay on BatchNorm and biases (the same). Beyond batches of about 8,192 take LARS (arXiv
1708.03888): --config.optimizer.name=lars --config.optimizer.lr=10 --config.optimizer.lr_batch=0, and tune
the rate.
"""

from epsanet_jax.training.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)


def get_config(variant: str = 'epsanet50_small') -> Config:
    return Config(
        batch_size=4096,
        epochs=120,
        label_smoothing=0.1,
        log_every_steps=20,
        eval_every_epochs=4,
        model=ModelConfig(name=variant, bn_group=32, dtype='bfloat16'),
        data=DataConfig(source='tfds', name='imagenet2012', eval_split='validation', reduced_decoding=True),
        optimizer=OptimizerConfig(
            lr=0.1, lr_batch=256, momentum=0.9, weight_decay=1e-4, decay_norm_and_bias=False
        ),
        schedule=ScheduleConfig(name='cosine', warmup_epochs=5),
        checkpoint=CheckpointConfig(every_minutes=15),
    )
