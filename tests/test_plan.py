"""The command plan, on 8 fake CPU devices."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import yaml

from hybrid_jax import plan, planner
from hybrid_jax.core.cli import _exit_code
from hybrid_jax.experiment import load_config, plan_phases
from hybrid_jax.models.flops import train_flops
from hybrid_jax.planning import step
from hybrid_jax.planning.accelerators import Accelerator
from hybrid_jax.planning.table import number, size

WIDTH, LAYERS, VOCABULARY = 32, 1, 320
CHIP = Accelerator("cpu", 2**30, 1e9, 1e8, 1e7, source="measured")
MODEL = {
    **{"name": "decoder", "num_layers": LAYERS, "width": WIDTH, "num_heads": 2, "max_length": 64},
    **{"position": "rotary", "vocab_size": VOCABULARY},
}
SETTINGS = {
    "run_dir": "runs/never",
    "steps": 4,
    "model": MODEL,
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "data": {"name": "jsonl", "train": "there/is/no/such/file.jsonl"},
    "phases": {"sft": {"batch_size": 16, "length": 64, "optimizer": {"name": "adamw"}}},
    "scheduler": {"name": "alternation", "cycle": {"sft": 1}},
}
PPO = {
    **{"prompts_per_step": 16, "epochs": 1, "max_prompt_length": 24, "sampler": {"max_new_tokens": 8}},
    "reward": {"parts": {"length": {"reward": {"name": "length", "target": 6}}}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "sft.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    both = {**SETTINGS, "phases": {**SETTINGS["phases"], "ppo": PPO}}
    both["scheduler"] = {"name": "alternation", "cycle": {"sft": 1, "ppo": 1}}
    (folder / "both.yaml").write_text(yaml.safe_dump(both, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def compiled():
    """Programs of this module are compiled once: what a plan shows of them needs them again and again."""
    known, compile_once = {}, step.compile_step

    def remembered(program, platform):
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype), str(x.sharding)), program.arguments)
        key = program.name, str(shapes)
        if key not in known:
            known[key] = compile_once(program, platform)
        return known[key]

    return remembered


@pytest.fixture(scope="module")
def command(compiled):
    """Runs the command where each device has 1 GiB, or ``chip`` its memory, and peaks of round numbers."""

    def run(*arguments, chip=CHIP) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr("hybrid_jax.planning.topology.local_accelerator", lambda devices: chip)
            patch.setattr("hybrid_jax.planning.plan.compile_step", compiled)
            code = _exit_code(plan.main, list(map(str, arguments)))
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def both(files):
    """Of a plan of SFT and PPO on all 8 devices."""
    return "--config", files / "both.yaml", "--price", "2", "mesh.data=2", "mesh.fsdp=4"


@pytest.fixture(scope="module")
def whole(command, both):
    code, out, _ = command(*both, "--json")
    assert code == 0
    return json.loads(out)


def test_the_plan_needs_no_data_and_names_every_program(whole):
    names = [program["name"] for phase in whole["phases"] for program in phase["programs"]]
    assert names == ["sft/update", "ppo/sample", "ppo/score", "ppo/learn"]
    assert [phase["tokens"] for phase in whole["phases"]] == [16 * 64, 16 * 8]
    assert (whole["schema"], whole["topology"], whole["fits"]) == (1, "local", True)
    assert whole["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}


def test_the_json_keeps_its_keys(whole):
    assert set(whole) == {
        *("schema", "topology", "chips", "devices", "slices", "mesh", "accelerator", "fits"),
        *("price_per_chip_hour", "fullest_program", "phases", "versions"),
    }
    phase = whole["phases"][1]
    assert set(phase) == {"name", "tokens", "programs", "predicted_by_formula"}
    program = phase["programs"][0]
    assert set(program) == {
        *("name", "tokens", "compile_seconds", "fits", "problem", "memory", "counted", "parts"),
        "predicted_by_formula",
    }
    assert set(program["memory"]) == {
        *("peak_bytes", "beside_bytes", "argument_bytes", "temporary_bytes", "output_bytes", "alias_bytes"),
        *("live_bytes", "host_bytes"),
    }
    counted = {"flops", "bytes", "collective_bytes", "between_slices_bytes", "uncounted_calls"}
    assert set(program["counted"]) == counted
    assert [part["name"] for part in program["parts"]] == ["prefill", "decode"]
    assert set(program["parts"][1]["predicted_by_formula"]) == {
        *("compute_seconds", "memory_seconds", "interconnect_seconds", "network_seconds", "bound_by"),
    }


def test_predictions_follow_from_the_counts(whole):
    program = whole["phases"][0]["programs"][0]
    counted, predicted = program["counted"], program["predicted_by_formula"]
    sent = sum(counted["collective_bytes"].values())
    assert predicted["seconds"] == max(counted["flops"] / 1e9, counted["bytes"] / 1e8, sent / 1e7)
    assert predicted["tokens_per_second"] == pytest.approx(16 * 64 / predicted["seconds"])
    # 8 chips at 2 dollars an hour
    dollars = 1e6 / (16 * 64) * predicted["seconds"] / 3600 * 8 * 2
    assert predicted["dollars_per_million_tokens"] == pytest.approx(dollars)
    assert whole["phases"][1]["programs"][0]["parts"][1]["times"] == 7  # the first of 8 tokens needs no turn


def test_each_device_holds_its_part_of_the_state(whole):
    """Float32 parameters and moments over fsdp 4; what is an argument of one program lies beside another."""
    kernels = 4 * WIDTH * WIDTH + 2 * 4 * WIDTH * WIDTH
    norms_and_biases = 2 * (4 * WIDTH + 4 * WIDTH + 5 * WIDTH) + 2 * WIDTH
    parameters = LAYERS * kernels + VOCABULARY * WIDTH + norms_and_biases
    update, sample = whole["phases"][0]["programs"][0], whole["phases"][1]["programs"][0]
    # policy, reference, and two moments for SFT and for PPO; small vectors may be whole on every device
    state = 6 * 4 * parameters / 4
    held = [p["memory"]["argument_bytes"] + p["memory"]["beside_bytes"] for p in (update, sample)]
    assert state <= held[1] <= 1.2 * state
    assert held[0] == pytest.approx(held[1], rel=0.05)  # the same state, but for the batch


def test_the_flops_of_an_update_are_those_of_the_formula(files, command):
    """Within 3 % of 6·N·tokens and attention, whose hidden half is counted here: so the MLP is wide."""
    code, out, _ = command(
        "--config", files / "sft.yaml", "--json", "model.mlp_width=512", "phases.sft.length=32"
    )
    model = load_config(files / "sft.yaml", ["model.mlp_width=512"]).model
    counted = json.loads(out)["phases"][0]["programs"][0]["counted"]["flops"]
    needed = train_flops(model, 16 * 32, 32)
    assert code == 0
    assert json.loads(out)["phases"][0]["predicted_by_formula"]["model_flops"] == needed
    assert counted == pytest.approx(needed, rel=0.03)


def test_the_table_says_the_same_and_ends_with_the_verdict(command, both, whole):
    code, out, err = command(*both)
    lines = out.splitlines()
    assert code == 0
    fullest = max(
        (p for phase in whole["phases"] for p in phase["programs"]), key=lambda p: p["memory"]["peak_bytes"]
    )
    needs = size(fullest["memory"]["peak_bytes"])
    assert lines[-1] == f"fits: {fullest['name']} needs {needs} of 1.00 GiB a device"
    assert "mesh: data 2 × fsdp 4 × tensor 1" in lines
    assert any(line.startswith("  decode × 7 ") for line in lines)
    assert any(line.startswith("sft/update sends all-") for line in lines)
    assert "from the measured peaks" in out
    assert err.startswith("compiled sft/update in ")


def test_what_does_not_fit_is_said_with_settings_that_help_and_is_no_failure(command, both):
    code, out, _ = command(*both, chip=replace(CHIP, memory_bytes=2**16))
    last = out.splitlines()[-1]
    assert code == 0
    assert last.startswith("does not fit: ")
    assert "of 64.0 KiB a device; try a larger mesh.fsdp, model.execution.remat=full" in last
    assert "phases.ppo.rollout_weights=fsdp" in last


def test_without_peaks_there_are_no_predictions(command, both):
    code, out, _ = command(*both, "--json", chip=None)
    plan = json.loads(out)
    assert (code, plan["fits"]) == (0, None)
    assert plan["phases"][0]["predicted_by_formula"]["seconds"] is None
    assert command(*both, chip=None)[1].splitlines()[-1].startswith("unknown: ")


def test_a_search_names_the_best_as_overrides(files, command):
    code, out, err = command("--config", files / "sft.yaml", "--search", "--search-limit", "2")
    best = out.splitlines()[-1]
    assert code == 0
    assert "2 of at most 2 ways tried, best first:" in out
    assert best.startswith("best: mesh.data=")
    assert err.count("trying ") == 2
    again = command("--config", files / "sft.yaml", *best.removeprefix("best: ").split())
    assert again[0] == 0
    assert "fits: " in again[1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--topology", "v5q:4x4"],
            "error: topology must be local or <TPU>:<chips>, as in v5e:4x4, got 'v5q:4x4'",
        ),
        (["mesh.fsdp=16"], "error: mesh 1 × 16 × 1 needs 16 devices, got 8"),
        (
            ["mesh.data=8", "phases.sft.batch_size=12"],
            "error: phases.sft: batch_size / microbatches must be a multiple of the 8",
        ),
        (["--price", "-1"], "error: argument --price: must be a number above 0, got '-1'"),
        (
            ["--prompt-length", "x"],
            "error: argument --prompt-length: must be a whole number of at least 1, got",
        ),
        (["phases.sft.batch=1"], "error: unknown setting 'phases.sft.batch'; did you mean 'batch_size'?"),
    ],
)
def test_mistakes_are_one_line(files, command, arguments, line):
    code, out, err = command("--config", files / "sft.yaml", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_without_the_hub_a_plan_names_the_folder_of_published_sizes(command, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = command("--config", "configs/tpu/llama31_8b.yaml", "mesh.fsdp=8")
    assert code == 2
    assert err.endswith("; its sizes are enough for a plan: model.path=configs/models/llama-3.1-8b\n")
    code, _, err = command("--config", "configs/tpu/llama31_8b.yaml", "mesh.fsdp=99")
    assert err.startswith("error: mesh 1 × 99 × 1 needs 99 devices, got 8")
    assert "its sizes" not in err


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 257), ("{name: bpe, vocab_size: 400}", 400)])
def test_a_model_from_scratch_is_planned_with_the_vocabulary_of_its_tokenizer(files, tokenizer, size):
    config = load_config(files / "sft.yaml", ["model.vocab_size=null", f"tokenizer={tokenizer}"])
    assert planner._with_vocabulary(config).model.vocab_size == size


def test_prompts_need_a_length(files, command):
    code, _, err = command("--config", files / "both.yaml", "phases.ppo.max_prompt_length=null")
    assert code == 2
    assert "phases.ppo.max_prompt_length must be set to plan without data; or use --prompt-length" in err


def test_numbers_are_written_with_three_digits():
    assert [size(n) for n in (0, 1023, 1536, 20 * 2**20, 300 * 2**30, 2**41)] == [
        *("0 B", "1023 B", "1.50 KiB", "20.0 MiB", "300 GiB", "2.00 TiB")
    ]
    assert [number(n) for n in (5, 1500, 49.3e12, 2e15)] == ["5.00", "1.50 k", "49.3 T", "2.00 P"]


def test_the_plan_is_for_all_local_devices(whole):
    assert whole["devices"] == whole["chips"] == len(jax.devices())


@pytest.mark.parametrize(
    ("config", "programs"),
    [
        ("dapo", ["sample", "score", "refill", "learn"]),
        pytest.param("a3c", ["sample", "score", "gradient", "apply"], marks=pytest.mark.slow),
        pytest.param("rloo", ["sample", "score", "learn"], marks=pytest.mark.slow),
        pytest.param("distillation", ["sample", "score", "learn"], marks=pytest.mark.slow),
        pytest.param("kto", ["update"], marks=pytest.mark.slow),
    ],
)
def test_every_program_of_a_method_is_traced_for_shapes_and_the_last_gives_back_what_trains(
    config, programs, monkeypatch
):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    settings = load_config(root / "configs" / "debug" / f"{config}.yaml", [])
    settings = replace(settings, model=replace(settings.model, vocab_size=384))
    phases, state = plan_phases(settings, jax.devices()[:1])
    name = "preference" if config == "kto" else config
    found = phases[name].programs(state, 32)
    assert [program.name for program in found] == [f"{name}/{program}" for program in programs]
    *_, last = [program.function.eval_shape(*program.arguments, **program.settings) for program in found]
    key = phases[name].optimizer_key
    given = (state.train.params, state.train.opt_state[key])
    trained = (last[0].params, last[0].opt_state[key])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), given) == jax.tree.map(
        lambda x: (x.shape, x.dtype), trained
    )
