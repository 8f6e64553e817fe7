"""What Optuna tells of a finished search: how much each choice mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from methods.knobs import Range
from orchestrator.sweep.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)


def importances(choices: Sequence[Mapping[str, Any]], values: Sequence[float], space: Space) -> dict[str, float]:
    """Optuna's shares of the differences of `values` that each choice explains, largest first; they sum to 1.

    Args:
        choices: of each trial; those that are no key of `space`, or took one value only, are left out.
        values: of each trial, larger is better.
        space: domains of the choices.
    """
    domains: dict[str, BaseDistribution] = {}
    for name, domain in space.items():
        seen: list[Any] = [c.get(name) for c in choices]
        if len(set(map(str, seen))) < 2 or None in seen:
            continue
        if isinstance(domain, Range):
            low, high = min(domain.low, *seen), max(domain.high, *seen)
            if domain.int:
                domains[name] = IntDistribution(int(low), int(high), log=domain.log)
            else:
                domains[name] = FloatDistribution(low, high, log=domain.log)
        else:
            domains[name] = CategoricalDistribution(sorted({str(v) for v in seen}))
    if not domains:
        return {}
    study = optuna.create_study(direction="maximize")
    for choice, value in zip(choices, values, strict=True):
        plain = {n: str(choice[n]) if isinstance(d, CategoricalDistribution) else choice[n] for n, d in domains.items()}
        study.add_trial(optuna.trial.create_trial(params=plain, distributions=domains, value=value))
    found = optuna.importance.get_param_importances(study)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
