"""Adapters against `peft` on models of `transformers`: logits, gradients, and folders both ways."""

import dataclasses
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.folders import peft_config
from hybrid_jax.models.folders.hf import Pretrained, abstract_params, load_pretrained, save_pretrained
from hybrid_jax.models.folders.peft_writing import save_adapter
from hybrid_jax.models.lora import ADAPTER, Lora

peft = pytest.importorskip("peft")

pytestmark = [
    # peft asks transformers 5 for a property by its old name,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # and says that it saves a copy of the base's head with the head's adapter.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
# Parity is about numbers, not speed: the compiler may skip its expensive passes.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
VOCAB = 61
_SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB}
_SIZES |= {"max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": None}
CONFIGS = {
    "llama": {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {**_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "tied": {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {**_SIZES, "intermediate_size": 48},
    "falcon": {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
}
# their settings, by family
ADAPTERS = {
    "llama rslora, ranks, head": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "lm_head"],
            "use_rslora": True,
            "rank_pattern": {"o_proj": 5},
            "alpha_pattern": {"1.self_attn.o_proj": 3},
        },
    ),
    "llama dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "falcon": ("falcon", {"target_modules": ["query_key_value"], "use_dora": True}),
}
USUAL_ADAPTERS = ("llama rslora, ranks, head", "gpt2", "falcon")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with a tiny model of each family."""
    folders = {}
    for family, settings in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["llama" if family == "tied" else family](**settings)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
    return folders


def their_model(base, **settings):
    """A model of `peft` whose adapter does something."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = base if isinstance(base, torch.nn.Module) else AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (2, 11))


def relative_error(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    "case", [c if c in USUAL_ADAPTERS else pytest.param(c, marks=pytest.mark.slow) for c in ADAPTERS]
)
def test_logits_and_every_gradient_equal_those_of_peft_and_its_folders_load_both_ways(case, bases, tmp_path):
    family, settings = ADAPTERS[case]
    theirs = their_model(bases[family], **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    model = Pretrained(str(bases[family]), lora=Lora(path=str(tmp_path / "theirs"))).build()
    params = model.init(jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(model))

    def loss(adapter):
        logits = model.apply({**params, ADAPTER: adapter}, jnp.asarray(tokens())).logits
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens()[:, 1:, None], 2)
        return -chosen.mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST_COMPILE)(params[ADAPTER])
    batch = torch.as_tensor(tokens())
    output = theirs(input_ids=batch, labels=batch, use_cache=False)
    assert relative_error(logits, output.logits.detach().numpy()) < 1e-4

    output.loss.backward()
    if family in ("llama", "gpt2"):
        check_gradients(gradients, theirs, factor_of(settings))

    save_adapter(tmp_path / "ours", model, params)
    base = AutoModelForCausalLM.from_pretrained(bases[family])
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative_error(again(input_ids=batch).logits.numpy(), np.asarray(logits)) < 1e-5

    save_pretrained(tmp_path / "merged", model, params)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert relative_error(merged(input_ids=batch).logits.numpy(), np.asarray(logits)) < 1e-5


def factor_of(settings):
    """Ours have one scale: where theirs differs, our B is theirs times a factor."""
    if "alpha_pattern" not in settings:
        return lambda name: 1.0
    scales = {"": 8 / 3**0.5, "o_proj": 8 / 5**0.5, "1.self_attn.o_proj": 3 / 5**0.5}
    return lambda name: next(scale for key, scale in reversed(scales.items()) if key in name) / scales[""]


OUR_NAMES = {  # of the maps in a module of theirs, in the order of its outputs
    "self_attn.q_proj": ["attention/query"], "self_attn.k_proj": ["attention/key"],
    "self_attn.v_proj": ["attention/value"], "self_attn.o_proj": ["attention/output"],
    "mlp.gate_proj": ["mlp/gate"], "mlp.up_proj": ["mlp/up"], "mlp.down_proj": ["mlp/down"],
    "attn.c_attn": ["attention/query", "attention/key", "attention/value"], "attn.c_proj": ["attention/output"],
    "mlp.c_fc": ["mlp/up"], "mlp.c_proj": ["mlp/down"],
}  # fmt: skip


def check_gradients(ours, theirs, factor_of):
    """Every gradient of theirs is found in ours; where they share an A, theirs is the sum."""
    left = {
        "/".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(ours)
    }
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        module, kind = name.removesuffix(".default.weight").removeprefix("base_model.model.").rsplit(".", 1)
        layer, _, rest = module.partition(".h." if ".h." in module else ".layers.")[2].partition(".")
        paths = [f"layer_{layer}/{path}" for path in OUR_NAMES[rest]] if rest else [module]
        leaf = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}[kind]
        found = [np.asarray(left.pop(f"{path}/{leaf}")) for path in paths]
        mine = sum(found).T if leaf == "a" else np.concatenate(found, axis=-1).T
        mine = mine * factor_of(name) if leaf == "b" else mine
        assert relative_error(mine, parameter.grad.numpy()) < 1e-4, name
    assert not left


@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_adapter_on_a_part_of_a_fused_map_is_one_that_peft_and_we_read_alike(dora, bases, tmp_path):
    targets = r"layer_0/attention/(query|value)|layer_1/(attention/key|mlp/up)|layer_\d/mlp/down"
    lora = Lora(rank=2, alpha=3.0, targets=targets, rank_stabilized=True, dora=dora, dropout=0.1)
    model = Pretrained(str(bases["gpt2"]), lora=lora).build()
    params, draw = model.init(jax.random.key(0)), np.random.default_rng(0).normal
    adapter = jax.tree.map(lambda x: x + jnp.asarray(draw(0.0, 0.2, x.shape), jnp.float32), params[ADAPTER])
    params = {**params, ADAPTER: adapter}
    save_adapter(tmp_path, model, params)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["attn.c_attn", "mlp.c_proj", "transformer.h.1.mlp.c_fc"]
    assert settings["rank_pattern"] == {"transformer.h.0.attn.c_attn": 4}  # query and value
    assert settings["base_model_name_or_path"] == str(bases["gpt2"])

    expected = jax.jit(lambda p: model.apply(p, jnp.asarray(tokens())).logits)(params)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases["gpt2"]), tmp_path
    ).eval()
    with torch.no_grad():
        assert relative_error(expected, theirs(input_ids=torch.as_tensor(tokens())).logits.numpy()) < 1e-5
    again = Pretrained(str(bases["gpt2"]), lora=Lora(path=str(tmp_path))).build()
    assert replace(again.config.lora, path=None, targets=targets) == lora
    reread = again.init(jax.random.key(1))
    if not dora:  # DoRA keeps the magnitudes of the other maps in a fused one
        assert jax.tree.all(jax.tree.map(np.array_equal, reread[ADAPTER], adapter))
    logits = jax.jit(lambda p: again.apply(p, jnp.asarray(tokens())).logits)(reread)
    assert relative_error(logits, np.asarray(expected)) < 1e-5


_QUERIES = {"target_modules": ["q_proj"]}
BESIDE = {  # the base, rows that it is resized to, their settings
    "both copies": ("llama", None, {**_QUERIES, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "copies of a block": ("llama", None, {**_QUERIES, "modules_to_save": ["mlp", "norm"]}),
    "the embedding of a tied model alone": ("tied", None, {**_QUERIES, "modules_to_save": ["embed_tokens"]}),
    "the head of a tied model alone": ("tied", None, {**_QUERIES, "modules_to_save": ["lm_head"]}),
    "both of a tied model": ("tied", None, {**_QUERIES, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "a table that stays tied": (
        "tied",
        None,
        {**_QUERIES, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "resized": ("llama", VOCAB + 3, _QUERIES),
    "resized and tied": ("tied", VOCAB + 3, _QUERIES),
    "resized below adapters": ("llama", VOCAB + 3, {"target_modules": ["q_proj", "embed_tokens"]}),
    "an adapter of the embedding": ("llama", None, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "an adapter of a tied embedding": ("tied", None, {"target_modules": ["q_proj", "embed_tokens"]}),
    "adapters of both tied tables": (
        "tied",
        None,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "an adapter of positions": ("gpt2", None, {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "tokens": ("llama", None, {**_QUERIES, "trainable_token_indices": [3, 60]}),
    "tokens of a tied model": ("tied", None, {**_QUERIES, "trainable_token_indices": [3, 60]}),
    "tokens of both tables": (
        "llama",
        None,
        {**_QUERIES, "trainable_token_indices": {"embed_tokens": [3, 60], "lm_head": [5, 3]}},
    ),
    "all biases": ("gpt2", None, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "biases of maps with adapters": (
        "gpt2",
        None,
        {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "a bias of B": ("llama", None, {**_QUERIES, "lora_bias": True}),
    "pissa": ("llama", None, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "pissa, fused": (
        "gpt2",
        None,
        {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "fan_in_fan_out": True},
    ),
    "olora": ("llama", None, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"}),
}


USUAL = ("both copies", "both of a tied model", "resized and tied", "tokens", "all biases", "pissa, fused")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of tied tables and saved embeddings
@pytest.mark.parametrize("case", [c if c in USUAL else pytest.param(c, marks=pytest.mark.slow) for c in BESIDE])
def test_what_peft_trains_beside_low_rank_maps_is_read_and_written(case, bases, tmp_path):
    family, rows, settings = BESIDE[case]

    def base():
        model = AutoModelForCausalLM.from_pretrained(bases[family])
        if rows is not None:
            torch.manual_seed(3)
            model.resize_token_embeddings(rows)
        return model

    theirs = their_model(base(), **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    if rows is not None:
        torch.manual_seed(5)  # of the rows that a fresh base gets, and which the folder replaces
    model = Pretrained(str(bases[family]), lora=Lora(path=str(tmp_path / "theirs"))).build()
    params = model.init(jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(model))
    read = np.arange(rows or VOCAB)[None]
    logits = jax.jit(lambda p: model.apply(p, read).logits, compiler_options=FAST_COMPILE)(params)

    def error(other):
        with torch.no_grad():
            return relative_error(logits, other(input_ids=torch.as_tensor(read)).logits.numpy())

    assert error(theirs) < 1e-4
    save_adapter(tmp_path / "ours", model, params)
    assert error(peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()) < 1e-4
    if "lora_bias" in settings:  # of which a Llama has no place
        with pytest.raises(UserError, match="gives 'layer_0/attention/query' a bias"):
            save_pretrained(tmp_path / "merged", model, params)
        return
    save_pretrained(tmp_path / "merged", model, params)
    assert error(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()) < 1e-4


@pytest.fixture
def adapter(bases, tmp_path):
    model = Pretrained(str(bases["llama"]), lora=Lora(rank=2, targets=".*/query|lm_head")).build()
    save_adapter(tmp_path, model, model.init(jax.random.key(0)))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights = 'pissa_niter_4' is not supported, for it",
        ),
        (
            {"target_parameters": ["experts.up"]},
            r"target_parameters = \['experts.up'\] is not supported; merge",
        ),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens = \[1\] is not supported"),
        ({"of_tomorrow": 1}, "of_tomorrow = 1 is not supported"),
        ({"r": 0}, "rank must be in \\[1, 1048576\\], got 0"),
    ],
)
def test_what_we_would_read_differently_from_peft_is_refused(settings, message, adapter, bases):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=r"adapter_config\.json: " + message):
        Pretrained(str(bases["llama"]), lora=Lora(path=str(adapter))).build()


def change(tensors, name, value):
    full_name = f"base_model.model.{name}"
    return (
        {**tensors, full_name: value}
        if value is not None
        else {k: v for k, v in tensors.items() if k != full_name}
    )


_QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{_QUERY}.lora_B.weight", None, f"{_QUERY}: lora_B is missing"),
        (f"{_QUERY}.lora_A.weight", np.zeros((2, 9)), r"lora_A \[2, 9\] must have 32 columns"),
        (
            f"{_QUERY}.lora_A.weight",
            np.zeros((3, 32)),
            r"lora_A \[3, 32\] and lora_B \[32, 2\] have no common rank",
        ),
        (f"{_QUERY}.lora_B.weight", np.zeros((16, 2)), "lora_B has 16 outputs, the model 32"),
        ("model.norm.lora_A.weight", np.zeros((2, 32)), "norm.lora_A.weight' has no place in a llama model"),
        ("model.layers.7.mlp.up_proj.lora_A.weight", np.zeros((2, 32)), "has no place in a llama model"),
        ("lm_head.base_layer.weight", np.zeros((VOCAB, 32)), "lm_head: its copy of the base differs"),
    ],
)
def test_a_folder_whose_tensors_do_not_fit_is_refused(name, value, message, adapter, bases):
    file = adapter / "adapter_model.safetensors"
    value = None if value is None else value.astype(np.float32)
    save_file(change(load_file(file), name, value), file)
    with pytest.raises(UserError, match=message):
        Pretrained(str(bases["llama"]), lora=Lora(path=str(adapter))).build().init(jax.random.key(0))


def test_every_setting_of_peft_is_read_harmless_or_refused_by_name():
    known = [*peft_config.READ, *peft_config.HARMLESS, *peft_config.REFUSED]
    assert sorted(known) == sorted({field.name for field in dataclasses.fields(peft.LoraConfig)})


def test_an_older_folder_of_torch_with_the_name_of_the_adapter_in_its_tensors_is_read(adapter, bases):
    settings = {"path": str(bases["llama"]), "lora": Lora(path=str(adapter))}
    expected = Pretrained(**settings).build().init(jax.random.key(0))
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    old = {n.replace(".weight", ".mine.weight"): torch.as_tensor(t) for n, t in tensors.items()}
    torch.save(old, adapter / "adapter_model.bin")
    jax.tree.map(
        np.testing.assert_array_equal, Pretrained(**settings).build().init(jax.random.key(0)), expected
    )
    torch.save(
        {**old, "base_model.model.lm_head.lora_A.other.weight": torch.ones(2, 32)},
        adapter / "adapter_model.bin",
    )
    with pytest.raises(UserError, match=r"adapter_model\.bin holds several adapters: mine, other"):
        Pretrained(**settings).build()
    torch.save({"a": dataclasses.field}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="not a plain PyTorch weight file"):
        Pretrained(**settings).build()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"train_fully": "token_embedding|lm_head"}),
        pytest.param("tied", {"train_fully": "token_embedding"}, marks=pytest.mark.slow),
        ("gpt2", {"bias": "lora_only", "targets": ".*/query"}),
        ("llama", {"tokens": (3, 60)}),
    ],
)
def test_what_we_train_beside_adapters_is_what_peft_loads(family, settings, bases, tmp_path):
    model = Pretrained(str(bases[family]), lora=Lora(rank=2, **settings)).build()
    params, draw = model.init(jax.random.key(0)), np.random.default_rng(0).normal
    before = jax.jit(lambda p: model.apply(p, tokens()).logits)(params)
    with torch.no_grad():  # nothing has moved yet
        plain = AutoModelForCausalLM.from_pretrained(bases[family])(input_ids=torch.as_tensor(tokens())).logits
    assert relative_error(before, plain.numpy()) < 1e-5
    adapter = jax.tree.map(lambda x: x + jnp.asarray(draw(0.0, 0.2, x.shape), jnp.float32), params[ADAPTER])
    params = {**params, ADAPTER: adapter}
    expected = jax.jit(lambda p: model.apply(p, tokens()).logits)(params)
    save_adapter(tmp_path, model, params)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[family]), tmp_path)
    with torch.no_grad():
        assert relative_error(expected, theirs(input_ids=torch.as_tensor(tokens())).logits.numpy()) < 1e-5
    again = Pretrained(str(bases[family]), lora=Lora(path=str(tmp_path))).build()
    reread = again.init(jax.random.key(1))
    assert (
        relative_error(jax.jit(lambda p: again.apply(p, tokens()).logits)(reread), np.asarray(expected)) < 1e-5
    )


def test_a_folder_brings_all_its_settings(adapter, bases):
    with pytest.raises(UserError, match=r"lora\.path brings rank, alpha, targets and all else"):
        Pretrained(str(bases["llama"]), lora=Lora(path=str(adapter), rank=4)).build()


def test_without_an_adapter_or_a_folder_below_it_there_is_no_adapter_to_write(bases, tmp_path):
    model, params = load_pretrained(bases["llama"])
    with pytest.raises(UserError, match="the model has no adapter to export"):
        save_adapter(tmp_path, model, params)
    model = replace(model, config=replace(model.config, lora=Lora()))
    with pytest.raises(UserError, match="an adapter needs its base, and this one came from no folder"):
        save_adapter(tmp_path, model, params)


@pytest.mark.slow
def test_an_adapter_on_every_map_of_any_family_is_one_that_peft_reads_alike(transformer, tmp_path):
    base = transformer[1]
    model = Pretrained(str(base), lora=Lora(rank=2)).build()
    params, draw = model.init(jax.random.key(0)), np.random.default_rng(0).normal
    adapter = jax.tree.map(lambda x: x + jnp.asarray(draw(0.0, 0.2, x.shape), jnp.float32), params[ADAPTER])
    params = {**params, ADAPTER: adapter}
    save_adapter(tmp_path, model, params)
    attention = transformer[0].config._attn_implementation
    theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    logits = jax.jit(lambda p: model.apply(p, jnp.asarray(tokens())).logits, compiler_options=FAST_COMPILE)(
        params
    )
    with torch.no_grad():
        expected = theirs(input_ids=torch.as_tensor(tokens()), use_cache=False).logits.numpy()
    assert relative_error(logits, expected) < 1e-4
