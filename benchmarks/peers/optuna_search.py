"""The search as a plain Optuna script has it: TPE over one space in which a method's knobs depend on the method.

Multivariate and by groups, which is what Optuna has for such spaces. Numbers to choose from are categories, as scripts
write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from methods.knobs import Choice, Range


class PlainSearch:
    """Proposes and hears values; more is better.

    Args:
        spaces: knobs by method.
        seed: of the sampler.
    """

    def __init__(self, spaces: Mapping[str, Mapping[str, Any]], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spaces = spaces
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, warn_independent_sampling=False)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)

    def ask(self) -> tuple[str, dict[str, Any]]:
        """A method and its knobs."""
        self.trial = self.study.ask()
        method = self.trial.suggest_categorical("method", list(self.spaces))
        return method, {knob: self._value(f"{method}.{knob}", d) for knob, d in self.spaces[method].items()}

    def _value(self, name: str, domain: Any) -> Any:
        if isinstance(domain, Choice):
            return self.trial.suggest_categorical(name, list(domain.values))
        if isinstance(domain, Range) and domain.int:
            return self.trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
        if isinstance(domain, Range):
            return self.trial.suggest_float(name, domain.low, domain.high, log=domain.log)
        return domain

    def tell(self, value: float) -> None:
        """Of what was asked for last."""
        self.study.tell(self.trial, value)
