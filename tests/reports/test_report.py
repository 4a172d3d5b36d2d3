"""The report: right numbers in the right places, and no way in for what a model writes."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.report import main
from hybrid_jax.reports.change import paired_interval
from hybrid_jax.reports.charts import (
    Block,
    Panel,
    Series,
    axis_for,
    draw,
    moving_mean,
    phase_blocks,
    short_number,
    thin,
)
from hybrid_jax.reports.report import _data_block, write_report


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        (self.scripts if self._in_script else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def evaluation(step: int, score: float | None = 0.5, **metrics: float) -> dict:
    record = {"step": step, "phase": "evaluation", "seconds": 2.0 * step, "evaluation/score": score}
    return record | {f"evaluation/{name}": value for name, value in metrics.items()}


BEFORE = [0.2, 0.6] * 4
RISE = [0.4] * 4 + [0.6] * 4


def by_prompt(step: int, scores: list[float]) -> dict:
    """An evaluation that knows the score of each prompt."""
    return evaluation(step, sum(scores) / len(scores)) | {"by_prompt": {"evaluation/score": scores}}


def sft(step: int, loss: float | None = 2.0) -> dict:
    return {"step": step, "phase": "sft", "seconds": 2.0 * step, "sft/loss": loss}


def ppo(step: int, score: float | None = 0.6, **metrics: float) -> dict:
    record = {"step": step, "phase": "ppo", "seconds": 2.0 * step, "ppo/score": score, "ppo/kl": 1.5}
    return record | {f"ppo/{name}": value for name, value in metrics.items()}


def sample(step: int, response: str, index: int = 0, prompt: str = "The Eagle is", **parts: float) -> dict:
    record = {"step": step, "phase": "evaluation", "split": "held_out", "index": index, "prompt": prompt}
    return record | {"response": response, "score": step / 100, "parts": parts}


def report(run_dir: Path, metrics: list[dict], samples: list[dict] | None = None) -> Page:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if samples is not None:
        (run_dir / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in samples))
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text())


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</p></article><img src=x onerror=alert(3)>",
    '" onmouseover="alert(4)',
    "{{data}} {{body}} {{name}}",
    "<!-- <script>",
    "&lt;b&gt; &amp;",
    "bell \x07 escape \x1b[31m null \x00 half \ud800 pair",
]


def test_what_a_model_writes_is_shown_and_never_interpreted(tmp_path):
    samples = [sample(0, text, index=i, prompt=text) for i, text in enumerate(HOSTILE)]
    samples += [sample(4, "fine", index=i) | {"parts": {text: 0.5}} for i, text in enumerate(HOSTILE)]
    metrics = [evaluation(0), evaluation(4), *(ppo(i, **{text: 0.5}) for i, text in enumerate(HOSTILE))]
    (tmp_path / "config.yaml").write_text(json.dumps({text: {"name": text} for text in HOSTILE[:-1]}))
    (tmp_path / "environment.json").write_text(json.dumps({text: text for text in HOSTILE}))
    page = report(tmp_path, metrics, samples)

    assert [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "link")] == [
        "script"
    ] * 2
    attributes = {name for _, found in page.tags for name in found}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    for text in HOSTILE[:-1]:
        assert page.text.count(text) >= 3  # as prompt, as response, as the name of a part or a metric
    assert "bell \ufffd escape \ufffd[31m null \ufffd half \ufffd pair" in page.text
    assert len(page.data["panels"]) == 2 + len(HOSTILE)  # score, KL and a chart for each metric


def test_embedded_numbers_cannot_end_their_block_early():
    block = _data_block({"label": "</script><!--<script>&"})
    assert not set("<>&") & set(block)
    assert json.loads(block) == {"label": "</script><!--<script>&"}


def test_the_page_reaches_for_nothing_and_runs_only_its_own_script(tmp_path):
    page = report(tmp_path, [evaluation(0), ppo(0), evaluation(1)])
    (policy,) = [found["content"] for tag, found in page.tags if found.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", (tmp_path / "report.html").read_text())


def test_the_headline_compares_the_end_with_the_last_evaluation_before_ppo(tmp_path):
    metrics = [evaluation(0, 0.1), sft(0), sft(1), by_prompt(2, BEFORE), ppo(2)]
    metrics += [evaluation(3, 0.7), ppo(3)]
    after = [score + d for score, d in zip(BEFORE, RISE, strict=True)]
    page = report(tmp_path, [*metrics, by_prompt(4, after)])
    # Differences of 0.4 and 0.6: mean 0.5, s = 0.1 √(8/7), t(0.975, 7) s / √8 = 2.3646 · 0.0378 = 0.0894.
    assert (
        "Training with reward raised the held-out score from 0.400 (sft alone, step 2) to 0.900 at step 4 "
        "(+0.5, 95 % interval +0.411 to +0.589). "
        "95 % interval of the mean difference over the same 8 held-out prompts, paired t."
    ) in page.text
    assert 'class="verdict up"' in (tmp_path / "report.html").read_text()
    assert "0.400 before the reward, +0.411 to +0.589" in page.text
    assert "Steps 4 2 sft · 2 ppo" in page.text
    assert "Duration 8 s" in page.text


def test_a_lower_score_is_called_lower_and_an_untrained_start_is_no_sft_level(tmp_path):
    page = report(tmp_path, [by_prompt(0, [0.5] * 8), ppo(0), by_prompt(1, [0.25] * 7 + [0.2])])
    assert "lowered the held-out score from 0.500 (the untrained start, step 0) to 0.244 at step 1" in page.text
    assert 'class="verdict down"' in (tmp_path / "report.html").read_text()


def test_a_pretrained_start_is_not_called_untrained(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name: pretrained, path: some/folder}")
    page = report(tmp_path, [evaluation(0, 0.5), ppo(0), evaluation(1, 0.25)])
    assert "(the pretrained model, step 0)" in page.text


def test_a_difference_within_chance_is_no_success(tmp_path):
    after = [score + d for score, d in zip(BEFORE, [0.04, -0.03] * 4, strict=True)]
    page = report(tmp_path, [by_prompt(0, BEFORE), ppo(0), by_prompt(4, after)])
    # d̄ = 0.005, s = 0.035 √(8/7): 2.3646 s / √8 = 0.0313
    assert (
        "Training with reward made no clear difference: the held-out score went from 0.400 (the untrained "
        "start, step 0) to 0.405 at step 4 (+0.005, 95 % interval −0.0263 to +0.0363), which may be chance."
    ) in page.text
    assert 'class="verdict"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (evaluation(0, 0.4), evaluation(4, 0.9), "(this run kept no scores by prompt)"),
        (by_prompt(0, [0.4] * 7), by_prompt(4, [0.9] * 7), "(only 7 prompts)"),
        (
            by_prompt(0, [0.4] * 9),
            by_prompt(4, [0.9] * 8),
            "(this run kept no scores by prompt)",
        ),  # other prompts
    ],
)
def test_a_difference_without_an_interval_claims_nothing(tmp_path, before, after, why):
    page = report(tmp_path, [before, ppo(0), after])
    assert (
        "The held-out score went from 0.400 (the untrained start, step 0) to 0.900 at step 4; whether that is "
        f"more than chance cannot be told {why}."
    ) in page.text
    assert 'class="verdict"' in (tmp_path / "report.html").read_text()


def test_the_paired_interval_is_that_of_students_t():
    low, high = paired_interval([0.0] * 10, [float(i) for i in range(10)])
    half = 2.2621571627 * (sum((i - 4.5) ** 2 for i in range(10)) / 9) ** 0.5 / 10**0.5  # t(0.975, 9)
    assert (low, high) == pytest.approx((4.5 - half, 4.5 + half), rel=1e-9)
    assert paired_interval([0.0] * 7, [1.0] * 7) is None


def test_a_kl_below_zero_is_said_to_be_noise(tmp_path):
    page = report(tmp_path, [ppo(0) | {"ppo/kl": -0.00826}])
    assert "−0.00826 nats a response: an estimate, 0 within its noise" in page.text


def test_a_report_is_written_for_each_run_that_is_named(tmp_path, capsys):
    for name in "ab":
        report(tmp_path / name, [sft(0)])
        (tmp_path / name / "report.html").unlink()
    main(["--run", str(tmp_path / "a"), "--run", f"{tmp_path}/b/"])
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/{name}/report.html" for name in "ab"]
    assert (tmp_path / "a" / "report.html").is_file()
    with pytest.raises(UserError, match="--run: needs a path, got an empty text"):
        main(["--run", ""])


def test_steps_are_counted_by_phase_also_when_only_some_are_logged(tmp_path):
    page = report(tmp_path, [sft(0), sft(10), ppo(20), ppo(30), ppo(39)])
    assert "Steps 40 20 sft · 20 ppo" in page.text


@pytest.mark.parametrize(
    ("metrics", "headings"),
    [
        ([sft(0), sft(1)], ["Progress", "Particulars"]),
        ([ppo(0), ppo(1)], ["Progress", "Particulars"]),
        ([evaluation(0)], ["Progress", "Particulars"]),
        ([sft(0, loss=None)], ["Particulars"]),
        (
            [ppo(0, **{"reward/length": 1.0, "odd": 2.0})],
            ["Progress", "Rewards", "More metrics", "Particulars"],
        ),
    ],
)
def test_a_run_may_lack_anything_and_empty_sections_vanish(tmp_path, metrics, headings):
    report(tmp_path, metrics)
    assert re.findall("<h2>(.*?)</h2>", (tmp_path / "report.html").read_text()) == headings


def test_every_metric_is_drawn_exactly_once(tmp_path):
    names = ["sft/loss", "sft/score", "ppo/score", "ppo/kl", "ppo/kl_coef", "ppo/reward/a", "ppo/reward/b"]
    names += [
        "evaluation/reward/a",
        "evaluation/kl",
        "evaluation/bleu",
        "dpo/margin",
        "ppo/entropy",
        "dpo/loss",
    ]
    metrics = [{"step": i, "phase": name.partition("/")[0], name: 1000.0 + i} for i, name in enumerate(names)]
    page = report(tmp_path, metrics)
    drawn = [series["y"] for panel in page.data["panels"] for series in panel["series"]]
    assert sorted(drawn) == [[1000.0 + i] for i in range(len(names))]


def timed(step: int, phase: str, seconds: float, **metrics: float) -> dict:
    record = {"step": step, "phase": phase, "seconds": 2.0 * step, f"{phase}/seconds": seconds}
    return record | {name.replace("__", "/"): value for name, value in metrics.items()}


def test_the_time_of_a_step_and_of_the_run_is_split_and_tabled(tmp_path):
    def ppo_step(step, seconds, **more):
        parts = {"input": 0.1, "rollout": 0.5, "reward": 0.05, "score": 0.05, "update": 0.3}
        parts = {f"ppo__{part}_seconds": share * seconds for part, share in parts.items()}
        return timed(step, "ppo", seconds, **parts, ppo__tokens_per_second=1000.0, **more)

    records = [
        timed(0, "sft", 20.0, sft__input_seconds=0.0, sft__update_seconds=20.0),  # it compiles
        timed(1, "sft", 0.5, sft__input_seconds=0.125, sft__update_seconds=0.375, sft__mfu=0.425),
        timed(2, "sft", 0.5, sft__input_seconds=0.125, sft__update_seconds=0.375, sft__mfu=0.425),
        {"step": 3, "phase": "evaluation", "seconds": 6.0, "time/evaluation_seconds": 6.0},
        ppo_step(3, 9.0),
        ppo_step(4, 2.0, time__checkpoint_seconds=2.0, memory__host_peak_bytes=3 * 2.0**29, compile__count=12),
    ]
    page = report(tmp_path, records)
    assert (
        "The whole run: 40 s sft steps 21 s 52 % ppo steps 11 s 28 % evaluation 6 s 15 % checkpoint 2 s 5 %"
        in (page.text)
    )
    assert "A step of sft, on average: 500 ms input 125 ms 25 % update 375 ms 75 %" in page.text
    assert (
        "A step of ppo, on average: 2 s input 200 ms 10 % rollout 1 s 50 % reward 100 ms 5 % "
        "score 100 ms 5 % update 600 ms 30 %"
    ) in page.text
    assert "sft 3 500 ms – 42.5 % ppo 2 2 s 1000 –" in page.text
    assert "Peak memory of the process (host) 1.50 GiB Programs compiled 12, in 0 ms" in page.text
    widths = [a["style"] for tag, a in page.tags if tag == "i" and a.get("style", "").startswith("width")]
    assert widths[:4] == ["width:52.50%", "width:27.50%", "width:15.00%", "width:5.00%"]


def test_a_phase_of_any_name_has_its_bar_and_no_markup_of_its_own(tmp_path):
    page = report(tmp_path, [timed(0, "<b>x", 1.0, **{"<b>x__update_seconds": 1.0}), ppo(1)])
    assert "A step of <b>x, on average: 1 s update 1 s 100 %" in page.text
    assert "b" not in {tag for tag, _ in page.tags if tag == "b>x"}


def test_a_run_without_metrics_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"no run directory '.*missing'"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match=r"metrics.jsonl holds no metrics yet"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "pha')
    with pytest.raises(UserError, match=r"metrics.jsonl holds no metrics yet"):
        write_report(tmp_path)
    with pytest.raises(UserError, match=r"required: --run; see python -m hybrid_jax.report --help"):
        main([])


def test_the_command_prints_the_path_or_ends_with_code_2(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(sft(0)) + "\n")
    command = [sys.executable, "-m", "hybrid_jax.report", "--run"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/report.html\n")
    done = subprocess.run([*command, tmp_path / "no"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: no run directory '{tmp_path}/no'\n")


def test_a_torn_last_line_and_values_that_are_no_numbers_leave_gaps(tmp_path):
    lines = [json.dumps(sft(0)), json.dumps(sft(1, loss=float("nan"))), json.dumps(sft(2, loss=None))]
    lines += [json.dumps(sft(3, loss=math.inf)), json.dumps(sft(4)), '{"step": 5, "phase": "sft", "sft/lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = Page(write_report(tmp_path).read_text())
    (panel,) = page.data["panels"]
    assert panel["series"] == [{"x": [0, 1, 2, 3, 4], "y": [2, None, None, None, 2], "colour": "blue"}]
    assert "training 2 3 not finite" in page.text


def test_samples_stand_side_by_side_before_at_the_sft_level_and_after(tmp_path):
    metrics = [sft(0), ppo(20), ppo(40)]
    samples = [sample(step, f"text at {step}", coverage=0.25) for step in (0, 10, 20, 30, 41)]
    page = report(tmp_path, metrics, samples)
    shown = "The Eagle is Before · step 0 0.00 text at 0 coverage 0.25 sft only · step 20 0.20 text at 20"
    assert shown in page.text
    assert "After · step 41 0.41 text at 41" in page.text
    assert "text at 30" not in page.text


def test_without_an_sft_level_the_middle_is_shown_and_an_empty_response_is_named(tmp_path):
    page = report(tmp_path, [ppo(0), ppo(9)], [sample(step, " " * step) for step in (0, 2, 6, 10)])
    moments = re.findall(r"(Before|During|After) · step (\d+)", page.text)
    assert moments == [("Before", "0"), ("During", "6"), ("After", "10")]
    assert page.text.count("empty response") == 3


def test_the_config_is_shown_without_its_secrets(tmp_path):
    (tmp_path / "config.yaml").write_text("judge: {name: http, api_key: hunter2}\nseed: 7\n")
    page = report(tmp_path, [sft(0)])
    assert "hunter2" not in (tmp_path / "report.html").read_text()
    assert "judge: name: http api_key: '***' seed: 7" in page.text


def test_a_long_run_stays_a_small_page(tmp_path):
    page = report(tmp_path, [sft(step, loss=2 + (step * 7919 % 100) / 100) for step in range(20_000)])
    assert (tmp_path / "report.html").stat().st_size < 60_000
    assert len(page.data["panels"][0]["series"][0]["x"]) == 200


def test_thinning_keeps_the_lowest_and_highest_of_each_bin_in_order():
    ys = [float(step % 10) for step in range(10_000)]
    ys[4321], ys[4325], ys[9999] = 99.0, -99.0, 7.5
    xs, thinned = thin(range(10_000), ys)
    assert len(xs) <= 600
    assert xs == sorted(xs)
    assert (4321, 99.0) in zip(xs, thinned, strict=True)
    assert (4325, -99.0) in zip(xs, thinned, strict=True)
    assert thin(range(8), [3, 1, 2, 9, 5, 5, 4, 6], limit=4) == ([1, 3, 6, 7], [1, 9, 4, 6])
    assert thin(range(600), ys[:600]) == (list(range(600)), ys[:600])


def test_thinning_keeps_a_stretch_without_numbers_as_a_gap():
    ys = [1.0, 2.0, None, 3.0, None, None, None, None, 4.0, 5.0, 6.0, 7.0]
    assert thin(range(12), ys, limit=6) == ([0, 3, 4, 8, 11], [1.0, 3.0, None, 4.0, 7.0])


def test_the_moving_mean_is_centred_and_skips_gaps():
    ys = [0.0, 3.0, None, 6.0, 9.0, 30.0]
    xs, means = moving_mean(range(6), ys, windows=2, points=100)  # five numbers, one neighbour on each side
    assert xs == [0, 1, 3, 4, 5]
    assert means == pytest.approx([1.5, 3.0, 6.0, 15.0, 19.5])


def test_quick_alternation_becomes_one_strip_of_shares_and_not_a_bar_code():
    steps = [(step, "sft") for step in range(100)]
    steps += [(step, "sft" if (step - 100) % 11 < 1 else "ppo") for step in range(100, 1000)]
    blocks = phase_blocks(steps, end=1000)
    assert blocks[0] == Block(0, 101, {"sft": 1.0})  # the warm-up and the first step of the alternation
    assert [block.start for block in blocks[1:]] == [block.end for block in blocks[:-1]]
    assert blocks[-1].end == 1000
    assert all(20 <= block.end - block.start <= 50 for block in blocks[1:])
    for block in blocks[1:-1]:
        assert block.shares == pytest.approx({"sft": 1 / 11, "ppo": 10 / 11})
    learned = sum(block.shares.get("ppo", 0) * (block.end - block.start) for block in blocks)
    assert learned == pytest.approx(sum(phase == "ppo" for _, phase in steps))
    drawing, _ = draw([Panel([Series("a", "sft", [0, 999], [0.0, 1.0])])], blocks, 1000)
    assert drawing.count('class="band') == 1


def test_wide_blocks_stay_as_they_are_and_are_shaded():
    steps = [(step, "ppo" if step // 50 % 2 else "sft") for step in range(200)]
    blocks = phase_blocks(steps, end=200)
    assert blocks == [
        Block(0, 50, {"sft": 1.0}),
        Block(50, 100, {"ppo": 1.0}),
        Block(100, 150, {"sft": 1.0}),
        Block(150, 200, {"ppo": 1.0}),
    ]
    drawing, _ = draw([Panel([Series("a", "sft", [0, 200], [0.0, 1.0])])], blocks, 200)
    assert drawing.count('class="band sft"') == drawing.count('class="band ppo"') == 2
    assert '<rect class="band ppo" x="250.0" y="0.0" width="250.0" height="100.0"/>' in drawing


def test_a_curve_is_drawn_where_its_numbers_say_and_breaks_at_a_gap():
    line = Series("loss", "sft", [0, 1, 2, 3, 4], [0.0, 5.0, None, 10.0, 2.5])
    drawing, data = draw([Panel([line])], [], end=4)
    assert 'd="M0.0 100.00L250.0 50.00M750.0 0.00L1000.0 75.00"' in drawing
    assert 'd="M0.0 100.00h0M250.0 50.00h0M750.0 0.00h0M1000.0 75.00h0"' in drawing
    assert (data[0]["low"], data[0]["high"], data[0]["log"]) == (0.0, 10.0, False)


@pytest.mark.parametrize(
    ("values", "floor", "ticks", "is_log"),
    [
        ([0.08, 0.96], None, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), False),
        ([0.3, 0.42], 0.0, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), False),
        ([-0.035, 0.011], None, (-0.04, -0.03, -0.02, -0.01, 0.0, 0.01, 0.02), False),
        ([0.0, 0.0], 0.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), False),
        ([4.0], None, (2.0, 3.0, 4.0, 5.0, 6.0), False),
        ([3.0, 3.5, 4.0, 5.0, 900.0], None, (1.0, 10.0, 100.0, 1000.0), True),
    ],
)
def test_an_axis_has_round_ends_and_turns_logarithmic_for_a_wide_range(values, floor, ticks, is_log):
    axis = axis_for(values, floor)
    assert axis.ticks == pytest.approx(ticks)
    assert (axis.low, axis.high, axis.is_log) == (pytest.approx(ticks[0]), pytest.approx(ticks[-1]), is_log)
    assert axis.share(axis.low) == 0
    assert axis.share(axis.high) == pytest.approx(1)
    assert all(0 <= axis.share(value) <= 1 for value in values)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.26e-5, "1.3e-5"),
        (3e-4, "3e-4"),
        (0.12345, "0.123"),
        (-0.5, "-0.5"),
        (12.345, "12.3"),
        (1234.6, "1235"),
        (20_512.0, "20.5k"),
        (100_000, "100k"),
        (2.5e6, "2.5M"),
        (1e10, "10G"),
    ],
)
def test_numbers_are_short(value, text):
    assert short_number(value) == text
