"""Whatever draws random numbers has numbers of its own."""

from dataclasses import replace

import jax
import numpy as np

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.config import parse
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.experiment import build
from hybrid_jax.experiment_config import ExperimentConfig
from hybrid_jax.testing import TINY


def numbers(key) -> tuple[int, ...]:
    return tuple(jax.random.key_data(key).tolist())


def test_the_numbers_of_a_purpose_are_those_that_results_were_published_with():
    assert {purpose.name: int(purpose) for purpose in Purpose}.items() >= {("MODEL", 0), ("TRAINING", 1)}
    assert numbers(root_key(7, Purpose.TRAINING)) == numbers(jax.random.fold_in(jax.random.key(7), 1))
    assert len({numbers(root_key(7, purpose)) for purpose in Purpose}) == len(Purpose)


def test_held_out_answers_are_drawn_with_keys_that_neither_the_model_nor_training_has(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}", "completion": "a"}}\n' for n in range(20)))
    data = {"name": "jsonl", "train": str(rows), "held_out_fraction": 0.5}
    settings = {**TINY, "data": data, "run_dir": str(tmp_path / "run"), "compilation_cache": None}
    experiment = build(parse(ExperimentConfig, settings))
    evaluator, drawn = experiment.evaluator, []
    evaluator.config = replace(evaluator.config, num_prompts=4, batch_size=2)

    def sample(params, prompts, mask, key):
        drawn.append(numbers(key))
        rows = jax.device_put((np.ones((len(prompts), 2), np.int32), np.zeros((len(prompts), 2), np.float32)))
        return Samples.chosen(*rows, jax.device_put(np.ones((len(prompts), 2), bool)))

    monkeypatch.setattr(evaluator, "_sample", sample)
    evaluator.answers(experiment.init().policy)
    seed = experiment.config.seed
    others = {numbers(jax.random.fold_in(jax.random.key(seed), number)) for number in (0, 1)}
    others |= {numbers(jax.random.fold_in(experiment.key, step)) for step in range(100)}
    assert len(set(drawn)) == len(drawn) == 2
    assert not others & set(drawn)
