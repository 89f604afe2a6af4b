"""Your own pictures: a folder with train/ and val/, in each a folder of pictures a class.

Command: python train.py --config=configs/image_folder.py --config.data.dir=DIR --workdir=runs/mine
         from weights that are there, a PyTorch or safetensors file or another workdir:
         python train.py --config=configs/image_folder.py:finetune --config.data.dir=DIR --workdir=runs/mine
             --config.init_from=FILE [--config.model.name=epsanet50_large] [--config.freeze='^(?!fc)']
Hardware: a GPU or TPU for whole trainings at 224 px. On a CPU small networks at 64 px train in minutes.
Expected result: depends on the pictures. From scratch, 4,000 pictures of ten ImageNet classes, a small
         network at 64 px: docs/results.md. Neither run yet with epsanet50_small at 224 px.

From scratch: SGD with momentum, label smoothing and crops are the reference's. Cosine with warm-up
instead of steps, and a smaller batch with the learning rate scaled along (0.1 a 256 pictures), suit small
data sets. Fine-tuning: a tenth of that rate, fewer epochs and less severe crops, as is usual for weights
that are good already.
"""

from epsanet_jax.training.config import Config, DataConfig, OptimizerConfig, ScheduleConfig


def get_config(kind: str = 'scratch') -> Config:
    if kind not in ('scratch', 'finetune'):
        raise ValueError(f"expected 'scratch' or 'finetune', got {kind!r}")
    config = Config(
        batch_size=64,
        epochs=90,
        log_every_steps=10,
        data=DataConfig(source='folder'),
        optimizer=OptimizerConfig(lr=0.1, lr_batch=256),
        schedule=ScheduleConfig(name='cosine', warmup_epochs=5),
    )
    if kind == 'finetune':
        config.epochs = 20
        config.optimizer.lr = 0.01
        config.schedule.warmup_epochs = 1
        config.data.crop_scale = (0.35, 1.0)
    return config
