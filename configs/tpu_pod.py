"""ImageNet with a batch size of 4,096 on a TPU slice.

Command, on every host of the slice (docs/tpu_pod.md): python train.py --config=configs/tpu_pod.py
         --config.data.source=records --config.data.dir=/mnt/BUCKET/imagenet --workdir=gs://BUCKET/runs/pod
Hardware: intended for 16 to 256 chips, for example v5e-64. To print the memory and time that a chip needs:
         epsanet plan --config=configs/tpu_pod.py --topology=v5e:8x8
Expected result: not yet run. The aim is the accuracy of configs/imagenet.py with a batch size of 256.

Sources: "Accurate, Large Minibatch SGD" (arXiv 1706.02677): the learning rate of 0.1 at batch size 256 is
scaled with the batch size, 5 epochs of warm-up, BatchNorm over groups of 32 images for any batch size. Cosine
schedule instead of steps, and no weight decay on BatchNorm and biases (arXiv 1812.01187). For batch sizes
above about 8,192 use LARS (arXiv 1708.03888): --config.optimizer.name=lars --config.optimizer.lr=10
--config.optimizer.lr_batch=0, and tune the learning rate.
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
