"""An n-gram model on the device: what `hybrid_jax.metrics.ngram_lm` has counted and smoothed, as a backbone.

    p_n(w | h) = share(h w) + backoff(h) p_{n−1}(w | h')            h' is h without its oldest token

A context that never occurred leaves p_{n−1} as it is; p_{−1} = 1 / V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Interval
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Natural, Vocabulary, settings
from hybrid_jax.metrics.ngram_lm import NgramModel, Smoothing
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.layers import placed_logits
from hybrid_jax.models.markov.windows import OrderK

MOST_ORDER = 8
_PIECE, _SCORES = 512, 2**24  # tokens of a row that is scored, and scores at a time
Context = Annotated[int, Interval(ge=1, le=MOST_ORDER)]  # its length


@BACKBONES.register("counts")
@settings
class CountsSettings:
    """Settings of an n-gram model as `count_tokens` makes them: what its folder says of its tables.

    Attributes:
        order: k, the longest context; n-grams have k + 1 tokens.
        vocab_size: V.
        ngrams: of all lengths that occurred, the empty one among them.
        most_children: n-grams that go on from one, at most, for each length from 1 to k.
    """

    order: Context = 5
    vocab_size: Vocabulary | None = None
    ngrams: Natural = 1
    most_children: tuple[Natural, ...] = ()

    def build(self, vocab_size: int | None = None) -> Counts:
        """The model.

        Raises:
            UserError: nothing was counted, or there are more tokens now.
        """
        if self.vocab_size is None or len(self.most_children) != self.order:
            raise UserError(
                "a model of counts comes from python -m hybrid_jax.count: take the folder that it writes"
            )
        if vocab_size is not None and vocab_size > self.vocab_size:
            raise UserError(f"the counts are of {self.vocab_size} tokens, the tokenizer has {vocab_size}")
        return Counts(self)


@dataclass(frozen=True)
class Counts(OrderK):
    """The n-grams as a `LanguageModel`. Hidden states are log p, V numbers; the parameters are the tables.

    The n-grams are a tree: node 0 is the empty one, and below each n-gram are those that go on from it with one
    more token. The children of a node are consecutive and ascending by token.
    """

    settings: CountsSettings

    @property
    def width(self) -> int:
        """V."""
        return self.vocab_size

    def init(self, key: Array) -> Params:
        """Tables in which nothing was counted: every token is as likely as any other."""
        count = self.settings.ngrams
        return {
            "token": jnp.zeros(count, jnp.int32),  # of each node, its last one
            "share": jnp.zeros(count),  # of the probability of that token
            "backoff": jnp.ones(count),  # of a node as a context: the weight of the shorter one
            "first_child": jnp.full(count + 1, count, jnp.int32),
        }

    def of_windows(
        self, params: Params, windows: Int[Array, "N K"], mask: Bool[Array, "N K"], key: Array | None = None
    ) -> tuple[Float[Array, "N V"], dict[str, Sum]]:
        """`OrderK.of_windows`: log p, from the empty context to the longest that occurred."""
        root = jnp.zeros(len(windows), jnp.int32)
        p = jnp.full((len(windows), self.vocab_size), 1 / self.vocab_size)
        for length, most in enumerate((self.vocab_size, *self.settings.most_children)):
            node, known = root, jnp.ones(len(windows), bool)
            for place in range(self.order - length, self.order):
                node, found = self._child(params, node, windows[:, place])
                known &= found & mask[:, place]
            p = jnp.where(known[:, None], self._mixed(params, node, p, most), p)
        return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), {}

    def logits(self, params: Params, hidden: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`: log p is one."""
        return placed_logits(hidden)

    def _child(self, params: Params, node: Int[Array, "N"], token: Int[Array, "N"]):
        """The n-gram with one more token, and whether it occurred: a binary search among the children."""
        end = params["first_child"][node + 1]

        def halved(_, ends: tuple[Array, Array]):
            low, high = ends
            middle = (low + high) // 2
            below = params["token"][middle] < token
            searching = low < high
            return jnp.where(searching & below, middle + 1, low), jnp.where(searching & ~below, middle, high)

        steps = self.vocab_size.bit_length()  # a node has V children at most
        low, _ = lax.fori_loop(0, steps, halved, (params["first_child"][node], end))
        return low, (low < end) & (params["token"][low] == token)

    def _mixed(self, params: Params, node: Int[Array, "N"], p: Float[Array, "N V"], most: int) -> Array:
        """p_n, of p_{n−1}, after contexts that occurred."""
        child = params["first_child"][node][:, None] + jnp.arange(most)
        real = child < params["first_child"][node + 1][:, None]
        token = jnp.where(real, params["token"][child], self.vocab_size)  # which is none
        rows = jnp.arange(len(node))[:, None]
        return (params["backoff"][node][:, None] * p).at[rows, token].add(params["share"][child], mode="drop")


def count_tokens(
    texts: Sequence[Sequence[int] | np.ndarray],
    order: int,
    vocab_size: int,
    smoothing: Smoothing = "kneser_ney",
) -> tuple[Counts, Params]:
    """Counts n-grams of up to ``order`` + 1 tokens and smooths them, as `NgramModel.train` does.

    Args:
        texts: each a sequence of tokens; no n-gram reaches over a boundary.
        order: k, from 1 to 8.
        vocab_size: V.
        smoothing: kneser_ney or witten_bell.

    Raises:
        UserError: there is no token.
    """
    if not sum(map(len, texts)):
        raise UserError("there is nothing to count: the data have no tokens")
    return as_model(NgramModel.train(texts, vocab_size, order, smoothing))


def as_model(counted: NgramModel) -> tuple[Counts, Params]:
    """The tables of an n-gram model for the device."""
    sizes = [1, *(len(level.keys) for level in counted.levels)]
    begins = np.cumsum([0, *sizes])  # of the n-grams of each length: 0, 1, …
    nodes = begins[-1]
    first_child = [begins[-1:]]
    token, share, backoff = [np.zeros(1)], [np.zeros(1)], []
    for length, level in enumerate(counted.levels):
        contexts, last = np.divmod(level.keys, counted.vocab_size)
        token.append(last)
        share.append(level.shares)
        backoff.append(level.backoffs)
        first_child.insert(-1, begins[length + 1] + np.searchsorted(contexts, np.arange(sizes[length])))
    backoff.append(np.ones(sizes[-1]))
    first_child.insert(-1, np.full(sizes[-1], nodes))
    firsts = np.concatenate(first_child)
    children = np.diff(firsts)
    most = tuple(int(children[a:b].max(initial=0)) for a, b in list(pairwise(begins))[1:-1])
    settings_ = CountsSettings(counted.context, counted.vocab_size, int(nodes), most)
    floats = {"share": np.concatenate(share), "backoff": np.concatenate(backoff)}
    whole = {"token": np.concatenate(token), "first_child": firsts}
    return Counts(settings_), {
        **{name: jnp.asarray(x, jnp.float32) for name, x in floats.items()},
        **{name: jnp.asarray(x, jnp.int32) for name, x in whole.items()},
    }


def nats_of(model: Counts, params: Params, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, int]:
    """-log p of all tokens that are to be predicted, together, and how many there are.

    A text is read in pieces, each with the k tokens before it, so that nothing is lost where it is cut.

    Args:
        model: to ask.
        params: of the model.
        texts: the tokens of each, and which of them are to be predicted.
    """
    length = model.order + _PIECE
    rows = max(1, _SCORES // (length * model.vocab_size))

    @jax.jit
    def nats(params: Params, tokens: Array, mask: Array, targets: Array) -> Array:
        scores = model.apply(params, tokens, mask).logits[:, :-1]
        of_next = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(of_next, where=targets[:, 1:])

    total, count = 0.0, 0
    pieces = [(*text, begin) for text in texts for begin in range(0, len(text[0]), _PIECE)]
    for first in range(0, len(pieces), rows):
        tokens, mask, targets = (np.zeros((rows, length), kind) for kind in (np.int32, bool, bool))
        for row, (text, wanted, begin) in enumerate(pieces[first : first + rows]):
            before = min(begin, model.order)
            piece = text[begin - before : begin + _PIECE]
            tokens[row, : len(piece)], mask[row, : len(piece)] = piece, True
            targets[row, before : len(piece)] = wanted[begin : begin + _PIECE]
        total += float(nats(params, tokens, mask, targets))
        count += int(targets[:, 1:].sum())
    return total, count
