"""ABQ-LLM (arXiv 2408.08554), W4A4.

python -m experiments.compress_lm --config=configs/lm/abq_w4a4.py [--config.outlier_channels=2]
"""

from ml_collections import ConfigDict

from configs.lm import abq_w2a8


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(abq_w2a8.get_config().to_dict() | dict(bits=4, act_bits=4))
