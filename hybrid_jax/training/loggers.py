"""Writes a run's records: always as JSON lines, also to TensorBoard and Weights & Biases if a config says so.

A metrics record is ``{"step", "phase", "kind", "seconds", "<phase>/<metric>": float, ...}``: the phase by its
name in the config, the kind by that of its settings. That of an evaluation, whose phase and kind are both
"evaluation", adds the values of each prompt, ``"by_prompt": {"evaluation/score": [float, ...], ...}``. A sample
record is ``{"step", "phase", "kind", "split", "index", "prompt", "response", "score", "parts"}``, with another
``"extreme": {"part", "rank"}`` where it was picked as one that a part likes best or least. Steps count from 0:
the record of update s carries s, and so does an evaluation made just before that update. Thus a run that
resumes at step s writes every record with ``step >= s`` again, and the loggers forget those first. That of an
evaluation of step s is forgotten once it is made again and not before: it may be the last of a longer run.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.core.secrets import without_secrets

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
BY_PROMPT = "by_prompt"  # in the record of an evaluation: metric -> its value for each held-out prompt


class Logger(Protocol):
    """Receives the records of a run, in order, from the one process that logs."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Takes the record of a step or of an evaluation."""
        ...

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Takes the answers of an evaluation."""
        ...

    def close(self) -> None:
        """Writes what is still held back; nothing comes after it."""
        ...


class LoggerConfig(Protocol):
    """The settings of a logger, a component of `LOGGERS`."""

    def open(self, run_dir: Path, config: dict[str, Any], resume_step: int | None) -> Logger:
        """Opens the logger of a run that goes on at ``resume_step``, or that is new where it is None."""
        ...


LOGGERS: Registry[LoggerConfig] = Registry("logger")


def open_loggers(
    loggers: Sequence[LoggerConfig], run_dir: Path, config: dict[str, Any], resume_step: int | None
) -> Logger:
    """Opens one logger that passes every record to the JSON lines and to each of ``loggers``."""
    extra = [logger for logger in loggers if not isinstance(logger, JsonLines)]
    return _FanOut([logger.open(run_dir, config, resume_step) for logger in (JsonLines(), *extra)])


@dataclass(frozen=True)
class _FanOut:
    loggers: list[Logger]

    def metrics(self, record: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.metrics(record)

    def samples(self, records: list[dict[str, Any]]) -> None:
        for logger in self.loggers:
            logger.samples(records)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


@LOGGERS.register("jsonl")
@settings
class JsonLines:
    """Writes ``metrics.jsonl`` and ``samples.jsonl``: a line of strict JSON for each record, at once.

    A NaN or an infinity is written as null. On resume the lines of steps that will run again are dropped, and
    so is a last line that a ``kill -9`` left incomplete: the files end up as if the run had never stopped, but
    for its timings.
    """

    def open(self, run_dir: Path, config: dict[str, Any], resume_step: int | None) -> Logger:
        """Opens the logger of a run that goes on at ``resume_step``, or that is new where it is None."""
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, SAMPLES_FILE):
            _keep(run_dir / name, lambda record: _is_before(record, resume_step))
        return _JsonLinesLogger(run_dir, resume_step)


def _is_before(record: Mapping[str, Any], step: int | None) -> bool:
    """Tells whether a run that goes on at ``step`` keeps the record, since it may not write it again."""
    evaluated = record["step"] == step and record.get("phase") == "evaluation"
    return step is not None and (record["step"] < step or evaluated)


class _JsonLinesLogger:
    def __init__(self, run_dir: Path, resume_step: int | None):
        self._files = {name: (run_dir / name).open("a") for name in (METRICS_FILE, SAMPLES_FILE)}
        self._resume_step = resume_step
        self._again = False  # the evaluation of that step is being made again

    def metrics(self, record: dict[str, Any]) -> None:
        self._again = record["step"] == self._resume_step and record.get("phase") == "evaluation"
        self._write(METRICS_FILE, [record])

    def samples(self, records: list[dict[str, Any]]) -> None:
        self._write(SAMPLES_FILE, records)

    def _write(self, name: str, records: list[dict[str, Any]]) -> None:
        if not self._again:
            return self._append(name, records)
        step, path = self._resume_step or 0, Path(self._files[name].name)
        self._files[name].close()
        try:
            _keep(path, lambda record: record["step"] < step, records)
            self._files[name] = path.open("a")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        file = self._files[name]
        try:
            file.writelines(map(_line, records))
            file.flush()
        except OSError as error:
            raise UserError(f"cannot write {file.name}: {error.strerror}") from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the records of a JSON-lines file; a line that is not a record (left incomplete) is skipped."""
    if not path.is_file():
        return
    with path.open(errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _of_step(path: Path, step: int | None) -> list[dict[str, Any]]:
    return [record for record in read_records(path) if record["step"] == step]


def phase_label(phase: str, kind: str | None) -> str:
    """The name of a phase, with its kind in brackets where that is another word: ``rl (ppo)``.

    Of a kind from outside the package, ``my_module:Mine``, only the last part is shown.
    """
    short = (kind or phase).rpartition(":")[2]
    return phase if short == phase else f"{phase} ({short})"


def without_extremes(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out answers that were picked for their scores, so that the prompts are the same each time.

    Conversations and the heads of a memory are no answers to a prompt: they are left out, too.
    """
    return [record for record in samples if not record.keys() & {"extreme", "conversation", "memory"}]


def without_timings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what depends on the machine: all else is the same to the last bit when a run is repeated."""
    of_the_day = ("seconds", "tokens_per_second", "mfu")
    return {
        name: value
        for name, value in record.items()
        if not name.endswith(of_the_day) and not name.startswith(("memory/", "compile/"))
    }


def strict(value: Any) -> Any:
    """Converts ``value`` to what strict JSON can hold: array scalars become numbers, non-finite ones None."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps(strict(record), allow_nan=False) + "\n"


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool], new: Sequence[dict[str, Any]] = ()) -> None:
    """Keeps the wanted records and adds new ones; a second file replaces the first: a kill loses none."""
    if not path.exists():
        return
    kept = path.with_suffix(".kept")
    with kept.open("w") as file:
        file.writelines(_line(record) for record in (*filter(wanted, read_records(path)), *new))
    os.replace(kept, path)


@LOGGERS.register("tensorboard")
@settings
class TensorBoard:
    """Writes event files in ``<run_dir>/tensorboard``: a scalar for each metric, the samples as a table.

    On resume a marker tells TensorBoard to hide the steps that run again; of these, an evaluation that
    `JsonLines` has kept is written again.
    """

    flush_seconds: Count = 10  # longest time until an event is on the disk

    def open(self, run_dir: Path, config: dict[str, Any], resume_step: int | None) -> Logger:
        """Opens the logger of a run that goes on at ``resume_step``, or that is new where it is None."""
        writer = _import_extra("tensorboardX", extra="tensorboard").SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=resume_step, flush_secs=self.flush_seconds
        )
        logger = _TensorBoardLogger(writer)
        for record in _of_step(run_dir / METRICS_FILE, resume_step):
            logger.metrics(record)
        logger.samples(_of_step(run_dir / SAMPLES_FILE, resume_step))
        return logger


class _TensorBoardLogger:
    def __init__(self, writer: Any):
        self._writer = writer

    def metrics(self, record: dict[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def samples(self, records: list[dict[str, Any]]) -> None:
        records = without_extremes(records)
        for step in sorted({record["step"] for record in records}):
            rows = [_markdown_row(record) for record in records if record["step"] == step]
            table = "\n".join(["prompt | response | score", "--- | --- | ---", *rows])
            self._writer.add_text("samples", table, step)

    def close(self) -> None:
        self._writer.close()


def _markdown_row(record: dict[str, Any]) -> str:
    score = "" if record["score"] is None else f"{record['score']:.3f}"  # None without a reward
    cells = (record["prompt"], record["response"], score)
    return " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells)


@LOGGERS.register("wandb")
@settings
class WeightsAndBiases:
    """Writes a Weights & Biases run with its files in ``<run_dir>/wandb``.

    Nothing leaves the machine unless ``mode`` is "online"; ``wandb sync`` uploads an offline run. The config is
    recorded without secrets; code, command line, console output and git state are not recorded.
    """

    project: str = "hybrid_jax"  # of the run at wandb
    mode: Literal["offline", "online"] = "offline"  # offline writes files alone, online uploads them
    entity: str | None = None  # user or team that the run belongs to; null is the default of the key
    name: str | None = None  # of the run; null is that of its directory
    tags: tuple[str, ...] = ()  # of the run

    def open(self, run_dir: Path, config: dict[str, Any], resume_step: int | None) -> Logger:
        """Opens the logger of a run that goes on at ``resume_step``, or that is new where it is None."""
        wandb = _import_extra("wandb", extra="wandb")
        run_dir.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
        )
        try:
            run = wandb.init(
                project=self.project,
                mode=self.mode,
                entity=self.entity,
                name=self.name or run_dir.name,
                tags=list(self.tags),
                id=_wandb_id(run_dir, resume_step),
                resume="allow",
                dir=str(run_dir),
                config=strict(without_secrets(config)),
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb: {error}; `mode: offline` needs neither key nor network") from error
        run.define_metric("*", step_metric="step")
        return _WandbLogger(run, wandb.Table)


class _WandbLogger:
    def __init__(self, run: Any, table: Any):
        self._run, self._table = run, table

    def metrics(self, record: dict[str, Any]) -> None:
        self._run.log({"step": record["step"], **_scalars(record)})

    def samples(self, records: list[dict[str, Any]]) -> None:
        if records := without_extremes(records):
            columns = ["step", "index", "prompt", "response", "score"]
            rows = [[record[column] for column in columns] for record in records]
            self._run.log({"step": records[0]["step"], "samples": self._table(columns=columns, data=rows)})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_dir: Path, resume_step: int | None) -> str:
    """The id of the run that is continued, or a new one for a new run."""
    file = run_dir / "wandb_run_id"
    if resume_step is None or not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if "/" in name and value is not None}


def _import_extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the logger needs {module}, which is not installed: pip install -e '.[{extra}]' in the checkout"
        ) from error
