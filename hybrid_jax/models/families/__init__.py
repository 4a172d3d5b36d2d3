"""The Hugging Face families that can be read and written: the only list of them."""

from hybrid_jax.models.families.gpt2 import GPT2
from hybrid_jax.models.families.llama import LLAMA
from hybrid_jax.models.families.table import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (GPT2, LLAMA)}
