"""A run on conversations: what it learns to stop at, what it exports, and how its policy is asked."""

import json
import re
from pathlib import Path

import pytest

from hybrid_jax import generate
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat import encode_question
from hybrid_jax.experiment import build, load_config
from hybrid_jax.runs.policy import load_policy, load_pretrained_policy
from hybrid_jax.training.loop import train

CONFIGS = Path(__file__).parents[2] / "configs" / "debug"
END, END_OF_TURN = 256, 258  # of bytes with ChatML
ASK = {"role": "user", "content": "say 1"}


def prefers_vowels(prompts, responses, messages):
    """A reward that sees the whole question as a column, and the last message as the prompt."""
    assert all(asked[-1]["content"] == prompt for asked, prompt in zip(messages, prompts, strict=True))
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The arguments of `load_config`, for one step of SFT; the evaluation samples and rewards."""
    overrides = [
        f"run_dir={tmp_path_factory.mktemp('chat') / 'run'}",
        "steps=1",
        f"data.train={CONFIGS / 'chat.jsonl'}",
        f"phases.ppo.reward.parts.vowels.reward.name={__name__}:prefers_vowels",
    ]
    return CONFIGS / "chat.yaml", overrides


@pytest.fixture(scope="module")
def trained(run):
    experiment = build(load_config(*run))
    return experiment, train(experiment)


def test_a_run_on_conversations_stops_at_the_end_of_a_turn_everywhere(trained, run):
    experiment, state = trained
    both = (END, END_OF_TURN)
    assert experiment.eos_ids == experiment.phases["ppo"].functions.eos_ids == both
    assert experiment.policy(state).eos_ids == both
    assert load_policy(experiment.config.run_dir).eos_ids == both
    assert build(load_config(*run)).eos_ids == both  # resumed


def test_sft_learns_answers_and_ppo_reads_questions(trained):
    experiment, _ = trained
    batch = experiment.phases["sft"].stream.batch(0, 1)
    learned = batch.tokens[batch.loss_mask].tolist()
    answers = "".join("|" if token == END_OF_TURN else chr(token) for token in learned)
    assert re.fullmatch(r"(\d+!\|)+", answers)
    prompts = experiment.phases["ppo"].rollouts.prompts.batch(0, 2)
    for tokens, mask, example in zip(prompts.tokens, prompts.mask, prompts.examples, strict=True):
        assert tokens[mask].tolist() == encode_question(example.question, experiment.tokenizer)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    experiment, state = trained
    return experiment.export(state, tmp_path_factory.mktemp("export") / "folder")


def test_an_export_renders_the_same_chat_and_stops_at_the_same_tokens_in_transformers(trained, exported):
    from transformers import AutoTokenizer, GenerationConfig

    theirs = AutoTokenizer.from_pretrained(exported)
    asked = theirs.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False)
    assert asked == encode_question([ASK], trained[0].tokenizer)
    assert GenerationConfig.from_pretrained(exported).eos_token_id == [END, END_OF_TURN]
    assert load_pretrained_policy(exported).eos_ids == (END, END_OF_TURN)


def test_a_run_from_a_folder_stops_at_every_end_token_of_the_folder_and_exports_them(run, exported, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [65, END_OF_TURN]}))
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        f"model={{name: pretrained, path: {folder}}}",
        f"tokenizer={{name: huggingface, path: {folder}}}",
    ]
    experiment = build(load_config(run[0], [*run[1], *overrides]))
    assert experiment.eos_ids == (65, END_OF_TURN, END)  # the tokenizer's too, since responses are taught it
    assert experiment.phases["ppo"].functions.eos_ids == experiment.eos_ids
    state = experiment.init()
    written = json.loads((experiment.export(state, tmp_path / "out") / "generation_config.json").read_text())
    assert written["eos_token_id"] == [65, END_OF_TURN, END]


def test_conversations_of_unlike_length_are_answered_as_each_alone(trained):
    experiment, state = trained
    policy = experiment.policy(state)
    policy = type(policy)(**{**vars(policy), "sampler": type(policy.sampler)(6, temperature=0.0)})
    asked = [[ASK], [ASK, {"role": "assistant", "content": "1!"}, {"role": "user", "content": "say 2"}]]
    together = policy.generate(asked)
    assert together == [policy.generate([question])[0] for question in asked]
    assert [answer.prompt for answer in together] == ["say 1", "say 2"]
    with pytest.raises(UserError, match="prompt 2 ends with a message of the assistant"):
        policy.generate([[ASK], asked[1][:2]])


def test_generate_asks_by_the_chat_template(exported, capsys, tmp_path):
    call = ["--model", str(exported), "--json", "sampler.temperature=0", "sampler.max_new_tokens=6"]

    def answers(*arguments):
        generate.main([*call, *arguments])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (asked,) = answers("--chat", "--prompt", "say 1")
    policy = load_pretrained_policy(exported, ["sampler.temperature=0", "sampler.max_new_tokens=6"])
    assert asked["response"] == policy.generate([[ASK]])[0].response
    raw = policy.generate(["say 1"])[0].response
    assert raw == answers("--prompt", "say 1")[0]["response"]
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"messages": [ASK]}))
    assert answers("--chat", "--prompts", str(file)) == [asked]
