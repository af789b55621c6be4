"""Consistency models for tensors of any shape: no states, no actions, no rewards.

Noise levels `t` are in the units of the data's standard deviation. A consistency function `f(x, t)` maps
a sample `x` noised to level `t` back to clean data; at the smallest level it is the identity. `function.py`
builds it from a network, `levels.py` says which noise levels there are, `losses.py` and `flows.py` train it,
`objectives.py` is the table of these, `sampling.py` draws from it, `editing.py` keeps a part of a sample and
generates the rest.
"""

from __future__ import annotations

from cpql.consistency.editing import colourise, edit, inpaint, interpolate, slerp, stroke, super_resolve
from cpql.consistency.flows import check_grid, compose, distill, flow_matching, meanflow, shortcut
from cpql.consistency.function import (
    PARAMETERISATIONS,
    ConsistencyFunction,
    Function,
    Kind,
    Network,
    Parameterisation,
    consistency_function,
    perturb,
)
from cpql.consistency.levels import (
    Levels,
    ct_discretisation,
    ct_teacher_decay,
    easy_ratio,
    ict_discretisation,
    lognormal_index,
    lognormal_level,
    uniform_index,
)
from cpql.consistency.losses import cd, ct, denoise, ect, ict, scm
from cpql.consistency.objectives import OBJECTIVES, Guide, Objective
from cpql.consistency.sampling import greedy_refinements, sample

__all__ = [
    "OBJECTIVES", "PARAMETERISATIONS", "ConsistencyFunction", "Function", "Guide", "Kind", "Levels",
    "Network", "Objective", "Parameterisation", "cd", "check_grid", "colourise", "compose",
    "consistency_function", "ct", "ct_discretisation", "ct_teacher_decay", "denoise", "distill", "easy_ratio",
    "ect", "edit", "flow_matching", "greedy_refinements", "ict", "ict_discretisation", "inpaint",
    "interpolate", "lognormal_index", "lognormal_level", "meanflow", "perturb", "sample", "scm", "shortcut",
    "slerp", "stroke", "super_resolve", "uniform_index",
]  # fmt: skip
