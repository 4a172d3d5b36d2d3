"""A user's mistakes: one line on stderr that says what, got and fix; exit code 2; nothing saved is lost."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hybrid_jax import HybridTrainer, evaluate, export, generate, train
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.runs.policy import load_policy


@pytest.fixture
def mistake(command):
    """Runs a command that must end by a mistake; gives the line without ``error: ``."""

    def run(main, *arguments) -> str:
        code, out, err = command(main, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.sft.lenght=8", "unknown setting 'phases.sft.lenght'; did you mean 'length'?"),
        ("stepz=8", "unknown setting 'stepz'; did you mean 'steps'?"),
        ("phases.sft.batch_size=many", "phases.sft.batch_size must be a whole number, got 'many'"),
        ("steps=2.5", "steps must be a whole number, got 2.5"),
        ("steps=-1", "steps must be at least 0, got -1"),
        ("steps", "an override is written a.b=value, without spaces, got 'steps'"),
        ("model.num_heads=3", "model.width must be a multiple of num_heads=3, got 16"),
        ("model.name=decodr", "model: unknown backbone 'decodr'; did you mean 'decoder'?"),
        ("phases.sft.length=64", "phases.sft: length must be at most the model's max_length 48, got 64"),
        ("phases.sft.length=1", "phases.sft.length must be at least 2, got 1"),
        (
            "phases.ppo.sft_mix={coef: 1, length: 64}",
            "length must be at most the model's max_length 48, got 64",
        ),
        (
            "phases.ppo.sampler.max_new_tokens=48",
            "ppo.sampler.max_new_tokens must leave room for a prompt in the context of 48 tokens, got 48",
        ),
        (
            "phases.ppo.sampler.max_new_tokens=43",
            "have more than 5 tokens (the model's max_length less phases.ppo.sampler.max_new_tokens), "
            "the longest 7 (line 11), so that none is left; lower phases.ppo.sampler.max_new_tokens",
        ),
        (
            "phases.ppo.minibatches=3",
            "must divide the prompts_per_step × samples_per_prompt = 4 responses, got 3",
        ),
        ("phases.ppo.sampler.top_k=5", "phases.ppo.sampler must not truncate"),
        ("scheduler.cycle.dpo=1", "scheduler chooses 'dpo', but phases holds sft, ppo"),
        (
            "phases={evaluation: {name: sft}}",
            "phases must have other names than 'compile', 'evaluation'",
        ),
        ("phases={a/b: {name: sft}}", "of letters, digits, '_' and '-', got 'a/b'"),
        ("phases={a.b: {name: sft}}", "of letters, digits, '_' and '-', got 'a.b'"),
        ("scheduler.name=zigzag", "scheduler: unknown scheduler 'zigzag'; known: alternation"),
        ("data.train=gone.jsonl", "no data file 'gone.jsonl'"),
        ("data.held_out_fraction=null", "data.jsonl has no held-out data; set held_out"),
        ("data.response_field=answer", "data.jsonl:1: no field 'answer'; known: completion, number, prompt"),
        ("mesh.data=1000", "mesh 1000 × 1 × 1 needs 1000 devices, got 8"),
        ("phases.ppo.reward.parts.length.reward=no.such:Reward", "cannot be imported: ModuleNotFoundError"),
        ("phases.ppo.reward.parts=none", "phases.ppo.reward.parts must be a mapping, got 'none'"),
    ],
)
def test_an_impossible_setting_is_refused_before_anything_is_written(
    tiny, tmp_path, mistake, override, message
):
    arguments = ("--config", tiny / "config.yaml", f"run_dir={tmp_path / 'run'}", override)
    assert message in mistake(train.main, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "data.jsonl has no train examples: the data is empty"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
            "data.jsonl:2: not JSON: Expecting value at column 12",
        ),
        (
            '{"prompt": "a", "completion": "b"}\n{"promt": "a", "completion": "b"}',
            "data.jsonl:2: no field 'prompt'",
        ),
        ('{"prompt": "a", "completion": 7}\n', "data.jsonl:1: field 'completion' must be a text, got 7"),
        ("[1, 2]\n", "data.jsonl, row 1: expected an object of fields, got '1'"),
    ],
)
def test_bad_data_is_named_by_file_and_line(tiny, tmp_path, mistake, lines, message):
    (tmp_path / "data.jsonl").write_text(lines)
    override = f"data.train={tmp_path / 'data.jsonl'}"
    arguments = ("--config", tiny / "config.yaml", f"run_dir={tmp_path / 'run'}", override)
    assert message in mistake(train.main, *arguments)


def test_long_rows_are_counted_once_with_file_and_setting_in_training_mix_prompts_and_evaluation(
    tiny, tmp_path, command, caplog, mistake
):
    rows = [
        {"prompt": "a" * (60 if i == 6 else 3), "completion": "b" * (40 if i == 2 else 1)} for i in range(8)
    ]
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    for file in (data, held_out):
        file.write_text("\n".join(map(json.dumps, rows)))
    settings = (f"data.train={data}", "data.held_out_fraction=null", f"data.held_out={held_out}")
    settings += (
        "steps=0",
        "evaluation={num_prompts: 8, length: null}",
        "phases.ppo.sft_mix={coef: 1, length: 20}",
    )
    start = ("--config", tiny / "config.yaml", f"run_dir={tmp_path / 'run'}", *settings)
    assert command(train.main, *start)[0] == 0
    long = "2 of 8 rows (25 %) of"
    cut = "1 cut at the end, 1 left out (cut, nothing to learn would remain)"
    prompts = "the model's max_length less phases.ppo.sampler.max_new_tokens"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{long} {data} have more than 32 tokens (phases.sft.length), the longest 62 (line 7): {cut}; "
        "phases.sft.long_rows is truncate_end, or raise phases.sft.length",
        f"1 of 8 prompts (12.5 %) of {data} has more than 40 tokens ({prompts}), the longest 60 (line 7): "
        "1 left out; phases.ppo.long_prompts is drop, or lower phases.ppo.sampler.max_new_tokens",
        f"{long} {data} have more than 20 tokens (phases.ppo.sft_mix.length), the longest 62 (line 7): {cut}; "
        "phases.ppo.sft_mix.long_rows is truncate_end, or raise phases.ppo.sft_mix.length",
        f"2 of 8 held-out rows (25 %) of {held_out} have more than 32 tokens (phases.sft.length), the longest "
        f"62 (line 7): {cut}; phases.sft.long_rows is truncate_end, or raise phases.sft.length",
        f"1 of 8 held-out prompts (12.5 %) of {held_out} has more than 40 tokens (the model's max_length less "
        "sampler.max_new_tokens), the longest 60 (line 7): 1 left out",
    ]
    message = mistake(train.main, *start, "phases.sft.long_rows=error", f"run_dir={tmp_path / 'other'}")
    assert message == (
        f"{long} {data} have more than 32 tokens (phases.sft.length), the longest 62 (line 7); "
        "raise phases.sft.length, or let phases.sft.long_rows be drop or truncate"
    )
    message = mistake(train.main, *start, "phases.ppo.long_prompts=error", f"run_dir={tmp_path / 'other'}")
    assert message.endswith(
        "lower phases.ppo.sampler.max_new_tokens, or let phases.ppo.long_prompts be drop or truncate"
    )


def test_a_config_file_that_is_missing_or_no_config_is_named(tmp_path, mistake):
    assert mistake(train.main, "--config", "gone.yaml") == "no config file 'gone.yaml'"
    assert (
        mistake(train.main, "--config", tmp_path)
        == f"config file '{tmp_path}' is a directory; expected a regular file"
    )
    broken = tmp_path / "broken.yaml"
    for content, message in [
        (b"steps: [1\nb: 2\n", "broken.yaml line 2: not YAML:"),
        (b"- 1\n", "broken.yaml: expected a mapping of settings, got list"),
        (b"\xff\xfe\x00", "broken.yaml must be UTF-8 text, got byte 0xff at 0"),
        (b"base: 3\n", "base must be a path, got 3"),
    ]:
        broken.write_bytes(content)
        assert message in mistake(train.main, "--config", broken)


def test_a_run_directory_that_is_a_file_or_cannot_be_made_is_refused(tiny, mistake):
    def message(run_dir) -> str:
        return mistake(train.main, "--config", tiny / "config.yaml", f"run_dir={run_dir}")

    file = tiny / "data.jsonl"
    assert message(file) == f"run_dir must be a directory, got the file {file}"
    assert message(file / "run").startswith(f"run_dir {file / 'run'} cannot be made: ")


def test_the_run_directory_of_another_config_is_refused_and_left_as_it_is(run_dir, tiny, mistake):
    before = contents(run_dir)
    message = mistake(train.main, "--config", tiny / "config.yaml", "phases.ppo.epochs=2")
    assert (
        "holds a run of another config: phases.ppo.epochs is 1 there and 2 here; give another run_dir"
        in message
    )
    assert contents(run_dir) == before


def test_a_setting_that_came_up_after_a_run_has_its_default_there(run_dir, tiny, tmp_path):
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    del settings["model"]["rotary_width"], settings["checkpoint"]["keep"], settings["phases"]["ppo"]["trace"]
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    (tmp_path / "tokenizer").symlink_to(run_dir / "tokenizer")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert build(load_config(tiny / "config.yaml", [f"run_dir={tmp_path}"])).config.run_dir == tmp_path


def test_a_corrupt_config_in_the_run_directory_is_refused_and_left_as_it_is(run_dir, tiny, mistake, tmp_path):
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    (tmp_path / "config.yaml").write_text("steps: [\n")
    calls = [
        (train.main, "--config", tiny / "config.yaml", f"run_dir={tmp_path}"),
        (generate.main, "--run", tmp_path, "--prompt", "a"),
        (evaluate.main, "--run", tmp_path),
        (export.main, "--run", tmp_path, "--output", tmp_path / "out"),
    ]
    for call in calls:
        assert "config.yaml line 2: not YAML" in mistake(*call)
    assert (tmp_path / "config.yaml").read_text() == "steps: [\n"


def test_a_start_that_came_to_nothing_binds_nobody(tiny, tmp_path, mistake, command):
    """It ended before its first checkpoint, so the mended config may use the same directory."""
    start = ("--config", tiny / "config.yaml", f"run_dir={tmp_path}", "steps=1", "scheduler.cycle.ppo=0")
    part = "phases.ppo.reward.parts.length.reward"
    assert (
        mistake(train.main, *start, f"{part}=fact_coverage")
        == "reward 'length' needs the column 'facts', which the data lacks; known: number"
    )
    assert not (tmp_path / "config.yaml").exists()
    late = mistake(train.main, *start, f"{part}={{name: win_rate, reward: {{name: length, target: 5}}}}")
    assert late.endswith("the data must have the column 'opponents', got number")
    assert (tmp_path / "config.yaml").is_file()
    assert (
        command(train.main, *start, "tokenizer={name: bpe, vocab_size: 260}", "evaluation.num_prompts=0")[0]
        == 0
    )
    assert load_policy(tmp_path).tokenizer.vocab_size == 260


def raising(prompts, responses):
    raise KeyError("price")


BAD_REWARDS = {
    "raising": (raising, r"reward '\w+' raised KeyError: 'price' at .*test_bad_input.py:\d+$"),
    "short": (lambda p, r: [0.0], r"returned 1 scores; expected one number for each of 4 responses$"),
    "nan": (lambda p, r: [0.0, float("nan"), 0.0, 0.0], r"gave nan for response 1 .*; a score must be finite"),
    "leaving": (lambda p, r: sys.exit(0), r"reward '\w+' raised SystemExit: 0 at .*test_bad_input.py:\d+$"),
    "texts": (lambda p, r: ["good"] * len(r), r"gave 'good' of type str for response 0 .*; expected a number"),
}


def test_a_reward_that_turns_bad_is_one_line_and_the_step_before_is_saved(tiny, tmp_path):
    calls, bad = 0, None

    def reward(prompts, responses, **columns):
        nonlocal calls
        calls += 1  # two are evaluations, the third is the PPO step at 1, the fourth the one at 3
        return bad(prompts, responses) if bad and calls > 3 else [0.0] * len(responses)

    trainer = HybridTrainer(
        tiny / "config.yaml", reward=reward, run_dir=tmp_path, steps=5, checkpoint={"every": 100}
    )
    for bad, message in BAD_REWARDS.values():  # noqa: B007  the reward above reads it
        with pytest.raises(UserError, match=message) as raised:
            trainer.train()
        assert "\n" not in str(raised.value)
        assert load_policy(tmp_path).step == 3
    bad = None
    trainer.train()
    assert trainer.policy.step == 5


def test_what_is_no_run_is_refused_by_every_command(tmp_path, tiny, mistake):
    for main, *more in [
        (generate.main, "--prompt", "a"),
        (evaluate.main,),
        (export.main, "--output", tmp_path / "o"),
    ]:
        assert mistake(main, "--run", tmp_path, *more).endswith("is no run directory: it holds no config.yaml")
        gone = mistake(main, "--run", tmp_path / "gone", *more)
        assert gone.endswith("is no run directory: there is no such directory")
    (tmp_path / "config.yaml").write_text((tiny / "config.yaml").read_text())
    assert "holds no tokenizer: its training has not begun" in mistake(
        generate.main, "--run", tmp_path, "--prompt", "a"
    )


def test_an_export_that_is_refused_leaves_no_folder(run_dir, tmp_path, mistake):
    message = mistake(export.main, "--run", run_dir, "--output", tmp_path / "new" / "out", "--adapter")
    assert message == "the model has no adapter to export: its config has no lora"
    assert not (tmp_path / "new" / "out").exists()


def test_an_export_never_overwrites_what_is_not_ours(run_dir, tmp_path, mistake):
    (tmp_path / "thesis.txt").write_text("precious")
    message = mistake(export.main, "--run", run_dir, "--output", tmp_path)
    assert message == f"{tmp_path} is not empty and no export of ours; give a new or an empty folder"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert "is a file; give a folder" in mistake(
        export.main, "--run", run_dir, "--output", tmp_path / "thesis.txt"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--prompt", "a" * 60),
            "prompt 1 must have at most 40 tokens (context 48 less sampler.max_new_tokens 8)",
        ),
        (("--prompt", ""), "prompt 1 is empty; give it at least one token to go on from"),
        (
            ("--prompt", "a", "sampler.max_new_tokens=48"),
            "must leave room for a prompt in the context of 48 tokens",
        ),
        (
            ("--prompt", "a", "sampler.temprature=0"),
            "unknown setting 'sampler.temprature'; did you mean 'temperature'",
        ),
        (("--prompt", "a", "sampler.top_p=2"), "sampler.top_p must be in (0, 1], got 2"),
        (("--prompt", "a", "steps=3"), "unknown setting 'steps'"),
        (
            ("--prompt", "a", "temperature=1"),
            "unknown setting 'temperature'; did you mean 'sampler.temperature'?",
        ),
        (("--prompt", "a", "--seed", "1", "--seed", "2"), "argument --seed: given twice, takes one value"),
        (("--prompt", "a", "--num-samples", "0"), "num_samples must be at least 1, got 0"),
        (("--prompt", "a", "--seed", "x"), "argument --seed: invalid int value: 'x'"),
        (("--prompts", "/dev/zero"), "prompts file '/dev/zero' is a device; expected a regular file"),
        (("--prompts", "gone.txt"), "no prompts file 'gone.txt'"),
        (("--prompts", "gone.jsonl"), "no data file 'gone.jsonl'"),
        (("--model", "elsewhere", "--prompt", "a"), "argument --model: not allowed with argument --run"),
    ],
)
def test_mistakes_of_generate(run_dir, mistake, arguments, message):
    assert message in mistake(generate.main, "--run", run_dir, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * 101, "standard input must have at most 100 bytes, got more"),
        (b"caf\xe9\n", "standard input must be UTF-8 text, got byte 0xe9 at 3"),
        (b"\n \n", "standard input holds no prompts; give --prompt TEXT or --prompts FILE"),
    ],
)
def test_standard_input_is_text_and_has_a_bound(run_dir, mistake, monkeypatch, content, message):
    monkeypatch.setattr(generate, "MOST_PROMPTS", 100)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert mistake(generate.main, "--run", run_dir) == message


def test_a_folder_without_a_model_is_refused(tmp_path, run_dir, mistake):
    message = mistake(generate.main, "--model", tmp_path, "--prompt", "a")
    assert message == f"{tmp_path} is no Hugging Face folder: it holds no config.json"
    message = mistake(generate.main, "--model", run_dir, "--prompt", "a")
    assert message.endswith("it holds no config.json; it is a run directory, which --run takes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "held-out"), "unknown suite 'held-out'; did you mean 'held_out'?"),
        (("--num-prompts", "-1"), "evaluation.num_prompts must be at least 0, got -1"),
        (("steps=3",), "an override of evaluate must begin with 'evaluation.', got 'steps=3'"),
        (("--suite", "answers", "--num-prompts", "0"), "suite 'answers' has nothing to measure"),
        (
            ("--json", "/no/such/folder/file"),
            "/no/such/folder/file cannot be written: there is no folder /no/such/folder",
        ),
    ],
)
def test_mistakes_of_evaluate(run_dir, command, arguments, message):
    code, _, err = command(evaluate.main, "--run", run_dir, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.slow
def test_a_tokenizer_whose_pad_is_its_end_learns_to_end(tiny, tmp_path):
    """With masks made of ``token != pad`` it would never see an end, and would never stop."""
    exported = HybridTrainer(tiny / "config.yaml", run_dir=tmp_path / "r").save_pretrained(tmp_path / "model")
    path = exported / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["hybrid_jax_kind"]  # so that transformers reads it
    path.write_text(json.dumps({**settings, "pad_token": settings["eos_token"]}))
    trainer = HybridTrainer(
        tiny / "config.yaml",
        run_dir=tmp_path / "run",
        steps=40,
        tokenizer={"name": "huggingface", "path": str(exported)},
        data=[{"prompt": f"{i}", "completion": "b"} for i in range(40)],
        scheduler={"name": "alternation", "cycle": {"sft": 1}},
        overrides=["phases.sft.optimizer.learning_rate=0.02", "phases.sft.optimizer.schedule=constant"],
    )
    assert trainer.train()["evaluation/eos_fraction"] == 1.0
    assert trainer.generate(["5", "17"], temperature=0) == ["b", "b"]


def test_a_mistake_ends_a_process_with_code_2(tiny):
    command = [sys.executable, "-m", "hybrid_jax.train", "--config", str(tiny / "config.yaml"), "seed=none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: seed must be a whole number, got 'none'\n"


def test_what_training_notices_is_a_line_in_the_log_and_no_python_warning(tiny, tmp_path, command, caplog):
    overrides = (f"run_dir={tmp_path}", "steps=0", "phases.sft.length=9")
    assert command(train.main, "--config", tiny / "config.yaml", *overrides)[0] == 0
    lines = [record.getMessage() for record in caplog.records]
    found = "have more than 9 tokens (phases.sft.length), the longest 16 (line 11): 32 cut at the end;"
    assert lines[0].startswith(f"32 of 32 rows (all) of {tiny / 'data.jsonl'} {found}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
