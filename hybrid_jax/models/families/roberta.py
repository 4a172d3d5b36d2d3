"""RoBERTa (Liu et al. 2019), XLM-RoBERTa: BERT whose positions start behind the pad token's number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybrid_jax.models.encoder import EncoderConfig
from hybrid_jax.models.families.bert import BERT_SIZES, BERT_TABLE, head
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import Part, Settings, fixed
from hybrid_jax.models.families.weights import Table


def _read_positions(theirs: Any) -> Settings:
    offset = theirs.pad_token_id + 1
    return {"position_offset": offset, "max_length": theirs.max_position_embeddings - offset}


def _write_positions(config: Any) -> Settings:
    return {"max_position_embeddings": config.max_length + config.position_offset}


def _table(config: Any) -> Table:
    head = {"classifier_dense": "classifier.dense", "classifier": "classifier.out_proj"}
    return {**BERT_TABLE, **head} if config.head == "sequence" else BERT_TABLE


ROBERTA = Family(
    "roberta",
    "RobertaModel",
    settings=(
        *BERT_SIZES,
        Part(_read_positions, _write_positions),
        head("Roberta", pooled=True),
        fixed(head_reads="tanh"),
    ),
    table=_table,
    prefix="roberta.",
    heads=("classifier", "qa_outputs"),
    ignored=r"embeddings\.position_ids|(roberta\.)?lm_head\..*",
    config=EncoderConfig,
    causal=False,
)
XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    architecture="XLMRobertaModel",
    settings=(*ROBERTA.settings[:-2], head("XLMRoberta", pooled=True), ROBERTA.settings[-1]),
)
