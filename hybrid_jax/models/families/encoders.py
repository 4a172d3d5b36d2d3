"""The Hugging Face families of encoders that can be read and written: the only list of them."""

from hybrid_jax.models.families.bert import BERT
from hybrid_jax.models.families.distilbert import DISTILBERT
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.roberta import ROBERTA, XLM_ROBERTA

ENCODERS: dict[str, Family] = {family.model_type: family for family in (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT)}
