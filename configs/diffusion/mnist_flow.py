r"""Class-conditional MNIST by flow matching; needs the data folder.

python -m experiments.train_dit --config=configs/diffusion/mnist_flow.py --workdir=runs/mnist_flow \
    --data_dir=$JAXCOMP_DATA --export=runs/mnist_flow/model
python -m experiments.sample --model=runs/mnist_flow/model --cache=ertacache --out=mnist.png

24 minutes on two busy CPU cores. 0.95 of the samples are nearest to a real image of their class (0.82 had it 4000 steps).
ERTACache at 15 of 30 steps is 39 dB from the full run.
"""

from configs.diffusion.recipe import settings


def get_config():
    """Every setting of the run."""
    model = dict(size=(14, 14), channels=4, patch=(2, 2), hidden_size=64, num_layers=4, num_heads=4, mlp_size=256)
    return settings(
        data="mnist", objective="flow", model=model, batch_size=32, steps=20000, learning_rate=3e-3, eval_every=5000
    )
