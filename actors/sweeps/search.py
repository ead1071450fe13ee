"""Choose trials with Ray Tune: Optuna's suggestions, and asynchronous successive halving.

The loop of actors.sweeps.runner feeds Tune's searcher and scheduler with the trials' metrics. After a kill, both are
restored from the journal and the run folders, so neither stores anything.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from rlhf.config.files.sweep import Sweep
from rlhf.config.schema.sweep import AshaMethod, BayesianMethod, Parameter
from rlhf.errors import UserError
from rlhf.sweeps.journal import Journal, Trial
from rlhf.sweeps.space import Values, bounds, fitting
from rlhf.sweeps.strategy import Listed, Strategy
from rlhf.sweeps.trial_results import judged_folder, metric_values

METRIC = "value"


def strategy_of(sweep: Sweep, journal: Journal, known: list[Values] | None) -> Strategy:
    method = sweep.config.method
    if isinstance(method, BayesianMethod):
        return Bayesian(sweep, journal, trials=method.trials)
    assert known is not None
    if isinstance(method, AshaMethod):
        return Asha(sweep, journal, known, method)
    return Listed(journal, known)


def require_optuna() -> None:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "sweep.method: bayesian needs the package optuna, which is not installed here: install the extra `sweeps` "
            "(uv pip install 'ray-rlhf[sweeps]'), or use random or asha."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class Bayesian(Strategy):
    """Suggest each trial when a slot is free, based on all ended trials."""

    def __init__(self, sweep: Sweep, journal: Journal, *, trials: int) -> None:
        require_optuna()
        from ray.tune.search.optuna import OptunaSearch

        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        self.sweep, self.journal, self.trials = sweep, journal, trials
        self.parameters = sweep.config.parameters
        self.search = OptunaSearch(
            {key: _distribution(parameter) for key, parameter in self.parameters.items()},
            metric=METRIC,
            mode="min" if sweep.lower_is_better else "max",
            seed=sweep.config.seed + len(journal.trials),  # else a restart would repeat the first draws
        )
        self.suggested: set[int] = set()
        for trial in journal.trials.values():
            if trial.state != "open":
                self.ended(trial)
        self.left = [number for number, trial in journal.trials.items() if trial.state == "open"]

    def next(self) -> Trial | None:
        """Return an unfinished trial from before a kill, else a new suggestion."""
        if self.left:
            return self.journal.trials[self.left.pop(0)]
        number = len(self.journal.trials)
        if number >= self.trials:
            return None
        suggested: dict[str, Any] = self.search.suggest(str(number))
        values = {
            key: fitting(parameter, suggested[key]) if parameter.values is None else parameter.values[suggested[key]]
            for key, parameter in self.parameters.items()
        }
        self.suggested.add(number)
        return self.journal.add(number, values)

    def ended(self, trial: Trial) -> None:
        values = metric_values(judged_folder(self.sweep, self.journal.run_folder(trial.number)), self.sweep.metric)
        failed = trial.state == "failed" or not values
        if trial.number in self.suggested:
            result = None if failed else {METRIC: values[-1][1]}
            self.search.on_trial_complete(str(trial.number), result, error=failed)
            return
        point = {
            key: trial.parameters[key] if parameter.values is None else parameter.values.index(trial.parameters[key])
            for key, parameter in self.parameters.items()
        }
        self.search.add_evaluated_point(point, 0.0 if failed else values[-1][1], error=failed)


class Asha(Listed):
    """Draw random trials, and stop bad trials early, judged after equally many steps."""

    def __init__(self, sweep: Sweep, journal: Journal, known: list[Values], method: AshaMethod) -> None:
        super().__init__(journal, known)
        from ray.tune.schedulers import AsyncHyperBandScheduler

        self.scheduler = AsyncHyperBandScheduler(
            time_attr="step",
            metric=METRIC,
            mode="min" if sweep.lower_is_better else "max",
            max_t=sweep.base.runs[sweep.judged].train.num_steps,
            grace_period=method.grace_steps,
            reduction_factor=method.reduction_factor,
            stop_last_trials=False,
        )
        self.added: set[int] = set()
        for trial in journal.trials.values():
            for step, value in metric_values(judged_folder(sweep, journal.run_folder(trial.number)), sweep.metric):
                self.report(trial, step, value)

    def report(self, trial: Trial, step: int, value: float) -> bool:
        tune_trial: Any = SimpleNamespace(trial_id=str(trial.number))
        if trial.number not in self.added:
            self.added.add(trial.number)
            self.scheduler.on_trial_add(None, tune_trial)
        if step == 0:
            return False
        action = self.scheduler.on_trial_result(None, tune_trial, {"step": step, METRIC: value})
        return bool(action == self.scheduler.STOP)


def _distribution(parameter: Parameter) -> Any:
    """Return the parameter as an Optuna distribution. Choices are numbered, because a choice may have any type."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values is not None:
        return CategoricalDistribution(tuple(range(len(parameter.values))))
    (low, high), log = bounds(parameter), parameter.scale == "log"
    if parameter.integer:
        return IntDistribution(int(low), int(high), log=log, step=int(parameter.step or 1))
    return FloatDistribution(low, high, log=log, step=parameter.step)
