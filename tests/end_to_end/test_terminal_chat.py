"""A conversation in the terminal, against the tokens of the template for all of it."""

import os
import pty
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat import encode_question
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.folders.pretrained import save_pretrained
from hybrid_jax.runs import terminal_chat
from hybrid_jax.runs.policy import Policy
from hybrid_jax.runs.terminal_chat import TerminalChat, talk
from hybrid_jax.sampling.ancestral import Ancestral

TOKENIZER = Bytes(chat_template="plain").build()
END = TOKENIZER.eos_id
USER, ASSISTANT = "user", "assistant"


@pytest.fixture
def scripted(monkeypatch):
    """A policy that gives the answers of a list, and the prompts that it was asked with."""
    asked, answers = [], []

    def sample(sampler, model, params, tokens, mask, key, *, eos_ids, tokenizer):
        asked.append(np.asarray(tokens)[0][np.asarray(mask)[0]].tolist())
        said = answers.pop(0)
        if callable(said):
            said = said()
        array, full = np.zeros((1, 24), np.int32), np.ones((1, 24), bool)
        array[0, : len(said)] = said
        full[0, len(said) :] = False
        return Samples(array, np.zeros((1, 24), np.float32), full, full)

    monkeypatch.setattr(terminal_chat, "sample", sample)
    model = SimpleNamespace(max_length=140)
    policy = Policy(model, None, TOKENIZER, Ancestral(max_new_tokens=16), (END,))
    return policy, asked, answers


def ids(text: str, end: bool = True) -> list[int]:
    return TOKENIZER.encode(text) + [END] * end


def rendered(*texts: str) -> list[int]:
    roles = [(USER, ASSISTANT)[n % 2] for n in range(len(texts))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return encode_question(messages, TOKENIZER)


def test_the_history_is_what_was_sampled_and_the_oldest_turns_go_when_the_context_is_full(scripted):
    policy, asked, answers = scripted
    answers += [ids(" Hello."), ids(" Cut", end=False), ids("  Two  spaces "), ids(" So."), ids(" x")]
    chat, turns = TerminalChat(policy), ()
    for text in ("Hi", "How?", "Why?", "And then?"):
        reply = chat.reply(turns, text)
        turns = reply.turns
        assert reply.dropped == 0
    assert asked[1] == rendered("Hi", "Hello.", "How?")
    assert asked[2] == rendered("Hi", "Hello.", "How?", "Cut", "Why?")  # the end that was not sampled is there
    spaces = TOKENIZER.encode("User: Why?\nAssistant:  Two  spaces ")
    assert spaces == asked[3][-len(spaces) - len(ids("\nUser: And then?\nAssistant:")) :][: len(spaces)]
    reply = chat.reply(turns, "y" * 30)
    assert reply.dropped == 2
    assert asked[4] == rendered("Why?", " Two  spaces ", "And then?", "So.", "y" * 30)
    assert [turn.text for turn in reply.turns] == ["  Two  spaces ", " So.", " x"]
    with pytest.raises(UserError, match=r"^a message must have at most 124 tokens, .*, got 317; shorten it"):
        chat.reply(reply.turns, "z" * 300)


def test_where_the_template_drops_reasoning_the_history_is_rendered_as_it_wants_it(scripted, tmp_path):
    policy, asked, answers = scripted
    (tmp_path / "drops.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer = Bytes(chat_template=str(tmp_path / "drops.jinja")).build()
    answers += [ids("<think>a</think>b"), ids("c")]
    chat = TerminalChat(replace(policy, tokenizer=tokenizer))
    turns = chat.reply((), "Hi").turns
    chat.reply(turns, "Go")
    assert tokenizer._backend.decode(asked[1], skip_special_tokens=False).replace("<|endoftext|>", "|") == (
        "u:Hi|a:b|u:Go|a:"
    )


def test_a_user_types_resets_stops_an_answer_and_quits(scripted, monkeypatch, capsys):
    policy, asked, answers = scripted
    running = threading.Event()

    def interrupted():
        running.set()
        release.wait(10)
        return ids(" late")

    release = threading.Event()
    lines = iter(["Hi", "", "Go on", "/reset", "Again", "Stop this", "More", "z" * 300, "/quit", "never read"])
    shown = []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    answers += [ids(" one"), ids(" two"), ids(" three"), interrupted, ids(" four")]

    class Pool(terminal_chat.ThreadPoolExecutor):
        def submit(self, function, turns, text, number):
            future = super().submit(function, turns, text, number)
            if text == "Stop this":
                running.wait(10)
                waits = future.result

                def result():
                    release.set()
                    waits()
                    raise KeyboardInterrupt

                future.result = result
            return future

    monkeypatch.setattr(terminal_chat, "ThreadPoolExecutor", Pool)
    talk(TerminalChat(policy), lambda answer: shown.append(answer.response))
    assert shown == [" one", " two", " three", " four"]
    expected = [("Hi",), ("Hi", "one", "Go on"), ("Again",), ("Again", "three", "Stop this"),
                ("Again", "three", "More")]  # fmt: skip
    assert asked == [rendered(*texts) for texts in expected]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == terminal_chat.HELP
    assert told[2] == "stopped; the conversation goes on as if this had not been asked"
    assert told[3].startswith("a message must have at most 124 tokens")


def test_each_answer_has_noise_of_its_own_and_a_seed_repeats_it(tmp_path):
    config = DecoderConfig(
        num_layers=1, width=8, num_heads=1, max_length=96, vocab_size=TOKENIZER.vocab_size, init_std=0.3
    )
    model = Decoder(config)
    policy = Policy(model, model.init(jax.random.key(0)), TOKENIZER, Ancestral(max_new_tokens=8), (END,))
    texts = [
        TerminalChat(policy, seed).reply((), "Hi", n).answer.response for seed, n in [(0, 0), (0, 1), (0, 0)]
    ]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.slow
def test_generate_chat_in_a_terminal_is_a_conversation(tmp_path):
    config = DecoderConfig(
        num_layers=1, width=8, num_heads=1, max_length=96, vocab_size=TOKENIZER.vocab_size, init_std=0.3
    )
    model = Decoder(config)
    save_pretrained(tmp_path, model, model.init(jax.random.key(0)), eos_ids=(END,), pad_id=END)
    TOKENIZER.save(tmp_path)
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "hybrid_jax.generate", "--model", str(tmp_path), "--chat", "--json"]
    with subprocess.Popen(
        [*command, "sampler.max_new_tokens=4"], stdin=side, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        os.write(terminal, b"Hi\nYou?\n/quit\n")
        out, err = process.communicate(timeout=240)
    os.close(side)
    os.close(terminal)
    assert process.returncode == 0, err.decode()
    assert [line.split(b'"')[3] for line in out.splitlines() if b"prompt" in line] == [b"Hi", b"You?"]
    assert terminal_chat.HELP in err.decode()
