"""python -m hybrid_jax.export --run DIR --output DIR"""

from __future__ import annotations

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging

EXAMPLES = """\
  python -m hybrid_jax.export --run runs/quickstart --output my_model
  python -m hybrid_jax.export --run runs/lora --output my_adapter --adapter
"""


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m hybrid_jax.export",
        description="Writes the newest policy of a run as a Hugging Face folder: weights, tokenizer and "
        "generation settings.",
        epilog="examples:\n" + EXAMPLES,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or an earlier export")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with LoRA, write the adapter alone, as a folder that peft loads; else it is merged",
    )
    options = parser.parse_args(arguments)
    set_up_logging()

    from hybrid_jax.policy import load_policy

    policy = load_policy(options.run)
    print(f"{policy.save_pretrained(options.output, adapter=options.adapter)}  (step {policy.step})")


if __name__ == "__main__":
    run_command(main)
