"""python -m hybrid_jax.export --run DIR --output DIR"""

from __future__ import annotations

from hybrid_jax.core.cli import ArgumentParser, add_trust, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.devices import check_devices

EXAMPLES = """\
  python -m hybrid_jax.export --run runs/quickstart --output my_model
  python -m hybrid_jax.export --run runs/lora --output my_adapter --adapter
  python -m hybrid_jax.export --run runs/quickstart --output my_model --dtype bfloat16 --value
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.export",
        description="Writes what a run has trained, as it is now: its language model as a Hugging Face folder "
        "(ours, where there is no such format), with tokenizer and generation settings; its heads, each "
        "with the model below it, in heads/NAME, or in the folder itself where a head is all that has trained.",
        epilog="examples:\n" + EXAMPLES,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or an earlier export")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with LoRA, write the adapter alone, as a folder that peft loads; else it is merged",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights in the files (default float32)",
    )
    parser.add_argument(
        "--value",
        action="store_true",
        help="also write the value function, as a classifier with one label in the folder value",
    )
    add_trust(parser)
    options = parser.parse_args(arguments)
    set_up_logging()
    check_devices(expect_accelerator=False)

    from hybrid_jax.experiment import newest_state
    from hybrid_jax.runs.policy import (
        load_policy,
        names_to_trust,
        run_settings,
        trains_heads,
        trains_language_model,
    )
    from hybrid_jax.runs.value import save_value

    settings, trust = run_settings(options.run), names_to_trust(options.trust, options.config)
    answers = trains_language_model(settings)
    if answers:
        policy = load_policy(options.run, trust=trust)
        folder = policy.save_pretrained(options.output, adapter=options.adapter, dtype=options.dtype)
        print(f"{folder}  (language model, step {policy.step})")
    elif options.adapter or options.value or options.dtype != "float32":
        raise UserError(f"{options.run} trains no language model: --adapter, --value and --dtype are for one")
    if options.value:
        print(f"{save_value(options.run, options.output, options.dtype, trust)}  (value)")
    if trains_heads(settings):
        experiment, state = newest_state(options.run, trust)
        for name, there in experiment.export_heads(state, options.output).items():
            print(f"{there}  (head {name}, step {state.step})")


if __name__ == "__main__":
    run_command(main)
