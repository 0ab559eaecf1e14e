"""Settings of `experiments.compress_lm` that no method changes; every config of this folder adds its own."""

from typing import Any


def settings() -> dict[str, Any]:
    """All settings of the job besides the method's."""
    return dict(
        seed=0,  # draws calibration windows and outlier channels
        dtype="float32",  # of activations and of the params that stay dense
        context=256,  # tokens of a window, at most the model's
        calibration_windows=64,
        evaluation_windows=0,  # evenly spread over the text; 0: all
        batch_size=16,
        outlier_channels=0,  # channels per norm that get large activations; the model's function stays the same
        outlier_factor=32.0,
        prompt_tokens=16,
        decode_tokens=48,
        decode_rounds=9,  # paired timings of float and compressed decoding
    )
