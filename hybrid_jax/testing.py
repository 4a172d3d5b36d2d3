"""Shared by tests, CI and benches: the 27-sequence language model, on which every optimum is a closed form.

Three tokens, three steps, so 27 responses that can be enumerated. KL-regularised reward maximisation has the
optimum π*(s) ∝ π_ref(s) exp(r(s)/β), and every algorithm that claims to find it is checked against its numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.base import ModelOutput, Params, RowCache
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.encoder import Encoder, EncoderConfig
from hybrid_jax.models.folders.encoder import save_encoder
from hybrid_jax.models.folders.hf import save_pretrained
from hybrid_jax.models.pooling import Mode, Pooling

VOCABULARY, STEPS = 3, 3
SEQUENCES = np.array(list(itertools.product(range(VOCABULARY), repeat=STEPS)))  # [27 3]
START = np.array([0.5, 0.3, 0.2])  # π_ref is a Markov chain: START, then TRANSITION
TRANSITION = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
NUM_PREFIXES = sum(VOCABULARY**step for step in range(STEPS))  # 13: (), (0), (1), (2), (0, 0), …

TINY: dict[str, Any] = {  # of the smallest run that has everything; it learns nothing
    "steps": 3,
    "model": {"name": "decoder", "num_layers": 1, "width": 16, "num_heads": 2, "max_length": 48},
    "tokenizer": "bytes",
    "phases": {
        "sft": {"batch_size": 4, "length": 32},
        "ppo": {
            "prompts_per_step": 4,
            "epochs": 1,
            "sampler": {"max_new_tokens": 8},
            "reward": {"parts": {"length": {"reward": {"name": "length", "target": 6}}}},
        },
    },
    "scheduler": {"name": "alternation", "cycle": {"sft": 1, "ppo": 1}},
    "evaluation": {"num_prompts": 4, "num_examples": 8, "batch_size": 4, "length": 32},
    "checkpoint": {"every": 2},
}


@dataclass(frozen=True)
class PrefixTable:
    """A `LanguageModel` with one row of scores for each prefix of a response; the prompt is any one token.

    Hidden states are one-hot prefixes, so that a linear value head is a table of state values.
    """

    vocab_size: int = VOCABULARY
    width: int = NUM_PREFIXES
    max_length: int | None = STEPS + 1

    def init(self, key: Array) -> Params:
        """The table of π_ref."""
        return reference_params()

    def cast(self, params: Params) -> Params:
        """The parameters as they are."""
        return params

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None):
        """The prefix that each token ends, one-hot."""
        mask = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask > 0
        prefix, prefixes = self.init_cache(*tokens.shape).state, []
        for t in range(tokens.shape[1]):
            prefix = jnp.where(mask[:, t], self._append(prefix, tokens[:, t]), prefix)
            prefixes.append(prefix)
        return jax.nn.one_hot(jnp.stack(prefixes, axis=1), NUM_PREFIXES)

    @property
    def loss_coefs(self):
        """Empty."""
        return {}

    def hidden_and_losses(self, params, tokens, attention_mask=None, *, dropout_key=None):
        """`hidden`, and no losses."""
        return self.hidden(params, tokens, attention_mask), {}

    def logits(self, params, hidden):
        """The row of each prefix."""
        return hidden @ params["table"]

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None):
        """`LanguageModel.apply`."""
        hidden = self.hidden(params, tokens, attention_mask)
        return ModelOutput(self.logits(params, hidden), hidden)

    def init_cache(self, batch: int, length: int):
        """The cache of rows that have read nothing."""
        return RowCache(jnp.full(batch, -1))

    def extend(self, params, tokens, attention_mask, cache):
        """`LanguageModel.extend`."""
        prefix = cache.state
        for t in range(tokens.shape[1]):
            prefix = jnp.where(attention_mask[:, t], self._append(prefix, tokens[:, t]), prefix)
        return params["table"][prefix], RowCache(prefix)

    prefill = extend

    def step(self, params, token, cache):
        """`LanguageModel.step`."""
        prefix = self._append(cache.state, token)
        return params["table"][prefix], RowCache(prefix)

    def _append(self, prefix: Array, token: Array) -> Array:
        """Row of the longer prefix: the prompt is none, and a whole response has none, so that any will do."""
        return jnp.where(prefix < 0, 0, jnp.minimum(VOCABULARY * prefix + 1 + token, NUM_PREFIXES - 1))


def reference_params() -> Params:
    """The table of π_ref."""
    rows = [START, *TRANSITION, *np.tile(TRANSITION, (VOCABULARY, 1))]
    return {"table": jnp.asarray(np.log(np.array(rows)), jnp.float32)}


def sequence_probabilities(params: Params) -> np.ndarray:
    """π(s) of all 27 responses, float64, in the order of `SEQUENCES`."""
    table = np.asarray(params["table"], np.float64)
    log_probs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    total, prefix = np.zeros(len(SEQUENCES)), np.zeros(len(SEQUENCES), int)
    for tokens in SEQUENCES.T:
        total += log_probs[prefix, tokens]
        prefix = VOCABULARY * prefix + 1 + tokens
        prefix = np.minimum(prefix, NUM_PREFIXES - 1)
    return np.exp(total)


def true_reward() -> np.ndarray:
    """r(s) = (number of 2s) − ½ [s starts with 1]."""
    return (SEQUENCES == 2).sum(axis=1) - 0.5 * (SEQUENCES[:, 0] == 1)


def optimum(reference: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """π* ∝ π_ref exp(r/β)."""
    weights = reference * np.exp(reward / beta)
    return weights / weights.sum()


def objective(policy: np.ndarray, reference: np.ndarray, reward: np.ndarray, beta: float) -> float:
    """J(π) = E[r] − β KL(π ‖ π_ref)."""
    return float((policy * (reward - beta * np.log(policy / reference))).sum())


# ---------------------------------------------------------------------------- tiny random models in folders

TINY_WORDS = (
    "a an and bad bird blue cat dog fish good green in is of on one red runs sat swims the tree two very"
)


def tiny_encoder_folder(folder: str | Path, *, seed: int = 0, pooling: Mode = "mean") -> Path:
    """A sentence encoder of two layers with a WordPiece tokenizer that knows words, letters and marks."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127) if chr(code) == chr(code).lower()]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *TINY_WORDS.split()[1:]]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces])
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = EncoderConfig(len(ids), num_layers=2, width=16, num_heads=2, max_length=64, init_std=0.3)
    model = Encoder(config, Pooling(pooling))
    save_encoder(folder, model, model.init(jax.random.key(seed)))
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    return Path(folder)


def tiny_decoder_folder(folder: str | Path, *, seed: int = 0) -> Path:
    """A decoder of two layers over bytes."""
    tokenizer = Bytes().build()
    config = DecoderConfig(
        num_layers=2, width=16, num_heads=2, max_length=96, vocab_size=tokenizer.vocab_size, init_std=0.3
    )
    model = Decoder(config)
    save_pretrained(folder, model, model.init(jax.random.key(seed)), eos_ids=(tokenizer.eos_id,))
    tokenizer.save(folder)
    return Path(folder)


def tiny_rows(count: int = 40) -> list[dict[str, Any]]:
    """Rows of a prompt, a completion and a column, as data of a run with the settings `TINY`."""
    return [{"prompt": f"say {i}:", "completion": f"{i} it is", "number": i} for i in range(count)]
