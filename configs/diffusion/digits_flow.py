r"""The flow-matching digits that ship with the package (jaxcomp/data/assets/digits/flow).

python -m experiments.train_dit --config=configs/diffusion/digits_flow.py --workdir=runs/digits_flow \
    --export=jaxcomp/data/assets/digits/flow
"""

from configs.diffusion.recipe import settings


def get_config():
    """Every setting of the run."""
    return settings(objective="flow")
