"""The baselines' updates beside ours in float64: the same weights, batches and noise go into both.

The codes are read from wherever their repositories were checked out and run as they are, except that random
numbers are handed to them, that layers are narrower, and that Diffusion-QL's target actor starts after update
10, not 1,000. ReBRAC's policy steps at the second of each two updates, as ours does, where its code begins
with a step; and its data's returns, by which the authors' own repository bounds the target from below, are
handed to it as minus infinity: the paper and CORL's copy have no such bound. Settings come from their own
tables where they have tables. JAX's codes want chex, distrax, flax, jax, ml_collections, optax and
tensorflow_probability. What the codes found is kept, so that tests/test_parity.py compares without them.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cpql.agents import Agent
from measure import jax_codes, torch_codes
from measure.parity import Found, compared, doubles, made

__all__ = ["CASES", "Case", "baselines"]


class Case(NamedTuple):
    """One comparison.

    Attributes:
        table: the checkout, by the name of its option.
        task: whose settings.
        words: our settings, as on the command line.
        code: runs the code from the weights of our agent.
    """

    table: str
    task: str
    words: str
    code: Callable[[Agent, str, Path], Found]


CASES = {
    "td3_bc": Case("corl", "hopper-medium-v2", "agent=td3_bc", torch_codes.corl_td3_bc),
    "iql_corl": Case("corl", "halfcheetah-medium-v2", "agent=iql_corl", torch_codes.corl_iql),
    "iql_corl, deterministic": Case("corl", "hopper-medium-v2", "agent=iql_corl", torch_codes.corl_iql),
    "diffusion_ql": Case(
        "diffusion_ql", "hopper-medium-v2", "agent=diffusion_ql_published", torch_codes.diffusion_ql
    ),
    "diffusion_ql, antmaze": Case(
        "diffusion_ql", "antmaze-large-play-v0", "agent=diffusion_ql_published", torch_codes.diffusion_ql
    ),
    "iql": Case("iql", "hopper-medium-v2", "agent=iql", jax_codes.iql),
    "iql, antmaze": Case("iql", "antmaze-large-play-v0", "agent=iql", jax_codes.iql),
    "rebrac": Case("rebrac", "hopper-medium-v2", "agent=rebrac_published", jax_codes.rebrac),
    "rebrac, CORL": Case("corl", "pen-human-v1", "agent=rebrac_published", jax_codes.corl_rebrac),
    "fql": Case("fql", "hopper-medium-v2", "agent=fql_published", jax_codes.fql),
    "fql, adroit": Case(
        "fql", "pen-human-v1", "agent=fql_published agent.q_loss=normalised agent.alpha=1", jax_codes.fql
    ),
}

FILES = {
    "corl": "algorithms/offline/td3_bc.py algorithms/offline/iql.py algorithms/offline/rebrac.py",
    "diffusion_ql": "main.py agents/ql_diffusion.py agents/diffusion.py",
    "iql": "learner.py actor.py critic.py",
    "rebrac": "src/algorithms/rebrac.py",
    "fql": "agents/fql.py",
}


def baselines(options: argparse.Namespace) -> dict[str, Any]:
    """Compare all cases at the given widths."""

    def theirs(case: Case, width: int) -> Found:
        with doubles():
            agent = made(case, width)  # type: ignore[arg-type]
        return case.code(agent, case.task, getattr(options, case.table))

    rows = compared(CASES, theirs, options.widths)
    sha256 = {
        f"{name}/{file}": hashlib.sha256((getattr(options, name) / file).read_bytes()).hexdigest()
        for name, files in FILES.items()
        for file in files.split()
    }
    return {"about": __doc__, "sha256": sha256, "rows": rows}
