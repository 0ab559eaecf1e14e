"""jaxcomp: make trained JAX models small and fast.

import jaxcomp
calibration = jaxcomp.Calibration(model.apply, batches)
transform = jaxcomp.chain(jaxcomp.quantize.smoothquant(), jaxcomp.quantize.gptq(bits=4))
small, state, seconds = jaxcomp.compress(transform, params, calibration)
logits = jax.jit(jaxcomp.compressed(model.apply))(small, x)
print(jaxcomp.explain(model.apply, small, x))
"""

from jaxcomp import deploy, fold, formats, quantize, sparsify
from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import is_compressed, materialise, materialise_tree, nbytes
from jaxcomp.core.reconstruct import reconstruct
from jaxcomp.core.report import report
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import (
    Transform,
    chain,
    compress,
    identity,
    masked,
    named_chain,
    stateless,
    wrap_optax,
)

__all__ = [
    "Calibration",
    "Rule",
    "Transform",
    "chain",
    "compress",
    "compressed",
    "deploy",
    "explain",
    "fold",
    "formats",
    "identity",
    "is_compressed",
    "masked",
    "materialise",
    "materialise_tree",
    "named_chain",
    "nbytes",
    "quantize",
    "reconstruct",
    "report",
    "sparsify",
    "stateless",
    "wrap_optax",
]
