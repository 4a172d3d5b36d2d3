"""python -m hybrid_jax.plan --config FILE --topology v5e:4x4 [--search] [a.b=value …]"""

from __future__ import annotations

import argparse
import contextlib
import json
import math

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.parallel.devices import check_devices

EXPLANATION = """\
Compiles every program of a step of every phase for devices that need not be there, and says what each needs. Of
a pretrained model only its config.json is read; data are not. Topologies: local, and slices of TPUs (extra tpu)
such as v5e:4x4, v6e:16x16, v4:2x2x4, v5p:4x4x4, tpu7x:2x2x1; 2xv5p:4x4x4 are two slices.

examples:
  python -m hybrid_jax.plan --config configs/quickstart.yaml --topology local
  python -m hybrid_jax.plan --config configs/tpu/llama31_8b.yaml --topology v5e:4x4 --price 1.2
  python -m hybrid_jax.plan --config configs/tpu/llama31_8b.yaml --topology v5e:4x4 --search

exit codes: 0 planned, whether it fits or not (the last line and the JSON's "fits" say), 2 a mistake in usage or
config (one line on stderr), 130 Ctrl-C
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.plan",
        description="Says before a run whether it fits, and how fast it can be at best.",
        epilog=EXPLANATION,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, as for train")
    parser.add_argument(
        "--topology", default="local", metavar="NAME", help="devices to plan for (default local)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--price", type=_positive, metavar="X", help="dollars for a chip and an hour")
    parser.add_argument("--prompt-length", type=_count, metavar="P", help="tokens of the longest prompts")
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and microbatches")
    parser.add_argument(
        "--search-limit", type=_count, default=12, metavar="N", help="plans to try (default 12)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over those of the file")
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()
    check_devices(expect_accelerator=False)

    from hybrid_jax.planner import Planner, trial_json
    from hybrid_jax.planning.plan import as_json
    from hybrid_jax.planning.search import render_search
    from hybrid_jax.planning.table import render
    from hybrid_jax.planning.topology import find_topology

    planner = Planner(options, find_topology(options.topology))
    if not options.search:
        plan = planner.plan(options.overrides)
        print(json.dumps(as_json(plan)) if options.json else render(plan))
        return
    trials = planner.search(options.search_limit)
    if options.json:
        print(json.dumps({"trials": [trial_json(trial) for trial in trials]}))
        return
    if trials and trials[0].plan is not None:
        print(render(trials[0].plan), end="\n\n")
    print(render_search(trials, options.search_limit))


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")


if __name__ == "__main__":
    run_command(main)
