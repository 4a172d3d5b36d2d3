"""The notebook's way in: `HybridTrainer`, a thin face over the same experiment that the commands run."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_jax.core.cli import set_up_logging
from hybrid_jax.core.config import load_yaml, parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING, names_in
from hybrid_jax.data.listed import Listed
from hybrid_jax.experiment import Experiment, ExperimentConfig, build, has_checkpoint
from hybrid_jax.parallel.devices import check_devices
from hybrid_jax.reports.report import write_report
from hybrid_jax.rewards.base import DeviceReward, StartedReward
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.runs.policy import Policy, check_spelling, load_policy
from hybrid_jax.training.interrupts import Interrupted
from hybrid_jax.training.loggers import METRICS_FILE, read_records
from hybrid_jax.training.phase import PHASES


class HybridTrainer:
    """Trains, answers, measures and exports from Python.

        trainer = HybridTrainer("configs/quickstart.yaml", reward=my_function, overrides=["run_dir=runs/mine"])
        trainer.train()
        trainer.generate(["The Eagle is"])
        trainer.save_pretrained("out")

    Args:
        config: a YAML file, or an `ExperimentConfig`.
        reward: replaces the reward of every phase that has one: a function ``reward(prompts, responses,
            **columns)`` that returns a number for each response (or a reward component), or the mapping
            ``{"parts": ...}`` that a YAML file holds.
        model: a backbone component, the mapping of a YAML file, or a Hugging Face folder, whose tokenizer
            is then used, too.
        data: a source component, the mapping of a YAML file, or a list of `Example`s or of rows with "prompt"
            and "completion", every tenth prompt of which is held out.
        overrides: ``a.b=value`` texts over the file.
        allow_change: goes on with the run in ``run_dir`` although settings differ that it can go on with.
        settings: whole settings of the experiment, such as ``steps=100``, over everything else.

    Raises:
        UserError: one line that says what is wrong with the config, the data or the run directory.
    """

    def __init__(
        self,
        config: str | Path | ExperimentConfig,
        reward: Callable[..., Any] | Mapping[str, Any] | None = None,
        *,
        model: Any = None,
        data: Any = None,
        overrides: Sequence[str] = (),
        allow_change: bool = False,
        **settings: Any,
    ):
        set_up_logging()
        check_devices()
        given = _settings_of(config, overrides)
        if model is not None:
            given |= _model_settings(model)
        if data is not None:
            given["data"] = Listed.of(data) if _is_list(data) else data
        if reward is not None:
            given["phases"] = _with_reward(given.get("phases"), reward)
        if "run_dir" in settings:
            settings["run_dir"] = str(settings["run_dir"])
        self.config = parse(ExperimentConfig, {**given, **settings}, trust=EVERYTHING)
        self.experiment: Experiment = build(self.config, allow_change=allow_change)
        self._policy: Policy | None = None

    def train(self) -> dict[str, float]:
        """Trains to the last step and returns the last evaluation; goes on from what is in ``run_dir``.

        Ctrl-C (a notebook's stop) saves the run first; the next call goes on.
        """
        self._policy = None  # it is not the newest any more, also where this is interrupted
        try:
            state = self.experiment.train()
        except Interrupted as stop:
            if stop.code == 128 + signal.SIGINT:  # a notebook knows how to show this one
                raise KeyboardInterrupt("the run is saved; train() goes on") from None
            raise
        if self.experiment.evaluator is not None:  # else heads alone have trained
            self._policy = self.experiment.policy(state)
        return self._last_evaluation()

    def generate(
        self, prompts: Sequence[str] | str, *, num_samples: int = 1, seed: int = 0, **sampler: Any
    ) -> list[str]:
        """Answers of the newest policy, ``num_samples`` to each prompt.

        Args:
            prompts: one or more texts.
            num_samples: answers to each, one after the other.
            seed: of the sampling.
            sampler: settings such as ``temperature=0.7, max_new_tokens=40``.
        """
        policy = self.policy
        own: Any = policy.sampler
        settings = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        policy = replace(policy, sampler=parse(type(own), {**settings, **sampler}, "sampler"))
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return [answer.response for answer in policy.generate(texts, seed=seed, num_samples=num_samples)]

    def evaluate(self) -> dict[str, float]:
        """Numbers of what has trained on the held-out data: ``evaluation/<metric>``."""
        numbers: dict[str, float] = {}
        if self.experiment.evaluator is not None:
            numbers |= self.experiment.evaluator.run(self.policy.params)[0]
        if self.config.heads:
            numbers |= self.experiment.measure_heads(self.experiment.begin())
        return numbers

    def save_pretrained(self, folder: str | Path, *, adapter: bool = False) -> Path:
        """Writes what has trained, see `Experiment.export`; its ``adapter`` alone as one of `peft`."""
        if self.experiment.evaluator is not None:
            folder = self.policy.save_pretrained(folder, adapter=adapter)
        if self.config.heads:
            self.experiment.export_heads(self.experiment.begin(), folder)
        return Path(folder)

    def report(self) -> Path:
        """Writes ``report.html`` into the run directory and returns its path; in a bucket, that of a copy."""
        return write_report(self.experiment.files.where)

    def _last_evaluation(self) -> dict[str, float]:
        records = read_records(self.experiment.files.folder / METRICS_FILE)
        last = [record for record in records if record.get("phase") == "evaluation"][-1]
        return {name: value for name, value in last.items() if name.startswith("evaluation/")}

    @property
    def policy(self) -> Policy:
        """The newest policy: just trained, of the run directory, of ``start_from``, or untrained."""
        if self._policy is None:
            try:
                self._policy = load_policy(self.experiment.files.where, trust=names_in(to_dict(self.config)))
            except UserError:
                if has_checkpoint(self.experiment.files.where):
                    raise
                return self.experiment.policy(self.experiment.begin())
        return self._policy


def _settings_of(config: str | Path | ExperimentConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The top level of an experiment, each setting as a mapping or as the object that it is."""
    if not isinstance(config, ExperimentConfig):
        settings = load_yaml(config, overrides, ExperimentConfig, EVERYTHING)
        check_spelling(settings)
        return settings
    if overrides:
        raise UserError("overrides must be empty for an ExperimentConfig: change it by dataclasses.replace")
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _model_settings(model: Any) -> dict[str, Any]:
    if not isinstance(model, str | Path):
        return {"model": model}
    if not Path(model).is_dir():
        raise UserError(f"model must be a component, a mapping or a Hugging Face folder, got {str(model)!r}")
    return {
        "model": {"name": "pretrained", "path": str(model)},
        "tokenizer": {"name": "huggingface", "path": str(model)},
    }


def _with_reward(phases: Any, reward: Callable[..., Any] | Mapping[str, Any]) -> dict[str, Any]:
    """The phases with another reward in each that has one."""
    phases = dict(phases or {})
    rewarded = [name for name, phase in phases.items() if _takes_reward(name, phase)]
    if not rewarded:
        raise UserError(f"reward has no phase to go to; phases: {', '.join(phases) or 'none'}")
    given = reward if isinstance(reward, Mapping) else _one_part(reward)
    composite = parse(_Rewarded, {"reward": given}, trust=EVERYTHING)
    for name in rewarded:
        old = phases[name]
        phases[name] = (
            {**(old or {}), "reward": composite.reward}
            if isinstance(old, Mapping) or old is None
            else replace(old, reward=composite.reward)
        )
    return phases


@dataclass(frozen=True)
class _Rewarded:
    reward: CompositeReward


def _takes_reward(name: str, phase: Any) -> bool:
    component = (
        PHASES.find((phase or {}).get("name", name), EVERYTHING)
        if (phase is None or isinstance(phase, Mapping))
        else type(phase)
    )
    return any(field.name == "reward" for field in dataclasses.fields(component))


def _one_part(reward: Callable[..., Any]) -> Any:
    if isinstance(reward, CompositeReward):
        return reward
    if not callable(reward) and not isinstance(reward, StartedReward | DeviceReward):
        raise UserError(f"reward must be a function, a component or {{parts: ...}}, got {reward!r}")
    name = getattr(reward, "__name__", type(reward).__name__)
    return {"parts": {name if name.isidentifier() else "reward": {"reward": reward}}}


def _is_list(data: Any) -> bool:
    return isinstance(data, Sequence) and not isinstance(data, str)
