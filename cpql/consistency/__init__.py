"""Consistency models for tensors of any shape: no states, no actions, no rewards.

Noise levels `t` are in the units of the data's standard deviation. A consistency function `f(x, t)` maps
a sample `x` noised to level `t` back to clean data, with `f(x, t_min) = x` exactly. `function.py` builds
it from a network, `levels.py` says which noise levels there are, `objectives.py` trains it, `sampling.py`
draws from it.
"""

from __future__ import annotations

from cpql.consistency.function import PARAMETERISATIONS as PARAMETERISATIONS
from cpql.consistency.function import Function as Function
from cpql.consistency.function import Parameterisation as Parameterisation
from cpql.consistency.function import consistency_function as consistency_function
from cpql.consistency.function import perturb as perturb
from cpql.consistency.levels import Levels as Levels
from cpql.consistency.levels import ct_discretisation as ct_discretisation
from cpql.consistency.levels import ct_teacher_decay as ct_teacher_decay
from cpql.consistency.levels import ict_discretisation as ict_discretisation
from cpql.consistency.levels import lognormal_index as lognormal_index
from cpql.consistency.levels import uniform_index as uniform_index
from cpql.consistency.objectives import OBJECTIVES as OBJECTIVES
from cpql.consistency.objectives import Objective as Objective
from cpql.consistency.objectives import ct as ct
from cpql.consistency.objectives import denoise as denoise
from cpql.consistency.objectives import ict as ict
from cpql.consistency.sampling import sample as sample
