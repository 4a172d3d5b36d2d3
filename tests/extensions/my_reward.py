"""A reward: how varied a response is."""

from hybrid_jax import Share, settings


@settings
class Variety:
    """The share of a response's words that are different, up to a limit; 0 for a response without words."""

    at_most: Share = 1.0  # no more than this is rewarded

    def __call__(self, responses: list[str]) -> list[float]:
        """Scores each response by itself, from 0 to ``at_most``."""
        words = [response.split() for response in responses]
        return [min(len(set(w)) / len(w), self.at_most) if w else 0.0 for w in words]
