"""Your own images: a folder with train/ and val/, each with one folder of images per class.

Command: python train.py --config=configs/image_folder.py --config.data.dir=DIR --workdir=runs/mine
         fine-tuning of existing weights (a PyTorch or safetensors file, or another workdir):
         python train.py --config=configs/image_folder.py:finetune --config.data.dir=DIR --workdir=runs/mine
             --config.init_from=FILE [--config.model.name=epsanet50_large] [--config.freeze='^(?!fc)']
Hardware: a GPU or TPU for full training at 224 px. On a CPU small networks at 64 px train in minutes.
Expected result: depends on the images. docs/results.md has a small network trained from scratch at 64 px on
         4,000 images of ten ImageNet classes. Not yet run with epsanet50_small at 224 px.

From scratch: SGD with momentum, label smoothing and crops are those of the reference. A cosine schedule with
warm-up, and a smaller batch with the learning rate scaled to it (0.1 per 256 images), suit small datasets.
Fine-tuning: a tenth of that learning rate, fewer epochs and less severe crops, as usual for pretrained
weights.
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
