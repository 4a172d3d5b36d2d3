"""Seeds: whole numbers of 32 bits, each of which gives other numbers."""

MOST_SEED = 2**32 - 1  # JAX's keys drop the bits above, so a larger seed would repeat a smaller one


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuses what would be another seed in disguise.

    Raises:
        ValueError: ``seed`` is below 0 or has more than 32 bits.
    """
    if not 0 <= seed <= MOST_SEED:
        shown = str(seed) if abs(seed) < 10**20 else f"one of {seed.bit_length()} bits"
        raise ValueError(f"{name} must be in [0, {MOST_SEED}], got {shown}")
