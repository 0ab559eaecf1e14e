"""Heat maps: the attention of each kind of head beside what each method loads of it at about the same density."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Bool
from PIL import Image

from experiments.s2o_operator import Method, arrays
from experiments.s2o_retrieval import threshold_for
from jaxcomp.attention import SparseAttention, visited_keys
from jaxcomp.attention.heads import KINDS, Head, synthetic_head
from jaxcomp.io.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def loaded(method: SparseAttention, head: Head) -> tuple[Bool[Array, "N N"], float]:
    """(which keys each query attends to, density)."""
    q, k, v = arrays(head)
    sizes = dict(length=len(q), keys=len(q), block_q=method.block_q, block_k=method.block_k)

    @jax.jit
    def run(q, k, v):
        _, stats = method.attend(q, k, v)
        plan = method.plan(jnp.moveaxis(q, 1, 0), jnp.moveaxis(k, 1, 0), 0)
        return visited_keys(plan, stats.blocks, **sizes)[0], stats.density[0]

    seen, density = run(q, k, v)
    return np.asarray(seen), float(density)


def attention(head: Head) -> np.ndarray:
    """Causal softmax probabilities."""
    logits = np.where(
        np.tril(np.ones((len(head.query),) * 2, bool)), head.query @ head.key.T / head.query.shape[1] ** 0.5, -np.inf
    )
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def draw(methods: Mapping[str, Method], path: pathlib.Path, length: int = 1024, density: float = 0.25) -> None:
    """Writes one PNG: kinds down, the true map and each method across, with the share of the softmax mass that was loaded."""
    figure, axes = plt.subplots(len(KINDS), len(methods) + 1, figsize=(2.2 * (len(methods) + 1), 2.3 * len(KINDS)))
    for row, kind in zip(axes, KINDS, strict=True):
        head = synthetic_head(kind, length, 0)
        truth = attention(head)
        row[0].imshow(np.log10(truth + 1e-6), cmap="magma", vmin=-5, vmax=-1)
        row[0].set_title(f"{kind}: attention", fontsize=8)
        for axis, (name, method) in zip(row[1:], methods.items(), strict=True):
            seen, share = loaded(method[0](threshold_for(method, head, density)), head)
            axis.imshow(np.where(seen, np.log10(truth + 1e-6), np.nan), cmap="magma", vmin=-5, vmax=-1)
            mass = (truth * seen).sum(1).mean()
            axis.set_title(f"{name}: density {share:.2f}, mass {mass:.1%}", fontsize=7)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_facecolor("0.85")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    plt.close(figure)
    with replacing(path) as temporary:
        Image.open(buffer).convert("RGB").quantize(128).save(temporary, format="PNG")


def report(card_markdown: str, picture: pathlib.Path, path: pathlib.Path) -> None:
    """One HTML file with the pictures and the card's text, nothing outside of it."""
    image = base64.b64encode(picture.read_bytes()).decode()
    body = f"<h1>S2O: what was loaded</h1><img style='max-width:100%' src='data:image/png;base64,{image}'>"
    page = f"<!doctype html><meta charset='utf-8'><title>S2O</title>{body}<pre>{html.escape(card_markdown)}</pre>"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
