"""Weight tables and settings tables by hand: which numbers go where, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.settings import ROPE
from hybrid_jax.models.families.weights import Fused, Stacked, Tensor, expand, with_fused

FAMILY_NAMES = (
    "gpt2 gpt_neo gptj gpt_neox gpt_bigcode opt bloom mpt falcon llama mistral mixtral qwen2 qwen2_moe qwen3 "
    "qwen3_moe gemma gemma2 gemma3_text phi phi3 stablelm starcoder2 olmo olmo2 olmoe granite cohere glm4 "
    "smollm3 gpt_oss ernie4_5"
)


def test_the_families_are_these():
    assert sorted(FAMILIES) == sorted(FAMILY_NAMES.split())


def _rows(table, shapes, transposed=True, config=None):
    return expand(table, shapes, config, lambda name: transposed)


def test_a_linear_map_is_transposed_and_its_bias_is_not():
    table = {"layer_*/up": "h.*.fc"}
    kernel, bias = _rows(table, {"layer_3/up/kernel": (2, 3), "layer_3/up/bias": (3,)})
    assert (kernel.ours, kernel.theirs) == (("layer_3/up/kernel",), ("h.3.fc.weight",))
    assert (bias.ours, bias.theirs) == (("layer_3/up/bias",), ("h.3.fc.bias",))
    theirs = np.arange(6).reshape(3, 2)
    assert kernel.load([theirs])[0].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert kernel.save(kernel.load([theirs]))[0].tolist() == theirs.tolist()
    assert bias.load([np.arange(3)])[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("groups", "query", "key"), [(1, [0, 1, 2, 3], [4, 5]), (2, [0, 1, 3, 4], [2, 5])], ids=["whole", "by head"]
)
def test_a_fused_map_is_divided_whole_after_whole_or_group_by_group(groups, query, key):
    table = {("q", "k"): Fused("qk", groups=lambda config: groups)}
    shapes = {"q/bias": (4,), "k/bias": (2,)}
    (row,) = _rows(table, shapes)
    ours = row.load([np.arange(6)])
    assert [a.tolist() for a in ours] == [query, key]
    assert row.save(ours)[0].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="expected 6 outputs, got 5"):
        row.load([np.arange(5)])


def test_stacked_maps_are_one_array_along_its_first_axis():
    (row,) = _rows({"e": Stacked("experts.+.w")}, {"e/kernel": (2, 1, 3)})
    assert row.theirs == ("experts.0.w.weight", "experts.1.w.weight")
    theirs = [np.array([[0], [1], [2]]), np.array([[3], [4], [5]])]
    assert row.load(theirs)[0].tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert [a.tolist() for a in row.save(row.load(theirs))] == [a.tolist() for a in theirs]


def test_a_tensor_is_named_in_full_and_stays_as_it_is():
    (row,) = _rows({"layer_*/sinks": Tensor("l.*.sinks")}, {"layer_0/sinks": (4,)})
    assert (row.ours, row.theirs) == (("layer_0/sinks",), ("l.0.sinks",))


def test_fusing_rows_takes_the_single_ones_out():
    table = with_fused({"a": "x", "b": "y", "c": "z"}, {("a", "b"): Fused("xy")})
    assert list(table) == ["c", ("a", "b")]


def test_a_family_says_which_setting_it_cannot_express():
    llama = FAMILIES["llama"].read_config({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2})
    assert FAMILIES["mistral"].write_config(llama)["hidden_size"] == 32
    with pytest.raises(UserError, match=r"attention_softcap must be None for a llama export, got 30\.0"):
        FAMILIES["llama"].write_config(replace(llama, attention_softcap=30.0))
    with pytest.raises(UserError, match="add_cross_attention must be False, got True: not supported"):
        FAMILIES["gpt2"].read_config({"add_cross_attention": True})
    with pytest.raises(UserError, match="rope_type must be default, linear"):
        FAMILIES["llama"].read_config({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}})


def test_settings_spelled_differently_are_the_same_decoder():
    plain = DecoderConfig(num_layers=2, width=32, num_heads=4, position="rotary", norm="rms")
    spelled = replace(
        plain, num_kv_heads=4, head_width=8, mlp_width=128, rotary_width=8, output_bias=True, norm_bias=False,
        attention_scale=8**-0.5, window_layers=(True, True), rotary_layers=(True, True),
    )  # fmt: skip
    assert plain != spelled
    assert plain.resolved() == spelled.resolved()
    assert plain.resolved() != replace(spelled, rotary_layers=(True, False)).resolved()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotary_width": 10, "position": "rotary"}, "rotary_width must be at most head_width=8, got 10"),
        ({"window_layers": (True,)}, "window_layers must name 4 layers, got 1"),
        ({"embedding_width": 8, "tie_embeddings": False}, "embedding_width needs tie_embeddings"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_an_impossible_decoder_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(width=32, num_heads=4, **settings)


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        ("gpt2", {"n_layer": 10**9}, "n_layer must be at most 65536, got 1000000000"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 65536, got 1000000000"),
        ("gpt2", {"num_labels": 10**9}, "num_labels must be at most 65536, got 1000000000"),
        ("gpt_neo", {"attention_types": [[["global"], 10**9]]}, "attention_types must be at most 65536"),
        ("llama", {"hidden_size": 2**30}, r"width must be in \[1, 1048576\], got 1073741824"),
        ("llama", {"vocab_size": 2**30}, r"vocab_size must be in \[1, 16777216\], got 1073741824"),
    ],
)
def test_a_size_beyond_any_models_is_refused_before_a_list_is_made_of_it(family, content, message):
    with pytest.raises((UserError, ValueError), match=message):
        FAMILIES[family].read_config(content)


def test_every_number_of_rotary_channels_comes_back_from_the_written_fraction():
    """`transformers` reads int(channels · fraction), which rounds 0.58 · 100 down to 57."""
    for channels in (7, 48, 64, 80, 100):
        for rotary in range(1, channels):
            config = DecoderConfig(
                num_heads=1, width=channels, head_width=channels, position="rotary", rotary_width=rotary
            )
            fraction = ROPE.write(config)["rope_parameters"]["partial_rotary_factor"]
            assert int(channels * fraction) == rotary


def test_an_odd_number_of_rotary_channels_is_refused_where_transformers_fails_with_it():
    sizes = {"hidden_size": 40, "num_attention_heads": 4, "rope_parameters": {"partial_rotary_factor": 0.5}}
    for name in ("phi", "stablelm"):
        with pytest.raises(
            UserError, match="partial_rotary_factor must give an even number of channels, got 5"
        ):
            FAMILIES[name].read_config(sizes)


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention must be false, got",
        ),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention must be false, got True",
        ),
        ("llama", {"is_causal": False}, "is_causal must be true for llama, got False: not supported"),
        (
            "llama",
            {"hidden_size": 32, "num_attention_heads": 4, "partial_rotary_factor": 0.5},
            "partial_rotary_factor must be 1, got 4 channels: not supported",
        ),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "attn_config.alibi_bias_max must be 8, got 16"),
    ],
)
def test_a_switch_that_would_change_the_model_is_refused_by_its_name(family, content, message):
    with pytest.raises(UserError, match=message):
        FAMILIES[family].read_config(content)


def test_what_transformers_does_not_read_changes_nothing():
    read = FAMILIES["gemma3_text"].read_config
    assert read({"attn_logit_softcapping": 2.0}) == read({})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}
    plain = {"rope_type": "default", "rope_theta": 100.0}
    within, beside = (
        read({"rope_parameters": {"full_attention": full, "sliding_attention": plain, **more}}).rope_scaling
        for full, more in (({**yarn, "truncate": False}, {}), (yarn, {"truncate": False}))
    )
    assert (within.truncate, beside.truncate) == (True, False)
