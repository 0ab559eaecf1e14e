"""S2O and every baseline on structured heads, retrieval tasks and a decoder at eight times its context.

python -m experiments.extend_lm --config=configs/attention/long_context.py --workdir=runs/lm_long --export=runs/lm_long/model
python -m experiments.train_recall --config=configs/attention/recall.py --workdir=runs/recall --export=runs/recall/model
python -m experiments.s2o

The last rebuilds experiments/results/s2o.json, .md and the heat maps; it goes on where a killed run stopped.
Expected (arXiv 2602.22575 at 128K: 3.82x lower error than PBS, 3.31x lower density): 7.7x and 3.2x at 8192. 40 CPU-minutes.
"""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcomp.attention import baselines as b
from jaxcomp.attention import s2o
from jaxcomp.attention.ablations import granules, local_window, unranked

SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.85, 0.93, 0.97, 0.99)  # of pooled mass that block methods cover
GAINS = (0.4, 0.15, 0.08, 0.04, 0.02, 0.01, 0.005, 0.0025)


def methods(block, segment):
    """{name: (threshold -> method, thresholds)} with tiles of `block`; `segment` is that of S2O."""
    sizes = dict(segment=segment, block_q=block, block_k=block)
    pooled = dict(sub_means=min(segment // 8, 8), runs=min(segment // 16, 4))
    lines = lambda t: b.minference(b.Pattern("vertical_slash", jnp.int32(t), jnp.int32(t)), block=block)
    return {
        "s2o": (lambda t: s2o(threshold=t, **sizes), GAINS),
        "s2o + sub-means": (lambda t: s2o(threshold=t, **pooled, **sizes), GAINS),
        "PBS-Attn": (lambda t: b.pbs(t, segment=4 * block, block=block), SHARES),
        "XAttention": (lambda t: b.xattention(t, stride=8, block=block), SHARES),
        "MeanPool": (lambda t: b.mean_pool(t, block=block), SHARES),
        "SpargeAttn": (lambda t: b.sparge(t, similarity=-1.0, block_q=block, block_k=block), SHARES),
        "FlexPrefill": (lambda t: b.flex_prefill(t, min_budget=2 * block, block=block), (*SHARES[3:], 0.995, 0.999)),
        "MInference": (lines, (48, 112, 128, 160, 192, 256, 384, 768)),
        "AnchorAttention": (lambda t: b.anchor(t, group=4, block=block), (5.0, 6.0, 7.0, 8.0, 9.0, 10.5, 12.0, 14.0)),
        "BLASST": (lambda t: b.blasst(t, block=block), (0.99, 0.9, 0.6, 0.3, 0.1, 0.01)),
        "oracle blocks": (lambda t: b.oracle_blocks(t, block=block), SHARES),
        "oracle order": (lambda t: b.oracle_order(t, **sizes), GAINS),
    }


def ablations(block, segment):
    """The same for variants of S2O, one change each."""
    variant = lambda **change: (
        lambda t: s2o(threshold=t, **dict(segment=segment, block_q=block, block_k=block) | change)
    )
    pooled = lambda count, **change: variant(**dict(segment=count * block, sub_means=8, runs=4) | change)
    sizes = dict(segment=segment, block_q=block, block_k=block)
    return {
        "segment = tile": (variant(segment=block), GAINS),
        "segment = tile, sub-means": (pooled(1), GAINS),
        "segment = 4 tiles": (variant(segment=4 * block), GAINS),
        "segment = 4 tiles, sub-means": (pooled(4), GAINS),
        "sub-means by the guide alone": (pooled(2, runs=1), GAINS),
        "sub-means of consecutive rows": (pooled(2, runs=8), GAINS),
        "half as many sub-means": (pooled(2, sub_means=4, runs=2), GAINS),
        "guide none (no query permutation)": (variant(guide="none"), GAINS),
        "guide mean_key": (variant(guide="mean_key"), GAINS),
        "stop by the maximum gain": (variant(aggregate="max"), tuple(4 * g for g in GAINS)),
        "stop by budget": (variant(stop="budget"), (0.8, 0.6, 0.4, 0.25, 0.12)),
        "stop fixed beforehand (prefix_cdf)": (variant(stop="prefix_cdf"), (0.6, 0.4, 0.2, 0.1, 0.05, 0.02)),
        "blocks of 16 keys": (variant(block_k=16), tuple(g / 8 for g in GAINS)),
        "granules of 64 keys": (lambda t: granules(t, granule=64, **sizes), tuple(g / 2 for g in GAINS)),
        "keys unranked (newest first)": (lambda t: unranked(t, **sizes), tuple(g / 8 for g in GAINS)),
        "local window only": (lambda t: local_window(**sizes), (0.5,)),
    }


def fine(block, segment):
    """S2O for rows that each read keys of their own: the ranking asks two rows at once, or every row."""
    sizes = lambda rows: dict(segment=segment, sub_means=segment // rows, runs=segment // (2 * rows))
    ranked = lambda rows: lambda t: s2o(threshold=t, block_q=block, block_k=block, **sizes(rows))
    return {"s2o, sub-means of two rows": (ranked(2), GAINS), "s2o, ranked by every row": (ranked(1), GAINS)}


def get_config() -> ConfigDict:
    """Every setting of the experiment."""
    return ConfigDict(
        dict(
            methods=methods,
            ablations=ablations,
            fine=fine,
            seeds=(0, 1, 2, 3, 4),
            ablation_seeds=(0, 1, 2),
            length=8192,
            block=64,
            segment=128,
            density=0.2,  # where errors are compared
            error=1e-2,  # where densities are compared
            needle=dict(lengths=(2048, 8192), depths=tuple(np.linspace(0.0, 1.0, 9).tolist()), asking=16, density=0.2),
            language=dict(
                model="runs/lm_long/model",
                context=2048,
                block=32,
                segment=32,
                windows=16,
                calibration_windows=2,
                targets=(0.1, 0.03, 0.01, 0.003),
                ratio=1.01,  # perplexity over that of dense attention
                composition_gain=0.004,
                abq=dict(w_bits=4, a_bits=8, epochs=2, batch_size=4, windows=32, context=256),
            ),
            recall=dict(
                model="runs/recall/model",
                lengths=(2048,),
                depths=(0.0, 0.25, 0.5, 0.75, 0.95),
                block=32,
                segment=32,
                symbols=(0, 128),
                span=24,  # symbols of a passage
                prompt=4,  # of them given at the end
                repeats=3,
                density=0.2,
                share=0.95,  # of dense recall that must remain
            ),
            least=dict(error=dict([("PBS-Attn", 3.8), ("XAttention", 2.5)]), density=dict([("PBS-Attn", 2.5)])),
        )
    )
