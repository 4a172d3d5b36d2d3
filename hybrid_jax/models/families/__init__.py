"""The Hugging Face families that can be read and written: the only list of them.

A decoder from scratch is exported as the first family that can express it.
"""

from hybrid_jax.models.families.bloom import BLOOM
from hybrid_jax.models.families.cohere import COHERE
from hybrid_jax.models.families.ernie4_5 import ERNIE4_5
from hybrid_jax.models.families.falcon import FALCON
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from hybrid_jax.models.families.glm4 import GLM4
from hybrid_jax.models.families.gpt2 import GPT2
from hybrid_jax.models.families.gpt_bigcode import GPT_BIGCODE
from hybrid_jax.models.families.gpt_neo import GPT_NEO
from hybrid_jax.models.families.gpt_neox import GPT_NEOX
from hybrid_jax.models.families.gpt_oss import GPT_OSS
from hybrid_jax.models.families.gptj import GPTJ
from hybrid_jax.models.families.granite import GRANITE
from hybrid_jax.models.families.llama import LLAMA, MISTRAL
from hybrid_jax.models.families.mixtral import MIXTRAL
from hybrid_jax.models.families.mpt import MPT
from hybrid_jax.models.families.olmo import OLMO, OLMO2, OLMOE
from hybrid_jax.models.families.opt import OPT
from hybrid_jax.models.families.phi import PHI
from hybrid_jax.models.families.phi3 import PHI3
from hybrid_jax.models.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from hybrid_jax.models.families.smollm3 import SMOLLM3
from hybrid_jax.models.families.stablelm import STABLELM
from hybrid_jax.models.families.starcoder2 import STARCODER2

_ALL = (
    *(GPT2, LLAMA, MISTRAL, GPT_NEO, GPTJ, GPT_NEOX, GPT_BIGCODE, OPT, BLOOM, MPT, FALCON),
    *(MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, GEMMA, GEMMA2, GEMMA3_TEXT, PHI, PHI3, STABLELM),
    *(STARCODER2, OLMO, OLMO2, OLMOE, GRANITE, COHERE, GLM4, SMOLLM3, GPT_OSS, ERNIE4_5),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
