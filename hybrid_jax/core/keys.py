"""Random keys by purpose: everything that a run draws random numbers for has a stream of its own.

A key is never stored and never used twice. `root_key` makes the first one from the seed; below it comes
``fold_in`` with a running number (a step, a batch, a row) or ``split``.
"""

from enum import IntEnum

import jax
from jax import Array


class Purpose(IntEnum):
    """The purposes that random numbers of a seed are drawn for. No number here is ever reassigned."""

    MODEL = 0  # the parameters at the start
    TRAINING = 1  # every step folds its number in
    EVALUATION = 2  # answers to held-out prompts; every batch folds its number in
    GENERATION = 3  # answers that a user asks for
    REFERENCE_ANSWERS = 4  # what a reward model's scores are centred on
    CONVERSATIONS = 5  # those of an evaluation; every phase folds its own seeds in


class Branch(IntEnum):
    """Numbers to fold into a key that is also split or folded with running numbers: far beyond those."""

    OPPONENTS = 2**31  # below a step of training
    ROUNDS = 2**31 + 1  # below a step of training; every further round folds its number in
    ACTORS = 3 * 2**30  # below a step of training, for all rollouts that it begins but the first


class Parameters(IntEnum):
    """Parameters of a model beside its trunk's, below the key of the trunk."""

    ADAPTER = 1
    HEADS = 2  # every head folds its number in


def root_key(seed: int | Array, purpose: Purpose) -> Array:
    """The key from which all randomness for ``purpose`` comes."""
    return jax.random.fold_in(jax.random.key(seed), purpose)
