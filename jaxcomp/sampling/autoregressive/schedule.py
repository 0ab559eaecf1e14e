"""Which chunk does which inference step when: the staggered schedule of chunk-wise autoregressive video."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class ChunkSchedule(NamedTuple):
    """Rows of a sampling run, static; every chunk does at most one step per row.

    Attributes:
      step: the inference step that a chunk does in a row, -1 where it rests.
      steps: inference steps of a chunk, n.
      prefix: chunks that are given, at the beginning; they never step.
    """

    step: Int[np.ndarray, "rows G"]
    steps: int
    prefix: int

    @property
    def chunks(self) -> int:
        """G, the given ones too."""
        return self.step.shape[1]

    @property
    def updates(self) -> int:
        """Chunk steps of the whole run."""
        return int((self.step >= 0).sum())

    def finished(self) -> Int[np.ndarray, "G"]:
        """Rows after which a chunk changes no more; 0 for a given one."""
        rows = np.arange(1, len(self.step) + 1)[:, None]
        return np.where(self.step >= 0, rows, 0).max(0)


def staggered(chunks: int, steps: int, stagger: int, prefix: int = 0) -> ChunkSchedule:
    """Chunk g follows chunk g-1 at a distance of `stagger` steps, and is never behind it once that has finished.

    The schedule of SkyReels-V2 (arXiv 2504.13074), `ar_step` = stagger: 0 denoises all chunks together, `steps` one after
    the other.

    Raises:
      ValueError: a stagger outside of 0..steps, no step, or no chunk to generate.
    """
    if steps < 1 or not 0 <= stagger <= steps:
        raise ValueError(f"expected steps >= 1 and a stagger within 0..steps, found steps {steps}, stagger {stagger}")
    if not 0 <= prefix < chunks:
        raise ValueError(f"expected fewer given chunks than chunks, found prefix {prefix} of {chunks}")
    index, rows = np.where(np.arange(chunks) < prefix, steps + 1, 0), []
    while (index < steps).any():
        new = index.copy()
        for g in range(chunks):
            follows = g > 0 and index[g - 1] < steps
            new[g] = np.clip(new[g - 1] - stagger if follows else index[g] + 1, 0, steps + 1)
        rows.append(np.where((new != index) & (new <= steps), new - 1, -1))
        index = new
    return ChunkSchedule(np.array(rows, np.int32), steps, prefix)


def check_schedule(schedule: ChunkSchedule, chunks: int, steps: int) -> None:
    """Raises ValueError unless the schedule is for so many chunks and steps, and every chunk does all steps in order."""
    if (schedule.chunks, schedule.steps) != (chunks, steps):
        expected, found = f"{chunks} chunks of {steps} steps", f"{schedule.chunks} chunks of {schedule.steps}"
        raise ValueError(f"schedule: expected {expected} (latents and solver), found one for {found}; make it again")
    for g in range(chunks):
        done = schedule.step[schedule.step[:, g] >= 0, g]
        expected = np.arange(0 if g < schedule.prefix else steps)
        if not np.array_equal(done, expected):
            raise ValueError(f"schedule: chunk {g} must do the steps 0..{steps - 1} once each, in order, found {done}")
