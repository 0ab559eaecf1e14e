"""Chunk-wise autoregressive video: every chunk at its own step, its tokens computed or recalled.

solver, schedule = euler_flow(flow_grid(24, 3.0, time_scale=1.0)), staggered(chunks=3, steps=24, stagger=8)
policy = motioncache(0.1, tabled(distances), denoiser.frames)
video, trace = jax.jit(lambda p, x: sample_chunks(denoiser, p, x, None, solver, schedule, policy=policy))(params, noise)
"""

from jaxcomp.sampling.autoregressive.denoiser import ChunkDenoiser, field_denoiser, sequence_velocity, video_denoiser
from jaxcomp.sampling.autoregressive.distance import Distance, embedded, output_table, tabled, time_table
from jaxcomp.sampling.autoregressive.loop import Trace, sample_chunks
from jaxcomp.sampling.autoregressive.policy import Seen, Step, TokenPolicy, every_step
from jaxcomp.sampling.autoregressive.schedule import ChunkSchedule, staggered
from jaxcomp.sampling.autoregressive.tokens import Ladder, Wanted, compute_tokens, ladder

__all__ = [
    "ChunkDenoiser",
    "ChunkSchedule",
    "Distance",
    "Ladder",
    "Seen",
    "Step",
    "TokenPolicy",
    "Trace",
    "Wanted",
    "compute_tokens",
    "embedded",
    "every_step",
    "field_denoiser",
    "ladder",
    "output_table",
    "sample_chunks",
    "sequence_velocity",
    "staggered",
    "tabled",
    "time_table",
    "video_denoiser",
]
