"""FLOPs by formula, against literal numbers and against parameters that are counted."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.flops import forward_flops, matmul_parameters, train_flops
from hybrid_jax.models.folders.hf import abstract_params
from hybrid_jax.models.lora import Lora

TINY = DecoderConfig(num_layers=2, width=8, num_heads=2, mlp_width=32, vocab_size=11, max_length=64)
LLAMA_8B = DecoderConfig(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_width=14336,
    vocab_size=128256,
    max_length=8192,
    position="rotary",
    norm="rms",
    mlp="gated",
    attention_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)


def test_a_tiny_decoder_has_the_flops_that_are_counted_by_hand():
    # a layer: 4 · 8·8 of attention and 2 · 8·32 of the MLP = 768; two layers and the head 8·11
    assert matmul_parameters(TINY) == 2 * 768 + 88 == 1624
    # a row of 4: its tokens see 1, 2, 3 and 4 keys; for each 2 products of 8 channels (2 heads of 4), 2 layers
    attention = 2 * 2 * 2 * 8 * (1 + 2 + 3 + 4)
    assert forward_flops(TINY, tokens=4, length=4) == 2 * 1624 * 4 + attention
    assert train_flops(TINY, tokens=4, length=4) == 3 * (2 * 1624 * 4 + attention)
    assert forward_flops(TINY, tokens=12, length=4) == 3 * forward_flops(TINY, tokens=4, length=4)


def test_a_window_hides_keys_and_scores_may_be_left_out():
    windowed = DecoderConfig(
        **{**vars(TINY), "window": 2, "window_layers": (True, False)}  # the first layer sees 1, 2, 2, 2 keys
    )
    attention = 2 * 2 * 8 * (1 + 2 + 2 + 2) + 2 * 2 * 8 * (1 + 2 + 3 + 4)
    assert forward_flops(windowed, 4, 4) == pytest.approx(2 * 1624 * 4 + attention, rel=1e-12)
    assert forward_flops(TINY, 4, 4) - forward_flops(TINY, 4, 4, head_tokens=1) == 2 * 88 * 3


def test_llama_8b_needs_the_published_parameters_less_embedding_and_norms():
    published = 8_030_261_248
    assert matmul_parameters(LLAMA_8B) == published - 128256 * 4096 - (2 * 32 + 1) * 4096
    token = train_flops(LLAMA_8B, 8192, 8192) / 8192
    full = 6 * matmul_parameters(LLAMA_8B) + 12 * 32 * 8192 * 32 * 128
    assert token == full - 6 * 32 * 8191 * 32 * 128  # the half above the diagonal is not counted


def test_sharing_the_head_with_the_embedding_changes_nothing():
    assert matmul_parameters(TINY) == matmul_parameters(
        DecoderConfig(**{**vars(TINY), "tie_embeddings": False})
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": "gated", "num_kv_heads": 1, "tie_embeddings": False},
        {"embedding_width": 4},
        {
            "experts": Experts(
                count=3, per_token=3, width=5, shared_width=6, shared_gate=True, layers=(True, False)
            )
        },
        {"mlp": "gated", "experts": Experts(count=3, per_token=3, width=5)},
    ],
    ids=["gated", "embedding_width", "shared_experts", "experts"],
)
def test_every_kernel_is_counted_once(changes):
    config = DecoderConfig(**{**vars(TINY), **changes})
    leaves = flatten_dict(abstract_params(config.build()), sep="/")
    counted = sum(int(np.prod(x.shape)) for path, x in leaves.items() if path.endswith("kernel"))
    if config.tie_embeddings:
        counted += int(np.prod(leaves["token_embedding/embedding"].shape))
    assert matmul_parameters(config) == counted


def test_a_token_goes_through_as_many_experts_as_are_chosen():
    few, all_ = (DecoderConfig(**{**vars(TINY), "experts": Experts(4, n, width=5)}) for n in (1, 4))
    assert matmul_parameters(all_) - matmul_parameters(few) == 2 * 3 * (3 * 8 * 5)  # layers · experts · kernels


def test_below_an_adapter_only_the_gradient_of_the_inputs_is_needed():
    lora = Lora(rank=3, targets=r"layer_\d+/attention/(query|value)")
    config = DecoderConfig(**{**vars(TINY), "lora": lora})
    adapter = jax.tree.leaves(abstract_params(config.build())["lora"])
    size = sum(int(np.prod(x.shape)) for x in adapter)
    attention = 3 * (forward_flops(TINY, 4, 4) - 2 * 1624 * 4)
    assert size == 2 * 2 * 3 * (8 + 8)
    assert train_flops(config, 4, 4) == (4 * 1624 + 6 * size) * 4 + attention
    assert forward_flops(config, 4, 4) == forward_flops(TINY, 4, 4) + 2 * size * 4
