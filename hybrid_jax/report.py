"""python -m hybrid_jax.report --run DIR [--run DIR …]"""

from __future__ import annotations

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.reports.report import write_report


def main(arguments: list[str]) -> None:
    """Writes the report of each run that is named, and prints its path."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.report", description="Writes report.html into a run directory."
    )
    parser.add_argument(
        "--run", required=True, action="append", metavar="DIR", help="a run directory; again for more of them"
    )
    for run_dir in parser.parse_args(arguments).run:
        if not run_dir:
            parser.error("argument --run: needs a path, got an empty text")
        write_report(run_dir := run_dir.rstrip("/") or "/")
        print(f"{run_dir}/report.html")


if __name__ == "__main__":
    run_command(main)
