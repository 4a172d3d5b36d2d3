"""A family of Hugging Face models: Seed-OSS is Llama with one more switch, the bias of attention's output."""

from dataclasses import replace

from hybrid_jax import FAMILIES, Pretrained, same, settings

LLAMA = FAMILIES["llama"]
FAMILIES["seed_oss"] = replace(
    LLAMA,
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    settings=(*LLAMA.settings, same(output_bias="attention_out_bias")),
)


@settings
class SeedOSS(Pretrained):
    """A pretrained model whose name in a config imports this file, and so makes the family known."""
