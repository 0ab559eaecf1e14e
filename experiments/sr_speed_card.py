"""Rows and notes of the card `sr_speed`; `experiments.sr_speed` measures."""

from collections.abc import Iterable

from experiments import sr
from experiments.cards import Row
from jaxcomp.evaluate.throughput import Paired

Size = tuple[int, int]
PEER, COMPILED = "PyTorch", "PyTorch, torch.compile"
PLAIN, BEST = "plain Flax", "C++ convolutions, fused"
REST = 0.05  # seconds before each call: the threads of PyTorch's OpenMP spin for some milliseconds after its calls
SPEEDUP, HURRIED, OVER_COMPILED = "speedup_vs_pytorch", "speedup_without_rest", "speedup_vs_torch_compile"

CPU_NOTES = (
    "Where the time of plain Flax goes: XLA's CPU convolution loses a third of its speed where the output channels are no "
    "multiple of 16 (RLFN has 52, 46), runs a 1 x 1 window as a window, and turns bfloat16 into float32.",
    "What was done: the C++ convolution reads maps where they are, multiplies bfloat16 in pairs, packs the 4 channels beyond "
    "48 of four pixels into one vector, steps over pixels, and fetches ahead what it will read, join and overwrite. XLA runs "
    "what lies between such calls in passes of their own; fused, the call adds the bias, activates, joins the residual, adds "
    "the resized attention or gates by the sigmoid, stage by stage over a tile of sums, and reads IMDN's splits and "
    "concatenations in place. What is left beside the convolutions is the max pooling of RLFN's attention at half the "
    "resolution (2 % of its time), and the pixel shuffle (2 %; done in the last convolution's store it costs as much there).",
    "Maps of tens of megabytes are fresh memory in most runs of either library, and page faults a part of all times: up to "
    "half of PyTorch's in float32 on the large image; the C++ calls ask for huge pages. With an allocator that keeps what is "
    "freed (glibc: MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) PyTorch gains more than JAX, and the ratios shrink.",
    "Both libraries use all cores; where the load exceeds the cores, other processes may disturb their thread pools "
    "unequally: repeat on an idle machine before relying on a ratio.",
    f"Before every timed call {REST * 1e3:.0f} ms pass: right after a call the threads of its library still spin for some "
    f"milliseconds and share the cores with the next call. {HURRIED} is the ratio of calls that follow one another at once.",
)


def best_of(names: Iterable[str]) -> str:
    """The form that is compared with PyTorch by itself."""
    return BEST if BEST in names else PLAIN


def rows(name: str, size: Size, dtype: str, rivals: Paired, hurried: Paired, others: Paired) -> list[Row]:
    """All times and their paired ratios to PyTorch's, whose own times are those beside the best form."""
    setting, found = f"{size[0]} x {size[1]}, {dtype}, batch 1, {rivals.cores} threads", []
    for times in (rivals, others):
        for form, seconds in times.seconds.items():
            method = f"{name}: {form}"
            if form != PEER or times is rivals:
                found.append(Row(method, setting, "runtime_ms", "ms", *sr.median_interval(seconds * 1e3)))
            if form != PEER:
                found.append(Row(method, setting, SPEEDUP, "", *times.speedup(form, PEER)))
    best = best_of(rivals.seconds)
    found.append(Row(f"{name}: {best}", setting, HURRIED, "", *hurried.speedup(best, PEER)))
    if COMPILED in rivals.seconds:
        found.append(Row(f"{name}: {best}", setting, OVER_COMPILED, "", *rivals.speedup(best, COMPILED)))
    return found


def departures(found: list[Row], on_cpu: bool) -> list[str]:
    """What the numbers say, and what they do not."""
    rivals = {(row.method, row.setting) for row in found if row.metric == HURRIED}
    ratios = [row for row in found if row.metric in (SPEEDUP, OVER_COMPILED) and (row.method, row.setting) in rivals]
    slower = [f"{row.method} at {row.setting} ({row.metric} {row.value:.2f})" for row in ratios if row.value < 1]
    verdict = (
        f"Slower than PyTorch: {'; '.join(slower)}."
        if slower
        else "JAX's best form is faster than PyTorch in every row."
    )
    return [
        verdict,
        *(CPU_NOTES if on_cpu else ()),
        "The papers' times are of PyTorch on GPUs of their own and are not compared.",
    ]
