"""Learning from conversations: which tokens are learned, what they earn, and what a broken-off one is worth."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybrid_jax as hj
from hybrid_jax.algorithms.advantages import GAE, Returns
from hybrid_jax.algorithms.multistep import VTrace
from hybrid_jax.core.config import parse
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.environments.base import Step
from hybrid_jax.experiment_config import ExperimentConfig
from hybrid_jax.models.heads import value
from hybrid_jax.phases.clock import Clock
from hybrid_jax.runs.initial_state import state_shapes
from hybrid_jax.sampling.logits import response_keys, response_noise, sample_token
from tests.dialogue.talkers import Counting

# Drops the reasoning of every answer but the last, as Qwen3's template does.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Asking:
    """A world of one turn over rows of data: pays for short answers."""

    reads_rows = True

    def make(self, answer_fn=None):
        return self

    def reset(self, seed, *, messages, **row):
        return [{"role": "user", "content": messages[0]["content"]}]

    def step(self, text):
        return Step([], -float(len(text)) / 8, True)


def brevity(prompts, responses):
    return [-len(response) / 8 for response in responses]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    chats = [[("user", f"Hi {i}"), ("assistant", "ok " * (i % 3))] for i in range(12)]
    messages = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    return path


def experiment(tmp_path, rows, kind="ppo", template="chatml", seed=0, **phase):
    talk = {
        "conversation": {"max_turns": 10, "max_tokens": 600, "max_reply_tokens": 64},
        "environment": Counting(turns=10),
        "max_prompt_length": 40,
    }
    settings = {
        **{"name": kind, "prompts_per_step": 4, "epochs": 1, "sampler": {"max_new_tokens": 8}},
        **(talk if "reward" not in phase and "environment" not in phase else {}),
        **phase,
    }
    config = {
        "run_dir": str(tmp_path / "run"),
        "steps": 2,
        "seed": seed,
        "model": {"name": "decoder", "num_layers": 1, "width": 16, "num_heads": 2, "max_length": 640},
        "tokenizer": {"name": "bytes", "chat_template": template},
        "data": {"name": "chat", "train": str(rows), "held_out_fraction": 0.2},
        "phases": {"rl": settings},
        "scheduler": {"name": "alternation", "cycle": {"rl": 1}},
        "evaluation": {"num_prompts": 2, "num_examples": 2, "batch_size": 2, "length": 64},
        "compilation_cache": None,
    }
    return hj.build(parse(ExperimentConfig, config, trust=EVERYTHING))


def played(built, key=1):
    """A rollout, and the state that it was made with."""
    state, phase = built.init(), built.phases["rl"]
    state = phase.rollouts.references.updated(state)
    return phase.rollouts.play(state, jax.random.key(0), jax.random.key(key), Clock()), state


@pytest.fixture(scope="module")
def talked(tmp_path_factory, rows):
    built = experiment(tmp_path_factory.mktemp("talked"), rows)
    return built, *played(built)


def test_a_plan_counts_the_tokens_of_whole_conversations(tmp_path, rows):
    limits = {"max_turns": 2, "max_tokens": 100, "max_reply_tokens": 48, "slots": 3}
    world = {"environment": Counting(turns=2), "max_prompt_length": 40}
    built = experiment(tmp_path, rows, conversation=limits, **world)
    phase = built.phases["rl"]
    state = state_shapes(built.model, built.phases, built.placement)
    sample, score, learn = phase.programs(state)
    assert sample.loop_steps == 2 * 100  # 4 conversations in 3 slots
    assert (sample.tokens, score.tokens, learn.tokens) == (400, 560, 560)
    assert sample.function.lower(*sample.arguments).out_info is not None


def test_every_token_that_is_learned_is_the_one_that_was_drawn_behind_those_before_it(talked):
    built, rolled, state = talked
    check_drawn(built, rolled.rollout, state, key=1)


@pytest.mark.slow
def test_so_it_is_under_a_template_that_rewrites_history(tmp_path, rows):
    template = tmp_path / "forgetful.jinja"
    template.write_text(FORGETFUL)
    limits = {"max_turns": 10, "max_tokens": 600, "max_reply_tokens": 64}
    world = {"environment": Counting(turns=10), "max_prompt_length": 40}
    with pytest.raises(hj.UserError, match="writes turn"):
        played(experiment(tmp_path / "a", rows, template=str(template), conversation=limits, **world))
    kept = {**limits, "rewriting_template": "append"}
    built = experiment(tmp_path / "b", rows, template=str(template), conversation=kept, **world)
    rolled, state = played(built)
    check_drawn(built, rolled.rollout, state, key=1)


def check_drawn(built, rollout, state, key):
    """Draws every chosen token again from one reading of its row: other tokens before it would give another."""
    length = rollout.action_mask.shape[1]
    params = state.train.params["model"]
    noise = response_noise(response_keys(jax.random.key(key), jnp.arange(len(rollout.tokens))), length)
    logits = built.model.apply(params, rollout.tokens, rollout.attention_mask).logits[:, -length - 1 : -1]
    redrawn, log_probs = jax.vmap(lambda x, n: sample_token(x, n))(logits, noise)
    chosen = np.asarray(rollout.action_mask)
    assert chosen.sum(axis=1).min() > 9
    np.testing.assert_array_equal(redrawn[chosen], rollout.tokens[:, -length:][chosen])
    np.testing.assert_allclose(log_probs[chosen], rollout.log_probs[chosen], atol=1e-4)
    read = np.asarray(rollout.attention_mask[:, -length:])
    assert (read & ~chosen).sum() > 50


def test_rewards_are_received_with_the_last_token_of_their_turn_and_sum_to_the_return(talked):
    built, rolled, _ = talked
    rollout = rolled.rollout
    mask, placed = np.asarray(rollout.action_mask), np.asarray(rollout.placed)
    for row in range(len(mask)):
        last = np.flatnonzero(mask[row] & ~np.append(mask[row, 1:], False))
        assert len(last) == 10
        complete = np.isin(np.asarray(rollout.tokens)[row, -600:][last], built.eos_ids)
        earned = np.arange(1, 11) - 1.0 * ~complete  # less the penalty of a turn that did not end by itself
        np.testing.assert_allclose(placed[row, last[:-1]], earned[:-1])
        np.testing.assert_allclose(rollout.scores[row], earned.sum())
        np.testing.assert_allclose(rollout.plain_scores[row], 55.0)
        assert np.count_nonzero(placed[row]) <= 9


def test_what_others_say_has_a_gradient_of_exactly_zero_at_its_tokens(talked):
    built, rolled, state = talked
    functions = built.phases["rl"].functions
    rollout, _ = functions.prepared(state.train.params["model"], rolled.rollout, jnp.float32(0.05), ("model",))
    length = rollout.action_mask.shape[1]

    def loss(logits):
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), rollout.tokens[:, -length:, None], axis=-1)[
            ..., 0
        ]
        losses = -rollout.advantages * jnp.exp(log_probs - rollout.log_probs) * rollout.loss_weights
        return jnp.where(rollout.action_mask, losses, 0.0).sum()

    states = built.model.hidden(state.train.params["model"], rollout.tokens, rollout.attention_mask)
    logits = built.model.logits(state.train.params["model"], states[:, -length - 1 : -1])
    gradient = jax.grad(loss)(logits)
    assert not np.abs(gradient[~np.asarray(rollout.action_mask)]).any()
    assert np.abs(gradient[np.asarray(rollout.action_mask)]).any(axis=-1).mean() > 0.9


def test_numbers_kept_at_the_tokens_of_others_change_no_update(talked):
    built, rolled, state = talked
    functions, mask = built.phases["rl"].functions, np.asarray(rolled.rollout.action_mask)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape), jnp.float32)
    rollout = rolled.rollout
    other = replace(
        rollout,
        log_probs=jnp.where(mask, rollout.log_probs, noise),
        values=jnp.where(mask, rollout.values, 9 * noise),
        reference_log_probs={
            name: jnp.where(mask, array, noise) for name, array in rollout.reference_log_probs.items()
        },
    )
    after = [
        functions.learn(state.train, each, None, jax.random.key(2), 1e-3)[0].params for each in (rollout, other)
    ]
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_conversation_that_was_broken_off_goes_on_in_the_value_of_its_last_state(tmp_path, rows):
    world = {"environment": Counting(turns=10, ends=False), "max_prompt_length": 40}
    limits = {"max_turns": 2, "max_tokens": 200, "max_reply_tokens": 64}
    built = experiment(
        tmp_path, rows, conversation=limits, discount=0.9, trace=0.8, whiten_advantages=False, **world
    )
    state = built.init()
    head = state.train.params["rl/value"]["head"]
    lively = jax.tree.map(lambda x: x + 0.3, head)
    train = replace(state.train, params={**state.train.params, "rl/value": {"head": lively}})
    phase, state = built.phases["rl"], replace(state, train=train)
    state = phase.rollouts.references.updated(state)
    rollout = phase.rollouts.play(state, jax.random.key(0), jax.random.key(1), Clock()).rollout
    assert rollout.truncated.all()
    prepared, _ = phase.functions.advantages(rollout, jnp.float32(0.0))
    hidden = built.model.hidden(train.params["model"], rollout.tokens, rollout.attention_mask)
    for row in range(len(rollout.tokens)):
        mask = np.asarray(rollout.action_mask[row])
        own = np.flatnonzero(mask)
        behind = 40 - 1 + int(np.asarray(rollout.attention_mask[row, 40:]).sum())  # the last token, of a reply
        last_value = float(value(lively, hidden[row, behind]))
        rewards = np.zeros(len(own))
        ends = [i for i, place in enumerate(own) if i + 1 == len(own) or own[i + 1] > place + 1]
        rewards[ends] = np.asarray(rollout.scores[row] - rollout.placed[row].sum())
        rewards[ends[0]] = rollout.placed[row, own[ends[0]]]
        values = [*np.asarray(rollout.values[row])[own], last_value]
        advantage, expected = 0.0, []
        for t in reversed(range(len(own))):
            advantage = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * advantage
            expected.append(advantage)
        np.testing.assert_allclose(prepared.advantages[row][own], expected[::-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_a_world_of_one_turn_is_the_phase_without_a_world_bit_for_bit(tmp_path, rows, kind):
    common = {"max_prompt_length": 24, "prompt_buckets": [24], "samples_per_prompt": 2}
    reward = {"parts": {"short": {"reward": f"{__name__}:brevity"}}}
    plain = experiment(tmp_path / "a", rows, kind, reward=reward, **common)
    limits = {"max_turns": 1, "max_tokens": 8, "max_reply_tokens": 64}
    common.pop("prompt_buckets")
    world = experiment(tmp_path / "b", rows, kind, environment=Asking(), conversation=limits, **common)
    after = []
    for built in (plain, world):
        state = built.init()
        for step in range(2):
            state, metrics = built.phases["rl"].step(state, jax.random.key(step))
        after.append((state, metrics))
    (a, of_plain), (b, of_world) = after
    for x, y in zip(*(jax.tree.leaves(state.train.params) for state in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)
    for name in ("score", "shaped_score", "kl", "policy_loss", "response_length"):
        assert float(of_plain[f"rl/{name}"]) == float(of_world[f"rl/{name}"]), name


def test_gae_over_turns_has_the_numbers_of_its_reference():
    rewards, values = jnp.array([[0, 0, 0, 0, 0, 1.0]]), jnp.array([[0.1, 0.2, 9, 9, 0.3, 0.4]])
    mask, group = jnp.array([[1, 1, 0, 0, 1, 1]]) > 0, jnp.array([0])
    per_token, _ = GAE(0.99, 0.95)(rewards, values, mask, group)
    np.testing.assert_allclose(per_token[mask], [0.773290, 0.718012, 0.660300, 0.600000], atol=1e-6)
    # Per turn: γ and λ act between the second and the third of the tokens alone.
    per_turn, returns = GAE(0.9, 0.5, "turn")(rewards, values, mask, group)
    second = (1 - 0.4) + (0.4 - 0.3)  # 0.7
    first = 0.9 * 0.3 - 0.2 + 0.9 * 0.5 * second
    np.testing.assert_allclose(per_turn[mask], [first + 0.1, first, 0.7, 0.6], atol=1e-6)
    whole, _ = Returns(0.9, "turn")(rewards, None, mask, group)
    np.testing.assert_allclose(whole[mask], [0.9, 0.9, 1.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(returns[mask], np.asarray(per_turn + values)[mask], atol=1e-6)


def test_a_reference_plays_the_user_and_says_the_same_to_the_same_messages(tmp_path, rows):
    world = {"environment": {"name": "user", "answered_by": "sft", "end": None}, "max_prompt_length": 40}
    limits = {"max_turns": 2, "max_tokens": 200, "max_reply_tokens": 64, "num_held_out": 2}
    common = {"conversation": limits, "samples_per_prompt": 2, "missing_eos_penalty": None, **world}
    reward = {"parts": {"goes_on": {"reward": {"name": "engagement", "horizon": 1}}}}
    built = experiment(tmp_path, rows, reward=reward, **common)
    phase, state = built.phases["rl"], built.init()
    numbers, records = phase.converse(state)  # before any step: no reference is frozen yet
    assert (numbers["turns"], numbers["return"], numbers["score"]) == (2, 0, 1)
    assert [m["role"] for m in records[0]["conversation"]] == ["user", "assistant"] * 2 + ["user"]
    state = phase.rollouts.references.updated(state)
    once, again = (phase.rollouts.play(state, jax.random.key(0), jax.random.key(1), Clock()) for _ in range(2))
    np.testing.assert_array_equal(once.rollout.tokens, again.rollout.tokens)
    # The first of two answers is followed by another turn, the last by none.
    np.testing.assert_array_equal(once.rollout.scores, np.full(8, 1.0))
    answer_fn = phase.rollouts._answer_fn(state)
    asked = [{"role": "user", "content": "Tell me more"}]
    assert answer_fn(asked) == answer_fn(asked)


def test_evaluations_talk_with_the_environment_that_is_held_out(tmp_path, rows):
    """Both ask nothing and end at once; what an unclear answer costs tells which of them it was."""
    world = {"name": "twenty_questions", "max_questions": 0, "question_cost": 1.0}
    common = {"conversation": {"max_turns": 2, "max_tokens": 100, "max_reply_tokens": 40, "num_held_out": 2}}
    common["missing_eos_penalty"] = None
    other = {"held_out_environment": {**world, "question_cost": 3.0}, "environment": world}
    built = experiment(tmp_path, rows, max_prompt_length=40, **other, **common)
    assert built.phases["rl"].converse(built.init())[0]["return"] == -3.0
    scores = played(built)[0].rollout.scores
    np.testing.assert_array_equal(scores, np.full(len(scores), -1.0))


@hj.settings
class Failing:
    """A world of two turns in which some conversations of a step fail in the second."""

    which: tuple[int, ...] = ()

    def make(self, answer_fn=None):
        return FailingWorld(self.which)


class FailingWorld:
    made = 0

    def __init__(self, which):
        self.fails = FailingWorld.made in which
        FailingWorld.made += 1
        self.turn = 0

    def reset(self, seed):
        return [{"role": "user", "content": "Hi"}]

    def step(self, text):
        self.turn += 1
        if self.fails and self.turn == 2:
            raise RuntimeError("lost")
        return Step([{"role": "user", "content": "And?"}], float(len(text)), self.turn == 2)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_conversation_whose_environment_failed_is_no_member_of_its_group_and_of_no_mean(tmp_path, rows, kind):
    world = {"environment": Failing((2, 6)), "max_prompt_length": 40, "references": {}}
    limits = {"max_turns": 2, "max_tokens": 100, "max_reply_tokens": 48, "slots": 1}  # made in their order
    groups = {"prompts_per_step": 2, "samples_per_prompt": 4, "missing_eos_penalty": None}
    built = experiment(tmp_path, rows, kind, conversation=limits, **groups, **world)
    FailingWorld.made = 0
    rolled, state = played(built)
    counts = np.asarray(rolled.rollout.counts)
    assert counts.tolist() == [True, True, False, True, True, True, False, True]
    functions = built.phases["rl"].functions
    prepared, metrics = functions.prepared(
        state.train.params["model"], rolled.rollout, jnp.float32(0), ("model",)
    )
    scores = np.asarray(rolled.rollout.scores)
    found = np.asarray(prepared.advantages).max(axis=1) + np.asarray(prepared.advantages).min(axis=1)
    for group in (np.array([0, 1, 3]), np.array([4, 5, 7])):
        earned = scores[group]
        expected = 1.5 * (earned - earned.mean())
        if kind == "grpo":
            expected = (earned - earned.mean()) / (earned.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(found[group], expected, rtol=1e-4, atol=1e-5)
    assert not found[~counts].any()
    assert float(metrics["shaped_score"]) == pytest.approx(scores[counts].mean())
    assert float(metrics["score_std"]) == pytest.approx(scores[counts].std())
    tokens = np.asarray(rolled.rollout.action_mask).sum(axis=1)
    assert float(metrics["response_length"]) == pytest.approx(tokens[counts].mean())


def test_limits_that_let_no_conversation_go_on_are_named_and_a_failing_evaluation_ends_no_run(tmp_path, rows):
    limits = {"max_turns": 2, "max_tokens": 100, "max_reply_tokens": 16}
    world = {"environment": Counting(turns=2), "max_prompt_length": 40}
    with pytest.raises(
        hj.UserError, match=r"^phases.rl.conversation.max_reply_tokens must hold a reply without"
    ):
        played(experiment(tmp_path / "a", rows, conversation=limits, **world))
    limits["max_reply_tokens"] = 48
    broken = {"environment": Failing(tuple(range(999))), "max_prompt_length": 40}
    built = experiment(tmp_path / "b", rows, conversation=limits, **broken)
    FailingWorld.made = 0
    assert built.phases["rl"].converse(built.init())[0] == {"failed_fraction": 1.0}
    with pytest.raises(hj.UserError, match=r"all 4 conversations failed; the first: .*RuntimeError: lost"):
        played(built)


def test_v_trace_at_ratio_1_is_gae_per_turn_too():
    draw = np.random.default_rng(3).normal(size=(2, 4, 9)).astype(np.float32)
    mask, group = jnp.asarray(np.random.default_rng(4).random((4, 9)) < 0.6), jnp.arange(4)
    of_gae, returns = GAE(0.9, 0.7, "turn")(*draw, mask, group)
    of_vtrace, targets = VTrace(0.9, 0.7, per="turn")(*draw, mask, group)
    np.testing.assert_allclose(of_gae, of_vtrace, atol=1e-5)
    np.testing.assert_allclose(returns, targets, atol=1e-5)
