"""python -m hybrid_jax.evaluate --run DIR [--suite NAME] [--json FILE] [evaluation.a=value …]
python -m hybrid_jax.evaluate --suite rewards --reward NAME --data FILE [reward.setting=value …]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.cli import ArgumentParser, add_trust, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING, NOTHING
from hybrid_jax.parallel.devices import check_devices

EXPLANATION = """\
suites:
  held_out  loss, answers, each head, and the memory with evaluation.memory_rows, as training measures them
            (default)
  loss      cross-entropy and perplexity of the held-out responses
  answers   answers to held-out prompts: reward and its parts, BLEU, eos, length, variety
  rewards   the texts of a file, by rewards; needs no run

With the settings of the run the numbers are those of its last evaluation. For a sharper look:
  python -m hybrid_jax.evaluate --run runs/quickstart --num-prompts 1000 --json numbers.json
  python -m hybrid_jax.evaluate --run runs/quickstart --suite answers evaluation.sampler.temperature=0

The suite rewards takes --reward (a name, module:function, or a YAML file with name: or parts:), as often as
wanted, and --data: a text a line, or .jsonl with the field response, completion or text; its other fields
are the columns that rewards ask for, such as references:
  python -m hybrid_jax.evaluate --suite rewards --reward bleu --reward length --data answers.jsonl \\
      length.target=20 bleu.max_order=2
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.evaluate",
        description="Measures what a run has trained on its held-out data, or scores a file by rewards.",
        epilog=EXPLANATION,
    )
    parser.add_argument("--run", metavar="DIR", help="the run directory")
    parser.add_argument("--suite", default="held_out", metavar="NAME", help="what to measure, see below")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="held-out prompts to answer")
    parser.add_argument(
        "--reward", action="append", metavar="NAME", help="suite rewards: what scores the texts"
    )
    parser.add_argument("--data", metavar="FILE", help="suite rewards: the texts, .jsonl or one a line")
    parser.add_argument("--response-field", metavar="FIELD", help="suite rewards: the field to score")
    parser.add_argument("--prompt-field", metavar="FIELD", help="suite rewards: the field with the prompt")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="a.b=value",
        help="settings, evaluation.… of the run or NAME.… of a reward",
    )
    add_trust(parser)
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()
    if options.json is not None:
        _check_free(Path(options.json))
    if options.suite == "rewards":
        _score_file(options)
    else:
        _measure_run(options)


def _measure_run(options: argparse.Namespace) -> None:
    if options.run is None:
        raise UserError("--run is missing: the run directory; only --suite rewards needs none")
    if options.reward or options.data:
        raise UserError(f"--reward and --data belong to --suite rewards, got --suite {options.suite}")
    overrides = list(options.overrides)
    if options.num_prompts is not None:
        overrides.append(f"evaluation.num_prompts={options.num_prompts}")

    from hybrid_jax.runs.policy import names_to_trust

    if options.json is not None and not (folder := Path(options.json).parent).is_dir():
        raise UserError(f"{options.json} cannot be written: there is no folder {folder}")
    check_devices()
    trust = names_to_trust(options.trust, options.config)
    result = evaluate(options.run, options.suite, overrides, trust)
    print(f"{result['suite']} of {options.run} at step {result['step']}\n")
    print(table(result["numbers"]))
    if options.json is not None:
        _write(Path(options.json), result)


def _score_file(options: argparse.Namespace) -> None:
    from hybrid_jax.evaluation import reward_suite

    if not options.reward or options.data is None:
        raise UserError("--suite rewards needs --reward NAME and --data FILE")
    if options.run is not None or options.num_prompts is not None:
        raise UserError("--suite rewards scores a file: it takes neither --run nor --num-prompts")
    rewards = reward_suite.load_rewards(options.reward, options.overrides)
    texts = reward_suite.read_texts(options.data, options.response_field, options.prompt_field)
    numbers = reward_suite.summary(reward_suite.score_texts(rewards, texts), texts)
    print(f"rewards of the {numbers['num_texts']} texts of {options.data}\n")
    print(reward_suite.report(numbers))
    if options.json is not None:
        _write(Path(options.json), {"suite": "rewards", "data": options.data, **numbers})


def evaluate(
    run_dir: str | Path,
    suite: str = "held_out",
    overrides: Sequence[str] = (),
    trust: Container[str] = NOTHING,
) -> dict[str, Any]:
    """Measures the newest policy of a run; returns suite, step and numbers.

    Args:
        run_dir: of a run with a checkpoint.
        suite: a name of `hybrid_jax.evaluation.suites.SUITES`.
        overrides: ``evaluation.a=value`` over the settings of the run.
        trust: names in the run's config that may run code.
    """
    from hybrid_jax.evaluation.suites import SUITES
    from hybrid_jax.experiment import load_run_config, newest_state
    from hybrid_jax.runs.evaluator import make_evaluator
    from hybrid_jax.runs.policy import load_policy, run_settings, trains_heads, trains_language_model
    from hybrid_jax.training.compilation import keep_compiled

    for override in overrides:
        if not override.startswith("evaluation."):
            raise UserError(f"an override of evaluate must begin with 'evaluation.', got {override!r}")
    measure = SUITES.find(suite, EVERYTHING)
    settings, numbers, step = run_settings(run_dir), {}, None
    config = load_run_config(run_dir, overrides, trust)
    keep_compiled(config.compilation_cache)
    answers = trains_language_model(settings)
    if not answers and suite != "held_out":
        raise UserError(f"{run_dir} trains heads and no language model: the suite held_out measures heads")
    if answers:
        policy = load_policy(run_dir, trust=trust)
        evaluator = make_evaluator(config, policy.model, policy.tokenizer, policy.eos_ids)
        numbers, step = dict(measure(evaluator, policy.params)), policy.step
    if trains_heads(settings) and suite == "held_out":
        experiment, state = newest_state(run_dir, trust)
        found = experiment.measure_heads(state)
        numbers |= {name.removeprefix("evaluation/"): value for name, value in found.items()}
        step = state.step
    if not numbers:
        raise UserError(
            f"suite {suite!r} has nothing to measure: the held-out data, the sampler or what trained is missing"
        )
    return {"suite": suite, "step": step, "numbers": numbers}


def table(numbers: Mapping[str, float]) -> str:
    """Names and values in two columns."""
    width = max(map(len, numbers))
    return "\n".join(f"{name:<{width}}  {value:>12.5g}" for name, value in numbers.items())


def _check_free(path: Path) -> None:
    """Checks, before anything is measured, that no file of the user lies where the numbers go.

    Raises:
        UserError: there is a folder, or a file that is none of this command.
    """
    try:
        ours = not path.exists() or "suite" in dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise UserError(f"--json {path} is there and holds no earlier result: give a new file")


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
