"""Class-conditional MNIST by flow matching; needs the data folder.

python -m experiments.train_dit --config=configs/diffusion/mnist_flow.py --workdir=runs/mnist_flow --data_dir=$JAXCOMP_DATA
"""

from configs.diffusion.recipe import settings


def get_config():
    """Every setting of the run."""
    model = dict(size=(14, 14), channels=4, patch=(2, 2), hidden_size=64, num_layers=4, num_heads=4, mlp_size=256)
    return settings(
        data="mnist", objective="flow", model=model, batch_size=32, steps=4000, learning_rate=1e-3, eval_every=2000
    )
