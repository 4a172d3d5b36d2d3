"""Decoders that choose by what a response says, where a policy is talked to and evaluated."""

from dataclasses import dataclass, field

import jax
import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.evaluation.evaluate import EvaluationConfig, Evaluator
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.runs.policy import Policy
from hybrid_jax.runs.terminal_chat import TerminalChat
from hybrid_jax.sampling.best_of_n import BestOfN
from hybrid_jax.sampling.rejection import Rejection

TOKENIZER = Bytes(chat_template="plain").build()
N = 8


def distinct(prompts, responses):
    return [float(len(set(response))) for response in responses]


@dataclass
class Remembering:
    """The number of distinct characters, and all texts that were asked for."""

    seen: list = field(default_factory=list)

    def __call__(self, prompts, responses):
        self.seen.append(list(responses))
        return distinct(prompts, responses)


def tiny() -> tuple[Decoder, dict]:
    model = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=64).build(TOKENIZER.vocab_size)
    return model, model.init(jax.random.key(0))


def test_an_answer_in_the_terminal_is_the_best_of_those_that_were_drawn():
    reward = Remembering()
    sampler = BestOfN(max_new_tokens=8, n=N, reward=reward)
    policy = Policy(*tiny(), TOKENIZER, sampler, (TOKENIZER.eos_id,))
    reply = TerminalChat(policy).reply((), "Hi")
    (texts,) = reward.seen
    scores = distinct(None, texts)
    assert len(texts) == N
    assert min(scores) < max(scores)
    assert reply.turns[-1].text == texts[int(np.argmax(scores))]


def test_an_evaluation_scores_the_best_of_those_that_were_drawn_for_each_prompt():
    reward = Remembering()
    model, params = tiny()
    evaluator = Evaluator(
        EvaluationConfig(num_prompts=3),
        model,
        TOKENIZER,
        [Example(prompt, None) for prompt in ("a", "bb", "ccc")],
        sampler=BestOfN(max_new_tokens=8, n=N, reward=reward),
        rewards={"ppo": CompositeReward({"distinct": Part(distinct)})},
        seed=0,
        eos_ids=(TOKENIZER.eos_id,),
    )
    _, _, by_prompt = evaluator.answers(params)
    best = np.concatenate([np.reshape(distinct(None, texts), (-1, N)).max(axis=1) for texts in reward.seen])
    assert by_prompt["score"] == best[:3].tolist()


def test_a_bound_below_a_reward_on_tokens_is_refused_by_an_evaluation_too():
    model, params = tiny()
    reward = TokenCount(weights={token: 1.0 for token in range(model.vocab_size)})
    evaluator = Evaluator(
        EvaluationConfig(num_prompts=2),
        model,
        TOKENIZER,
        [Example(prompt, None) for prompt in "ab"],
        sampler=Rejection(reward=reward, max_new_tokens=4, n=2, most=0.5),
        rewards={},
        seed=0,
        eos_ids=(),
    )
    with pytest.raises(UserError, match=r"sampler.most must be at least every reward, got 0.5"):
        evaluator.answers(params)
