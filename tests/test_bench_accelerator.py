"""The arithmetic of the figures against numbers worked out by hand; that the commands run, on a smoke shape."""

import contextlib
import io
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.family import parameter_shapes

ONCE = ("--turns", "1", "--steps", "1")
SFT_COMMAND = ["sft", "--size", "smoke", *ONCE, "--peaks", "2", "1", "--attention", "einsum"]


@pytest.fixture(scope="module")
def bench(scripts):
    """The script with its modules."""
    return scripts("bench_accelerator")


# The smoke shape: 2 layers of width 16, 4 query and 2 key/value heads of 4 channels, MLP of 24, 64 tokens. A
# layer multiplies with 16·16 (queries) + 2·16·8 (keys, values) + 16·16 (output) + 3·16·24 = 1,920 parameters,
# so N = 2·1,920 + 16·64 (head) = 4,864: 9,728 bytes. Keys and values of a token: 2·2 layers·2·4·2 bytes = 64.


@pytest.fixture(scope="module")
def sft_record(bench):
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        bench.main(SFT_COMMAND)
    return json.loads(lines.getvalue())


@pytest.mark.slow
def test_an_update_of_the_smoke_shape_has_the_flops_worked_out_by_hand(sft_record):
    seconds = sft_record["seconds"]
    # 2 rows of 8: 6·4,864·16, and attention 3·4·16 (channels of all heads)·16 tokens·4.5 keys·2 layers
    assert sft_record["flops"] == 466_944 + 27_648
    assert sft_record["mfu"] == pytest.approx(494_592 / seconds / 2e12, rel=1e-3)
    assert sft_record["tokens_per_second"] == pytest.approx(16 / seconds, rel=1e-3)
    assert sft_record["peaks"] == {"flops": 2e12, "bandwidth": 1e9, "source": "given"}


def test_a_rollout_of_the_smoke_shape_needs_the_bytes_worked_out_by_hand(bench, capsys):
    bench.main(["rollout", "--size", "smoke", *ONCE, "--peaks", "1", "2"])
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    # 3 rows, 4 prompt tokens, 6 new ones: 5 turns over weights and over 5 + 6 + 7 + 8 + 9 = 35 tokens a row.
    # The cache has 9 slots from the first turn on.
    assert record["needed_bytes"] == 5 * 9_728 + 3 * 35 * 64 == 55_360
    assert record["slot_bytes"] == 5 * 9_728 + 3 * 5 * 9 * 64 == 57_280
    decode = record["seconds"] - record["prefill_seconds"]
    assert record["roofline"] == pytest.approx(55_360 / 2e9 / record["seconds"], rel=1e-3)
    if decode > 0.1 * record["seconds"]:  # else rounding leaves no digits of it
        assert record["decode_roofline"] == pytest.approx(55_360 / 2e9 / decode, rel=0.01)
        assert record["bandwidth_used"] / record["decode_roofline"] == pytest.approx(57_280 / 55_360, rel=1e-3)
    assert record["tokens_per_second"] == pytest.approx(18 / record["seconds"], rel=1e-3)


def test_seconds_are_those_of_one_update_of_a_burst(bench):
    numbers = {"seconds": 2.0, "peer_seconds": 3.0, "ratio": 1.5}
    assert bench.of_one(numbers, burst=4) == {"seconds": 0.5, "peer_seconds": 0.75, "ratio": 1.5}


def test_an_unknown_peak_gives_no_shares(bench, monkeypatch):
    roofline = sys.modules["accelerator.roofline"]
    monkeypatch.setattr(roofline, "local_accelerator", lambda devices: None)
    peaks = bench.find_peaks()
    assert (peaks.source, peaks.share_of_flops(1.0, 1.0), peaks.share_of_bandwidth(1.0, 1.0)) == (
        "unknown",
        None,
        None,
    )
    from hybrid_jax.planning.accelerators import H100, TPU7X

    monkeypatch.setattr(roofline, "local_accelerator", lambda devices: H100)
    assert bench.find_peaks() == bench.Peaks(989e12, 3.35e12, "published")
    monkeypatch.setattr(roofline, "local_accelerator", lambda devices: TPU7X)  # two devices a chip
    assert bench.find_peaks() == bench.Peaks(1153.5e12, 3.69e12, "published")


def test_a_cache_that_grows_is_read_with_the_slots_that_it_has_at_each_turn(bench):
    smoke = bench.SHAPES["smoke"]
    # After a prompt of 4: 3 turns over 7 slots, then 2 over 9.
    assert bench.slot_bytes(smoke, rows=1, prompt=4, lengths=(7, 9)) == 5 * 9_728 + (3 * 7 + 2 * 9) * 64


def test_a_record_says_what_ran_where_and_beside_which_plan(sft_record):
    command = "sft --size smoke --turns 1 --steps 1 --peaks 2 1 --attention einsum"
    assert sft_record["command"] == f"python scripts/bench_accelerator.py {command}"
    assert sft_record["execution"] == {"scan_layers": False, "remat": "none", "attention": "einsum"}
    assert [sft_record[name] for name in ("rows", "length", "burst", "dtype")] == [2, 8, 2, "bfloat16"]
    assert (sft_record["platform"], sft_record["versions"]["jax"]) == ("cpu", jax.__version__)
    assert sft_record["recompiled"] is None
    memory = sft_record["memory"]
    assert (memory["plan_program"], memory["peak_bytes"], memory["ratio"]) == ("sft/update", None, None)
    # At least parameters and two moments in float32: 4,864, biases 2·(16 + 8 + 8) and norms 5·16.
    assert 3 * 4 * (4_864 + 64 + 80) < memory["plan_bytes"] < 10 * 4 * (4_864 + 64 + 80)


def test_choices_of_the_computation_are_passed_through(bench):
    options = bench.parse(["ppo", "--remat", "dots", "--attention", "cudnn", "--scan-layers", "--rows", "16"])
    assert vars(bench.execution(options)) == {"scan_layers": True, "remat": "dots", "attention": "cudnn"}
    work = bench.work_of(options, bench.SHAPES["qwen2.5-0.5b"])
    assert (work.rows, work.length, work.new_tokens, work.vocab_size) == (16, 128, 256, 151_936)


def test_the_peak_of_the_runtime_stands_beside_the_fullest_program_of_the_plan(bench, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda devices: {"memory/peak_bytes": 12_000.0})
    double, quarter = jax.jit(lambda x: x * 2), jax.jit(lambda x: x[:256] * 2)
    numbers = (jax.ShapeDtypeStruct((1024,), jnp.float32),)
    programs = [bench.Program("a/double", double, numbers), bench.Program("a/quarter", quarter, numbers)]
    memory = bench.memory_and_plan(programs)
    # 4 KiB in and 4 KiB out, against 1 KiB out
    assert memory == {
        "peak_bytes": 12_000.0,
        "plan_bytes": 8_192,
        "plan_program": "a/double",
        "ratio": 12_000 / 8_192,
    }


def test_the_split_of_an_iteration_is_that_of_the_runs_own_records(bench):
    parts = {"input_seconds": 0.1, "rollout_seconds": 0.8, "reward_seconds": 0.2, "score_seconds": 0.4}

    def record(scale, mfu):
        times = {**parts, "update_seconds": 0.5, "seconds": 2.0}
        return {f"ppo/{n}": s * scale for n, s in times.items()} | {
            "ppo/tokens_per_second": 9.0,
            "ppo/mfu": mfu,
        }

    records = bench.Records()
    for scale, mfu in ((50.0, 0.0), (1.0, 0.25), (2.0, 0.125), (3.0, 0.0625)):  # the first is warm-up
        records.metrics(record(scale, mfu))
    numbers = records.medians(first=1)
    assert (numbers["seconds"], numbers["reward_seconds"], numbers["mfu"]) == (4.0, 0.4, 0.125)
    shares = {"input": 0.05, "rollout": 0.4, "reward": 0.1, "score": 0.2, "update": 0.25}
    assert numbers["split"] == pytest.approx(shares)


@pytest.mark.slow
def test_an_iteration_is_split_without_a_rest(bench):
    options = bench.parse(["ppo", "--size", "smoke"])
    config = replace(bench.SHAPES["smoke"], num_layers=1)
    work = bench.Bench(bench.work_of(options, config), config, bench.Peaks(1e12, 1e9, "given"))
    numbers, programs, recompiled = work.ppo(None, turns=1, steps=1)
    assert sum(numbers["split"].values()) == pytest.approx(1)
    assert numbers["tokens_per_second"] * numbers["seconds"] == pytest.approx(4 * 6, abs=4)  # some rows may end
    assert [program.name for program in programs] == ["ppo/sample", "ppo/score", "ppo/learn"]
    assert recompiled == ""


def test_what_is_compiled_after_the_warm_up_is_told(bench, caplog):
    lengths = iter((3, 3, 4))

    def twice(x):
        return 2 * x

    doubled = jax.jit(twice)
    arrays = {length: jnp.zeros(length) for length in (3, 4)}
    step = bench.Watched(lambda: doubled(arrays[next(lengths)]))
    for _ in range(bench.WARM_UP):
        step()
    assert step.recompiled == ""
    step()
    assert step.recompiled.startswith("twice (")
    assert "step 3 compiled twice (" in caplog.text


# By the index of each model's safetensors; a tied head counts once.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "llama-3.2-1b": 1_235_814_400,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_its_model(bench, size):
    shapes = parameter_shapes(bench.SHAPES[size].build())
    assert sum(shape.size for shape in shapes.values()) == PUBLISHED[size]


def test_a_peer_gets_the_published_config(bench):
    llama = FAMILIES["llama"].write_config(bench.SHAPES["llama-3.2-1b"])
    expected = {
        **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5},
        **{"vocab_size": 128_256, "tie_word_embeddings": True, "max_position_embeddings": 131_072},
    }
    assert {name: llama[name] for name in expected} == expected
    rope = {"rope_theta": 500_000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert {name: llama["rope_parameters"][name] for name in rope} == rope
    qwen = FAMILIES["qwen2"].write_config(bench.SHAPES["qwen2.5-0.5b"])
    assert (qwen["rms_norm_eps"], qwen["rope_parameters"]["rope_theta"]) == (1e-6, 1e6)


def test_a_row_that_no_accelerator_has_measured_says_so(bench, capsys, tmp_path):
    common = {"size": "qwen2.5-0.5b", "rows": 8, "length": 1024, "new_tokens": 0, "commit": "abcdef0123"}
    common |= {"platform": "gpu", "device": "some GPU, 16 cores", "tokens_per_second": 81_920.0}
    memory = {"peak_bytes": 3 * 2**30, "plan_bytes": 2 * 2**30, "ratio": 1.5}
    sft = {**common, "kind": "sft", "seconds": 0.1, "mfu": 0.459, "memory": memory}
    sft |= {"peer": "torch", "peer_seconds": 0.123, "ratio": 1.23}
    rollout = {**common, "kind": "rollout", "seconds": 1.5, "new_tokens": 512, "roofline": 0.5}
    rollout |= {"decode_roofline": None, "memory": {**memory, "ratio": None}}
    on_cpu = {**sft, "platform": "cpu", "seconds": 99.0}
    file = tmp_path / "lines"
    file.write_text("\n".join(map(json.dumps, ({**sft, "seconds": 9.0}, sft, rollout, on_cpu))))
    bench.main(["--table", str(file)])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 9  # of 3 kinds and 3 models
    assert header.count("|") == rows[0].count("|") == rows[1].count("|")
    assert rows[0] == (
        "| SFT step | Qwen2.5-0.5B | 0.1 s, 81,920 tokens/s at 8 × (1024) | 46 % MFU "
        "| torch: 0.123 s, **1.23×** | 3.0 GiB (2.0 GiB, 1.50) | some GPU, 16 cores, abcdef0 |"
    )
    assert "8 × (1024 + 512) | 50 % of the bandwidth, peak unknown without the prompts |" in rows[3]
    assert rows[1].startswith("| SFT step | Qwen2.5-1.5B | not measured yet: no GPU was at hand |")
    assert sum("not measured yet: no GPU was at hand" in row for row in rows) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a kind of work or --table"),
        (["sft", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["rollout", "--new-tokens", "-1"], "--new-tokens must be at least 1, got -1"),
        (["--table", "nowhere.jsonl"], "--table must be a file of JSON lines, got nowhere.jsonl"),
        (["ppo", "--against", "torch"], "ppo has no peer here"),
        (["sft", "--against", "torch"], "--against torch needs --peer-python, or HYBRID_JAX_PEER_PYTHON"),
        (
            ["sft", "--against", "torch", "--peer-python", "false"],
            "the peer torch_bf16 ended: .* needs torch==",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(bench, arguments, words, monkeypatch):
    monkeypatch.delenv(bench.PEER_PYTHON, raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    size = ["--size", "smoke", "--peaks", "1", "1"]
    with pytest.raises(UserError, match=words):
        bench.main([*arguments, *size])
