"""A language model of recurrent layers, whatever their cell is. Its cache is their state.

x = embed(tokens);  x = layer(x) for each layer;  logits = W x + b                       W the embedding if tied

In a residual stack x ← x + layer(norm(x)), then x ← x + mlp(norm(x)) where there is an MLP, and a norm at the
end. A packed sequence begins from the start state, padding leaves the state as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum, segment_positions
from hybrid_jax.core.ranges import Layers, Rate, Vocabulary, Width, settings
from hybrid_jax.models.base import ModelOutput, Params, RowCache
from hybrid_jax.models.layers import gelu_tanh, linear, placed_logits, rms_norm
from hybrid_jax.models.param_axes import param_axes, path_of
from hybrid_jax.models.recurrent.cell import Cell, Flow, State
from hybrid_jax.models.vocabulary import embedding_rows
from hybrid_jax.parallel.rules import made_in_parts, shard, shard_for_use


@settings
class RecurrentSettings:
    """Settings that all recurrent models share. Those of one inherit them and have `cell`."""

    num_layers: Layers = 1  # how many, each reading what the one below gives
    width: Width = 256  # of the states
    embedding_width: Width | None = None  # of the token embedding; null: that of what a layer gives
    vocab_size: Vocabulary | None = None  # rows of the embedding; null: the tokenizer's
    tie_embeddings: bool = False  # the head is the embedding
    residual: bool = False  # a layer adds to what it reads, normalised (RMS) before it
    mlp_width: Width | None = None  # of the MLP behind each layer of a residual stack; null: none
    dropout: Rate = 0.0  # of what the layers and the head read
    variational_dropout: bool = (
        True  # one mask for all tokens of a row (Gal & Ghahramani 2016), else each its own
    )

    def __post_init__(self):
        if self.mlp_width is not None and not self.residual:
            raise ValueError("mlp_width needs residual: true")
        if self.embedding_width not in (None, self.cell().width) and (self.residual or self.tie_embeddings):
            name = "residual" if self.residual else "tie_embeddings"
            raise ValueError(
                f"embedding_width must be null or {self.cell().width}, what a layer gives, with {name}, "
                f"got {self.embedding_width}"
            )

    def cell(self) -> Cell:
        """One layer; all are alike."""
        raise NotImplementedError

    def dropped(self, params: Params, key: Array) -> Params:
        """The parameters of a layer, less what dropout takes from them."""
        return params

    def sized(self, vocab_size: int | None) -> Self:
        """The same with the vocabulary of a tokenizer; an own ``vocab_size`` may be larger."""
        return replace(self, vocab_size=embedding_rows(self.vocab_size, vocab_size))

    @property
    def epsilon(self) -> float:
        """The number that norms add to the mean square."""
        return 1e-6

    @property
    def head_bias(self) -> bool:
        """Tells whether a head that is not the embedding has a bias."""
        return True

    @property
    def input_width(self) -> int:
        """Channels of the embedding."""
        return self.embedding_width or self.cell().width


@dataclass(frozen=True)
class RecurrentModel:
    """A stack of recurrent layers as a `LanguageModel`. It reads rows of any length."""

    config: RecurrentSettings

    max_length = None

    @property
    def settings(self) -> RecurrentSettings:
        """The settings that build it."""
        return self.config

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.config.cell().width

    @property
    def loss_coefs(self) -> dict[str, float]:
        """Empty: it has no losses of its own."""
        return {}

    def init(self, key: Array) -> Params:
        """Makes random parameters, each device only its own part."""
        return made_in_parts(param_axes, partial(_init, self), key)

    def cast(self, params: Params) -> Params:
        """The same: it computes in float32."""
        return params

    def start(self, rows: int) -> State:
        """The states of all layers of rows that have read nothing."""
        start = tuple(self.config.cell().start(rows) for _ in range(self.config.num_layers))
        return jax.tree.map(lambda x: shard(x, "batch", *[None] * (x.ndim - 1)), start)

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None) -> Float[Array, "B T D"]:
        """`LanguageModel.hidden`."""
        flow = None if attention_mask is None else flow_of(attention_mask)
        return self.read(params, tokens, self.start(len(tokens)), flow, dropout_key)[0]

    def hidden_and_losses(
        self, params, tokens, attention_mask=None, *, dropout_key=None
    ) -> tuple[Float[Array, "B T D"], dict[str, Sum]]:
        """`LanguageModel.hidden_and_losses`: no losses."""
        return self.hidden(params, tokens, attention_mask, dropout_key=dropout_key), {}

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`."""
        if self.config.tie_embeddings:
            return placed_logits(linear(hidden, params["token_embedding"]["embedding"].T))
        return placed_logits(linear(hidden, params["lm_head"]["kernel"], params["lm_head"].get("bias")))

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None) -> ModelOutput:
        """`LanguageModel.apply`."""
        hidden = self.hidden(params, tokens, attention_mask, dropout_key=dropout_key)
        return ModelOutput(logits=self.logits(params, hidden), hidden=hidden)

    def init_cache(self, batch: int, length: int) -> RowCache:
        """`LanguageModel.init_cache`: as large for any length."""
        return RowCache(self.start(batch))

    def extend(
        self, params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: RowCache
    ) -> tuple[Float[Array, "B V"], RowCache]:
        """`LanguageModel.extend`."""
        hidden, cache = self.read_on(params, tokens, attention_mask, cache)
        return self.logits(params, hidden[:, -1]), cache

    prefill = extend

    def read_on(
        self, params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: RowCache
    ) -> tuple[Float[Array, "B X D"], RowCache]:
        """`StateReader.read_on`."""
        hidden, state = self.read(params, tokens, cache.state, Flow((attention_mask > 0).T))
        return hidden, RowCache(state)

    def step(self, params, token: Int[Array, "B"], cache: RowCache) -> tuple[Float[Array, "B V"], RowCache]:
        """`LanguageModel.step`."""
        cell = self.config.cell()

        def layer(own: Params, x: Array, state: State):
            state, y = cell.step(own, state, cell.prepared(own, x))
            return y, state

        hidden, state = self.stack(params, self.embed(params, token), cache.state, layer)
        return self.logits(params, hidden), RowCache(state)

    def read(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        state: State,
        flow: Flow | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Hidden states of rows that go on from ``state``, and the state behind them."""
        x = shard(self.embed(params, tokens.T), "length", "batch", "width")
        return self.read_embedded(params, x, state, flow, dropout_key)

    def read_embedded(
        self,
        params: Params,
        x: Float[Array, "T B I"],
        state: State,
        flow: Flow | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """`read` of what `embed` has made of the tokens."""
        cell = self.config.cell()

        def layer(own: Params, x: Array, state: State):
            y, state = cell.read(own, x, state, flow)
            return shard(y, "length", "batch", "width"), state

        hidden, state = self.stack(params, x, state, layer, dropout_key)
        return hidden.swapaxes(0, 1), state

    def embed(self, params: Params, tokens: Int[Array, "..."]) -> Float[Array, "... I"]:
        """The vectors that the first layer reads."""
        table = params["token_embedding"]["embedding"]
        used = (None if tokens.ndim > 1 else "vocab", None)
        return jnp.take(shard_for_use(table, ("vocab", "embed"), used), tokens, axis=0)

    def stack(self, params: Params, x: Array, states: State, layer: Any, key: Array | None = None):
        """All layers; ``layer(own, x, state) -> (y, state)`` is one of them."""
        c, after = self.config, []
        for i, state in enumerate(states):
            own, keys = params[f"layer_{i}"], (None, None, None)
            if key is not None:
                keys = jax.random.split(jax.random.fold_in(key, i), 3)
            cell_params = _whole(own["cell"], f"layer_{i}/cell")
            if keys[0] is not None:
                cell_params = c.dropped(cell_params, keys[0])
            y, state = layer(cell_params, self._dropped(self._normed(own, "norm", x), keys[1]), state)
            x = x + y if c.residual else y
            if c.mlp_width is not None:
                x = x + _mlp(own["mlp"], self._dropped(self._normed(own, "mlp_norm", x), keys[2]))
            after.append(state)
        key = None if key is None else jax.random.fold_in(key, c.num_layers)
        return self._dropped(self._normed(params, "final_norm", x), key), tuple(after)

    def _normed(self, params: Params, name: str, x: Array) -> Array:
        return rms_norm(x, params[name]["scale"], self.config.epsilon) if name in params else x

    def _dropped(self, x: Array, key: Array | None) -> Array:
        if key is None or not self.config.dropout:
            return x
        return drop(
            x, self.config.dropout, key, (1, *x.shape[1:]) if self.config.variational_dropout else x.shape
        )


def flow_of(attention_mask: Bool[Array, "B T"] | Int[Array, "B T"]) -> Flow:
    """Where rows with this mask are real, and where a packed sequence begins."""
    segments = attention_mask.astype(jnp.int32)
    real = segments > 0
    return Flow(real.T, (real & (segment_positions(segments) == 0)).T)


def drop(x: Array, rate: float, key: Array, shape: tuple[int, ...]) -> Array:
    """``x`` with a share ``rate`` of it zeroed by a mask of ``shape``, the rest scaled up by 1 / (1 − rate)."""
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, shape), x / (1.0 - rate), 0.0)


def _mlp(params: Params, x: Array) -> Array:
    inner = gelu_tanh(linear(x, params["up"]["kernel"]))
    return linear(shard(inner, *("length", "batch", "mlp")[-x.ndim :]), params["down"]["kernel"])


def _whole(params: Params, path: str) -> Params:
    """The parameters of a cell, gathered once and not at every step of a scan."""

    def gather(keys: tuple[Any, ...], leaf: Array) -> Array:
        names = param_axes(f"{path}/{path_of(keys)}", leaf.shape)
        return shard_for_use(leaf, names, (None,) * leaf.ndim)

    return jax.tree_util.tree_map_with_path(gather, params)


@partial(jax.jit, static_argnums=0)
def _init(model: RecurrentModel, key: Array) -> Params:
    c, cell = model.config, model.config.cell()
    keys = jax.random.split(key, c.num_layers + 2)
    normal, scale = jax.nn.initializers.lecun_normal(), {"scale": jnp.ones(cell.width)}
    embedding = jax.random.normal(keys[-1], (model.vocab_size, c.input_width)) / jnp.sqrt(c.input_width)
    params: Params = {"token_embedding": {"embedding": embedding}}
    if not c.tie_embeddings:
        kernel = normal(keys[-2], (cell.width, model.vocab_size))
        params["lm_head"] = {"kernel": kernel, **({"bias": jnp.zeros(model.vocab_size)} if c.head_bias else {})}
    for i in range(c.num_layers):
        of_cell, up, down = jax.random.split(keys[i], 3)
        layer: Params = {"cell": cell.init(of_cell, cell.width if i else c.input_width)}
        if c.residual:
            layer["norm"] = scale
        if c.mlp_width is not None:
            layer["mlp_norm"] = scale
            layer["mlp"] = {
                "up": {"kernel": normal(up, (cell.width, c.mlp_width))},
                "down": {"kernel": normal(down, (c.mlp_width, cell.width))},
            }
        params[f"layer_{i}"] = layer
    return {**params, "final_norm": scale} if c.residual else params


def kernels(config: RecurrentSettings) -> dict[str, tuple[int, int]]:
    """The linear maps that a token is multiplied with, by path: inputs and outputs."""
    shapes = jax.eval_shape(partial(_init, RecurrentModel(config)), jax.random.key(0))
    leaves = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    maps = {path.removesuffix("/kernel"): shape for path, shape in leaves.items() if path.endswith("/kernel")}
    if config.tie_embeddings:
        maps["lm_head"] = leaves["token_embedding/embedding"][::-1]
    return maps
