"""ERTACache: an offline plan of reused steps, adjusted time steps, and a linear rectification of the reuse error."""

from jaxcomp.sampling.cache.ertacache.calibrate import (
    Calibrated,
    ERTACacheConfig,
    ErtaPlan,
    ErtaSettings,
    calibrate,
    load,
    run_plan,
    save,
)
from jaxcomp.sampling.cache.ertacache.plan import plan_dp, plan_from_profile
from jaxcomp.sampling.cache.ertacache.profile import Profile, profile

__all__ = [
    "Calibrated",
    "ERTACacheConfig",
    "ErtaPlan",
    "ErtaSettings",
    "Profile",
    "calibrate",
    "load",
    "plan_dp",
    "plan_from_profile",
    "profile",
    "run_plan",
    "save",
]
