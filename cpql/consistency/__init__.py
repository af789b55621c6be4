"""Consistency models for tensors of any shape: no states, no actions, no rewards.

Noise levels `t` are in the units of the data's standard deviation. A consistency function `f(x, t)` maps
a sample `x` noised to level `t` back to clean data; at the smallest level it is the identity. `function.py`
builds it from a network, `levels.py` says which noise levels there are, `objectives.py` trains it,
`sampling.py` draws from it, `editing.py` keeps a part of a sample and makes the rest.
"""

from __future__ import annotations

from cpql.consistency.editing import colourise as colourise
from cpql.consistency.editing import edit as edit
from cpql.consistency.editing import inpaint as inpaint
from cpql.consistency.editing import interpolate as interpolate
from cpql.consistency.editing import slerp as slerp
from cpql.consistency.editing import stroke as stroke
from cpql.consistency.editing import super_resolve as super_resolve
from cpql.consistency.function import PARAMETERISATIONS as PARAMETERISATIONS
from cpql.consistency.function import ConsistencyFunction as ConsistencyFunction
from cpql.consistency.function import Function as Function
from cpql.consistency.function import Network as Network
from cpql.consistency.function import Parameterisation as Parameterisation
from cpql.consistency.function import consistency_function as consistency_function
from cpql.consistency.function import perturb as perturb
from cpql.consistency.levels import Levels as Levels
from cpql.consistency.levels import ct_discretisation as ct_discretisation
from cpql.consistency.levels import ct_teacher_decay as ct_teacher_decay
from cpql.consistency.levels import easy_ratio as easy_ratio
from cpql.consistency.levels import ict_discretisation as ict_discretisation
from cpql.consistency.levels import lognormal_index as lognormal_index
from cpql.consistency.levels import lognormal_level as lognormal_level
from cpql.consistency.levels import uniform_index as uniform_index
from cpql.consistency.objectives import GIVEN as GIVEN
from cpql.consistency.objectives import GUIDES as GUIDES
from cpql.consistency.objectives import KINDS as KINDS
from cpql.consistency.objectives import OBJECTIVES as OBJECTIVES
from cpql.consistency.objectives import SCHEDULED as SCHEDULED
from cpql.consistency.objectives import Objective as Objective
from cpql.consistency.objectives import cd as cd
from cpql.consistency.objectives import check_grid as check_grid
from cpql.consistency.objectives import ct as ct
from cpql.consistency.objectives import denoise as denoise
from cpql.consistency.objectives import distill as distill
from cpql.consistency.objectives import ect as ect
from cpql.consistency.objectives import flow_matching as flow_matching
from cpql.consistency.objectives import ict as ict
from cpql.consistency.objectives import keywords as keywords
from cpql.consistency.objectives import meanflow as meanflow
from cpql.consistency.objectives import scm as scm
from cpql.consistency.objectives import shortcut as shortcut
from cpql.consistency.sampling import greedy_refinements as greedy_refinements
from cpql.consistency.sampling import sample as sample
