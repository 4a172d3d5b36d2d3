"""python -m hybrid_jax.train --config configs/quickstart.yaml [a.b=value …]"""

from __future__ import annotations

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.parallel.devices import check_devices
from hybrid_jax.parallel.hosts import joined

EXPLANATION = """\
The run directory (setting run_dir) receives config.yaml, metrics.jsonl, samples.jsonl, checkpoints/ and, at the
end, report.html. The same command goes on from the newest checkpoint there. Ctrl-C, SIGTERM and SIGHUP save
first.

examples:
  python -m hybrid_jax.train --config configs/quickstart.yaml
  python -m hybrid_jax.train --config configs/quickstart.yaml run_dir=runs/mine seed=1 phases.ppo.epochs=2

exit codes: 0 done, 2 a mistake in usage, config or data (one line on stderr), 130 Ctrl-C, 143 SIGTERM,
129 SIGHUP
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.train",
        description="Trains a language model by examples (SFT) and by reward (PPO), as a config file says.",
        epilog=EXPLANATION,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file; configs/ holds some")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over those of the file")
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="go on with the run in run_dir although settings of optimizers, rewards or phases differ; "
        "changes.jsonl there keeps what has changed",
    )
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()

    with joined():  # before JAX looks at any device
        check_devices()
        from hybrid_jax.experiment import build, load_config
        from hybrid_jax.runs.files import run_files
        from hybrid_jax.runs.identity import owned
        from hybrid_jax.training.interrupts import leaving_in_order

        config = load_config(options.config, options.overrides)
        with owned(run_files(config.run_dir)):  # so that a second trainer hears of it before it loads anything
            with leaving_in_order():
                experiment = build(config, allow_change=options.allow_change)
            experiment.train()


if __name__ == "__main__":
    run_command(main)
