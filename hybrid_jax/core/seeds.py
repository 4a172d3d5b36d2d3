"""Checks seeds: whole numbers of 32 bits, each of which gives other random numbers."""

from hybrid_jax.core.ranges import Seed, check_range


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuses a number that JAX would take for another seed.

    Raises:
        ValueError: ``seed`` is below 0 or has more than 32 bits.
    """
    check_range(Seed, seed, name)
