"""python -m hybrid_jax.preferences pairs | split | agree | leaks …"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.writing import write_text

EXPLANATION = """\
  pairs   rankings, ratings or votes to pairs for a reward model or a preference phase:
            {"prompt": …, "responses": [texts], "ranking": [places] | "ratings": [numbers] | "votes": [indices]}
            or one rating a row: {"prompt": …, "response": text, "rating": number}
  split   pairs to a training and a held-out file, all pairs of a prompt on one side
  agree   how far annotators agree: rows {"item": …, "annotator": …, "label": …}
  leaks   what a held-out file shares with a training file

  python -m hybrid_jax.preferences pairs votes.jsonl --output pairs.jsonl --least-margin 0.2
  python -m hybrid_jax.preferences split pairs.jsonl --train train.jsonl --held-out test.jsonl
  python -m hybrid_jax.preferences agree labels.jsonl
  python -m hybrid_jax.preferences leaks train.jsonl test.jsonl
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.preferences",
        description="Makes pairs of what people said, divides them, and measures agreement and leaks.",
        epilog=EXPLANATION,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="pairs | split | agree | leaks")
    pairs = commands.add_parser("pairs", help="rankings, ratings or votes to pairs")
    pairs.add_argument("file", metavar="FILE", help="the rows, .jsonl")
    pairs.add_argument("--output", metavar="FILE", required=True, help="where the pairs go")
    pairs.add_argument(
        "--least-margin",
        type=float,
        default=0.0,
        metavar="X",
        help="leave out pairs no further apart (0: ties)",
    )
    pairs.add_argument(
        "--extremes", action="store_true", help="of each row only the best answer against the worst"
    )
    split = commands.add_parser("split", help="pairs to a training and a held-out file")
    split.add_argument("file", metavar="FILE", help="the pairs, .jsonl")
    split.add_argument("--train", metavar="FILE", required=True, help="where the training pairs go")
    split.add_argument("--held-out", metavar="FILE", required=True, help="where the held-out pairs go")
    split.add_argument(
        "--fraction", type=float, default=0.1, metavar="X", help="share of the prompts to hold out (0.1)"
    )
    split.add_argument(
        "--length-matched",
        type=float,
        metavar="R",
        help="hold out only pairs with |log(words better / words worse)| up to R, won as often by either",
    )
    agree = commands.add_parser("agree", help="Cohen's and Fleiss' kappa, Krippendorff's alpha")
    agree.add_argument("file", metavar="FILE", help="the labels, .jsonl")
    agree.add_argument(
        "--level", choices=("nominal", "interval"), default="nominal", help="of the labels: names, or numbers"
    )
    leaks = commands.add_parser("leaks", help="what two files share")
    leaks.add_argument("train", metavar="TRAIN", help="training rows, .jsonl")
    leaks.add_argument("held_out", metavar="HELD_OUT", help="held-out rows, .jsonl")
    leaks.add_argument("--words", type=int, default=13, metavar="N", help="words in a row that count (13)")
    options = parser.parse_args(arguments)
    set_up_logging()
    {"pairs": _pairs, "split": _split, "agree": _agree, "leaks": _leaks}[options.command](options)


def _pairs(options: argparse.Namespace) -> None:
    from hybrid_jax.data.files import json_rows
    from hybrid_jax.data.judgements import pairs_of

    if options.least_margin < 0:
        raise UserError(f"--least-margin must be at least 0, got {options.least_margin}")
    which = "extremes" if options.extremes else "all"
    found = pairs_of(json_rows(Path(options.file)), options.least_margin, which)
    if not found.rows:
        raise UserError(f"{options.file} gives no pair: {found.too_close:,} comparisons are ties or too close")
    _write(options.output, found.rows)
    print(f"{options.output}: {len(found.rows):,} pairs; {found.too_close:,} were ties or too close")


def _split(options: argparse.Namespace) -> None:
    from hybrid_jax.metrics.pair_splits import length_matched, longer_wins, split_by_prompt

    if not 0 < options.fraction < 1:
        raise UserError(f"--fraction must be in (0, 1), got {options.fraction}")
    if options.length_matched is not None and not options.length_matched >= 0:
        raise UserError(f"--length-matched must be at least 0, got {options.length_matched}")
    rows = _read(options.file, ("prompt", "chosen", "rejected"))
    train, held_out = split_by_prompt(rows, options.fraction)
    if options.length_matched is not None:
        matched = length_matched(held_out, options.length_matched)
        print(f"of {len(held_out):,} held-out pairs {len(matched):,} are matched in length")
        held_out = matched
    if not held_out:
        raise UserError("no held-out pair is left: raise --fraction, or --length-matched")
    for path, part in ((options.train, train), (options.held_out, held_out)):
        _write(path, part)
        print(f"{path}: {len(part):,} pairs, the longer answer wins {100 * longer_wins(part):.1f} %")


def _agree(options: argparse.Namespace) -> None:
    from hybrid_jax.metrics.agreement import agreement

    votes: dict[tuple[str, str], Any] = {}
    for number, row in enumerate(_read(options.file, ("item", "annotator", "label")), start=1):
        key, label = (str(row["annotator"]), str(row["item"])), row["label"]
        if key in votes:
            raise UserError(f"{options.file}, row {number}: {key[0]!r} labels item {key[1]!r} twice")
        if options.level == "interval" and (isinstance(label, bool) or not isinstance(label, int | float)):
            raise UserError(f"{options.file}, row {number}: label must be a number for --level interval")
        votes[key] = label if options.level == "interval" else json.dumps(label)
    found = agreement([(*key, label) for key, label in votes.items()], options.level)
    if not found:
        raise UserError(f"{options.file}: no item has two labels, so nobody can agree")
    people, items = ({key[part] for key in votes} for part in (0, 1))
    print(f"{len(votes):,} labels of {len(items):,} items by {len(people):,} annotators\n")
    for name, number in found.items():
        print(f"{name:20s} {number:8.4f}")


def _leaks(options: argparse.Namespace) -> None:
    from hybrid_jax.metrics.pair_splits import leaks

    if options.words < 1:
        raise UserError(f"--words must be at least 1, got {options.words}")
    train, held_out = _read(options.train), _read(options.held_out)
    for kind, rows in leaks(train, held_out, options.words).items():
        what = f"{options.words} words in a row" if kind == "passages" else f"whole {kind}"
        first = f", first row {rows[0] + 1}" if rows else ""
        print(f"{len(rows):,} of {len(held_out):,} held-out rows share {what} with {options.train}{first}")


def _read(path: str, fields: Iterable[str] = ()) -> list[Mapping[str, Any]]:
    from hybrid_jax.data.files import json_rows

    rows = []
    for where, row in json_rows(Path(path)):
        if missing := [field for field in fields if row.get(field) is None]:
            raise UserError(f"{where}: no field {missing[0]!r}; fields: {', '.join(row) or 'none'}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _write(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if Path(path).exists():
        raise UserError(f"{path} is there already: give a new file")
    if not Path(path).parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {Path(path).parent}")
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run_command(main)
