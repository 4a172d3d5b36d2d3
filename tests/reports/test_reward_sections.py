"""The report on rewards: planted curves that are suspicious, curves that are not, and what the page shows."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hybrid_jax.reports.charts import Band, Panel, Series, draw
from hybrid_jax.reports.flags import GAMING, WEAKNESS, find_flags, trend
from hybrid_jax.reports.glossary import glossary_entry
from hybrid_jax.reports.report import write_report
from hybrid_jax.reports.rewarded import Rewarded, rewarded_phases
from hybrid_jax.reports.run import Run

HOSTILE = [
    "<script>alert(1)</script>",
    "</summary></details><img src=x onerror=alert(2)>",
    '" onclick="x',
    "{{body}}",
]
FIRST_PPO = 10


def evaluations(since: int = FIRST_PPO, every: int = 10, **curves: list[float]) -> list[dict]:
    """Evaluation records with ``evaluation/<name>``, ``__`` in a name for a slash."""
    length = max(map(len, curves.values()))
    records = [{"step": since + every * i, "phase": "evaluation", "seconds": 1.0} for i in range(length)]
    for name, values in curves.items():
        for record, value in zip(records, values, strict=False):
            record["evaluation/" + name.replace("__", "/")] = value
    return records


def ppo(count: int = 20, **metrics) -> list[dict]:
    """PPO records with ``ppo/reward/<name>``: a number, or a function of the number of the step."""
    records = []
    for i in range(count):
        record = {"step": FIRST_PPO + i, "phase": "ppo", "seconds": 1.0, "ppo/score": 0.5}
        record |= {f"ppo/reward/{name}": m(i) if callable(m) else m for name, m in metrics.items()}
        records.append(record)
    return records


def run(*records: list[dict], config: dict | None = None) -> Rewarded:
    """The one phase of a planted run that learns from a reward."""
    joined = sorted((r for some in records for r in some), key=lambda record: record["step"])
    (phase,) = rewarded_phases(Run("planted", joined, [], [], config or {}, {}))
    return phase


def only(rule: str, planted: Rewarded) -> str:
    """The one sentence of a rule, and of no other."""
    flags = find_flags(planted)
    assert rule in flags.looked_at
    (sentence,) = (*flags.gaming, *flags.weakness)
    assert {**GAMING, **WEAKNESS}[rule](planted) == [sentence]
    assert (rule in GAMING) == (sentence in flags.gaming)
    return sentence


def found(flags) -> list[str]:
    return [*flags.gaming, *flags.weakness]


def line(start: float, end: float, count: int = 9, wobble: float = 0.0) -> list[float]:
    return [start + (end - start) * i / (count - 1) + wobble * (-1) ** i for i in range(count)]


# --- trends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "direction"),
    [
        ([0.0, 1.0, 2.0], 1),  # a straight line has no noise
        ([2.0, 1.0, 0.0], -1),
        ([0.4, 0.6, 0.75], 1),  # it levels off: σ = 0.05 / √6, least 6 √2 σ = 0.173 < 0.35
        ([0.4, 0.6, 0.7], 0),  # σ = 0.1 / √6, least 0.346 > 0.3
        ([0.4, 0.6, 0.7, 0.75], 1),  # σ² = (0.01 + 0.0025) / 12, least 4 √2 σ = 0.183
        ([100.0, 100.2, 100.4], 0),  # below 1 % of the size
        ([-5.0, -4.0, -3.0], 1),
        (line(0.5, 0.5, 12, wobble=0.1), 0),
        (line(0.2, 0.9, 12, wobble=0.05), 1),
    ],
)
def test_a_curve_rose_or_fell_only_beyond_its_noise(values, direction):
    assert trend(values).direction == direction


def test_a_trend_compares_the_outer_thirds_and_needs_three_points():
    found = trend([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert (found.before, found.after) == (1.5, 6.5)
    assert trend([1.0, 2.0]) is None


@pytest.mark.parametrize("count", [3, 4, 6, 9, 30])
def test_pure_noise_is_seldom_called_a_trend_and_a_steep_slope_nearly_always(count):
    source = random.Random(count)
    noise = [trend([source.gauss(0, 1) for _ in range(count)]).direction for _ in range(1000)]
    assert max(noise.count(1), noise.count(-1)) < (75 if count == 3 else 50)  # σ of three points is a guess
    steep = [trend([i * 6 / count + source.gauss(0, 0.3) for i in range(count)]).direction for _ in range(1000)]
    assert -1 not in steep
    assert count < 6 or steep.count(1) > 950


# --- rules -----------------------------------------------------------------------------------------------


def test_a_judge_that_falls_while_the_score_rises_is_told():
    planted = run(
        ppo(), evaluations(score=line(0.3, 0.7), judge__taste=line(0.5, 0.1), judge__style=line(0.5, 0.6))
    )
    assert only("score against judges", planted) == (
        "The held-out score rose from 0.35 to 0.65 while the judge taste, on which nothing is trained, "
        "fell from 0.45 to 0.15."
    )


@pytest.mark.parametrize(
    ("score", "judge"),
    [
        (line(0.3, 0.7), line(0.1, 0.5)),  # both rise
        (line(0.7, 0.3), line(0.5, 0.1)),  # both fall: a bad run, but no game
        (line(0.3, 0.7), line(0.50, 0.49, wobble=0.1)),  # the judge only wobbles
        (line(0.5, 0.5, wobble=0.1), line(0.5, 0.1)),
    ],
)
def test_a_judge_that_agrees_or_only_wobbles_is_not_told(score, judge):
    assert found(find_flags(run(ppo(), evaluations(score=score, judge__taste=judge)))) == []


def test_what_happened_before_ppo_counts_for_nothing():
    before = evaluations(0, 1, score=line(0.1, 0.3), judge__taste=line(0.9, 0.5))
    after = evaluations(score=line(0.3, 0.7), judge__taste=line(0.5, 0.6))
    assert found(find_flags(run(before, ppo(), after))) == []


def test_a_score_that_rises_by_length_alone_is_told():
    # At 20 tokens the score would be 0.3 + 0.4 t - 0.02 * 25 t = 0.3 - 0.1 t, with t from 0 to 1.
    curves = {"score": line(0.3, 0.7), "response_length": line(20, 45), "score_length_slope": [0.02] * 9}
    sentences = GAMING["score at equal length"](run(ppo(), evaluations(**curves)))
    assert sentences == [
        "The held-out score rose from 0.35 to 0.65, but at the length that responses had before it "
        "(20 tokens) it would have fallen from 0.287 to 0.212: the gain is one of length."
    ]
    for change in (
        {"score_length_slope": [0.005] * 9},
        {"response_length": line(20, 25)},
        {"score": line(0.3, 1)},
    ):
        assert GAMING["score at equal length"](run(ppo(), evaluations(**{**curves, **change}))) == []


def test_parts_that_are_traded_for_each_other_are_told_from_the_held_out_values():
    planted = run(
        ppo(), evaluations(reward__a=line(0, 1), reward__b=line(1, 0), reward__c=line(1, 1, wobble=0.1))
    )
    assert only("parts against each other", planted) == (
        "Parts are traded: a rose from 0.125 to 0.875 while b fell from 0.875 to 0.125. Look at the weights."
    )
    assert found(find_flags(run(ppo(), evaluations(reward__a=line(0, 1), reward__b=line(0, 2))))) == []


def test_without_evaluations_the_parts_are_watched_in_training():
    planted = run(ppo(30, a=lambda i: i / 30, a_std=1.0, b=lambda i: -i / 30, b_std=1.0))
    assert "a rose from 0.15 to 0.817 while b fell from -0.15" in only("parts against each other", planted)


@pytest.mark.parametrize(
    "reward",
    [
        {"parts": {"b": {"weight": -0.5}}},
        {"parts": {"b": {"weight": 1.0}}, "combine": {"name": "lagrangian", "limits": {"b": {"at_most": 0.1}}}},
    ],
)
def test_a_penalty_is_wanted_to_fall(reward):
    config = {"phases": {"ppo": {"reward": reward}}}
    fell, rose = (evaluations(reward__a=line(0, 1), reward__b=b) for b in (line(1, 0), line(0, 1)))
    assert found(find_flags(run(ppo(), fell, config=config))) == []
    assert "a rose from 0.125 to 0.875 while b rose from" in only(
        "parts against each other", run(ppo(), rose, config=config)
    )


def test_a_part_that_is_clipped_in_most_rows_of_the_last_steps_is_told():
    def clipped(late: float):
        return run(ppo(20, a=0.1, a_std=1.0, a_clip_fraction=lambda i: late if i >= 18 else 0.9))

    assert only("clipped parts", clipped(0.51)).startswith(
        "a was clipped in 51 % of the rows over the last tenth"
    )
    assert found(find_flags(clipped(0.5))) == []


def test_a_part_that_is_the_same_for_all_is_told():
    assert only("constant parts", run(ppo(20, a=3.0, a_std=0.0))) == (
        "a gives no signal: in all of training every response got 3."
    )
    assert only("constant parts", run(ppo(20, a=3e9, a_std=0.5))).startswith("a gives no signal")
    late = ppo(20, a=3.0, a_std=lambda i: float(i < 18))
    assert only("constant parts", run(late)) == (
        "a gave all responses of a rollout the same over the last tenth of the ppo steps: "
        "it no longer teaches anything."
    )
    assert found(find_flags(run(ppo(20, a=3.0, a_std=lambda i: float(i == 19))))) == []


@pytest.mark.parametrize(("end", "count"), [(62.0, 1), (30.0, 0), (5.0, 0)])
def test_responses_that_grow_are_told(end, count):
    found = find_flags(run(ppo(), evaluations(response_length=line(20, end)))).gaming
    assert len(found) == count
    assert not found or found == ["Responses grew from 25.2 to 56.8 tokens, 2.2 times as long."]


@pytest.mark.parametrize("name", ["score~response_length", "response_length~score"])
def test_a_score_that_goes_with_length_is_told(name):
    def planted(late: float) -> Rewarded:
        return run(ppo(20, **{"a": 0.1, "a_std": 1.0, name: lambda i: late if i >= 18 else 0.0}))

    assert only("score with length", planted(0.71)).startswith(
        "Longer responses score higher: the correlation is 0.71 over"
    )
    assert only("score with length", planted(-0.9)).startswith(
        "Shorter responses score higher: the correlation is -0.9"
    )
    assert found(find_flags(planted(0.7))) == []


@pytest.mark.parametrize("kind", ["gate", "bandit"])
def test_weights_that_come_down_to_one_part_are_told(kind):
    def planted(entropy: float) -> Rewarded:
        return run(ppo(20, a=0.1, a_std=1.0, b=0.1, b_std=1.0, **{f"{kind}_entropy": entropy}))

    assert "have come down to 1.11 of 2 parts (entropy 0.1 nats)" in only(
        "entropy of the weights", planted(0.1)
    )
    assert found(find_flags(planted(0.2))) == []
    assert found(find_flags(planted(math.log(2)))) == []


def test_rules_without_numbers_say_so_and_a_run_without_ppo_has_none():
    flags = find_flags(run(ppo(), evaluations(score=line(0.3, 0.7))))
    assert (found(flags), flags.looked_at) == ([], [])
    assert set(flags.not_looked_at) == set(GAMING) | set(WEAKNESS)
    sft = [{"step": 0, "phase": "sft", "seconds": 0.0, "sft/loss": 1.0}]
    grown = evaluations(response_length=line(20, 90))
    assert find_flags(run(sft, grown)).looked_at == []
    flags = find_flags(run(ppo(), grown, evaluations(judge__taste=[0.1, 0.2])))
    assert flags.looked_at == ["growing responses"]


# --- the page --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with attributes, and texts by the section they are in."""

    def __init__(self, run_dir: Path, metrics: list[dict], samples: list[dict] | None = None):
        super().__init__()
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
        (run_dir / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in samples or []))
        self.html = write_report(run_dir).read_text()
        self.tags: list[tuple[str, dict]] = []
        self.sections: dict[str, str] = {}
        self._section, self._tag = "", ""
        self.feed(self.html)
        self.close()
        self.sections = {name: " ".join(text.split()) for name, text in self.sections.items()}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._tag = tag

    def handle_data(self, data):
        if self._tag == "h2" and data.strip():
            self._section, self._tag = data, ""
        self.sections[self._section] = self.sections.get(self._section, "") + " " + data


def described(part: str) -> dict:
    endings = {
        "": 0.5,
        "_std": 0.2,
        "_p10": 0.1,
        "_p50": 0.45,
        "_p90": 0.9,
        "_clip_fraction": 0.25,
        "_weight": 0.6,
    }
    return {part + ending: value for ending, value in endings.items()}


def extreme(step: int, part: str, rank: str, response: str, prompt: str = "Why?", value: float = 0.25) -> dict:
    record = {"step": step, "phase": "evaluation", "split": "held_out", "index": 0, "prompt": prompt}
    record |= {"response": response, "score": 0.75, "parts": {part: value}}
    return record | {"extreme": {"part": part, "rank": rank}}


def shown(step: int, response: str) -> dict:
    return {k: v for k, v in extreme(step, "a", "best", response).items() if k != "extreme"}


def test_the_section_shows_each_part_the_combination_and_correlations_and_nothing_twice(tmp_path):
    more = {
        "bandit_entropy": 0.69,
        "bandit_arm": 1.0,
        "a_probability": 0.5,
        "b_probability": 0.5,
        "a_cost": 7.5,
    }
    pairs = {
        "a~b": -0.25,
        "a~score": 0.5,
        "a~response_length": 0.125,
        "b~score": 0.875,
        "b~response_length": 0.0,
        "score~response_length": 0.3,
    }
    metrics = ppo(20, **described("a"), **described("b"), **more, **pairs)
    metrics += evaluations(score=[0.5] * 3, reward__a=[0.5] * 3, reward__b=[0.5] * 3, judge__taste=[0.25] * 3)
    page = Page(tmp_path, metrics)
    assert list(page.sections)[1:] == [
        "Progress",
        "Rewards",
        "Particulars",
    ]  # nothing is left for "More metrics"
    rewards = page.sections["Rewards"]
    legend = "training 0.5 held-out 0.5 median 0.45 10–90 % 0.1 to 0.9"
    assert f"a {legend}" in rewards
    assert f"b {legend}" in rewards
    assert "Judge: taste held-out 0.25" in rewards
    assert "Weights a 0.6 b 0.6" in rewards
    assert "The bandit's chances a 0.5 b 0.5" in rewards
    assert "Clipped rows a 0.25 b 0.25" in rewards
    assert "A cost ppo 7.5" in rewards
    assert (
        "Correlations a b score b −0.25 score +0.50 +0.88 response length +0.12 +0.00 +0.30 Over the responses"
    ) in rewards
    cells = [(found["class"], found["style"]) for tag, found in page.tags if tag == "td" and "style" in found]
    assert cells[0] == ("blue", "--share:14%")  # of 55 % at ±1, below 0 in another colour
    assert cells[1:] == [("orange", f"--share:{share}%") for share in (28, 48, 7, 0, 16)]
    titles = re.findall("<h3>(.*?)</h3>", page.html)[1:]  # after the score
    assert titles == [
        "Nothing suspicious",
        *("a", "b", "Judge: taste", "Weights", "The bandit&#x27;s chances", "Spread within a rollout"),
        *("Clipped rows", "A cost", "Correlations"),
    ]
    assert (
        "Nothing suspicious Looked at: score against judges, parts against each other, score with length, "
        "clipped parts, constant parts, entropy of the weights." in rewards
    )
    assert "Without numbers to look at: score at equal length, growing responses." in rewards
    assert page.html.count('class="area blue"') == 2


def test_signs_are_told_in_the_section_and_at_the_top(tmp_path):
    metrics = [
        *ppo(),
        *evaluations(score=line(0.3, 0.7), judge__taste=line(0.5, 0.1), response_length=line(10, 40)),
    ]
    page = Page(tmp_path, metrics)
    assert "2 signs of reward hacking: see Rewards." in page.html
    assert "Signs of reward hacking The held-out score rose from 0.35 to 0.65 while" in page.sections["Rewards"]
    assert "Nothing suspicious" not in page.html


def by_prompt(step: int, **values: list[float]) -> dict:
    """An evaluation whose means are those of ``values``, by prompt."""
    named = {"evaluation/" + name.replace("__", "/"): found for name, found in values.items()}
    means = {name: sum(found) / len(found) for name, found in named.items()}
    return {"step": step, "phase": "evaluation", "seconds": 1.0, **means, "by_prompt": named}


def test_a_run_without_signal_says_so_and_is_not_said_to_be_gamed(tmp_path):
    metrics = [
        by_prompt(10, score=[0.0] * 9, reward__a=[0.0] * 9),
        *ppo(20, **{**described("a"), "a": 0.0, "a_std": 0.0}),
        *evaluations(20, response_length=line(10, 40)),
        by_prompt(30, score=[0.0] * 9, reward__a=[0.0] * 9),
    ]
    page = Page(tmp_path, metrics)
    assert (
        "The reward gave no signal: in each rollout all responses scored the same, so there was nothing to "
        "learn from it. Training with reward left the held-out score at <b>0.000</b>: no prompt scored "
        "differently."
    ) in page.html
    assert "reward hacking" not in page.html
    assert (
        "Little or no signal a gives no signal: in all of training every response got 0."
        in page.sections["Rewards"]
    )
    assert "a 0 0 0 0 to 0 no signal in training" in page.sections["Rewards"]


def test_a_part_without_signal_is_named_at_the_top_beside_one_that_has_some(tmp_path):
    metrics = ppo(20, **{**described("a"), "a_std": 0.0}, **described("b"))
    page = Page(tmp_path, metrics + evaluations(score=[0.5, 0.5]))
    assert "No signal in training from a: see Rewards." in page.html
    assert "The reward gave no signal" not in page.html
    assert "reward hacking" not in page.html


def test_parts_and_judges_have_an_interval_of_their_change(tmp_path):
    rise = [0.1 * i for i in range(10)]
    before = by_prompt(10, score=[0.0] * 10, reward__a=[0.5] * 10, judge__taste=[1.0] * 10)
    # a differs by 0.1 in four prompts and by -0.3 in one: s² = 0.129 / 9, 2.2622 s / √10 = 0.0856
    after = by_prompt(30, score=rise, reward__a=[0.5] * 5 + [0.6] * 4 + [0.2], judge__taste=[0.9] * 9 + [0.8])
    page = Page(tmp_path, [before, *ppo(20, **described("a")), after])
    assert (
        "Held-out change before reward at the end difference 95 % interval "
        "score 0 0.45 +0.45 +0.233 to +0.667 up "
        "a 0.5 0.51 +0.01 −0.0756 to +0.0956 within chance "
        "judge: taste 1 0.89 −0.11 −0.133 to −0.0874 down "
        "The 95 % interval of the mean difference over the same 10 held-out prompts, paired t."
    ) in page.sections["Rewards"]


def test_the_best_and_worst_answers_of_the_last_evaluation_are_folded_by_part(tmp_path):
    samples = [shown(10, "steady before"), shown(20, "steady after")]
    samples += [extreme(10, "a", "best", "an older one")]
    samples += [extreme(20, "a", rank, f"{rank} {i}") for rank in ("best", "worst") for i in range(3)]
    samples += [extreme(20, "taste", "worst", " ", value=-0.5), shown(20, "unmarked") | {"extreme": None}]
    metrics = [*ppo(), *evaluations(score=[0.5, 0.6], judge__taste=[0.1, 0.2], reward__a=[0.1, 0.2])]
    page = Page(tmp_path, metrics, samples)
    assert page.sections["Rewards"].endswith(
        "Best and worst answers at step 20 "
        "a Best · score 0.75 0.25 Why? best 0 Best · score 0.75 0.25 Why? best 1 "
        "Worst · score 0.75 0.25 Why? worst 0 Worst · score 0.75 0.25 Why? worst 1 "
        "Judge: taste Worst · score 0.75 -0.50 Why? empty response"
    )
    assert "older" not in page.html
    samples_section = page.sections["Samples"]
    assert "steady before" in samples_section
    assert "steady after" in samples_section
    assert not re.search(r"best \d|worst \d|unmarked", samples_section)


def test_what_a_model_writes_and_a_part_is_called_is_never_interpreted(tmp_path):
    samples = [extreme(20, text, "best", text, prompt=text) for text in HOSTILE]
    names = {f"{a}~{b}": 0.5 for a in HOSTILE for b in HOSTILE if a < b}
    rows = {name: value for text in HOSTILE for name, value in described(text).items()}
    metrics = ppo(20, **rows, **names, **{f"{HOSTILE[0]}_excess": 0.9})
    metrics += evaluations(score=line(0.1, 0.9), **{f"judge__{text}": line(0.9, 0.1) for text in HOSTILE})
    page = Page(tmp_path, metrics, samples)
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "iframe")] == ["script"] * 2
    attributes = {name for _, found in page.tags for name in found}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    for text in HOSTILE:
        assert page.sections["Rewards"].count(text[:39]) >= 8  # flags, charts, table, answers


@pytest.mark.parametrize(
    ("metrics", "has_rewards"),
    [
        (ppo(5, coverage=0.5, length=-1.0) + evaluations(score=[0.1, 0.2], reward__coverage=[0.1, 0.2]), True),
        (ppo(5) + evaluations(score=[0.1, 0.2]), False),  # rewards on the device log no parts
        ([{"step": 0, "phase": "sft", "seconds": 0.0, "sft/loss": 1.0}], False),
    ],
)
def test_old_runs_and_runs_without_parts_give_a_page(tmp_path, metrics, has_rewards):
    page = Page(tmp_path, metrics)
    assert ("Rewards" in page.sections) == has_rewards
    assert "More metrics" not in page.sections
    if has_rewards:
        assert "coverage training 0.5 held-out 0.2" in page.sections["Rewards"]
        assert "length training -1" in page.sections["Rewards"]
        assert "Correlations" not in page.html
        assert "Best and worst" not in page.html


def test_a_band_is_filled_between_its_curves():
    low, high = Series("", "ppo", [0, 2, 4], [0.0, None, 5.0]), Series("", "ppo", [0, 2, 4], [5.0, None, 10.0])
    mean = Series("mean", "ppo", [0, 2, 4], [2.0, 3.0, 4.0])
    drawing, data = draw([Panel([mean], band=Band("10–90 %", low, high))], [], end=4)
    assert 'class="area ppo" d="M0.0 100.00L1000.0 50.00L1000.0 0.00L0.0 50.00Z"' in drawing
    assert '<span class="key area ppo"><i></i>10–90 % <b>5</b> to <b>10</b></span>' in drawing
    assert [series["y"] for series in data[0]["series"]] == [[2, 3, 4], [0, None, 5], [5, None, 10]]
    assert drawing.count("<b>") == len(data[0]["series"])  # the hover fills them in this order


@pytest.mark.parametrize(
    ("metric", "start"),
    [
        ("ppo/reward/a_p90", "A tenth of the responses earn more"),
        ("ppo/reward/a_clip_fraction", "Share of rows"),
        ("ppo/clip_fraction", "Share of tokens"),
        ("ppo/reward/gate_entropy", "Entropy of the gate's weights"),
        ("ppo/reward/a~response_length", "Correlation over a rollout"),
        ("ppo/reward/a", "One part of the score"),
        ("evaluation/judge/taste", "A held-out judge"),
        ("evaluation/score_length_slope", "How much the held-out score"),
    ],
)
def test_the_glossary_knows_the_metrics_of_rewards(metric, start):
    assert glossary_entry(metric.partition("/")[2])[0].startswith(start)
