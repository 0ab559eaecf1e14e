"""Round to nearest, 4 bits, a scale per 32 inputs: the quickest run of the whole job.

python -m experiments.compress_lm

Expected on the embedded model: see configs/lm/rtn_w4.py; one minute on two CPU cores.
"""

from configs.lm import rtn_w4


def get_config():
    """Every setting of the run."""
    return rtn_w4.get_config()
