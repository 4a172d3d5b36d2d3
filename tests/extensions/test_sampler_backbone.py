"""A sampler and a recurrent backbone, each one file outside the package that a config names."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import Ancestral, UserError, build, generate, load_config, load_policy, sample
from hybrid_jax.core.cli import _exit_code
from hybrid_jax.core.errors import Untrusted
from hybrid_jax.rewards.tokens import TokenLength
from hybrid_jax.testing import TINY, PrefixTable

HERE = Path(__file__).parent


@pytest.fixture
def outside(tmp_path):
    def folder(name: str) -> Path:
        shutil.copy(HERE / f"{name}.py", tmp_path)
        return tmp_path

    return folder


def answers(capsys, *arguments: object) -> list[str]:
    capsys.readouterr()
    assert _exit_code(generate.main, [*map(str, arguments), "--json"]) == 0
    return [json.loads(line)["response"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_a_sampler_of_one_file_answers_in_evaluation_and_on_the_command_line(outside, run_extension, capsys):
    sampler = {"name": "best_of_n:BestOfN", "n": 6, "max_new_tokens": 8}
    sampler["reward"] = {"name": "token_length", "target": 0}  # the shortest answer is the best
    run = run_extension(outside("best_of_n"), {"evaluation": {**TINY["evaluation"], "sampler": sampler}})
    assert "best_of_n:BestOfN" in (run.folder / "config.yaml").read_text()
    assert run.numbers["score"] == pytest.approx(run.records[-1]["evaluation/score"], abs=1e-6)
    assert "<h1>" in run.page

    with pytest.raises(Untrusted, match=r"best_of_n:BestOfN.*--trust"):
        load_policy("run")  # the run's own config may not say what code to run
    asked = ("--run", "run", "--trust", "--prompt", "say 1:", "--num-samples", 4)
    assert len(answers(capsys, *asked)) == 4
    plain = answers(capsys, *asked, "sampler.name=ancestral")
    assert plain == answers(capsys, *asked, "sampler.name=ancestral", "sampler.max_new_tokens=8")
    one = answers(capsys, *asked, "sampler.n=1", "sampler.reward=null")
    assert one == plain  # the best of one is that one

    with pytest.raises(UserError, match=r"phases\.ppo\.sampler must not truncate .*, choose or search"):
        load_config("config.yaml", ["phases.ppo.sampler.name=best_of_n:BestOfN"])


def test_the_best_of_n_is_the_one_that_a_loop_over_all_answers_finds(outside, monkeypatch):
    monkeypatch.syspath_prepend(outside("best_of_n"))
    sys.modules.pop("best_of_n", None)
    from best_of_n import BestOfN

    model, n = PrefixTable(), 5
    params, key = model.init(jax.random.key(0)), jax.random.key(1)
    prompts, mask = jnp.zeros((7, 1), jnp.int32), jnp.ones((7, 1), bool)
    many = [jnp.repeat(x, n, axis=0) for x in (prompts, mask)]
    drawn = Ancestral(3)(model, params, *many, key, eos_ids=(2,))
    lengths, log_probs = np.sum(drawn.action_mask, axis=1), np.sum(drawn.log_probs, axis=1)
    for reward, scores in ((TokenLength(3), lengths), (None, log_probs / lengths)):
        best = BestOfN(3, n, reward=reward)(model, params, prompts, mask, key, eos_ids=(2,))
        assert best.log_probs is None
        for row in range(7):
            wanted = max(range(row * n, row * n + n), key=lambda i, scores=scores: scores[i])
            np.testing.assert_array_equal(best.tokens[row], drawn.tokens[wanted])
            np.testing.assert_array_equal(best.action_mask[row], drawn.action_mask[wanted])


@pytest.mark.slow
def test_a_recurrent_backbone_of_one_file_learns_answers_and_is_exported(outside, run_extension, capsys):
    ppo = {**TINY["phases"]["ppo"], "sampler": {"max_new_tokens": 8, "slots": 2}}  # its cache takes new rows
    config = {"model": {"name": "gru:GRU", "width": 16}, "phases": {**TINY["phases"], "ppo": ppo}}
    run = run_extension(outside("gru"), config)
    assert {record["kind"] for record in run.records} >= {"sft", "ppo"}
    ratios = [record["ppo/first_ratio"] for record in run.records if "ppo/first_ratio" in record]
    np.testing.assert_allclose(ratios, 1.0, atol=1e-5)  # what sampled is what is learned from
    assert "model gru:GRU" in run.page
    assert json.loads((run.exported / "config.json").read_text())["model"]["name"] == "gru:GRU"
    asked = ("--prompt", "say 1:", "--seed", 3, "--trust", "sampler.max_new_tokens=8", "sampler.temperature=1")
    of_run = answers(capsys, "--run", "run", *asked)
    assert answers(capsys, "--model", "exported", *asked, "sampler.top_k=null") == of_run

    experiment = build(load_config("config.yaml"))
    model, params = experiment.model, experiment.begin().policy
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)))
    mask = jnp.arange(9)[None] >= jnp.array([[0], [4]])
    whole = model.apply(params, tokens, mask).logits
    scores, cache = model.prefill(params, tokens[:, :5], mask[:, :5], model.init_cache(2, 9))
    np.testing.assert_allclose(scores, whole[:, 4], atol=1e-5)
    scores, cache = model.extend(params, tokens[:, 5:8], mask[:, 5:8], cache)
    scores, _ = model.step(params, tokens[::-1, 8], cache.take(jnp.array([1, 0])))
    np.testing.assert_allclose(scores, whole[::-1, 8], atol=1e-5)
    packed = model.apply(params, tokens, jnp.array([[1] * 4 + [2] * 5] * 2)).logits
    np.testing.assert_allclose(packed[:, 4:], model.apply(params, tokens[:, 4:]).logits, atol=1e-5)
    assert sample(model, params, tokens, mask, jax.random.key(0), max_new_tokens=3).tokens.shape == (2, 3)
