"""A reference out of a folder may be a model of any size: the teacher of a distillation."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import build, load_config, load_pretrained, save_pretrained
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import plan_phases
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.flops import forward_flops
from hybrid_jax.models.folders.ours import save_ours
from hybrid_jax.models.markov import FeedForwardSettings
from hybrid_jax.models.markov.counts import count_tokens
from hybrid_jax.phases.references import Reference, reference_models, shortest_context
from hybrid_jax.training.loop import take_step, train

DEBUG = Path(__file__).parents[2] / "configs" / "debug"
STUDENT = "{name: decoder, num_layers: 1, width: 8, num_heads: 1, max_length: 96}"
ROWS, NEW = 4, 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a model with twice the layers and twice the width of the student, and more tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    model = DecoderConfig(num_layers=2, width=16, num_heads=2, max_length=64, position="rotary").build(300)
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(1)))
    save_pretrained(folder, model, params)
    return folder, model, params


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """One of our own folders: an n-gram model of the bytes."""
    folder = tmp_path_factory.mktemp("counted")
    model, params = count_tokens([np.random.default_rng(0).integers(0, 300, 2000)], 2, 300)
    save_ours(folder, model, params)
    return folder, model, params


def config(folder, run_dir, *overrides, model=STUDENT):
    settings = [
        f"run_dir={run_dir}",
        f"model={model}",
        "tokenizer=bytes",
        f"phases.distillation.references={{teacher: {{path: {folder}}}}}",
        f"phases.distillation.prompts_per_step={ROWS}",
        f"phases.distillation.sampler.max_new_tokens={NEW}",
        "phases.distillation.long_prompts=truncate_start",
        "scheduler={name: alternation, cycle: {distillation: 1}}",
        "evaluation={num_prompts: 0, num_examples: 0}",
    ]
    return load_config(DEBUG / "distillation.yaml", [*settings, *overrides])


@pytest.fixture
def in_repository(monkeypatch):
    monkeypatch.chdir(DEBUG.parents[1])


def log_probs(model, params, rollout):
    """log π of the tokens that were sampled, by a plain softmax over the whole vocabulary."""
    length = rollout.action_mask.shape[1]
    logits = np.asarray(model.apply(params, rollout.tokens, rollout.attention_mask).logits, np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(scores[:, :-1], np.asarray(rollout.tokens)[:, 1:, None], axis=2)[..., 0]
    return chosen[:, -length:]


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize(
    ("kind", "student"),
    [
        ("teacher", STUDENT),
        pytest.param("counted", "{name: feed_forward, order: 3, width: 8}", marks=pytest.mark.slow),
    ],
)
def test_a_token_earns_how_much_likelier_a_larger_teacher_finds_it_and_nothing_of_later_ones(
    kind, student, request, tmp_path
):
    folder, model, params = request.getfixturevalue(kind)
    experiment = build(config(folder, tmp_path, model=student))
    phase, state = experiment.phases["distillation"], experiment.init()
    learn, rollouts = phase._learn, []
    phase._learn = lambda *inputs, **settings: rollouts.append(inputs[2]) or learn(*inputs, **settings)
    student = jax.tree.map(jnp.copy, state.policy)
    state = take_step(experiment, phase, state)
    (rollout,) = rollouts
    mask = np.asarray(rollout.action_mask)
    theirs, own = log_probs(model, params, rollout), log_probs(experiment.model, student, rollout)
    coef = phase.config.kl_control.coefficient(phase.config.kl_control.init())
    advantages, _ = phase.functions.advantages(rollout, coef)
    np.testing.assert_allclose(np.asarray(advantages.advantages)[mask], (theirs - own)[mask], atol=1e-5)
    assert np.abs(theirs - own)[mask].max() > 1
    assert not state.references  # no checkpoint holds what every start reads from the folder


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository")
def test_a_teacher_is_planned_and_counted_with_its_own_size_and_its_own_context(teacher, tmp_path):
    folder, model, _ = teacher
    settings = config(folder, tmp_path, "phases.distillation.max_prompt_length=24")
    phases, state = plan_phases(replace(settings, model=replace(settings.model, vocab_size=259)))
    (_, score, _) = phases["distillation"].programs(state)
    shapes = score.arguments[2]["teacher"]
    assert shapes["layer_1"]["attention"]["query"]["kernel"].shape == (16, 16)
    flops = phases["distillation"].config.flops
    student = phases["distillation"].functions.model
    copied = replace(
        settings.phases["distillation"],
        references={"teacher": replace(settings.phases["distillation"].references["teacher"], path=None)},
    )
    read = ROWS * (24 + NEW)
    own = [forward_flops(m.config, read, 24 + NEW, ROWS * NEW) for m in (student, model)]
    assert flops(student, 24, 8)["flops"] - copied.flops(student, 24, 8)["flops"] == pytest.approx(
        own[1] - own[0]
    )
    prompts = build(settings).phases["distillation"].rollouts.prompts
    assert prompts.longest <= 24
    longest = build(config(folder, tmp_path)).phases["distillation"].rollouts.prompts.longest
    assert longest == 64 - NEW  # of the teacher; the student reads 96


def test_a_teacher_that_lacks_tokens_is_one_line_and_the_shortest_context_counts(teacher):
    folder = teacher[0]
    given = {"copy": Reference(), "teacher": Reference(path=str(folder))}
    student = DecoderConfig(num_layers=1, width=8, num_heads=1, max_length=96)
    models = reference_models(given, student.build(257))
    assert models["copy"] == student.build(257)
    assert (models["teacher"].width, models["teacher"].vocab_size) == (16, 300)
    assert shortest_context(given, student.build(257)) == 64
    with pytest.raises(UserError, match="must hold a model of the policy's 301 tokens or more, got 300"):
        reference_models(given, student.build(301))


def test_a_folder_of_ours_stands_beside_any_policy(counted):
    folder, model, params = counted
    policy = FeedForwardSettings(order=3, width=8).build(257)
    assert reference_models({"counted": Reference(path=str(folder))}, policy) == {"counted": model}
    found, read = load_pretrained(folder)
    assert found == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


def against(folder, run_dir):
    other = f"{{sft: {{}}, other: {{path: {folder}, weight: 0.0}}}}"
    phase = {"references": other, "opponent": "{reference: other}", "sampler.max_new_tokens": NEW}
    settings = [f"phases.online_preference.{name}={value}" for name, value in phase.items()]
    scheduler = "scheduler={name: alternation, cycle: {online_preference: 1}}"
    return load_config(
        DEBUG / "online_opponent.yaml",
        [f"run_dir={run_dir}", f"model={STUDENT}", "tokenizer=bytes", scheduler, *settings],
    )


@pytest.mark.usefixtures("in_repository")
def test_an_opponent_with_tokens_that_the_policy_has_not_is_one_line(teacher, tmp_path):
    with pytest.raises(UserError, match=r"opponent: .* must hold a model of the policy's 257 tokens, got 300"):
        build(against(teacher[0], tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository")
def test_an_opponent_out_of_a_folder_answers_with_its_own_probabilities(tmp_path):
    model = DecoderConfig(num_layers=2, width=16, num_heads=2, max_length=64, position="rotary").build(257)
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(1)))
    save_pretrained(tmp_path / "other", model, params)
    experiment = build(against(tmp_path / "other", tmp_path / "run"))
    phase, rivals = experiment.phases["online_preference"], []
    learn = phase._learn
    phase._learn = lambda *inputs: rivals.extend(inputs[3]) or learn(*inputs)
    take_step(experiment, phase, experiment.init())
    (rival,) = rivals
    mask = np.asarray(rival.action_mask)
    np.testing.assert_allclose(
        np.asarray(rival.log_probs)[mask], log_probs(model, params, rival)[mask], atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository")
def test_a_distilled_run_ends_alike_if_it_is_resumed_with_adapters_too(teacher, tmp_path):
    folder = teacher[0]
    for lora in ("", ", lora: {rank: 2}"):
        ends = []
        for name, stops in (("whole", [4]), ("cut", [2, 4])):
            for stop in stops:
                run_dir = tmp_path / f"{name}{len(lora)}"
                model = STUDENT.replace("}", f"{lora}}}") if lora else STUDENT
                state = train(build(config(folder, run_dir, f"steps={stop}", model=model)))
            ends.append([np.asarray(leaf) for leaf in jax.tree.leaves(state.train)])
        assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))
