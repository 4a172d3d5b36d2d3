"""Language models with a memory of slots that they read and write: each file registers its backbones."""
