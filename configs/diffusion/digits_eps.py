r"""The noise-predicting digits that ship with the package (jaxcomp/data/assets/digits/eps).

python -m experiments.train_dit --config=configs/diffusion/digits_eps.py --workdir=runs/digits_eps \
    --export=jaxcomp/data/assets/digits/eps
"""

from configs.diffusion.recipe import settings


def get_config():
    """Every setting of the run."""
    return settings(objective="eps")
