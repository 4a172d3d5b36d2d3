"""The contract of environments: who talks with the policy, and what an answer earns.

    messages = environment.reset(seed, **row)                                    # what the policy reads first
    messages, reward, terminated, truncated, info = environment.step(text)       # after each of its answers

It is the five-tuple of gymnasium over chat messages. The two ends differ in what follows: after ``terminated``
nothing can be earned any more; ``truncated`` breaks off a conversation that could have gone on, so that the
value of its last state counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from hybrid_jax.core.batches import Message
from hybrid_jax.core.registry import Registry

AnswerFn = Callable[[Sequence[Message]], str]  # another language model's answer to a conversation


class Step(NamedTuple):
    """The reply to an answer."""

    messages: Sequence[Message]  # of the user, a tool or a system: what the policy reads next
    reward: float  # of the answer; finite
    terminated: bool  # the conversation has ended
    truncated: bool = False  # it is broken off, though it could go on
    info: Mapping[str, Any] = {}  # numbers to log, by name: they are added up over the conversation


@runtime_checkable
class Environment(Protocol):
    """One conversation at a time, on one thread of the host at a time. What it remembers is its own.

    It may have ``tools``, JSON schemas of functions that the chat template shows to the policy, to be read
    after `reset`; and ``close()``, which is called once nothing more is asked of it.
    """

    def reset(self, seed: int, **row: Any) -> Sequence[Message]:
        """Begins a conversation; the same seed and row begin the same one.

        Args:
            seed: of all that is drawn, at least 0.
            row: the columns of a row of data, where the settings have ``reads_rows = True``.

        Returns:
            Messages that the policy answers; the last is not its own.
        """
        ...

    def step(self, text: str) -> Step:
        """Replies to an answer of the policy; ``text`` is without the token that ends it."""
        ...


@runtime_checkable
class EnvironmentSettings(Protocol):
    """Settings of an environment: a frozen dataclass, registered in `ENVIRONMENTS` or named ``my_module:Mine``.

    One that has much to make before its first conversation, such as its games, may have ``prepare()``, which is
    called before conversations begin, outside of their time-outs, and often has nothing left to do.
    One whose conversations begin with a row of data says ``reads_rows = True``. One that asks another language
    model, such as a user played by it, names the reference in its setting ``answered_by``.
    """

    def make(self, answer_fn: AnswerFn | None = None) -> Environment:
        """An environment of its own for one conversation; ``answer_fn`` where it has ``answered_by``."""
        ...


ENVIRONMENTS: Registry[EnvironmentSettings] = Registry("environment", needs=("make",))


def reads_rows(environment: EnvironmentSettings) -> bool:
    """Tells whether conversations begin with rows of data."""
    return getattr(environment, "reads_rows", False)
