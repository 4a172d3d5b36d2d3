"""How a model is computed: choices of memory and speed that leave its numbers alone."""

from __future__ import annotations

from typing import Literal

from hybrid_jax.core.ranges import settings


@settings
class Execution:
    """Settings of the computation.

    Attributes:
        scan_layers: The layers are one stack that `jax.lax.scan` runs over. Compiling then takes as long for 80
            layers as for one; on a CPU decoding from a stack is slower.
        remat: What the backward pass finds saved of a layer, beside its input: "none" recomputes nothing, but
            saves everything; "full" saves nothing, "dots" the products of activations and weights (on a CPU,
            whose products have hand-written gradients, nothing), "named" the mixed values of attention.
        attention: An implementation of attention by name; None takes the best that can serve.
    """

    scan_layers: bool = False
    remat: Literal["none", "full", "dots", "named"] = "none"
    attention: Literal["einsum", "blocked", "cudnn", "splash"] | None = None
