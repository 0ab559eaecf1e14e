"""Round to nearest, W8A8: weights per output channel, activations per token, integer products.

python -m experiments.compress_lm --config=configs/lm/rtn_w8a8.py
"""

from ml_collections import ConfigDict

from configs.lm import rtn_w4


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(rtn_w4.get_config().to_dict() | dict(bits=8, act_bits=8, group_size=0))
