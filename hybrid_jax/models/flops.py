"""The arithmetic that a decoder or a recurrent model needs, by formula: what MFU is measured against.

    forward   2 · N + 4 · H · C · S   a token     N: matmul parameters, S: mean number of keys that a token sees
    training  3 × forward                         the gradient of a product is two products

A multiply-add is 2. The formula is that of Kaplan et al. 2020 (section 2.1) and Chowdhery et al. 2022 (appendix
B), with these conventions, the same for plans and for the logs of a run:

- N counts every kernel that a token is multiplied with: attention, MLP (of experts the router and those that it
  chooses), maps beside the embedding, and the head, tied or not. The embedding is looked up, so it does not
  count; nor do norms, biases, positions and softmax.
- Attention counts what causality lets through, nothing above the diagonal: in a row of T a token sees
  S = (T + 1) / 2 keys on average, fewer where the layer has a window. In training that is about 6·L·T·H·C a
  token, *half* of the 12·L·T·H·C of papers that count the hidden half. A row is taken as one segment.
- A recurrent layer has no attention; what its cell computes beside products with kernels counts where the cell
  says how much (`Cell.flops`), as the reading of a memory; gates do not.
- What rematerialisation computes again is not needed and does not count.
- Below an adapter nothing learns: the base has a gradient of its inputs but none of its kernels, so 4·N instead
  of 6·N.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.lora import Lora
from hybrid_jax.models.recurrent.model import RecurrentSettings, kernels

Counted = DecoderConfig | RecurrentSettings  # settings of the models that there is a formula for
Map = tuple[str, int, int, int]  # path, inputs, outputs, times that a token goes through such a map


def forward_flops(config: Counted, tokens: int, length: int, head_tokens: int | None = None) -> float:
    """FLOPs to read ``tokens`` tokens in rows of ``length``, at once or token by token from a cache.

    Args:
        config: whose ``vocab_size`` is known.
        tokens: in all rows together, padding included.
        length: of a row.
        head_tokens: for how many tokens the scores of the next one are computed; all.
    """
    return float(2 * sum(_multiply_adds(config, tokens, head_tokens)) + _mixing(config, tokens, length))


def train_flops(config: Counted, tokens: int, length: int, head_tokens: int | None = None) -> float:
    """FLOPs to learn from ``tokens`` tokens once: `forward_flops` and the gradient."""
    base, adapter = _multiply_adds(config, tokens, head_tokens)
    base = 6 * base if _lora(config) is None else 4 * base
    return float(base + 6 * adapter + 3 * _mixing(config, tokens, length))


def matmul_parameters(config: Counted) -> int:
    """N: parameters that a token is multiplied with, adapters not counted."""
    return sum(inputs * outputs * times for _, inputs, outputs, times in _maps(config))


def _multiply_adds(config: Counted, tokens: int, head_tokens: int | None) -> tuple[int, int]:
    """FLOPs of the base and of the adapter, for one reading."""
    head_tokens = tokens if head_tokens is None else head_tokens
    base, adapter, lora = 0, 0, _lora(config)
    for path, inputs, outputs, times in _maps(config):
        reads = times * (head_tokens if path in ("lm_head", "embedding_out") else tokens)
        base += reads * inputs * outputs
        if lora is not None and re.fullmatch(lora.targets, path):
            adapter += reads * lora.rank * (inputs + outputs)
    return base, adapter


def _lora(config: Counted) -> Lora | None:
    return config.lora if isinstance(config, DecoderConfig) else None


def _mixing(config: Counted, tokens: int, length: int) -> float:
    """Scores and mixing of attention, or what recurrent cells do beside their maps, of one reading."""
    if isinstance(config, RecurrentSettings):
        return config.num_layers * config.cell().flops() * tokens
    keys = sum(_mean_keys(length, config.window if config.is_windowed(i) else None) for i in _layers(config))
    return 4 * config.num_heads * config.channels * tokens * keys


def _mean_keys(length: int, window: int | None) -> float:
    """Mean over a row of the number of keys that a token sees, itself included."""
    window = length if window is None else min(window, length)
    return window - window * (window - 1) / (2 * length)


def _layers(config: DecoderConfig) -> range:
    return range(config.num_layers)


def _maps(c: Counted) -> Iterator[Map]:
    if isinstance(c, RecurrentSettings):
        for path, (inputs, outputs) in kernels(c).items():
            yield path, inputs, outputs, 1
    else:
        yield from _decoder_maps(c)


def _decoder_maps(c: DecoderConfig) -> Iterator[Map]:
    embedding = c.width if c.embedding_width is None else c.embedding_width
    if embedding != c.width:
        yield "embedding_in", embedding, c.width, 1
        yield "embedding_out", c.width, embedding, 1
    for i in _layers(c):
        for name, heads in {"query": c.num_heads, "key": c.kv_heads, "value": c.kv_heads}.items():
            yield f"layer_{i}/attention/{name}", c.width, heads * c.channels, 1
        yield f"layer_{i}/attention/output", c.num_heads * c.channels, c.width, 1
        yield from (
            _experts(c, f"layer_{i}/mlp") if c.has_experts(i) else _mlp(c, f"layer_{i}/mlp", c.inner_width)
        )
    yield "lm_head", embedding, c.vocab_size or 0, 1


def _mlp(c: DecoderConfig, path: str, inner: int, times: int = 1, gated: bool | None = None) -> Iterator[Map]:
    gated = c.mlp == "gated" if gated is None else gated
    for name in ("gate", "up") if gated else ("up",):
        yield f"{path}/{name}", c.width, inner, times
    yield f"{path}/down", inner, c.width, times


def _experts(c: DecoderConfig, path: str) -> Iterator[Map]:
    e = c.experts
    assert e is not None
    yield f"{path}/router", c.width, e.count, 1
    yield from _mlp(c, f"{path}/experts", e.width, e.per_token, gated=True)
    if e.shared_width is not None:
        yield from _mlp(c, f"{path}/shared", e.shared_width)
        if e.shared_gate:
            yield f"{path}/shared_gate", c.width, 1, 1
