"""Language models whose memory is a state of constant size: each file registers its backbones."""

from hybrid_jax.models.recurrent.elman import Elman
from hybrid_jax.models.recurrent.gated_deltanet import GatedDeltaNet
from hybrid_jax.models.recurrent.gru import GRU
from hybrid_jax.models.recurrent.lru import LRU
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.models.recurrent.mamba2 import Mamba2
from hybrid_jax.models.recurrent.mingru import MinGRU
from hybrid_jax.models.recurrent.rg_lru import RGLRU

__all__ = ["GRU", "LRU", "LSTM", "RGLRU", "Elman", "GatedDeltaNet", "Mamba2", "MinGRU"]
