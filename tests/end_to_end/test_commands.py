"""generate, evaluate and export as a user calls them, on one tiny run."""

import io
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import evaluate, export, generate, train
from hybrid_jax.models.folders.hf import load_pretrained
from hybrid_jax.runs.policy import load_policy, load_pretrained_policy
from hybrid_jax.sampling.ancestral import Ancestral


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export.main(["--run", str(run_dir), "--output", str(folder)])
    return folder


def last_evaluation(run_dir) -> dict[str, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["phase"] == "evaluation"][-1]
    return {name.removeprefix("evaluation/"): x for name, x in last.items() if name.startswith("evaluation/")}


def test_generate_prints_each_prompt_with_its_response(run_dir, command):
    code, out, err = command(generate.main, "--run", run_dir, "--prompt", "say 1:", "--prompt", "say 2:")
    assert (code, err) == (0, "")
    assert [line[:16] for line in out.splitlines() if line.startswith("prompt")] == [
        "prompt:   say 1:",
        "prompt:   say 2:",
    ]
    assert out.count("response: ") == 2


def test_a_seed_decides_the_samples_and_several_samples_differ(run_dir, command):
    def sample(seed: int) -> list[dict]:
        call = ("--run", run_dir, "--prompt", "say 1:", "--num-samples", "3", "--json", "--seed", seed)
        return [json.loads(line) for line in command(generate.main, *call)[1].splitlines()]

    first = sample(0)
    assert [answer["prompt"] for answer in first] == ["say 1:"] * 3
    assert len({answer["response"] for answer in first}) == 3
    assert sample(0) == first
    assert sample(1) != first


def test_prompts_come_from_a_file_or_standard_input_too(run_dir, command, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "more": 1}\n')
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    sources = [(), ("--prompts", tmp_path / "prompts.txt"), ("--prompts", tmp_path / "prompts.jsonl")]
    outputs = {command(generate.main, "--run", run_dir, "--json", *source)[1] for source in sources}
    assert len(outputs) == 1
    assert [json.loads(line)["prompt"] for line in outputs.pop().splitlines()] == ["one", "two"]


def test_settings_of_the_sampler_go_over_those_of_the_run(run_dir):
    assert load_policy(run_dir).sampler.max_new_tokens == 8
    policy = load_policy(run_dir, ["sampler.temperature=0", "sampler.max_new_tokens=3"])
    assert (policy.sampler.temperature, policy.sampler.max_new_tokens) == (0, 3)
    (greedy,) = policy.generate(["say 1:"])
    assert greedy == policy.generate(["say 1:"], seed=5)[0]


def test_generate_needs_neither_the_data_nor_the_reward_of_the_run(run_dir, tmp_path, command):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("checkpoints", "tokenizer"):
        (moved / name).symlink_to(run_dir / name)
    text = (run_dir / "config.yaml").read_text()
    text = text.replace("data.jsonl", "gone.jsonl").replace("name: length", "name: __main__:gone")
    (moved / "config.yaml").write_text(text)
    call = ("--prompt", "say 1:", "--json")
    assert command(generate.main, "--run", moved, *call) == command(generate.main, "--run", run_dir, *call)


def test_with_the_settings_of_the_run_evaluate_repeats_its_last_evaluation(run_dir, command, tmp_path):
    code, out, err = command(evaluate.main, "--run", run_dir, "--json", tmp_path / "numbers.json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert (result["suite"], result["step"]) == ("held_out", 3)
    assert result["numbers"] == last_evaluation(run_dir)
    for name, value in result["numbers"].items():
        assert f"{value:.5g}" in next(line for line in out.splitlines() if line.startswith(f"{name} "))


def test_each_suite_measures_its_share_and_more_prompts_where_asked(run_dir):
    everything = last_evaluation(run_dir)
    loss = evaluate.evaluate(run_dir, "loss")["numbers"]
    answers = evaluate.evaluate(run_dir, "answers")["numbers"]
    assert set(loss) == {"loss", "perplexity"}
    assert loss | answers == everything
    more = evaluate.evaluate(run_dir, "answers", ["evaluation.num_prompts=8"])["numbers"]
    assert more["reward/length"] != answers["reward/length"]


def test_the_settings_of_the_sampler_can_be_changed_for_an_evaluation(run_dir):
    short = ["evaluation.sampler.max_new_tokens=2"]
    assert evaluate.evaluate(run_dir, "answers", short)["numbers"]["response_length"] <= 2


def test_an_exported_folder_gives_the_same_logits_in_transformers(run_dir, exported):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = (kind.from_pretrained(exported) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("say 17: naïve", return_tensors="pt")["input_ids"]
    policy = load_policy(run_dir)
    assert ids[0].tolist() == policy.tokenizer.encode("say 17: naïve")
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    for model, params in [(policy.model, policy.params), load_pretrained(exported)]:
        ours = model.apply(params, jnp.asarray(ids.numpy())).logits
        np.testing.assert_allclose(ours, expected, atol=1e-5)  # float32, one layer


def test_generation_of_the_export_in_transformers_stops_at_the_end_token(exported):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(exported) for kind in (AutoModelForCausalLM, AutoTokenizer))
    end = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == end == 256
    with torch.no_grad():  # every hidden state now points along the embedding of the end token, a long one
        model.lm_head.weight[end] *= 1000
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[end])
    inputs = tokenizer("say 1:", return_tensors="pt")
    assert model.generate(**inputs)[0].tolist() == [*inputs["input_ids"][0].tolist(), end]


def test_a_folder_gives_its_generation_settings_and_all_its_end_tokens(exported, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(exported / name)

    def policy(**settings):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        return load_pretrained_policy(tmp_path)

    own = load_pretrained_policy(exported)
    assert (own.sampler, own.eos_ids) == (Ancestral(max_new_tokens=8), (256,))
    chosen = policy(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=5, eos_token_id=[1, 256]
    )
    assert chosen.eos_ids == (1, 256)
    sampler = chosen.sampler
    assert (sampler.temperature, sampler.top_k, sampler.top_p, sampler.max_new_tokens) == (0.7, 20, 0.9, 5)
    assert policy(temperature=0.7).sampler.temperature == 0  # greedy, as in transformers, without do_sample
    assert policy(eos_token_id=65).eos_ids == (65,)


def test_generate_from_the_exported_folder_equals_generate_from_the_run(run_dir, exported, command):
    call = ("--prompt", "say 1:", "--json", "--seed", "3")
    from_run = command(generate.main, "--run", run_dir, *call)
    assert command(generate.main, "--model", exported, *call) == from_run
    assert from_run[0] == 0


def test_an_earlier_export_may_be_written_again(run_dir, exported, command):
    assert command(export.main, "--run", run_dir, "--output", exported)[0] == 0


@pytest.mark.parametrize("module", [train, generate, evaluate, export])
def test_every_command_explains_itself_with_an_example(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert f"python -m {module.__name__} --" in capsys.readouterr().out.split("options:")[1]


def test_the_commands_work_as_processes_of_their_own(run_dir):
    command = [sys.executable, "-m", "hybrid_jax.generate", "--run", str(run_dir), "--json"]
    done = subprocess.run(command, input="say 1:\n", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["prompt"] == "say 1:"
