"""Every setting of every config.json changed in turn: logits move as in `transformers`, or one line says no.

A model's weights are drawn by their names and shapes, so that a changed config meets the same ones wherever
they fit. A setting that moves neither model is of no matter here (training, saving, generation).
"""

import copy
import importlib
import inspect
import json
import sys
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, masking_utils, modeling_layers, modeling_rope_utils

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.encoder import Encoder
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.encoders import ENCODERS
from hybrid_jax.models.families.t5 import ENCODER_DECODERS
from hybrid_jax.models.folders.encoder import load_encoder
from hybrid_jax.models.folders.encoder_decoder import load_encoder_decoder
from hybrid_jax.models.folders.hf import load_pretrained

VOCAB, PAD = 61, 1
_RANDOM = np.random.default_rng(0)
TOKENS = _RANDOM.integers(0, VOCAB, (2, 20))
TOKENS[0, 7] = PAD  # a real token may be the one that pads
LEFT = np.arange(20) >= np.array([[0], [5]])
RIGHT = LEFT[:, ::-1]
TOKENS_RIGHT = np.where(RIGHT, np.where(TOKENS == PAD, 2, TOKENS), PAD)  # as RoBERTa counts positions

_ACTIVATIONS = ["relu", "gelu", "silu", "gelu_new", "gelu_fast", "quick_gelu", "tanh", "gelu_pytorch_tanh"]
_WORDS: dict[str, list[Any]] = {
    "rope_type": ["linear", "dynamic", "yarn", "longrope", "llama3", "proportional"],
    "position_embedding_type": ["relative_key", "relative_key_query"],
    "feed_forward_proj": ["relu", "gated-gelu", "gated-silu", "gelu"],
    "model_type": [],  # another family, not a setting
    "architectures": [],
    "transformers_version": ["4.30.0"],
    "dtype": ["bfloat16"],
    "summary_type": ["first"],
    "problem_type": ["regression"],
}
_SIZES = ("hidden", "size", "layer", "dim", "d_", "n_embd", "n_inner", "heads", "experts", "width")
_ROPES = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    {"rope_type": "yarn", "original_max_position_embeddings": 24, "factor": 4.0, "attention_factor": 0.7},
    {"rope_type": "yarn", "original_max_position_embeddings": 24, "factor": 4.0, "beta_fast": 16,
     "beta_slow": 2},
    {"rope_type": "yarn", "original_max_position_embeddings": 24, "factor": 4.0, "truncate": False},
    {"rope_type": "yarn", "original_max_position_embeddings": 24, "factor": 4.0, "mscale": 0.7},
    {"rope_type": "yarn", "original_max_position_embeddings": 24, "factor": 4.0, "mscale": 0.7,
     "mscale_all_dim": 0.4},
    {"rope_type": "longrope", "short_factor": "SHORT", "long_factor": "LONG",
     "original_max_position_embeddings": 12},
    {"rope_type": "longrope", "short_factor": "SHORT", "long_factor": "LONG",
     "original_max_position_embeddings": 48, "factor": 4.0},
    {"rope_type": "longrope", "short_factor": "SHORT", "long_factor": "LONG",
     "original_max_position_embeddings": 12, "attention_factor": 1.3},
]  # fmt: skip
# Settings that a file may hold although `transformers` does not write them for the family, of any version.
_EXTRA: dict[str, list[Any]] = {
    "is_causal": [False], "is_decoder": [True], "use_bidirectional_attention": [True],
    "add_cross_attention": [True],
    "attention_bias": [True, False], "mlp_bias": [True], "use_bias": [False], "bias": [True],
    "use_sliding_window": [True, False], "sliding_window": [4, None], "max_window_layers": [0, 1],
    "layer_types": [["sliding_attention"] * 2, ["sliding_attention", "full_attention"], ["full_attention"] * 2],
    "sliding_window_pattern": [2], "no_rope_layers": [[0, 1]], "no_rope_layer_interval": [2],
    "partial_rotary_factor": [0.5], "rotary_pct": [0.5], "rotary_dim": [2], "rope_theta": [77.0],
    "rope_local_base_freq": [33.0], "rotary_emb_base": [55.0], "head_dim": [12, None],
    "num_key_value_heads": [1],
    "logit_scale": [0.5], "clip_qkv": [0.3], "qk_layernorm": [True], "use_qk_norm": [True], "qk_norm": [True],
    "hidden_act": ["relu"], "hidden_activation": ["relu"], "activation_function": ["relu"],
    "pretraining_tp": [2],
    "attn_logit_softcapping": [1.0], "final_logit_softcapping": [1.0], "query_pre_attn_scalar": [7],
    "logits_scaling": [3.0], "embedding_multiplier": [2.0], "attention_multiplier": [0.1],
    "residual_multiplier": [0.5], "rms_norm_eps": [0.1], "layer_norm_eps": [0.1], "layer_norm_epsilon": [0.1],
    "tie_word_embeddings": [True, False], "use_cache": [False], "torch_dtype": ["bfloat16"],
    "_attn_implementation": ["sdpa"], "attn_implementation": ["sdpa"], "chunk_size_feed_forward": [4],
    "attention_dropout": [0.3], "hidden_dropout": [0.3], "norm_topk_prob": [True, False], "norm_first": [True],
    "routed_scaling_factor": [2.0], "n_shared_experts": [1], "moe_layer_freq": [2], "alibi": [True],
    "scale_attn_by_inverse_layer_idx": [True], "reorder_and_upcast_attn": [True], "scale_embedding": [True],
    "output_hidden_states": [True], "output_attentions": [True], "return_dict": [False],
    "cross_attention_hidden_size": [8], "pruned_heads": [{"0": [1]}], "quantization_config": [],
    "original_max_position_embeddings": [12], "attention_factor": [0.5], "sinks": [True], "pad_token_id": [PAD],
}  # fmt: skip


def _without(content: dict, path: tuple) -> dict:
    changed = copy.deepcopy(content)
    node = changed
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return changed


def _with(content: dict, path: tuple, value: Any) -> dict:
    changed = copy.deepcopy(content)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


def _leaves(node: Any, path: tuple = ()) -> Any:
    """(path, value) of everything that is no dict; a list is one leaf, and so is each of its items."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
        return
    yield path, node
    if isinstance(node, list):
        for i, value in enumerate(node):
            yield from _leaves(value, (*path, i))


def _others(key: str, value: Any) -> list[Any]:
    """Other values that a setting may have."""
    match value:
        case bool():
            return [not value, None]
        case int():
            return [2 * value, max(value // 2, 1), None]
        case float():
            return [1.5 * value + 0.1, value / 2, None]
        case str() if value in ("sliding_attention", "full_attention"):
            return [
                {"sliding_attention": "full_attention"}.get(value, "sliding_attention"),
                "chunked_attention",
            ]
        case str() if value in ("local", "global"):
            return ["local" if value == "global" else "global"]
        case str() if key in _WORDS:
            return [word for word in _WORDS[key] if word != value]
        case str() if "act" in key:
            return [word for word in _ACTIVATIONS if word != value]
        case str():
            return [None]
        case None:
            return [True, 4, 0.5, [0]]
        case list():
            return [value[::-1], value[:-1], [], None, [0]]
    return [None]


def changes(content: dict) -> Any:
    """(name of the change, config.json) for all of them."""
    for path, value in _leaves(content):
        name = ".".join(map(str, path))
        if any(str(key) in ("id2label", "label2id") for key in path):
            continue
        for other in _others(str(next(k for k in path[::-1] if isinstance(k, str))), value):
            if other != value or type(other) is not type(value):
                yield f"{name}: {value} -> {other}", _with(content, path, other)
        if not isinstance(path[-1], int):
            yield f"{name}: absent", _without(content, path)
    source = _source(content["model_type"])
    for name, values in _EXTRA.items():
        for other in values if name in source else ():
            if name not in content or content[name] != other:
                yield f"{name} = {other}", copy.deepcopy({**content, name: other})
    yield from _rope_changes(content)


def _source(model_type: str) -> str:
    """The code of `transformers` that reads a config of this type."""
    config = CONFIG_MAPPING[model_type]
    package = config.__module__.rpartition(".")[0]
    modeling = importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
    modules = (modeling, sys.modules[config.__module__], masking_utils, modeling_rope_utils, modeling_layers)
    return "\n".join(inspect.getsource(module) for module in modules)


def _rope_changes(content: dict) -> Any:
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    nested = "full_attention" in rope
    base = rope["full_attention"] if nested else rope
    head = content.get("head_dim") or content["hidden_size"] // content["num_attention_heads"]
    pairs = int(head * (base.get("partial_rotary_factor") or 1.0)) // 2
    factors = {"SHORT": [1.0 + i / 4 for i in range(pairs)], "LONG": [2.0 + 3 * i for i in range(pairs)]}
    keep = {key: base[key] for key in ("rope_theta", "partial_rotary_factor") if key in base}
    for change in _ROPES:
        new = {key: factors.get(str(value), value) for key, value in change.items()}
        for kind in ("full_attention", "sliding_attention") if nested else (None,):
            made = {**keep, **new}
            whole = {**content, "rope_parameters": {**rope, kind: made} if kind else made}
            yield f"rope_parameters {kind or ''} = {change}", whole
            for missing in ("factor", "original_max_position_embeddings"):
                if missing in new and len(new) < 5:
                    yield (
                        f"rope_parameters {kind or ''} = {change} less {missing}",
                        _without(whole, ("rope_parameters", *([kind] if kind else []), missing)),
                    )
        old = {key: value for key, value in content.items() if key != "rope_parameters"}
        yield f"rope_scaling = {change}", {**old, "rope_scaling": new, "rope_theta": 500.0}


# ------------------------------------------------------------------------------------------------ two models


def make_theirs(model_class: str, content: dict) -> Any:
    """Their model of a config.json, every weight drawn by its name and shape."""
    read = copy.deepcopy({key: value for key, value in content.items() if key != "model_type"})
    config = CONFIG_MAPPING[content["model_type"]].from_dict(read)
    _check_small(config.to_dict())
    cls = getattr(transformers, model_class)
    # Their eager Falcon adds the ALiBi bias twice.
    attention = "sdpa" if getattr(config, "alibi", False) else "eager"
    model = cls._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = np.random.default_rng(zlib.crc32(f"{name}{tuple(parameter.shape)}".encode()))
            values = 0.25 * draw.standard_normal(parameter.shape)
            values = values + 1.0 if parameter.ndim == 1 and name.endswith("weight") else values
            parameter.copy_(torch.as_tensor(values, dtype=torch.float32))
    return model


def _check_small(settings: dict) -> None:
    """A setting that is left out may have the size of a real model."""
    for name, value in settings.items():
        if isinstance(value, int) and value > 300 and any(word in name for word in _SIZES):
            raise ValueError(f"{name} {value} is too large for a test")


def their_logits(model: Any) -> np.ndarray:
    """Of the tokens that are no padding."""
    tensor = lambda x: torch.as_tensor(np.array(x)).long()  # noqa: E731
    kind = model.config.model_type
    with torch.no_grad():
        if kind in ENCODERS:
            out = model(input_ids=tensor(TOKENS_RIGHT), attention_mask=tensor(RIGHT), return_dict=True)
            return _real(out.logits if "logits" in out else out.last_hidden_state, RIGHT)
        if kind in ENCODER_DECODERS:
            inputs = {"input_ids": tensor(TOKENS_RIGHT), "attention_mask": tensor(RIGHT)}
            start = model.config.decoder_start_token_id or 0
            targets = np.concatenate([np.full((2, 1), start), TOKENS[:, :-1]], 1)
            out = model(**inputs, decoder_input_ids=tensor(targets), return_dict=True, use_cache=False)
            return out.logits.numpy()
        inputs = {"input_ids": tensor(TOKENS), "attention_mask": tensor(LEFT)}
        if kind not in ("bloom", "mpt"):  # these count positions by themselves
            inputs["position_ids"] = tensor(np.maximum(np.cumsum(LEFT, 1) - 1, 0))
        return _real(model(**inputs, return_dict=True, use_cache=False).logits, LEFT)


def _real(scores: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    values = scores.numpy()
    return values if values.ndim == 2 else values[mask]


def load_ours(kind: str, folder: Any) -> tuple[Any, Any]:
    """Our model of their folder and its parameters."""
    if kind in ENCODERS:
        return load_encoder(folder)
    return load_encoder_decoder(folder) if kind in ENCODER_DECODERS else load_pretrained(folder)


def our_logits(model: Any, params: Any) -> np.ndarray:
    """Of the tokens that are no padding. Each operation runs by itself: compiled once for all the changes."""
    if isinstance(model, Encoder):
        read = model.logits if model.config.head is not None else model.hidden
        scores = np.asarray(read(params, jnp.asarray(TOKENS_RIGHT), jnp.asarray(RIGHT)))
        return scores if scores.ndim == 2 else scores[RIGHT]
    if isinstance(model, EncoderDecoder):
        pair = (
            jnp.asarray(TOKENS_RIGHT),
            jnp.asarray(RIGHT),
            jnp.asarray(TOKENS),
            jnp.ones(TOKENS.shape, bool),
        )
        return np.asarray(model.apply_pairs(params, *pair).logits)
    return np.asarray(model.apply(params, jnp.asarray(TOKENS), jnp.asarray(LEFT)).logits)[LEFT]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to the largest number; infinite where shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))


# ------------------------------------------------------------------------------------------------ the scan


@dataclass
class Findings:
    """What became of each change, by its name."""

    neutral: list[str] = field(default_factory=list)  # moves neither
    equal: list[str] = field(default_factory=list)  # moves both alike
    refused: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)  # for transformers
    wrong: list[str] = field(default_factory=list)


class Scan:
    """One model of `transformers`, and the ways in which its config.json may be changed."""

    def __init__(self, model_class: str, settings: dict, folder: Any):
        self.model_class, self.folder, self.found = model_class, folder, Findings()
        self.kind = settings["model_type"]
        self.family = {**FAMILIES, **ENCODERS, **ENCODER_DECODERS}[self.kind]
        theirs = make_theirs(model_class, settings)
        self.content = self._save(theirs)
        self.config = self.family.read_config(self.content)
        self.logits = their_logits(theirs)
        self.model, params = load_ours(self.kind, folder)
        assert distance(our_logits(self.model, params), self.logits) < 1e-4, "the base differs"

    def _save(self, theirs: Any) -> dict:
        theirs.save_pretrained(self.folder)
        return json.loads((self.folder / "config.json").read_text())

    def all(self) -> Findings:
        """Tries every change."""
        for name, content in changes(self.content):
            self.one(name, content)
        return self.found

    def one(self, name: str, content: dict) -> None:
        """Files one change under what becomes of it."""
        try:
            theirs = make_theirs(self.model_class, content)
            logits = their_logits(theirs)
        except Exception as error:  # their checks raise errors of many kinds
            self.found.invalid.append(f"{name} ({type(error).__name__}: {str(error)[:90]})")
            return
        moved = distance(logits, self.logits) > 1e-5
        try:
            config = self.family.read_config(copy.deepcopy(content))
            if not moved and config == self.config:
                self.found.neutral.append(name)
                return
            self._save(theirs)
            (self.folder / "config.json").write_text(json.dumps(content))
            model, params = load_ours(self.kind, self.folder)
            error = distance(our_logits(model, params), logits)
        except UserError as refusal:
            named = name.split(":")[0].split(" ")[0].split(".")
            told = any(part in str(refusal) for part in (*named, "must be")) or "rope_" in name
            lines = str(refusal).count("\n")
            (self.found.refused if told and not lines else self.found.wrong).append(f"{name} -> {refusal}")
            return
        except Exception as crash:
            self.found.wrong.append(f"{name}: crashes with {type(crash).__name__}: {crash}")
            return
        if error > 1e-4:
            self.found.wrong.append(
                f"{name}: off by {error:.2g}, theirs moved {distance(logits, self.logits):.2g}"
            )
            return
        (self.found.equal if moved else self.found.neutral).append(name)
        if moved:
            self._check_export(name, model, content, logits)

    def _check_export(self, name: str, model: Any, content: dict, logits: np.ndarray) -> None:
        try:
            written = self.family.write_config(model.config)
            back = distance(their_logits(make_theirs(self.model_class, written)), logits)
        except Exception as crash:
            self.found.wrong.append(f"{name}: the way back: {type(crash).__name__}: {crash}")
            return
        if back > 1e-4:
            self.found.wrong.append(f"{name}: off by {back:.2g} on the way back")


_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_heads": 4, "num_layers": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 2,
}  # fmt: skip
_NAMES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}


def bases(kind: str) -> Any:
    """(name, class, settings) of the models of an encoder's or an encoder-decoder's family to change."""
    if kind == "t5":
        yield "t5", "T5ForConditionalGeneration", {**_T5, "model_type": kind}
        new = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        yield "t5 1.1", "T5ForConditionalGeneration", {**_T5, **new, "model_type": kind}
        return
    sizes = {**(_DISTILBERT if kind == "distilbert" else _BERT), "model_type": kind}
    for head in ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        yield f"{kind} {head}", _NAMES[kind] + head, sizes


def _of_family(kind: str, cases: dict) -> list[tuple[str, str, dict]]:
    """(name, class, settings) of the models of a family to change."""
    if kind not in FAMILIES:
        return list(bases(kind))
    mine = {name: case for name, case in cases.items() if name.split()[0] == kind}
    return [(name, FAMILIES[kind].architecture, {**case, "model_type": kind}) for name, case in mine.items()]


@pytest.fixture
def quiet():
    """Configs that `transformers` doubts are many here."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", [*FAMILIES, *ENCODERS, *ENCODER_DECODERS])
def test_every_setting_moves_both_models_alike_or_is_refused_by_name(kind, cases, tmp_path):
    wrong = {}
    for name, model_class, settings in _of_family(kind, cases):
        found = Scan(model_class, settings, tmp_path).all()
        assert len(found.equal) > 10  # the scan itself works
        wrong |= {name: found.wrong} if found.wrong else {}
    assert not wrong


# What was once read wrongly: settings that moved only one of the two models.
OFFENDERS = {
    "gemma3_text": {
        "use_bidirectional_attention": True, "is_causal": False, "attn_logit_softcapping": 0.5,
        "layer_types": ["full_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", OFFENDERS)
def test_settings_that_were_read_wrongly_once_are_equal_or_refused(kind, cases, tmp_path):
    scan = Scan(*_of_family(kind, cases)[0][1:], tmp_path)
    for name, value in OFFENDERS[kind].items():
        scan.one(name, {**scan.content, name: value})
    assert scan.found.wrong == scan.found.invalid == []
