"""python -m hybrid_jax.evaluate --run DIR [--suite NAME] [--json FILE] [evaluation.a=value …]"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.registry import UserError

EXPLANATION = """\
suites:
  held_out  loss and answers together, as training measures them (default)
  loss      cross-entropy and perplexity of the held-out responses
  answers   answers to held-out prompts: reward and its parts, BLEU, eos, length, variety

With the settings of the run the numbers are those of its last evaluation. For a sharper look:
  python -m hybrid_jax.evaluate --run runs/quickstart --num-prompts 1000 --json numbers.json
  python -m hybrid_jax.evaluate --run runs/quickstart --suite answers evaluation.sampler.temperature=0
"""


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m hybrid_jax.evaluate",
        description="Measures the newest policy of a run on its held-out data.",
        epilog=EXPLANATION,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--suite", default="held_out", metavar="NAME", help="what to measure, see below")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="held-out prompts to answer")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluation.a=value", help="settings over those of the run"
    )
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()
    overrides = list(options.overrides)
    if options.num_prompts is not None:
        overrides.append(f"evaluation.num_prompts={options.num_prompts}")

    result = evaluate(options.run, options.suite, overrides)
    print(f"{result['suite']} of {options.run} at step {result['step']}\n")
    print(table(result["numbers"]))
    if options.json is not None:
        _write(Path(options.json), result)


def evaluate(run_dir: str | Path, suite: str = "held_out", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measures the newest policy of a run; returns suite, step and numbers.

    Args:
        run_dir: of a run with a checkpoint.
        suite: a name of `hybrid_jax.evaluation.suites.SUITES`.
        overrides: ``evaluation.a=value`` over the settings of the run.
    """
    from hybrid_jax.evaluation.suites import SUITES
    from hybrid_jax.experiment import load_run_config, make_evaluator
    from hybrid_jax.policy import load_policy
    from hybrid_jax.training.compilation import keep_compiled

    for override in overrides:
        if not override.startswith("evaluation."):
            raise UserError(f"an override of evaluate must begin with 'evaluation.', got {override!r}")
    measure = SUITES[suite]
    config = load_run_config(run_dir, overrides)
    keep_compiled(config.compilation_cache)
    policy = load_policy(run_dir)
    evaluator = make_evaluator(config, policy.model, policy.tokenizer, policy.eos_ids)
    numbers = measure(evaluator, policy.params)
    if not numbers:
        raise UserError(f"suite {suite!r} has nothing to measure: the held-out data or the sampler is missing")
    return {"suite": suite, "step": policy.step, "numbers": numbers}


def table(numbers: Mapping[str, float]) -> str:
    """Names and values in two columns."""
    width = max(map(len, numbers))
    return "\n".join(f"{name:<{width}}  {value:>12.5g}" for name, value in numbers.items())


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
