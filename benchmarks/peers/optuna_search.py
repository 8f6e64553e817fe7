"""The search as a plain Optuna script has it: TPE over one space in which a method's knobs depend on the method.

Multivariate and by groups, which is what Optuna has for such spaces. Numbers to choose from are categories, as scripts
write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from orchestrator.sweep.space import Space, sample


class PlainSearch:
    """Proposes and hears values; more is better.

    Args:
        spaces: knobs by method.
        seed: of the sampler.
    """

    def __init__(self, spaces: Mapping[str, Space], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spaces = spaces
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, warn_independent_sampling=False)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)

    def ask(self) -> tuple[str, dict[str, Any]]:
        """A method and its knobs."""
        self.trial = self.study.ask()
        method = self.trial.suggest_categorical("method", list(self.spaces))
        return method, sample(self.spaces[method], method, self.trial)

    def tell(self, value: float) -> None:
        """Of what was asked for last."""
        self.study.tell(self.trial, value)
