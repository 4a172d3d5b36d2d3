"""Puts a model beside a datastore of a text, for `knn_lm`.

    python scripts/knn_store.py --model FOLDER --text FILE --output NEW_FOLDER --held-out FILE

The model of a run or of a folder reads the text in rows of ``--length`` tokens; each hidden state is kept with
the token that followed it. The new folder is read as any other: ``python -m hybrid_jax.generate --model``. Its
config.json holds ``share``, ``neighbours`` and ``temperature``, to be changed at will. With ``--held-out`` the
nats of a token of another text are printed, of the model alone (``share`` 0) and of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.continuations import encode_prompts
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.lora import merge
from hybrid_jax.models.memory.knn import KnnLMSettings, pairs, with_datastore
from hybrid_jax.rewards.ngram import read_texts
from hybrid_jax.runs.policy import Policy, load_policy, load_pretrained_policy

MOST_GIBIBYTES = 8.0  # of a datastore: it lies in the memory of the device


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(prog="python scripts/knn_store.py", description="A datastore for a language model.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="a run directory: its newest checkpoint reads")
    source.add_argument("--model", metavar="FOLDER", help="a folder of Hugging Face, or an export")
    parser.add_argument("--text", required=True, type=Path, help="what is read: plain text, or jsonl")
    parser.add_argument("--field", default="text", metavar="NAME", help="of a jsonl row (default text)")
    parser.add_argument("--output", metavar="FOLDER", help="to be written; nothing without it")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="another text, to measure the gain on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--batch", type=int, default=16, help="rows at a time (default 16)")
    parser.add_argument("--share", type=float, default=0.25, help="lambda (default 0.25)")
    parser.add_argument("--neighbours", type=int, default=1024, help="k (default 1024)")
    parser.add_argument("--temperature", type=float, default=1.0, help="T (default 1)")
    options = parser.parse_args(arguments)
    set_up_logging()
    if options.length < 2 or options.batch < 1:
        raise UserError(
            f"--length must be at least 2 and --batch at least 1, got {options.length} and {options.batch}"
        )
    if options.output is None and options.held_out is None:
        raise UserError("nothing to do: give --output FOLDER to write, --held-out FILE to measure, or both")
    policy = _plain(load_policy(options.run) if options.run else load_pretrained_policy(options.model))
    try:
        component = getattr(policy.model, "settings", None) or getattr(policy.model, "config", None)
        settings = KnnLMSettings(
            component or policy.component, 1, options.share, options.neighbours, options.temperature
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error
    settings.build(policy.model.vocab_size)  # that it gives states at all
    read = lambda path: _rows(policy, path, options)  # noqa: E731
    settings, params = with_datastore(settings, policy.params, *_entries(policy, read(options.text)))
    print(f"{settings.entries:,} entries of {options.text}")
    model = settings.build(policy.model.vocab_size)
    if options.held_out is not None:
        batches = list(read(options.held_out))
        for share in dict.fromkeys((0.0, options.share)):
            other = replace(settings, share=share).build(policy.model.vocab_size)
            print(f"share {share}: {_nats(other, params, batches):.4f} nats a token of {options.held_out}")
    if options.output is not None:
        replace(policy, model=model, params=params, component=settings).save_pretrained(options.output)
        print(f"written to {options.output}")


def _plain(policy: Policy) -> Policy:
    """The same without adapters."""
    if not isinstance(policy.model, Decoder):
        return policy
    config = policy.model.config
    return replace(policy, model=Decoder(replace(config, lora=None)), params=merge(config.lora, policy.params))


def _rows(policy: Policy, path: Path, options: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens [B T] and a mask, batch by batch; rows of a text share a token, so that each is predicted."""
    length = min(options.length, policy.model.max_length or options.length)
    texts = encode_prompts(policy.tokenizer, read_texts(path, options.field), plain=True)
    rows = [ids[start : start + length] for ids in texts for start in range(0, len(ids) - 1, length - 1)]
    if not rows:
        raise UserError(f"{path} must hold at least two tokens, got none")
    for start in range(0, len(rows), options.batch):
        tokens, mask = np.zeros((options.batch, length), np.int32), np.zeros((options.batch, length), bool)
        for row, ids in enumerate(rows[start : start + options.batch]):
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        yield tokens, mask


def _entries(policy: Policy, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a text."""
    find, keys, values = jax.jit(pairs, static_argnums=0), [], []
    most = int(MOST_GIBIBYTES * 2**30 / (4 * policy.model.width))
    for tokens, mask in batches:
        states, following, real = (np.asarray(x) for x in find(policy.model, policy.params, tokens, mask))
        keys.append(states[real])
        values.append(following[real])
        if (count := sum(map(len, values))) > most:
            raise UserError(f"a datastore may hold {most:,} pairs ({MOST_GIBIBYTES:g} GiB), got over {count:,}")
    return np.concatenate(keys), np.concatenate(values)


def _nats(model: Any, params: Any, batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Minus the mean log-probability of the tokens behind the first of each row."""

    @jax.jit
    def total(params, tokens, mask):
        log_probs = jax.nn.log_softmax(model.apply(params, tokens, mask).logits[:, :-1])
        chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(mask[:, 1:], chosen, 0.0))

    sums = [float(total(params, *batch)) for batch in batches]
    return -math.fsum(sums) / sum(int(mask[:, 1:].sum()) for _, mask in batches)


if __name__ == "__main__":
    run_command(main)
