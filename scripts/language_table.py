"""Trains language models of every kind on the bytes of one text, each for the same time; prints a table.

    python scripts/language_table.py --text ../shared/data/tinyshakespeare/input.txt --split-at 1003854
    python scripts/language_table.py --text train.txt --held-out valid.txt --models lstm decoder --seconds 900

A model gets ``--seconds`` of processor time, of all cores together; run it on one core, `taskset -c 0`, and a
loaded machine changes little. Its step is timed first, so that the schedule of the learning rate ends with the
time. All have the same optimizer, 8 rows of 256 bytes a step, one seed and no trials. In the table:

nats           -log p of a held-out byte, each behind at least half a row of text
TFLOPs         of training, by formula (`hybrid_jax.models.flops`); windows count each token they read
distinct-2     different pairs of words among all, in 32 samples of 240 bytes
repeated       share of the word triples of a sample that it has said before

A table of n-grams needs seconds; it is counted for each order. Runs that are there already are only measured.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hybrid_jax as hj
from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.packing import encode_examples
from hybrid_jax.experiment import Experiment, build
from hybrid_jax.experiment_config import ExperimentConfig, load_config
from hybrid_jax.metrics.text import distinct_n, repetition_rate
from hybrid_jax.models.flops import train_flops
from hybrid_jax.models.markov.counts import count_tokens
from hybrid_jax.models.markov.view import MarkovView
from hybrid_jax.runs.policy import Policy
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.training.loop import take_step

CONFIG = "configs/tinyshakespeare.yaml"
ROWS, LENGTH = 8, 256  # of a step
TIMED, WARM = 5, 3  # steps
SAMPLES, SAMPLED = 32, 240
DECODER = {"name": "decoder", "num_layers": 4, "width": 128, "num_heads": 4, "max_length": LENGTH}
WINDOWED = {**DECODER, "num_layers": 2, "max_length": 16}
RECURRENT = {"tie_embeddings": False, "num_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    **{f"feed_forward_{k}": {"name": "feed_forward", "order": k} for k in (1, 2, 4, 8, 16)},
    "windowed_decoder_16": {"name": "markov", "order": 16, "model": WINDOWED},
    "decoder": DECODER,
    "lstm": {"name": "lstm", "width": 256, **RECURRENT},
    "gru": {"name": "gru", "width": 256, **RECURRENT},
    "mamba2": {"name": "mamba2", "num_layers": 3, "width": 128, "state_width": 32, "head_width": 32},
}


class Row(NamedTuple):
    """A line of the table."""

    model: str
    parameters: int
    steps: int
    seconds: float
    tflops: float | None
    nats: float
    distinct: float
    repeated: float

    def __str__(self) -> str:
        tflops = "" if self.tflops is None else f"{self.tflops:.2f}"
        cells = (self.model, f"{self.parameters:,}", f"{self.steps:,}", f"{self.seconds:.0f}", tflops)
        return f"| {' | '.join(cells)} | {self.nats:.4f} | {self.distinct:.3f} | {self.repeated:.3f} |"


COLUMNS = ("model", "parameters", "steps", "seconds", "TFLOPs", "nats", "distinct-2", "repeated")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main(arguments: list[str]) -> None:
    """Trains and measures; prints a line for each model as it is done."""
    parser = ArgumentParser(
        prog="python scripts/language_table.py", description="Language models at equal time."
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="plain text to learn from")
    parser.add_argument("--held-out", metavar="FILE", help="plain text to be measured on")
    parser.add_argument("--split-at", type=int, metavar="N", help="characters before the held-out text")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--orders", nargs="*", type=int, default=[1, 2, 3, 4, 5, 6], help="of the n-grams")
    parser.add_argument("--seconds", type=float, default=300, help="processor time a model (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/language"), help="of the runs")
    options = parser.parse_args(arguments)
    if (options.held_out is None) == (options.split_at is None):
        raise UserError("give --held-out FILE or --split-at N, one of them")
    set_up_logging()
    print(HEADER, flush=True)
    train, held_out, tokenizer = texts_of(settings(options, "decoder", 1, options.folder))
    for order in options.orders:
        started = time.process_time()
        model, params = count_tokens([train], order, tokenizer.vocab_size, "kneser_ney")
        seconds = time.process_time() - started
        policy = Policy(model, params, tokenizer, Ancestral(), ())
        print(measured(f"{order + 1}-gram, Kneser-Ney", policy, held_out, 0, seconds, None), flush=True)
    for name in options.models:
        run_dir = options.folder / f"{name}_{options.seconds:.0f}s_{options.seed}"
        note = run_dir / "language_table.json"
        if not note.is_file():
            steps = max(1, int(options.seconds / seconds_a_step(options, name)))
            started = time.process_time()
            build(settings(options, name, steps, run_dir)).train()
            note.write_text(json.dumps({"seconds": time.process_time() - started}))
        policy, seconds = hj.load_policy(str(run_dir)), json.loads(note.read_text())["seconds"]
        steps = policy.step or 0
        print(measured(name, policy, held_out, steps, seconds, tflops(policy.model, steps)), flush=True)


def settings(options: Any, name: str, steps: int, run_dir: Path) -> ExperimentConfig:
    """The run of one model."""
    given: dict[str, Any] = {"run_dir": str(run_dir), "steps": steps, "seed": options.seed}
    given["data"] = {"name": "text", "train": options.text}
    given["data"] |= {"held_out": options.held_out, "split_at": options.split_at}
    given |= {"model": MODELS[name], "phases.sft.batch_size": ROWS, "phases.sft.length": LENGTH}
    given |= {"checkpoint.every": 1000, "evaluation": {"num_prompts": 0, "num_examples": 0}}
    return load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def texts_of(config: ExperimentConfig) -> tuple[np.ndarray, np.ndarray, Any]:
    """The tokens of both texts, each in one piece, and the tokenizer."""
    tokenizer = config.tokenizer.build([])
    train, held_out = (
        np.concatenate([e.tokens for e in encode_examples(config.data.load(split), tokenizer, None)])
        for split in ("train", "held_out")
    )
    return train, held_out, tokenizer


def seconds_a_step(options: Any, name: str) -> float:
    """Processor seconds of one step, without those of compiling."""
    folder = Path(tempfile.mkdtemp())
    try:
        experiment: Experiment = build(settings(options, name, WARM + TIMED, folder / "run"))
        state, phase = experiment.init(), experiment.phases["sft"]
        for step in range(WARM + TIMED):
            if step == WARM:
                started = time.process_time()
            state = take_step(experiment, phase, state)
            jax.block_until_ready(state.train)
        return (time.process_time() - started) / TIMED
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measured(
    name: str, policy: Policy, held_out: np.ndarray, steps: int, seconds: float, flops: float | None
) -> Row:
    """The line of a model."""
    length = 8 * LENGTH if reads_on(policy.model) else LENGTH
    nats = nats_a_token(policy.model, policy.params, held_out, length)
    sampler = Ancestral(max_new_tokens=SAMPLED)
    sampled = Policy(policy.model, policy.params, policy.tokenizer, sampler, ())
    said = [answer.response for answer in sampled.generate(["\n"], num_samples=SAMPLES)]
    repeated = float(np.mean([repetition_rate(text, 3) for text in said]))
    size = sum(x.size for x in jax.tree.leaves(policy.params))
    return Row(name, size, steps, seconds, flops, nats, distinct_n(said, 2), repeated)


def nats_a_token(model: Any, params: Any, tokens: np.ndarray, length: int) -> float:
    """Mean of -log p of all tokens but the first; rows overlap, so that each has half a row before it."""
    half, rows = length // 2, max(1, 16 * LENGTH // length)
    pieces = [tokens[begin : begin + length] for begin in range(0, max(1, len(tokens) - half), half)]

    @jax.jit
    def nats(params, batch, mask, targets):
        scores = jax.nn.log_softmax(model.apply(params, batch, mask).logits[:, :-1])
        of_next = jnp.take_along_axis(scores, batch[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(of_next, where=targets[:, 1:])

    total, count = 0.0, 0
    for first in range(0, len(pieces), rows):
        batch, mask, targets = (np.zeros((rows, length), kind) for kind in (np.int32, np.int32, bool))
        for row, piece in enumerate(pieces[first : first + rows]):
            batch[row, : len(piece)], mask[row, : len(piece)] = piece, 1
            targets[row, half if first + row else 1 : len(piece)] = True
        total, count = total + float(nats(params, batch, mask, targets)), count + int(targets.sum())
    return total / count


def tflops(model: Any, steps: int) -> float:
    """The arithmetic of ``steps`` steps, in 10¹² FLOPs."""
    tokens, config = ROWS * LENGTH, getattr(model, "config", None)
    if isinstance(model, MarkovView):
        order = model.order
        inner: Any = model.model
        each = train_flops(inner.config, order * tokens, order, head_tokens=tokens)
    elif config is None:  # maps alone, and each token goes through all of them once
        params = jax.eval_shape(model.init, jax.random.key(0))
        each = (
            6
            * tokens
            * sum(leaf.size for path, leaf in jax.tree.leaves_with_path(params) if "kernel" in str(path))
        )
    else:
        each = train_flops(config, tokens, LENGTH)
    return steps * each / 1e12


def reads_on(model: Any) -> bool:
    """Tells whether a model reads rows of any length."""
    return getattr(model, "max_length", None) is None and not isinstance(model, hj.OrderK)


if __name__ == "__main__":
    run_command(main)
