"""python -m hybrid_jax.count --config FILE --order K --output DIR"""

from __future__ import annotations

import logging
import math
import time
from typing import get_args

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.devices import check_devices

log = logging.getLogger(__name__)

EXAMPLES = """\
  python -m hybrid_jax.count --config configs/tinyshakespeare.yaml --order 5 --output runs/kneser_ney
  python -m hybrid_jax.generate --model runs/kneser_ney --prompt "ROMEO:"
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    from hybrid_jax.metrics.ngram_lm import Smoothing

    parser = ArgumentParser(
        prog="python -m hybrid_jax.count",
        description="Counts what follows each context of up to K tokens in the training data of a config, "
        "smooths the counts, says how well they predict the held-out data, and writes a model with its "
        "tokenizer: to sample from, as a reference, for a perplexity reward. It is counted: no phase can train "
        "it further.",
        epilog="examples:\n" + EXAMPLES,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="whose data and tokenizer are read")
    parser.add_argument(
        "--order", type=int, default=5, metavar="K", help="tokens that the next one depends on (default 5)"
    )
    parser.add_argument("--smoothing", choices=get_args(Smoothing), default="kneser_ney", help="of the counts")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or an earlier export")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings of the config")
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()
    check_devices(expect_accelerator=False)

    from hybrid_jax.core.config import local_path
    from hybrid_jax.data.packing import encode_examples
    from hybrid_jax.experiment_config import load_config
    from hybrid_jax.models.markov.counts import MOST_ORDER, count_tokens, nats_of
    from hybrid_jax.runs.export_folder import check_export_folder
    from hybrid_jax.runs.policy import Policy
    from hybrid_jax.runs.samplers import default_sampler
    from hybrid_jax.sampling.generation_config import end_tokens

    if not 1 <= options.order <= MOST_ORDER:
        raise UserError(f"--order must be in [1, {MOST_ORDER}], got {options.order}")
    config = load_config(options.config, options.overrides)
    check_export_folder(local_path(options.output, "the folder to export to"))
    examples = config.data.load("train")
    tokenizer = config.tokenizer.build(text for example in examples for text in example.texts)
    started = time.monotonic()
    encoded = encode_examples(examples, tokenizer, None)
    held_out = encode_examples(config.data.load("held_out"), tokenizer, None)
    if not any(e.loss_mask.any() for e in held_out):
        raise UserError("data.held_out has no token to predict")
    texts = [e.tokens for e in encoded]
    model, params = count_tokens(texts, options.order, tokenizer.vocab_size, options.smoothing)
    log.info(
        "%s tokens counted in %.1f s: %s n-grams",
        f"{sum(map(len, texts)):,}",
        time.monotonic() - started,
        f"{model.settings.ngrams:,}",
    )
    eos_ids = end_tokens(model, tokenizer, chat=any(example.messages for example in examples))
    policy = Policy(model, params, tokenizer, default_sampler(None), eos_ids, component=model.settings)
    print(f"{policy.save_pretrained(options.output)}  (language model)")
    nats, targets = nats_of(model, params, [(e.tokens, e.loss_mask) for e in held_out])
    nats /= targets
    print(f"held out: {nats:.4f} nats a token, perplexity {math.exp(nats):.2f}, over {targets:,} tokens")


if __name__ == "__main__":
    run_command(main)
