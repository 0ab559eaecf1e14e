"""RLFN's published network under the compression methods of this package: what quantization and pruning cost on Set5.

    JAXCOMP_DATA=FOLDER python -m experiments.rlfn --workdir=runs/rlfn_card [--methods=rtn_w8a8 ...] [--out=experiments/results]

The folder holds sr/weights/rlfn_x4.safetensors and sr/set5. GPTQ calibrates on images that ship with scikit-image. Scores are
kept in the workdir: a run that was killed goes on; scores of other weights, images or jax are refused. Speed and trainings are
cited from the cards of `experiments.sr_speed` and `experiments.sr_budget` (`sr_stages`) where they lie in the same folder.
About 8 minutes on two idle CPU cores.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import sr
from experiments.cards import Card, Row, command_line, current_commit, current_device
from experiments.runs import launch
from experiments.stages import Stages
from jaxcomp.core.apply import explain
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import nbytes
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform, chain, compress, identity
from jaxcomp.data.bicubic import imresize
from jaxcomp.evaluate.restoration import Restoration, restorer
from jaxcomp.io.super_resolution import load_super_resolver
from jaxcomp.models.rlfn import RLFN
from jaxcomp.quantize import gptq, rtn
from jaxcomp.quantize.scheme import KERNELS
from jaxcomp.sparsify import remove_zero_filters, rlfn_spaces, soft_filter_pruning

CALIBRATION = ("rocket", "motorcycle_left", "immunohistochemistry")
_CROP = 384  # pixels of the calibration images before they are shrunk
FLOAT = "float"
PRUNED = "soft_filter_pruning"
ENDS = (Rule("head/kernel", bits=8), Rule("upsample/kernel", bits=8))
ATTENTION = (Rule("blocks_*/esa/*/kernel", bits=8),)
GROUPS = (  # one scale per tap and output channel, of the 3 x 3 convolutions
    Rule("blocks_*/conv_*/kernel", group_size=52),
    Rule("trunk/kernel", group_size=52),
)
_ASYMMETRIC = dict(act_bits=8, symmetric=False, act_symmetric=False)
METHODS: dict[str, Transform] = {
    FLOAT: identity(),
    "rtn_w8a8": rtn(8, act_bits=8),
    "gptq_w8a8": gptq(8, act_bits=8),
    "gptq_w8a8_asymmetric": gptq(8, **_ASYMMETRIC),
    "rtn_w4a8": rtn(4, act_bits=8),
    "gptq_w4a8": gptq(4, act_bits=8),
    "gptq_w4a8_asymmetric": gptq(4, **_ASYMMETRIC),
    "gptq_w4a8_mixed": gptq(4, rules=[*ENDS, *ATTENTION, *KERNELS], **_ASYMMETRIC),
    "gptq_w4a8_mixed_groups": gptq(
        4, rules=[*ENDS, *ATTENTION, *GROUPS, *KERNELS], scale_dtype="float16", **_ASYMMETRIC
    ),
    PRUNED: chain(soft_filter_pruning(rlfn_spaces(6), 2 / 52), remove_zero_filters(rlfn_spaces(6))),
}
LABELS = {
    FLOAT: "RLFN, float32",
    "rtn_w8a8": "round to nearest, W8A8",
    "gptq_w8a8": "GPTQ, W8A8",
    "gptq_w8a8_asymmetric": "GPTQ, W8A8, asymmetric",
    "rtn_w4a8": "round to nearest, W4A8",
    "gptq_w4a8": "GPTQ, W4A8",
    "gptq_w4a8_asymmetric": "GPTQ, W4A8, asymmetric",
    "gptq_w4a8_mixed": "GPTQ, W4A8, asymmetric; first, last and attention in 8 bits",
    "gptq_w4a8_mixed_groups": "the same with a scale per tap of a window",
    PRUNED: "52 to 50 channels, not fine-tuned",
}
PAPER = {FLOAT: (32.24, 0.8952)}
DEPARTURES = (
    "The weights of the set5 rows are the authors'. The paper does not quantize: those rows have no figure of it.",
    "Weights have one scale per output channel unless the row says otherwise; activations one per sample and layer, found as "
    "they pass. Asymmetric grids have a zero point: LeakyReLU leaves activations almost all positive. Biases, and the resizing "
    "and sigmoid of the attention, stay in floating point.",
    "Filters of the paper's challenge network were pruned during training and fine-tuned; here two channels per space are "
    "removed from trained weights, which shows what the fine-tuning has to recover.",
    "The paper's own training (configs/sr/rlfn.py) does not fit a CPU: warm starts and the contrastive loss are compared on a "
    "tiny network under one budget, and those rows have no figure of the paper.",
)


class Scored(NamedTuple):
    """What one method scored; mappings are by image."""

    y: Restoration
    rgb: Restoration
    bytes: int


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


def score(
    name: str, model: RLFN, params: Any, stats: Calibration, pairs: Sequence[tuple[str, sr.Image, sr.Image]]
) -> Scored:
    """Compresses by one method and scores."""
    small, _, _ = compress(METHODS[name], params, stats)
    network = model.clone(channels=small["head"]["bias"].size)
    check_kernels(network, small)
    return Scored(*sr.scores(restorer(network, small), pairs, model.scale), nbytes(small))


def kept(stages: Stages, name: str, make: Callable[[], Scored]) -> Scored:
    """The scores of a method, which `make` finds if the stages do not hold them."""

    def work() -> dict[str, Any]:
        found = make()
        return {"y": dataclasses.asdict(found.y), "rgb": dataclasses.asdict(found.rgb), "bytes": found.bytes}

    body = stages.run(name, work)
    return Scored(Restoration(**body["y"]), Restoration(**body["rgb"]), body["bytes"])


def identity_of(weights: pathlib.Path, pairs: Sequence[tuple[str, sr.Image, sr.Image]]) -> dict[str, Any]:
    """What scores depend on beside the methods: digests of weights and images, the calibration, the version of jax."""
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
    images = {name: digest(low.tobytes() + high.tobytes()) for name, low, high in pairs}
    calibrated = {"calibration": [*CALIBRATION, _CROP], "jax": jax.__version__}
    return {"weights": digest(weights.read_bytes()), "images": images} | calibrated


def rows(found: Mapping[str, Scored], bicubic: Sequence[Restoration], scale: int) -> list[Row]:
    """Quality on Y and RGB, what is lost to the float network, and bytes, of every method."""
    setting = f"set5 x{scale}"
    result = [row for channel in bicubic for row in sr.quality_rows("bicubic", setting, channel)]
    for name, scored in found.items():
        base = None if name == FLOAT else found[FLOAT].y
        result += sr.quality_rows(LABELS[name], setting, scored.y, base, PAPER.get(name, (None, None)))
        result += sr.quality_rows(LABELS[name], setting, scored.rgb)
        result.append(Row(LABELS[name], setting, *sr.exact("weights_MB", "MB", scored.bytes / 1e6)))
    return result


def cited(folder: str) -> list[Row]:
    """Speed against PyTorch and where the time goes; the stages of training."""
    stages = sr.cited_rows(folder, "sr_stages", lambda row: True)
    stages = [dataclasses.replace(row, setting=f"{row.setting}, trained here under one budget") for row in stages]
    return sr.cited_rows(folder, "sr_speed", lambda row: row.metric != "runtime_ms") + stages


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_string("workdir", None, "Folder of the scores.", required=True)
    flags.DEFINE_multi_enum("methods", list(METHODS), list(METHODS), "Methods to run beside the float network.")
    flags.DEFINE_bool("overwrite", False, "Discard scores of other weights or images.")
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Scores all methods and writes the card `rlfn`."""
    del argv
    start, args = time.monotonic(), flags.FLAGS
    data = sr.data_folder("sr/weights and sr/set5")
    weights = data / "sr" / "weights" / "rlfn_x4.safetensors"
    model, params = load_super_resolver("rlfn_x4", weights)
    pairs, stats, found = sr.set5(data), calibration(model), {}
    stages = Stages(args.workdir, identity_of(weights, pairs), overwrite=args.overwrite)
    for name in dict.fromkeys([FLOAT, *args.methods]):
        found[name] = kept(stages, name, functools.partial(score, name, model, params, stats, pairs))
        print(f"{LABELS[name]}: {found[name].y.psnr:.2f} dB, {found[name].bytes / 1e6:.2f} MB", flush=True)
    bicubic = sr.scores(lambda low: np.asarray(imresize(low, model.scale)), pairs, model.scale)
    result = rows(found, bicubic, model.scale) + cited(args.out)
    paper = "Residual Local Feature Network for Efficient Super-Resolution, CVPRW 2022, arXiv 2205.07514"
    command = "JAXCOMP_DATA=FOLDER " + command_line("experiments.rlfn", sys.argv[1:])
    device = f"{current_device()}, jax {jax.__version__}"
    minutes = (time.monotonic() - start) / 60
    card = Card("rlfn", paper, command, current_commit(), device, minutes, [0], result, DEPARTURES)
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    launch(main)
