"""A head: how near a text is to a learnt point for each label."""

import jax
import jax.numpy as jnp

import hybrid_jax as hj


@hj.settings
class Nearest:
    """``y = −|u − c_y|²`` of the vector u of a text, a point c_y for each label (Snell et al. 2017, eq. 2)."""

    labels: tuple[str, ...]  # one a point
    spread: hj.Positive = 0.1  # standard deviation of the points at the start
    trains_trunk: bool = True  # the trunk trains with the points

    def init(self, key, width):
        """Random points, [Y F]."""
        return {"points": self.spread * jax.random.normal(key, (len(self.labels), width))}

    def read(self, params, features, *, dropout_key=None):
        """The squared distances to the points, negative: float32 [B Y]."""
        away = features.astype(jnp.float32)[:, None] - params["points"]
        return -jnp.square(away).sum(axis=-1)
