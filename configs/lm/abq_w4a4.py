"""ABQ-LLM (arXiv 2408.08554), W4A4.

python -m experiments.compress_lm --config=configs/lm/abq_w4a4.py [--config.outlier_channels=2]

Expected on the embedded model with two outlier channels per norm (factor 20), windows of 128 tokens, keys and values at 4 bits,
one seed: perplexity 23.8 -> 25.8 (round to nearest 79.4, SmoothQuant 27.3, OmniQuant 25.9); 4.26 bits per weight with scales.
Learning takes about a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import abq_w2a8


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(abq_w2a8.get_config().to_dict() | dict(bits=4, act_bits=4))
