"""python -m hybrid_jax.train --config configs/quickstart.yaml [a.b=value …]"""

from __future__ import annotations

import logging

from hybrid_jax.core.cli import ArgumentParser, run_command


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m hybrid_jax.train", description="Trains; the same command resumes."
    )
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over those of the file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)

    from hybrid_jax.experiment import build, load_config
    from hybrid_jax.training.loop import train

    train(build(load_config(options.config, options.overrides)))


if __name__ == "__main__":
    run_command(main)
