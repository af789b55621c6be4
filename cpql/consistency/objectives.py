"""The objectives by name: ways to train a consistency function, with one signature.

    loss, metrics = objective(f, teacher, x0, z, u, progress, levels, ...)

    f          the function being trained, `f(x, t)`
    teacher    the same with EMA weights, for the objectives that want one (others ignore it)
    x0         clean data [*shape, D]
    z          standard normal noise, like x0
    u          uniform noise in [0, 1), [*shape]: which level each example is noised to
    progress   fraction of the training that is done, a tensor in [0, 1]
    levels     the noise levels
    loss       per example, [*shape]
    metrics    a dict of tensors, 0-dimensional or [*shape]

Some take more, as keyword arguments:

    u2, u3     more uniform noise, like u
    guide      another function that is trained beside f and distilled into it: a denoiser or a velocity
    acting     levels, like u: what an example is noised to in place of the level drawn by u; 0 leaves it
    tanh       noise the data under a tanh, see `perturb`; objectives on straight paths don't have it

All other keyword arguments are settings, with the paper's values as defaults. Noise is an argument, so an
update is a pure function of its inputs: it compiles as one graph, and tests, resumed runs and exported
programs agree to the bit. A new objective is one function of this form and one row of `OBJECTIVES`.
`docs/consistency.md` compares them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, get_type_hints

from torch import Tensor

from cpql.consistency.flows import compose, distill, flow_matching, meanflow, shortcut
from cpql.consistency.losses import Metrics, cd, ct, denoise, ect, ict, scm

__all__ = ["OBJECTIVES", "Guide", "Loss", "Objective"]

Loss = Callable[..., tuple[Tensor, Metrics]]
"""The signature that all objectives share; see the module's text."""

INPUTS = ("u2", "u3", "guide", "acting", "tanh")


class Guide(NamedTuple):
    """A function that is trained beside f, to be distilled into it.

    Attributes:
        loss: what trains it, of the common signature.
        parameterisation: its own.
    """

    loss: Loss
    parameterisation: Literal["edm", "flow"]


@dataclass(frozen=True)
class Objective:
    """One way to train a consistency function.

    Attributes:
        loss: the function.
        parameterisation: what f's has to be, where the objective trains the network F itself.
        guide: what is trained along, where the objective distils another function.
        scheduled: whether it depends on `progress`. A training by it can't be made longer afterwards.
    """

    loss: Loss
    parameterisation: Literal["trig", "average"] | None = None
    guide: Guide | None = None
    scheduled: bool = False

    @cached_property
    def _keywords(self) -> Mapping[str, Any]:
        hints = get_type_hints(self.loss.func if isinstance(self.loss, partial) else self.loss)
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def settings(self) -> dict[str, Any]:
        """The types of its settings, by name."""
        return {name: kind for name, kind in self._keywords.items() if name not in INPUTS}

    def takes(self, name: str) -> bool:
        """Whether it takes `u2`, `u3`, `guide`, `acting` or `tanh`."""
        return name in self._keywords


OBJECTIVES: dict[str, Objective] = {
    "denoise": Objective(denoise),
    "ct": Objective(ct, scheduled=True),
    "ict": Objective(ict, scheduled=True),
    "ect": Objective(ect, scheduled=True),
    "cd": Objective(cd, guide=Guide(partial(denoise, noise="lognormal"), "edm")),
    "scm": Objective(scm, "trig", scheduled=True),
    "meanflow": Objective(meanflow, "average"),
    "shortcut": Objective(shortcut, "average"),
    "compose": Objective(compose, "average"),
    "distill": Objective(distill, guide=Guide(flow_matching, "flow")),
}
