"""Heads: small pure functions over what a trunk has read.

A run has one trunk and any number of named heads, each a group of parameters of its own:

    params = {"model": trunk, "heads/<name>": …, "<phase>/value": …}

    trunk   ``model:`` of a config (BACKBONES), either a `LanguageModel`, whose own head ``lm`` scores the next
            token and is part of it, since it may be tied to the embeddings; or a `TextTrunk` (encoder, ngrams),
            which gives one vector a text and no next token
    head    ``heads:`` of a config (HEADS): one vector a text [B F] → one number a label [B Y]
    value   V of a policy gradient: made by the phase that asks for one

A phase says which head it trains (``head: name``), a head whether the trunk trains with it. Trunk and head are
joined by `models.scorer.TextScorer`, which reads tokens: what folders hold and rewards load.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import Rate, Width, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.models.base import Params
from hybrid_jax.models.layers import linear

GROUP = "heads/"  # before the name of a head: its group of parameters
_DENSE, _SCORE = 1, 2  # numbers below a head's key: each map draws its own noise


class Head(Protocol):
    """Numbers for a text, from what a trunk has made of it. Hashable: its fields are its settings."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the numbers: classes of logits, or what a regression predicts."""
        ...

    @property
    def trains_trunk(self) -> bool:
        """Tells whether the trunk trains with it; else it reads the trunk as it is."""
        ...

    def init(self, key: Array, width: int) -> Params:
        """Parameters for vectors of ``width`` numbers."""
        ...

    def read(
        self, params: Params, features: Float[Array, "B F"], *, dropout_key: Array | None = None
    ) -> Float[Array, "B Y"]:
        """One number a label, float32. Dropout acts only with a key."""
        ...


HEADS: Registry[Head] = Registry("head", needs=("labels", "trains_trunk", "init", "read"))


@settings(kw_only=True)
class TextHead:
    """A linear map of a text's vector u, or a layer before it.

        y = drop(u) W + b,  or  drop(gelu(drop(u) V + c)) W + b     float32, [B Y]

    Attributes:
        labels: one a number that it gives.
        hidden_width: of the layer before the last map; None has none.
        dropout: rate on what each map reads, in training only.
        bias: b is there; `transformers` knows none on the head of a decoder.
        trains_trunk: the trunk trains with the head; else only the head does.
    """

    labels: tuple[str, ...]
    hidden_width: Width | None = None
    dropout: Rate = 0.0
    bias: bool = True
    trains_trunk: bool = True

    def __post_init__(self):
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must be different names, at least one, got {list(self.labels)}")

    def init(self, key: Array, width: int) -> Params:
        """The last map is zero without a layer before it: nothing is known yet."""
        params: dict[str, Any] = {}
        kernel = jnp.zeros((width, len(self.labels)))
        if self.hidden_width is not None:
            shape = (width, self.hidden_width)
            dense = jax.random.normal(jax.random.fold_in(key, _DENSE), shape) / jnp.sqrt(width)
            params["score_dense"] = {"kernel": dense, "bias": jnp.zeros(self.hidden_width)}
            shape = (self.hidden_width, len(self.labels))
            kernel = jax.random.normal(jax.random.fold_in(key, _SCORE), shape) / jnp.sqrt(self.hidden_width)
        bias = {"bias": jnp.zeros(len(self.labels))} if self.bias else {}
        return {**params, "score": {"kernel": kernel, **bias}}

    def read(
        self, params: Params, features: Float[Array, "B F"], *, dropout_key: Array | None = None
    ) -> Float[Array, "B Y"]:
        """One number a label; see `Head.read`."""
        score, x = params["score"], features
        if self.hidden_width is not None:
            keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
            dense = params["score_dense"]
            x = linear(_dropped(x, self.dropout, keys[0]), dense["kernel"], dense["bias"])
            x, dropout_key = jax.nn.gelu(x, approximate=False), keys[1]
        x = _dropped(x, self.dropout, dropout_key)
        return linear(x, score["kernel"], score.get("bias"), jnp.float32)


@HEADS.register("classification")
@settings(kw_only=True)
class ClassificationHead(TextHead):
    """A logit for each of several labels."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.labels) < 2:
            raise ValueError(f"labels must be at least two classes, got {list(self.labels)}")


@HEADS.register("regression")
@settings(kw_only=True)
class RegressionHead(TextHead):
    """A number for each label: what a regression predicts, or the rewards of an ensemble."""

    labels: tuple[str, ...] = ("score",)


def init_value_head(width: int) -> Params:
    """A value head that says 0 everywhere: until it learns, advantages are those of the rewards alone."""
    return {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros((1,))}


def value(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """``V = hidden · w + b``, float32: one number a position."""
    return linear(hidden.astype(jnp.float32), params["kernel"], params["bias"])[..., 0]


def _dropped(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)
