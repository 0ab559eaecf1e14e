"""RLFN's published network under the compression methods of this package: what quantization and pruning cost on Set5.

    JAXCOMP_DATA=FOLDER python -m experiments.rlfn [--methods=rtn_w8a8 --methods=...] [--out=experiments/results]

The folder holds sr/weights/rlfn_x4.safetensors and sr/set5. GPTQ calibrates on images that ship with scikit-image. About 6
minutes on two idle CPU cores.
"""

import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import sr
from experiments.cards import Card, Row, current_commit
from experiments.ntire_esr import exact
from jaxcomp.core.apply import explain
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import nbytes
from jaxcomp.core.transform import Transform, chain, compress, identity
from jaxcomp.data.bicubic import imresize
from jaxcomp.evaluate.restoration import Restoration, restoration, restorer
from jaxcomp.io.super_resolution import load_super_resolver
from jaxcomp.models.rlfn import RLFN
from jaxcomp.quantize import gptq, rtn
from jaxcomp.sparsify import remove_zero_filters, rlfn_spaces, soft_filter_pruning

CALIBRATION = ("rocket", "motorcycle_left", "immunohistochemistry")
_CROP = 384  # pixels of the calibration images before they are shrunk
FLOAT = "float"
PRUNED = "soft_filter_pruning"
METHODS: dict[str, Transform] = {
    FLOAT: identity(),
    "rtn_w8a8": rtn(8, act_bits=8),
    "gptq_w8a8": gptq(8, act_bits=8),
    "rtn_w4a8": rtn(4, act_bits=8),
    "gptq_w4a8": gptq(4, act_bits=8),
    PRUNED: chain(soft_filter_pruning(rlfn_spaces(6), 2 / 52), remove_zero_filters(rlfn_spaces(6))),
}
LABELS = {
    FLOAT: "RLFN, float32",
    "rtn_w8a8": "round to nearest, W8A8",
    "gptq_w8a8": "GPTQ, W8A8",
    "rtn_w4a8": "round to nearest, W4A8",
    "gptq_w4a8": "GPTQ, W4A8",
    PRUNED: "52 to 50 channels, not fine-tuned",
}
PAPER = {FLOAT: (32.24, 0.8952)}
DEPARTURES = (
    "The weights are the authors'; nothing was trained here. The paper does not quantize: those rows have no figure of it.",
    "Weights have one scale per output channel; activations one per sample and layer, found as they pass. Biases, and the "
    "resizing and sigmoid of the attention, stay in floating point.",
    "Filters of the paper's challenge network were pruned during training and fine-tuned; here two channels per space are "
    "removed from trained weights, which shows what the fine-tuning has to recover.",
    "The paper's contrastive loss, warm starts and step counts can be run with configs/sr/rlfn.py, but not in the time of a "
    "CPU: no row compares training.",
)


def calibration(model: nn.Module) -> Calibration:
    """Low-resolution crops of bundled images, in the network's data range."""
    lows = [sr.degrade(sr.centre(x, _CROP), model.scale).low for x in sr.bundled_images(CALIBRATION).values()]
    batches = [jnp.asarray(low[None], jnp.float32) * (model.data_range / 255) for low in lows]
    return Calibration(_apply(model), batches)


def _apply(model: nn.Module) -> Callable:
    return lambda params, x: model.apply({"params": params}, x)


def check_kernels(model: nn.Module, params: Any) -> None:
    """Raises ArithmeticError if a compressed leaf would be expanded to a dense array."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    found = explain(_apply(model), params, image)
    if found.materialised or found.unused:
        raise ArithmeticError(f"leaves without a kernel:\n{found}")


def score_all(
    model: RLFN, params: Any, pairs: Sequence[tuple[str, sr.Image, sr.Image]], methods: Sequence[str]
) -> list[Row]:
    """Quality and bytes of every method; "float" comes first."""
    stats, rows, base = calibration(model), [], None
    score = lambda restore: restoration(restore, pairs, border=model.scale, channel="y")
    bicubic = score(lambda low: np.asarray(imresize(low, model.scale)))
    setting = f"Set5 x{model.scale}, {bicubic.convention}"
    rows += sr.quality_rows("bicubic", setting, bicubic)
    for name in dict.fromkeys([FLOAT, *methods]):
        small, _, _ = compress(METHODS[name], params, stats)
        network = model.clone(channels=small["head"]["bias"].size)
        check_kernels(network, small)
        found: Restoration = score(restorer(network, small))
        base = base or found
        against = None if name == FLOAT else base
        rows += sr.quality_rows(LABELS[name], setting, found, against, PAPER.get(name, (None, None)))
        rows.append(Row(LABELS[name], setting, *exact("weights", "MB", nbytes(small) / 1e6)))
        print(f"{LABELS[name]}: {found.psnr:.2f} dB, {nbytes(small) / 1e6:.2f} MB", flush=True)
    return rows


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_multi_enum("methods", list(METHODS), list(METHODS), "Methods to run beside the float network.")
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Scores all methods and writes the card `rlfn`."""
    del argv
    start, args = time.monotonic(), flags.FLAGS
    if "JAXCOMP_DATA" not in os.environ:
        raise SystemExit("rlfn: set JAXCOMP_DATA to a folder that holds sr/weights and sr/set5")
    data = pathlib.Path(os.environ["JAXCOMP_DATA"])
    model, params = load_super_resolver("rlfn_x4", data / "sr" / "weights" / "rlfn_x4.safetensors")
    rows = score_all(model, params, sr.set5(data), args.methods)
    paper = "Residual Local Feature Network for Efficient Super-Resolution, CVPRW 2022, arXiv 2205.07514"
    command = "JAXCOMP_DATA=FOLDER " + shlex.join(["python", "-m", "experiments.rlfn", *sys.argv[1:]])
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    minutes = (time.monotonic() - start) / 60
    card = Card("rlfn", paper, command, current_commit(), device, minutes, [0], rows, DEPARTURES)
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    app.run(main)
