"""From a config to everything that a run needs: the only file that sees the whole package."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax import Array

from hybrid_jax.core.batches import Example
from hybrid_jax.core.config import to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.core.registry import NOTHING, names_in
from hybrid_jax.core.secrets import without_secrets
from hybrid_jax.core.writing import write_folder, write_text
from hybrid_jax.core.yaml_text import dump_yaml
from hybrid_jax.data import e2e, labelled, preferences  # noqa: F401  these register sources
from hybrid_jax.data.bounded_tokenizer import bounded
from hybrid_jax.data.conversations import Chat
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.evaluation.evaluate import Evaluator
from hybrid_jax.experiment_config import ExperimentConfig, spelled_out
from hybrid_jax.experiment_config import load_config as load_config
from hybrid_jax.experiment_config import load_run_config as load_run_config
from hybrid_jax.models import decoder, markov, memory, ngrams, recurrent, text_encoder  # noqa: F401  these fill BACKBONES
from hybrid_jax.models.base import BACKBONES, LanguageModel
from hybrid_jax.models.folders import hf  # noqa: F401  these fill BACKBONES
from hybrid_jax.models.folders.ours import check_has_format
from hybrid_jax.models.vocabulary import RESIZE
from hybrid_jax.parallel import hosts
from hybrid_jax.parallel.rules import Placement, under
from hybrid_jax.phases import classifier, ppo, reward_model, sft  # noqa: F401  these fill PHASES
from hybrid_jax.reports.report import write_report
from hybrid_jax.runs.banner import banner
from hybrid_jax.runs.changes import Change, record_changes
from hybrid_jax.runs.contents import Contents, contents
from hybrid_jax.runs.evaluator import make_evaluator
from hybrid_jax.runs.files import RunFiles, run_files
from hybrid_jax.runs.head_folders import check_heads, save_heads
from hybrid_jax.runs.identity import ENVIRONMENT, check_is_run, environment, keep_earlier, owned
from hybrid_jax.runs.initial_state import fresh_state, reference_shapes, state_shapes
from hybrid_jax.runs.origin import (
    Origin,
    changes_since,
    find_origin,
    known_tokenizer,
    pinned,
    split,
    tell_origin,
)
from hybrid_jax.runs.policy import NO_ANSWERS, Policy, as_list
from hybrid_jax.runs.samplers import default_sampler
from hybrid_jax.sampling.generation_config import end_tokens, write_generation_config
from hybrid_jax.training import out_of_memory
from hybrid_jax.training.checkpoint import CheckpointConfig, Checkpoints, saved_steps
from hybrid_jax.training.compilation import keep_compiled
from hybrid_jax.training.horizons import horizons, say_what_stays
from hybrid_jax.training.loggers import METRICS_FILE, Logger, open_loggers, read_records
from hybrid_jax.training.loop import train
from hybrid_jax.training.machine import Machine
from hybrid_jax.training.offload import Idle
from hybrid_jax.training.phase import LM, PHASES, MeasuredPhase, ObservingPhase, Phase, Resources, with_talks
from hybrid_jax.training.profiler import Profiler
from hybrid_jax.training.progress import Progress
from hybrid_jax.training.recorder import Recorder
from hybrid_jax.training.scheduler import phase_after, planned_steps, steps_in_a_row
from hybrid_jax.training.state import RunState
from hybrid_jax.training.time_left import TimeLeft, relative_costs, steps_ahead

log = logging.getLogger(__name__)


def build(config: ExperimentConfig, *, allow_change: bool = False) -> Experiment:
    """Loads data and tokenizer and builds model and phases; writes nothing and compiles nothing yet.

    Args:
        config: of the experiment.
        allow_change: whether a run may go on with other settings than it had, where it can.
    """
    keep_compiled(config.compilation_cache)
    files = run_files(config.run_dir)
    check_is_run(files)
    files.fetch()
    config = replace(config, start_from=pinned(config.start_from, files))
    settings = to_dict(config)
    told = partial(
        spelled_out, trust=names_in(settings)
    )  # a run's own config may name no other code than this one
    changes = partial(changes_since, files, config.start_from, settings, told, allow_change)
    changes()
    placement = config.mesh.placement()  # are there so many devices?
    examples = config.data.load("train")
    held_out = functools.cache(partial(config.data.load, "held_out"))
    own_tokenizer = known_tokenizer(files, config.start_from)
    if own_tokenizer is None:
        own_tokenizer = config.tokenizer.build(t for e in examples for t in e.texts)
    _check_hosts(config, own_tokenizer, examples)
    model = config.model.build(own_tokenizer.vocab_size)
    tokenizer = bounded(own_tokenizer, model.vocab_size, RESIZE)
    sources = [getattr(phase, "source", None) for phase in config.phases.values()]
    chat = any(example.messages for example in examples) or any(isinstance(s, Chat) for s in sources)
    eos_ids = end_tokens(model, tokenizer, chat=chat)
    phases = _build_phases(config, placement, model, tokenizer, examples, eos_ids, held_out)
    key = root_key(config.seed, Purpose.TRAINING)
    check_heads(config.heads, config.phases, phases)
    if config.heads or config.checkpoint.export_every is not None:
        check_has_format(config.model)
    answers = LM in config.trained_heads
    evaluator = make_evaluator(config, model, tokenizer, eos_ids, held_out()) if answers else None
    rows = {"train": len(examples), "held_out": len(held_out())}
    components = {"phases": config.phases, "scheduler": config.scheduler}
    made_of = contents(components, own_tokenizer, examples, held_out)
    found = (config, files, model, tokenizer, phases, evaluator, key, eos_ids, placement, rows)
    return Experiment(*found, made_of, changes)


def _check_hosts(config: ExperimentConfig, tokenizer: Tokenizer, examples: Sequence[Example]) -> None:
    """Several processes must be about to do the same."""
    settings = {name: value for name, value in to_dict(config).items() if name != "compilation_cache"}
    hosts.check_same("config", repr(settings))
    hosts.check_same("number of examples", len(examples))
    hosts.check_same("tokenizer", [tokenizer.encode(text) for e in examples[:4] for text in e.texts])


def _build_phases(
    config: ExperimentConfig,
    placement: Placement,
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    examples: Sequence[Example] | None,
    eos_ids: tuple[int, ...],
    held_out: Callable[[], Sequence[Example]] | None = None,
) -> dict[str, Phase]:
    planned = horizons(config.scheduler, config.steps)
    trunk_trains = config.trunk_trains
    for name in planned:
        if not hasattr(config.phases[name], "head") and not isinstance(model, LanguageModel):
            raise UserError(
                f"phases.{name} trains the next token, which the model {BACKBONES.name_of(config.model)} does "
                "not have: on it only heads train"
            )
    return {
        name: phase.build(
            Resources(
                name=name,
                kind=PHASES.name_of(phase),
                model=model,
                tokenizer=tokenizer,
                examples=examples,
                seed=config.seed,
                horizon=planned[name],
                placement=placement,
                optimizer_key="shared" if config.share_optimizer_state else name,
                eos_ids=eos_ids,
                offload=config.offload,
                held_out=held_out,
                phases={other: config.phases[other] for other in planned},
                following=partial(phase_after, config.scheduler, phase=name),
                in_a_row=partial(steps_in_a_row, config.scheduler, phase=name),
                heads=config.heads,
                trunk_trains=trunk_trains,
            )
        )
        for name, phase in config.phases.items()
        if name in planned
    }


def plan_phases(
    config: ExperimentConfig, devices: Sequence[Any] | None = None
) -> tuple[dict[str, Phase], RunState]:
    """The phases and the shapes of the whole state, with what each device holds of it: nothing is made.

    Needs neither data, nor tokenizer, nor weights: of a pretrained model its config.json.

    Args:
        config: of the experiment.
        devices: those to plan for; they may be no more than a description (`jax.experimental.topologies`).
    """
    placement = config.mesh.placement(devices)
    model = config.model.build(getattr(config.tokenizer, "vocab_size", None))  # at most
    phases = _build_phases(config, placement, model, None, None, eos_ids=(0,))
    return phases, state_shapes(model, phases, placement)


@dataclass(frozen=True)
class Experiment:
    """A built experiment: what `hybrid_jax.training.loop.train` runs."""

    config: ExperimentConfig
    files: RunFiles
    model: LanguageModel
    tokenizer: Tokenizer
    phases: Mapping[str, Phase]
    evaluator: Evaluator | None  # of a language model; None where no phase trains one
    key: Array  # the root of all randomness in training; every step folds its number in
    eos_ids: tuple[int, ...]  # every token that ends a response
    placement: Placement
    num_rows: Mapping[str, int]  # of the data, by split
    made_of: Contents
    changes: Callable[[], list[Change]]  # since the checkpoint that it goes on from, in its settings

    @property
    def steps(self) -> int:
        """How many steps all phases take together."""
        return self.config.steps

    @property
    def scheduler(self) -> Any:
        """It chooses the phase of each step."""
        return self.config.scheduler

    @property
    def checkpoint(self) -> CheckpointConfig:
        """When the run is saved and exported."""
        return self.config.checkpoint

    @property
    def offload(self) -> tuple[Idle, ...]:
        """The parts of the state that wait in the host's memory while no phase uses them."""
        return self.config.offload

    def train(self) -> RunState:
        """Trains to the last step and returns the final state; resumes and raises as `training.loop.train`."""
        return train(self)

    def init(self) -> RunState:
        """The state before the first step, a function of config and seed alone."""
        return fresh_state(self.model, self.phases, self.placement, root_key(self.config.seed, Purpose.MODEL))

    def begin(self) -> RunState:
        """The state that the next training begins with; reads it and writes nothing."""
        return self._origin(Checkpoints(self.files.checkpoints, self.checkpoint.keep)).state

    def _origin(self, checkpoints: Checkpoints) -> Origin:
        with out_of_memory.explained("the state of a fresh run"):
            fresh = self.init()
        reference = reference_shapes(self.model, self.placement, fresh.train.params["model"])
        return find_origin(self.files, checkpoints, fresh, reference, self.config.start_from)

    def owned(self) -> contextlib.AbstractContextManager[None]:
        """Holds the run directory during a training, so that nobody else writes it."""
        return owned(self.files)

    def open(self) -> tuple[RunState, Checkpoints, Recorder]:
        """The newest saved state, or a fresh one, with what writes the run directory, which must be `owned`."""
        files, folder = self.files, self.files.folder
        files.fetch()  # another process may have trained here since this was built
        changes = self.changes()
        shapes = state_shapes(self.model, self.phases, self.placement)
        if hosts.is_first():
            at = max(saved_steps(files.checkpoints), default=None)
            log.info("%s", banner(self.config, self.placement, shapes, self.num_rows, at))
        note = {"contents": self.made_of, "horizons": planned_steps(self.scheduler, self.steps)}
        checkpoints = Checkpoints(files.checkpoints, self.checkpoint.keep, before=files.upload, note=note)
        out_of_memory.check_state_fits((shapes.train, shapes.references, shapes.base))
        origin = self._origin(checkpoints)
        state = origin.state
        changes = tell_origin(origin, note, changes, self.config, files.name)
        say_what_stays(self.config.phases, horizons(self.config.scheduler, self.steps))
        resume_step = state.step if origin.is_own else None
        logger = self._open_files(resume_step) if hosts.is_first() else files.open(folder, {}, None)
        if origin.is_branch:
            checkpoints.save(state)  # from now on it does not need the other run
            checkpoints.wait()
        if hosts.is_first():
            record_changes(folder, state.step, changes)
        machine = Machine(list(self.placement.mesh.devices.flat), self.config.peak_tflops)
        profiler = Profiler(self.config.profile, folder / "profile")
        elapsed = max((r.get("seconds", 0.0) for r in read_records(folder / METRICS_FILE)), default=0.0)
        stream = None if hosts.is_first() else io.StringIO()
        time_left = TimeLeft(steps_ahead(self, state), relative_costs(self.phases, shapes))
        progress = Progress(self.steps, state.step, stream, time_left=time_left)
        return state, checkpoints, Recorder(logger, progress, elapsed, machine, profiler)

    def _open_files(self, resume_step: int | None) -> Logger:
        """Writes what a run says of itself, and opens its logs."""
        folder, settings = self.files.folder, to_dict(self.config)
        if resume_step is None:
            keep_earlier(self.files)
        # First of all: it says that the folder is ours.
        write_text(folder / ENVIRONMENT, json.dumps(environment(), indent=1))
        write_text(folder / "config.yaml", dump_yaml(without_secrets(settings)))
        write_folder(folder / "tokenizer", self._save_tokenizer)  # a resumed run trusts it once it is there
        self.files.upload()
        try:
            return open_loggers((*self.config.loggers, self.files), folder, settings, resume_step)
        except OSError as error:
            raise UserError(f"the logs in {folder} cannot be opened: {error.strerror}") from error

    def evaluation_is_due(self, state: RunState, next_phase: str) -> bool:
        """Tells whether to evaluate now: as often as set, before the first step of a phase, and at the end."""
        every = self.config.evaluation.every
        first_of_phase = next_phase not in state.schedule.steps
        on_time = every is not None and state.step % every == 0
        begins = self.config.start_from is not None and state.step == split(self.config.start_from)[1]
        return state.step >= self.steps or first_of_phase or on_time or begins

    def evaluate(
        self, state: RunState
    ) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, list[float]]]:
        """Numbers and samples on the held-out split, and the values by prompt behind some of the numbers."""
        numbers, samples, by_prompt = {}, [], {}
        if self.evaluator is not None:
            numbers, samples, by_prompt = under(self.placement, self.evaluator.run)(state.policy)
        numbers, samples = with_talks(self.phases, state, numbers | self.measure_heads(state), samples)
        where = {"step": state.step, "phase": "evaluation", "kind": "evaluation"}
        return numbers, [{**where, **sample} for sample in samples], by_prompt

    def measure_heads(self, state: RunState) -> dict[str, float]:
        """Numbers that phases measure themselves on the held-out split."""
        numbers: dict[str, float] = {}
        measured = [phase for phase in self.phases.values() if isinstance(phase, MeasuredPhase)]
        # What is all that a run measures needs no more of a name.
        alone = len(measured) == 1 and self.evaluator is None
        for phase in measured:
            where = "evaluation" if alone else f"evaluation/{phase.name}"
            found = under(self.placement, phase.evaluate)(state)
            numbers |= {f"{where}/{name}": value for name, value in found.items()}
        return numbers

    def observe(self, state: RunState, numbers: Mapping[str, float]) -> RunState:
        """The state once these numbers were measured: a mixture of rewards may learn from them."""
        for phase in self.phases.values():
            state = phase.observe(state, numbers) if isinstance(phase, ObservingPhase) else state
        return state

    def export(self, state: RunState, folder: Path | None = None) -> Path:
        """Writes what has trained, with its tokenizer: the language model, and each head with its trunk.

        The language model lies in the folder itself, or else the only head; all others in ``heads/<name>``.
        """
        folder = folder or self.files.folder / "exports" / f"step_{state.step}"
        if self.evaluator is not None:
            self.policy(state).save_pretrained(folder)
            log.info("exported the language model to %s", folder)
        for name, there in self.export_heads(state, folder).items():
            log.info("exported the head %s to %s", name, there)
        return folder

    def export_heads(self, state: RunState, folder: str | Path) -> dict[str, Path]:
        """Writes each head with the trunk below it; returns the folder of each. See `export`."""
        parts = self.phases.values(), state, folder, self.tokenizer, self.config.model
        return save_heads(*parts, beside=self.evaluator is not None)

    def policy(self, state: RunState) -> Policy:
        """The policy of a state, ready to answer.

        Raises:
            UserError: the run trains no language model.
        """
        if self.evaluator is None:
            raise UserError(f"{self.files.name} {NO_ANSWERS}")
        sampler = self.evaluator.sampler or default_sampler(self.model.max_length)
        model, params = as_list(self.model, state.policy)
        rest = self.tokenizer, sampler, self.eos_ids, state.step, self.config.model
        return Policy(model, params, *rest, getattr(self.config.data, "chat_template_kwargs", {}))

    def _save_tokenizer(self, folder: Path) -> None:
        """With the end tokens, which a policy of the run needs too."""
        self.tokenizer.save(folder)
        write_generation_config(folder, None, self.eos_ids)

    def finish(self, state: RunState) -> None:
        """Writes the report of a finished run, and the heads that it has trained."""
        folder = self.files.folder / ("model" if self.evaluator is None else ".")
        for name, there in self.export_heads(state, folder).items():
            log.info("head %s: %s", name, there)
        if hosts.is_first():
            write_report(self.files.where)
            log.info("report: %s/report.html", self.files.name)


def newest_state(run_dir: str | Path, trust: Container[str] = NOTHING) -> tuple[Experiment, RunState]:
    """The experiment of a run, whose data must still be there, and its newest saved state.

    Raises:
        UserError: there is no checkpoint, or the data is gone.
    """
    # Without one, `build` would look at the run that this one names in ``start_from``.
    if not has_checkpoint(run_dir):
        raise UserError(f"{run_dir} holds no checkpoint yet: train it up to its first checkpoint")
    experiment = build(load_run_config(run_dir, trust=trust))
    state = Checkpoints(experiment.files.checkpoints, keep=1).newest(experiment.init())
    assert state is not None, "there is a checkpoint"
    return experiment, state


def has_checkpoint(run_dir: str | Path) -> bool:
    """Tells whether training has left anything there to go on from."""
    return bool(saved_steps(run_files(run_dir).checkpoints))
