"""A reward, a scheduler and a family of models, each one file outside the package that a config names."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax import build, load_config, load_pretrained
from hybrid_jax.testing import TINY

HERE = Path(__file__).parent


@pytest.fixture
def outside(tmp_path):
    """``outside(name)`` is a folder that holds nothing but the file of that name."""

    def folder(name: str) -> Path:
        shutil.copy(HERE / f"{name}.py", tmp_path)
        return tmp_path

    return folder


def ppo_with(parts: dict) -> dict:
    return {**TINY["phases"], "ppo": {**TINY["phases"]["ppo"], "reward": {"parts": parts}}}


def variety(text: str) -> float:
    words = text.split()
    return min(len(set(words)) / len(words), 0.75) if words else 0.0


@pytest.mark.slow
def test_a_reward_of_one_file_is_trained_on_and_shown_as_a_part(outside, run_extension):
    parts = {"variety": {"reward": {"name": "my_reward:Variety", "at_most": 0.75}}}
    run = run_extension(outside("my_reward"), {"phases": ppo_with(parts)})
    shown = [sample for sample in run.samples if "extreme" not in sample]
    assert len(shown) > 4
    assert {(sample["phase"], sample["kind"]) for sample in run.samples} == {("evaluation", "evaluation")}
    for sample in shown:
        assert sample["parts"]["variety"] == pytest.approx(variety(sample["response"]), abs=1e-6)
        assert sample["score"] == pytest.approx(sample["parts"]["variety"], abs=1e-6)
    assert run.numbers["score"] == pytest.approx(run.records[-1]["evaluation/score"], abs=1e-6)
    assert all("ppo/reward/variety" in record for record in run.records if record["kind"] == "ppo")
    assert "<h3>variety</h3>" in run.page
    assert (run.exported / "config.json").is_file()


@pytest.mark.slow
def test_a_scheduler_of_one_file_decides_which_phase_takes_each_step(outside, run_extension):
    scheduler = {"name": "my_scheduler:Growing", "first": "sft", "second": "ppo", "longest": 2}
    run = run_extension(outside("my_scheduler"), {"scheduler": scheduler, "steps": 8})
    taken = [record["phase"] for record in run.records if record["phase"] != "evaluation"]
    assert "".join(phase[0] for phase in taken) == "spssppss"
    assert "5 sft · 3 ppo" in run.page  # and the report counts them


@pytest.mark.slow
def test_a_family_of_one_file_is_read_trained_and_written_as_transformers_has_it(outside, run_extension):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = outside("my_family")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "intermediate_size": 48, "vocab_size": 300, "max_position_embeddings": 96}
    switches = {"attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.0}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    torch.manual_seed(0)
    theirs = transformers.SeedOssForCausalLM(transformers.SeedOssConfig(**sizes, **switches, **ids)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(folder / "seed")
    run = run_extension(folder, {"model": {"name": "my_family:SeedOSS", "path": "seed"}})

    tokens = np.arange(3, 27)[None] * 11 % 300
    before, params = load_pretrained("seed")
    ours = before.apply(params, tokens).logits
    wanted = theirs(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(ours, wanted, atol=2e-5)
    exported = transformers.AutoModelForCausalLM.from_pretrained(run.exported).eval()
    assert type(exported).__name__ == "SeedOssForCausalLM"
    experiment = build(load_config("config.yaml"))
    trained = experiment.model.apply(experiment.begin().policy, tokens).logits
    np.testing.assert_allclose(trained, exported(torch.tensor(tokens)).logits.detach().numpy(), atol=2e-5)
    assert np.abs(np.asarray(trained) - wanted).max() > 1e-3  # it has learned something
    assert re.search("model my_family:SeedOSS", run.page)
