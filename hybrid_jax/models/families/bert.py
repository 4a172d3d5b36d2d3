"""BERT (Devlin et al. 2019): learned positions and token types, a pooler, norms behind the branches."""

from __future__ import annotations

from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.encoder import EncoderConfig
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import (
    INIT_STD,
    MAX_LENGTH,
    MLP_WIDTH,
    Part,
    Settings,
    activation,
    fixed,
    require,
    same,
)
from hybrid_jax.models.families.weights import Table

_HEADS = {"ForSequenceClassification": "sequence", "ForTokenClassification": "token"}
_HEADS |= {"ForQuestionAnswering": "question"}
_BODIES = ("Model", "ForMaskedLM", "ForPreTraining")  # their heads are of the pre-training and left behind


def head(prefix: str, pooled: bool = False) -> Part:
    """The head, by the name of their class; ``pooled`` families have a pooler where nothing else is said."""

    def read(theirs: Any) -> Settings:
        name = str((theirs.architectures or [f"{prefix}Model"])[0])
        kind = name.removeprefix(prefix)
        if kind not in (*_BODIES, *_HEADS):
            known = ", ".join(f"{prefix}{known}" for known in ("Model", *_HEADS))
            raise UserError(f"architectures must be one of {known}, got {name!r}")
        head = _HEADS.get(kind)
        names = tuple(theirs.id2label[i] for i in sorted(theirs.id2label)) if head else ()
        if head == "question" and len(names) != 2:
            raise UserError(f"num_labels must be 2 for question answering, got {len(names)}")
        labels = () if head == "question" else names
        usual = pooled and head in (None, "sequence")
        return {"head": head, "labels": labels, "pooler": getattr(theirs, "add_pooling_layer", usual)}

    def write(config: Any) -> Settings:
        kinds = {head: kind for kind, head in _HEADS.items()} | {None: "Model"}
        names = config.labels if config.labels else ("LABEL_0", "LABEL_1")
        written: Settings = {"architectures": [prefix + kinds[config.head]], "add_pooling_layer": config.pooler}
        written["id2label"] = dict(enumerate(names))
        return written | {"label2id": {name: i for i, name in enumerate(names)}}

    return Part(read, write)


def _read_head_dropout(theirs: Any) -> Settings:
    if str((theirs.architectures or [""])[0]).endswith("ForQuestionAnswering"):
        return {"head_dropout": 0.0}
    rate = theirs.classifier_dropout
    return {"head_dropout": theirs.hidden_dropout_prob if rate is None else rate}


HEAD_DROPOUT = Part(_read_head_dropout, same(head_dropout="classifier_dropout").write)
BERT_SIZES = (
    *(INIT_STD, MLP_WIDTH, activation("hidden_act")),
    same(num_layers="num_hidden_layers", width="hidden_size", num_heads="num_attention_heads"),
    same(vocab_size="vocab_size", token_types="type_vocab_size", pad_id="pad_token_id"),
    same(norm_epsilon="layer_norm_eps", dropout="hidden_dropout_prob"),
    same(attention_dropout="attention_probs_dropout_prob"),
    HEAD_DROPOUT,
    require(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute"),
)
BERT_TABLE: Table = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layer_*/attention/query": "encoder.layer.*.attention.self.query",
    "layer_*/attention/key": "encoder.layer.*.attention.self.key",
    "layer_*/attention/value": "encoder.layer.*.attention.self.value",
    "layer_*/attention/output": "encoder.layer.*.attention.output.dense",
    "layer_*/attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layer_*/mlp/up": "encoder.layer.*.intermediate.dense",
    "layer_*/mlp/down": "encoder.layer.*.output.dense",
    "layer_*/mlp_norm": "encoder.layer.*.output.LayerNorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
}

BERT = Family(
    "bert",
    "BertModel",
    settings=(*BERT_SIZES, MAX_LENGTH, head("Bert", pooled=True), fixed(head_reads="pooler")),
    table=BERT_TABLE,
    prefix="bert.",
    heads=("classifier", "qa_outputs"),
    ignored=r"embeddings\.position_ids|cls\..*",
    config=EncoderConfig,
    causal=False,
)
