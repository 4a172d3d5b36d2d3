"""DistilBERT (Sanh et al. 2019): BERT without token types and pooler.

Dropout, which acts in training only, differs in one place: theirs leaves the attention's output alone.
"""

from __future__ import annotations

from typing import Any

from hybrid_jax.models.encoder import EncoderConfig
from hybrid_jax.models.families.bert import head
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import INIT_STD, MAX_LENGTH, Part, Settings, activation, fixed, same
from hybrid_jax.models.families.weights import Table

DISTILBERT_TABLE: Table = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layer_*/attention/query": "transformer.layer.*.attention.q_lin",
    "layer_*/attention/key": "transformer.layer.*.attention.k_lin",
    "layer_*/attention/value": "transformer.layer.*.attention.v_lin",
    "layer_*/attention/output": "transformer.layer.*.attention.out_lin",
    "layer_*/attention_norm": "transformer.layer.*.sa_layer_norm",
    "layer_*/mlp/up": "transformer.layer.*.ffn.lin1",
    "layer_*/mlp/down": "transformer.layer.*.ffn.lin2",
    "layer_*/mlp_norm": "transformer.layer.*.output_layer_norm",
    "classifier_dense": "pre_classifier",
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
}
_RATES = {"ForSequenceClassification": "seq_classif_dropout", "ForQuestionAnswering": "qa_dropout"}


def _read_head_dropout(theirs: Any) -> Settings:
    kind = str((theirs.architectures or [""])[0]).removeprefix("DistilBert")
    return {"head_dropout": getattr(theirs, _RATES.get(kind, "dropout"))}


def _write_head_dropout(config: Any) -> Settings:
    return dict.fromkeys(_RATES.values(), config.head_dropout)


DISTILBERT = Family(
    "distilbert",
    "DistilBertModel",
    settings=(
        *(INIT_STD, MAX_LENGTH, activation("activation")),
        same(num_layers="n_layers", width="dim", num_heads="n_heads", vocab_size="vocab_size"),
        same(dropout="dropout", attention_dropout="attention_dropout", pad_id="pad_token_id"),
        Part(
            lambda theirs: {"mlp_width": theirs.hidden_dim}, lambda config: {"hidden_dim": config.inner_width}
        ),
        Part(_read_head_dropout, _write_head_dropout),
        head("DistilBert"),
        fixed(token_types=0, norm_epsilon=1e-12, pooler=False, head_reads="relu"),
    ),
    table=DISTILBERT_TABLE,
    prefix="distilbert.",
    heads=("classifier", "pre_classifier", "qa_outputs"),
    ignored=r"embeddings\.position_ids|vocab_(transform|layer_norm|projector)\..*",
    config=EncoderConfig,
    causal=False,
)
