"""A result in a few lines, for people: of a run, of an evaluation, on a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["summary"]


def summary(result: Mapping[str, Any]) -> str:
    """The content of a run's `result.json`, or of an evaluation's file, in two to four lines.

    Raises:
        KeyError: it isn't what cpql has written.
    """
    policy = result.get("policy")  # in an evaluation's file; its origin may be a stranger's
    data = result.get("data", policy.get("data") if isinstance(policy, Mapping) else None)
    data = data if isinstance(data, Mapping) else {}
    behaviour = data.get("return_mean")
    source = f"data: {data.get('source', 'unknown')} {data.get('id', '')}"
    lines = []
    if isinstance(policy, Mapping):
        agent, step, seed = (policy.get(key, "unknown") for key in ("agent", "step", "seed"))
        lines.append(f"{agent} on {result.get('task')}, update {step}, seed {seed}")
    if "return_mean" not in result:
        lines.append(f"trained and not evaluated: {result['task']} has no environment here (env.id=null)")
    else:
        returns = f"return {result['return_mean']:,.0f} ± {result['return_std']:,.0f}"
        last = "last checkpoint, " if "checkpoint" in result else ""
        how = f"over {result['episodes']} episodes of {result['environment']}, {last}{result['rule']}"
        if cut := result.get("episodes_cut"):
            how += f", {cut} of them cut after {result['episode_limit']:,} steps"
        known = isinstance(behaviour, int | float)
        if result["score"] is None:
            beside = f"{behaviour:,.0f}" if known else "unknown"
            lines += [
                f"{returns} {how}",
                f"behaviour's return {beside}   ({source}, without reference scores)",
            ]
        else:
            (low, high), references = result["score_interval"], result["references"]
            of, zero, hundred = (references[key] for key in ("of", "random", "expert"))
            lines.append(
                f"score {result['score']:.1f} (95% interval {low:.1f} to {high:.1f}; {returns} {how})"
            )
            if result.get("measure") == "success":
                lines.append(
                    f"the score is the share of successes in percent, as {of} counts them   ({source})"
                )
            else:
                beside = f"{100 * (behaviour - zero) / (hundred - zero):.1f}" if known else "unknown"
                lines.append(
                    f"behaviour {beside}   random 0.0   expert 100.0   ({of}'s references; {source})"
                )
    return "\n".join([*lines, f"note: {result['note']}"] if result["note"] else lines)
