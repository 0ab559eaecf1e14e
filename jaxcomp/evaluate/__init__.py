"""Quality of a model: perplexity with bootstrap intervals."""

from jaxcomp.evaluate.intervals import Interval, bootstrap_perplexity, paired_difference, paired_ratio
from jaxcomp.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Interval", "Perplexity", "bootstrap_perplexity", "paired_difference", "paired_ratio", "perplexity"]
