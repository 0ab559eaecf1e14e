"""The caches of `experiments.sample` with as many computed steps as asked for, or for a budget of quality."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcomp.sampling import Pipeline, cache
from jaxcomp.sampling.cache import ertacache, figures, magcache, teacache
from jaxcomp.sampling.cache.pareto import Batch, choose, pareto
from jaxcomp.sampling.cache.search import tune

Draw = tuple[Pipeline, Any, Batch]  # pipeline, params, calibration batch


def _mag(draw: Draw, n: int) -> magcache.MagCacheConfig:
    pipeline, params, batch = draw
    curve = magcache.calibrate(pipeline, params, *batch)
    settings = [(t, k) for k in range(1, 9) for t in np.geomspace(1e-3, 10, 100)]
    far = lambda s: abs(int(magcache.plan(curve, *s, 0.2).sum()) - n)
    return magcache.MagCacheConfig(curve, *min(settings, key=far))


def _erta(draw: Draw, n: int) -> ertacache.ERTACacheConfig:
    pipeline, params, batch = draw
    return ertacache.calibrate(pipeline, _settings(pipeline, n), params, *batch).config


def _settings(pipeline: Pipeline, n: int) -> ertacache.ErtaSettings:
    return ertacache.ErtaSettings(computed=n, phi="v" if pipeline.solver.name == "euler_flow" else "off")


def _interval(draw: Draw, n: int) -> int:
    return max(1, round(draw[0].solver.steps / n))


def _tuned(config: Any, draw: Draw, n: int) -> Any:
    return tune(draw[0], config, draw[1], *draw[2], computed=n)[0]


CACHES: dict[str, Callable[[Draw, int], Any]] = {
    "uniform": lambda draw, n: cache.UniformCacheConfig(computed=n),
    "fora": lambda draw, n: cache.FORAConfig(_interval(draw, n)),
    "taylorseer": lambda draw, n: cache.TaylorSeerCacheConfig(_interval(draw, n)),
    "delta_dit": lambda draw, n: cache.DeltaDiTConfig(_interval(draw, n)),
    "adacache": lambda draw, n: cache.AdaCacheConfig(),
    "pab": lambda draw, n: cache.PyramidAttentionBroadcastConfig(),
    "fastercache": lambda draw, n: cache.FasterCacheConfig(),
    "teacache": lambda draw, n: _tuned(teacache.calibrated(draw[0], draw[1], *draw[2])[0], draw, n),
    "dbcache": lambda draw, n: _tuned(cache.DBCacheConfig(1, 0, warmup_steps=0), draw, n),
    "sencache": lambda draw, n: _tuned(cache.SenCacheConfig(), draw, n),
    "magcache": _mag,
    "ertacache": _erta,
}

ATTENTION_ONLY = ("pab", "fastercache")
FIXED = ("adacache", *ATTENTION_ONLY)  # these choose their steps themselves


def budgeted(draw: Draw, evaluation: Batch, report: str, **budget: Any) -> ertacache.ERTACacheConfig:
    """ERTACache's plan for a budget of `choose`; prints it, and writes the whole curve to `report` if that is not empty.

    Raises:
      ValueError: no plan meets the budget, or the report's name ends neither in .html nor in .png.
    """
    pipeline, params, calibration = draw
    curve = pareto(pipeline, params, calibration, evaluation, settings=_settings(pipeline, 1))
    chosen = choose(curve, **budget)
    psnr, error = chosen.psnr, chosen.relative_error
    print(
        f"{chosen.computed} of {curve.steps} steps: PSNR {psnr.value:.1f} dB [{psnr.low:.1f}, {psnr.high:.1f}], relative error "
        f"{error.value:.4f} [{error.low:.4f}, {error.high:.4f}] on {len(evaluation.x)} other noises"
    )
    if report:
        plans = {f"{p.computed} steps": p.config.plan.mask for p in curve.points}
        curves = {"ERTACache": curve}
        drawn = (
            figures.draw_profile(curve.profile),
            figures.draw_plans(plans),
            figures.draw_curves(curves, chosen),
        )
        figures.write_report(report, "ERTACache: quality over computed steps", curves, drawn, chosen)
        print(report)
    return chosen.config
