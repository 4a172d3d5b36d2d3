"""Memories kept between calls: against one call that reads everything, and files that are not to be trusted."""

import json
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import generate
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.memory.dnc import DNC
from hybrid_jax.models.memory.keeping import Continued, nothing_kept
from hybrid_jax.models.memory.neural_cache import NeuralCacheSettings
from hybrid_jax.models.recurrent.lru import LRU
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.runs.policy import Policy
from hybrid_jax.runs.remembering import Remembering
from hybrid_jax.runs.terminal_chat import padded, sampled, talk
from hybrid_jax.sampling.ancestral import Ancestral

TOKENIZER = Bytes(chat_template="plain").build()
DECODER = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=64, init_std=0.4)
MODELS = {
    "lstm": LSTM(width=8, num_layers=2),
    "lru": LRU(width=6),  # its state is complex
    "dnc": DNC(width=6, num_slots=4, word_width=3),
    "bank": NeuralCacheSettings(LSTM(width=8), 0.5, 2.0, slots=6),
    "bank of a decoder": NeuralCacheSettings(DECODER, 0.5, 2.0, slots=6),
}


@cache
def policy_of(name: str, seed: int = 0) -> Policy:
    settings = MODELS[name]
    model = settings.build(TOKENIZER.vocab_size)
    draw = np.random.default_rng(seed).normal
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draw(0, 0.6, leaf.shape), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    sampler = Ancestral(max_new_tokens=5)
    return Policy(model, params, TOKENIZER, sampler, (TOKENIZER.eos_id,), component=settings)


def tokens_of(policy: Policy, prompt: list[int]) -> list[int]:
    """The answer of a policy that has read the prompt alone."""
    return sampled(policy, prompt, jax.random.fold_in(root_key(0, Purpose.GENERATION), 0)).tokens


@partial(jax.jit, static_argnums=0)
def read_at_once(model, params, tokens, mask):
    return model.apply(params, tokens, mask)


def outputs(model, params, tokens: list[int]):
    """Scores and states behind each token of a text."""
    row, mask = padded(tokens, None)
    output = read_at_once(model, params, row, mask)
    return output.logits[0, -len(tokens) :], output.hidden[0, -len(tokens) :]


@partial(jax.jit, static_argnums=0)
def prefill(model, params, tokens, mask):
    return model.prefill(params, tokens, mask, model.init_cache(1, 32))[0]


def scores_behind(policy: Policy, kept, tokens: list[int]):
    """The scores behind a text that is read behind a memory."""
    return prefill(Continued(policy.model), {"model": policy.params, "memory": kept}, *padded(tokens, None))[0]


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode([token for token in tokens if token != TOKENIZER.eos_id])


@pytest.mark.parametrize(
    "name", ["lstm", "bank", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lru", "dnc"))]
)
def test_two_calls_answer_as_one_that_reads_both_texts(name, tmp_path):
    policy, first, second = policy_of(name), TOKENIZER.encode("My name is Ann."), TOKENIZER.encode("Who?")
    said = tokens_of(policy, first)
    whole = [*first, *said, *second]
    assert [
        answer.response for answer in Remembering(policy, tmp_path, "ann").answers(["My name is Ann."])
    ] == [text_of(said)]
    again = Remembering(policy, tmp_path, "ann")
    assert again.memory.tokens == len(first) + len(said)
    scores = scores_behind(policy, again.memory.kept, second)
    np.testing.assert_allclose(scores, outputs(policy.model, policy.params, whole)[0][-1], atol=1e-4)
    alone = outputs(policy.model, policy.params, second)[0][-1]
    assert np.abs(scores - alone).max() > 1e-2  # what was read before counts
    assert [answer.response for answer in again.answers(["Who?"])] == [text_of(tokens_of(policy, whole))]


def test_a_bank_is_kept_where_the_cache_of_its_model_grows(tmp_path):
    """A decoder begins a new text, beside a bank of the last tokens that it has read and sampled."""
    policy, first = policy_of("bank of a decoder"), TOKENIZER.encode("My name is Ann.")
    list(Remembering(policy, tmp_path, "ann").answers(["My name is Ann."]))
    bank = Remembering(policy, tmp_path, "ann").memory.kept
    read = [*first, *tokens_of(policy, first)]
    slots = [int(bank.values[0, slot]) for slot in np.argsort(bank.used[0])]
    assert slots == read[-6:]
    plain, second = policy.model.model, TOKENIZER.encode("Who?")
    _, before = outputs(plain, policy.params, read)
    logits, here = outputs(plain, policy.params, second)
    keys = np.float64([*before[-7:-1], *here[:-1]])[-6:]  # the state before each token
    said = [*read[-6:], *second[1:]][-6:]
    weights, cached = np.exp(2.0 * keys @ np.float64(here[-1])), np.zeros(TOKENIZER.vocab_size)
    np.add.at(cached, said, weights / weights.sum())
    expected = 0.5 * np.float64(jax.nn.softmax(logits[-1])) + 0.5 * cached
    np.testing.assert_allclose(np.exp(np.float64(scores_behind(policy, bank, second))), expected, atol=1e-5)


def test_a_memory_that_is_removed_is_the_start_again(tmp_path):
    policy = policy_of("lstm")
    ask = lambda: [answer.response for answer in Remembering(policy, tmp_path, "ann").answers(["Who?"])]  # noqa: E731
    first, second = ask(), ask()
    (tmp_path / "ann.safetensors").unlink()
    assert ask() == first != second
    assert first == [answer.response for answer in policy.generate(["Who?"])]


def test_nothing_of_one_user_reaches_another(tmp_path):
    policy = policy_of("bank")
    list(Remembering(policy, tmp_path, "ann").answers(["The word is xyzzy."]))
    anns = (tmp_path / "ann.safetensors").read_bytes()
    bob = Remembering(policy, tmp_path, "bob")
    jax.tree.map(np.testing.assert_array_equal, bob.memory.kept, nothing_kept(policy.model))
    assert [a.response for a in bob.answers(["Who?"])] == [a.response for a in policy.generate(["Who?"])]
    assert (tmp_path / "ann.safetensors").read_bytes() == anns
    (tmp_path / "ann.safetensors").rename(tmp_path / "eve.safetensors")
    with pytest.raises(UserError, match=r"eve.safetensors holds the memory of 'ann', not of 'eve'; remove it"):
        Remembering(policy, tmp_path, "eve")


@pytest.mark.parametrize("name", ["../ann", "a/b", "a\\b", "", ".ann", "ann\n", "a" * 65, "a:b", "~"])
def test_a_name_that_is_no_name_of_a_file_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"^--user must be a name of at most 64 letters"):
        Remembering(policy_of("lstm"), tmp_path / "inner", name)
    assert not list(tmp_path.iterdir())


def test_a_memory_of_another_model_or_shape_is_refused(tmp_path):
    policy = policy_of("bank")
    list(Remembering(policy, tmp_path, "ann").answers(["Hello"]))
    with pytest.raises(
        UserError, match=r"ann.safetensors is the memory of another model, or of this one before"
    ):
        Remembering(policy_of("bank", seed=1), tmp_path, "ann")
    larger = replace(MODELS["bank"], slots=7).build(TOKENIZER.vocab_size)
    with pytest.raises(
        UserError,
        match=r"another shape: .bank.keys must be float32 \[1, 7, 8\], got float32 \[1, 6, 8\]; remove",
    ):
        Remembering(replace(policy, model=larger), tmp_path, "ann")


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-3], lambda x: x[:5], lambda x: b"", lambda x: x[:-9] + b"\0" * 9]
)
def test_a_damaged_file_is_one_line_that_says_what_to_do(damage, tmp_path):
    policy = policy_of("lstm")
    list(Remembering(policy, tmp_path, "ann").answers(["Hello"]))
    file = tmp_path / "ann.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        UserError, match=r"ann.safetensors is damaged \(.*\); remove it to begin anew, or give"
    ) as e:
        Remembering(policy, tmp_path, "ann")
    assert "\n" not in str(e.value)


def test_a_full_disk_leaves_what_was_remembered_before(tmp_path):
    policy, file = policy_of("lstm"), tmp_path / "ann.safetensors"
    list(Remembering(policy, tmp_path, "ann").answers(["Hello"]))
    before = file.read_bytes()
    (tmp_path / "ann.safetensors.new").symlink_to("/dev/full")
    told = []
    with pytest.raises(UserError, match=r"No space left on device: the answer is not remembered, what was"):
        told += Remembering(policy, tmp_path, "ann").answers(["And you?"])
    assert [path.name for path in tmp_path.iterdir()] == ["ann.safetensors"]
    assert file.read_bytes() == before
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"--memory .*inside cannot be made: .*; give another folder"):
        Remembering(policy, tmp_path / "taken" / "inside", "ann")


def test_of_two_calls_at_once_the_second_says_that_it_is_not_remembered(tmp_path):
    one, other = (Remembering(policy_of("lstm"), tmp_path, "ann") for _ in range(2))
    list(one.answers(["Hello"]))
    with pytest.raises(UserError, match="was changed while this answer was given"):
        list(other.answers(["Hello"]))


def test_a_model_whose_cache_grows_is_refused(tmp_path):
    model = DECODER.build(TOKENIZER.vocab_size)
    policy = replace(policy_of("lstm"), model=model, params=model.init(jax.random.key(0)))
    with pytest.raises(
        UserError, match="got a Decoder, whose cache grows with what it reads; take a recurrent"
    ):
        Remembering(policy, tmp_path, "ann")


def test_a_conversation_reads_the_message_alone_and_goes_on_in_the_next_call(tmp_path, monkeypatch):
    policy, read = policy_of("lstm"), TOKENIZER.encode("User: Hi\nAssistant:")
    for text in ("You?", None):
        read += (said := tokens_of(policy, read))
        end = [TOKENIZER.eos_id] * (said[-1] != TOKENIZER.eos_id)
        read += [*end, *TOKENIZER.encode(f"\nUser: {text}\nAssistant:")] if text else []
    for number, text in enumerate(["Hi", "You?"]):
        chat, lines = Remembering(policy, tmp_path, "ann"), iter([text, "/reset", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt, lines=lines: next(lines))
        talk(chat, lambda answer: None, (chat.memory,), lambda turns, chat=chat: chat.keep(*turns))
        assert number or chat.memory.tokens < len(read)
    memory = Remembering(policy, tmp_path, "ann").memory
    row, mask = padded(read, None)
    _, expected = jax.jit(policy.model.read_on)(policy.params, row, mask, policy.model.init_cache(1, 1))
    assert memory.tokens == len(read)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), memory.kept, expected)


def test_the_command_keeps_a_memory_and_wants_folder_and_user_together(tmp_path, command, caplog):
    policy_of("lstm").save_pretrained(tmp_path / "model")
    call = ("--model", tmp_path / "model", "--prompt", "Who?", "--json", "sampler.max_new_tokens=4")
    kept = ("--memory", tmp_path / "memories", "--user", "ann")
    answers = []
    for _ in range(2):
        code, out, err = command(generate.main, *call, *kept)
        assert code == 0, err
        answers.append(json.loads(out)["response"])
    assert answers[0] != answers[1]
    assert "ann is remembered: 8 tokens read so far" in caplog.messages
    assert command(generate.main, *call, *kept[:2])[2] == (
        "error: --memory DIR and --user NAME belong together: give both or none\n"
    )
    assert (
        "with --memory a prompt has one answer" in command(generate.main, *call, *kept, "--num-samples", "2")[2]
    )


def test_a_folder_that_is_a_file_and_a_later_prompt_without_tokens_are_found_before_any_answer(tmp_path):
    policy = policy_of("lstm")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--memory .*file is a file; give a folder"):
        Remembering(policy, tmp_path / "file", "ann")
    remembering = Remembering(policy, tmp_path / "memories", "ann")
    with pytest.raises(UserError, match="prompt 2 must have at least 1 token, got 0"):
        next(iter(remembering.answers(["a", ""])))
    assert not list((tmp_path / "memories").iterdir())
