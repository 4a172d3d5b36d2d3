"""The Hugging Face families that can be read and written: the only list of them.

A decoder from scratch is exported as the first family that can express it.
"""

from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.gpt2 import GPT2
from hybrid_jax.models.families.llama import LLAMA, MISTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL)}
