"""A report goes by what phases do, whatever they are called: their kinds and the metrics that they log."""

import json
import re
from pathlib import Path

import pytest

from hybrid_jax.reports.report import write_report

OTHER_NAMES = {"sft": "teach", "ppo": "rl"}


def step(number: int, phase: str, kind: str | None = None, **metrics: float) -> dict:
    """A record of ``phase``; ``__`` in the name of a metric stands for a slash."""
    record = {"step": number, "phase": phase, "seconds": 2.0 * number, f"{phase}/seconds": 2.0}
    record |= {} if kind is None else {"kind": kind}
    return record | {f"{phase}/{name.replace('__', '/')}": value for name, value in metrics.items()}


def learnt_by_example(number: int, phase: str = "sft", kind: str | None = "sft") -> dict:
    times = {"input_seconds": 0.5, "update_seconds": 1.5, "tokens_per_second": 900.0}
    return step(number, phase, kind, loss=2.0 / (number + 1), learning_rate=1e-3, grad_norm=1.0, **times)


def learnt_by_reward(number: int, phase: str = "ppo", kind: str | None = "ppo") -> dict:
    """A step that earns the more the longer the responses are, with one part that says nothing."""
    numbers = {"score": 0.1 * number, "score_std": 0.3, "kl": 0.5 * number, "kl_coef": 0.05, "entropy": 2.0}
    numbers |= {"policy_loss": -0.1, "value_loss": 0.2, "response_length": 10.0 + number, "learning_rate": 1e-3}
    numbers |= {"shaped_score": 0.05 * number, "penalty": 0.01, "rollout_seconds": 1.0, "update_seconds": 1.0}
    for part, spread in {"tone": 0.2, "constant": 0.0}.items():
        distribution = {"": 0.5, "_std": spread, "_p10": 0.2, "_p50": 0.5, "_p90": 0.8, "_clip_fraction": 0.9}
        numbers |= {f"reward__{part}{ending}": value for ending, value in distribution.items()}
    numbers |= {"reward__tone~score": 0.75, "reward__score~response_length": 0.95}
    return step(number, phase, kind, **numbers)


def evaluated(number: int) -> dict:
    score = 0.1 * number
    numbers = {"score": score, "score_std": 0.1, "reward/tone": score, "reward/constant": 0.5, "loss": 2.0}
    numbers |= {"judge/taste": 1.0 - score, "response_length": 10.0 + number, "score_length_slope": 0.01}
    record = {"step": number, "phase": "evaluation", "kind": "evaluation", "seconds": 2.0 * number}
    record |= {f"evaluation/{name}": value for name, value in numbers.items()}
    scores = [score + 0.01 * i for i in range(9)]
    return record | {"by_prompt": {"evaluation/score": scores, "evaluation/reward/tone": scores}}


def sampled(number: int) -> dict:
    record = {"step": number, "phase": "evaluation", "kind": "evaluation", "split": "held_out", "index": 0}
    record |= {"prompt": "Why?", "response": f"since {number}", "score": 0.5, "parts": {"tone": 0.5}}
    return record


def write(folder: Path, records: list[dict], config: dict | None = None) -> str:
    """The HTML of a planted run's report."""
    folder.mkdir()
    samples = [sampled(record["step"]) for record in records if record["phase"] == "evaluation"]
    samples += [samples[-1] | {"extreme": {"part": "tone", "rank": rank}} for rank in ("best", "worst")]
    for name, rows in {"metrics.jsonl": records, "samples.jsonl": samples}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps(config or {}))  # JSON is YAML
    return write_report(folder).read_text()


def text_of(page: str) -> str:
    body = page.partition("</style>")[2].partition("<script")[0]
    return " ".join(re.sub("<[^>]+>", " ", body).split())


def config_of(sft: str, ppo: str) -> dict:
    reward = {"parts": {"tone": {"weight": 1.0}, "constant": {"weight": 1.0}}}
    phases = {sft: {"name": "sft", "batch_size": 4}, ppo: {"name": "ppo", "reward": reward}}
    return {"model": {"name": "decoder"}, "phases": phases}


def one_of_each(sft: str, ppo: str, has_kind: bool = True) -> list[dict]:
    kinds = ("sft", "ppo") if has_kind else (None, None)
    learnt = [learnt_by_example(i, sft, kinds[0]) for i in range(4)]
    learnt += [learnt_by_reward(i, ppo, kinds[1]) for i in range(4, 24)]
    return [evaluated(0), *learnt[:4], evaluated(4), *learnt[4:14], evaluated(14), *learnt[14:], evaluated(24)]


@pytest.mark.parametrize("has_kind", [True, False], ids=["records of now", "records of older versions"])
def test_a_run_whose_phases_have_other_names_gives_the_same_page(tmp_path, has_kind):
    usual = write(tmp_path / "usual", one_of_each("sft", "ppo", has_kind), config_of("sft", "ppo"))
    renamed = write(tmp_path / "other", one_of_each("teach", "rl", has_kind), config_of("teach", "rl"))
    for kind, name in OTHER_NAMES.items():
        renamed = renamed.replace(f"{name} ({kind})", kind)  # where both are told
        renamed = re.sub(rf"\b{name}\b", kind, renamed)
    assert renamed.replace("<h1>other", "<h1>usual").replace("<title>other", "<title>usual") == usual
    text = text_of(usual)
    for told in (
        "Training with reward raised the held-out score from 0.400 (sft alone, step 4) to 2.400 at step 24",
        "3 signs of reward hacking: see Rewards.",
        "No signal in training from constant: see Rewards.",
        "KL to the reference 11.5 nats",
        "Longer responses score higher: the correlation is 0.95 over the last tenth of the ppo steps.",
        "constant gives no signal: in all of training every response got 0.5.",
        "tone 0.4 2.4 +2 +2 to +2 up",
        "score +0.75 response length +0.95",
        "sft only · step 4",
        "Best and worst answers at step 24",
        "A step of ppo, on average: 2 s rollout 1 s 50 % update 1 s 50 %",
    ):
        assert told in text


def test_two_phases_of_one_kind_have_tiles_lines_and_sections_of_their_own(tmp_path):
    records = [learnt_by_example(0), evaluated(0)]
    for number in range(1, 21):
        phase, part = [("polite", "tone"), ("short", "brief")][number % 2]
        record = learnt_by_reward(number, phase)
        records.append({name.replace("tone", part): value for name, value in record.items()})
    phases = config_of("sft", "polite")["phases"] | {
        "short": {"name": "ppo", "reward": {"parts": {"brief": {}}}}
    }
    of_short = {"evaluation/short/score": 0.25, "evaluation/short/reward/brief": -1.5}
    page = write(tmp_path / "two", [*records, evaluated(21) | of_short], {"phases": phases})
    text = text_of(page)
    assert re.findall("<h2>(.*?)</h2>", page) == [
        *("Progress", "Samples", "Rewards of short (ppo)", "Rewards of polite (ppo)"),
        *("Training", "Speed and memory", "Particulars"),
    ]
    assert "Steps 21 1 sft · 10 short (ppo) · 10 polite (ppo)" in text
    assert "2 signs of reward hacking: see Rewards of short (ppo)." in text
    assert "No signal in training from constant: see Rewards of polite (ppo)." in text
    assert "KL to the reference of short 9.5 nats" in text
    assert "KL to the reference of polite 10 nats" in text
    assert "Held-out score of short 0.250 at the end" in text
    assert "Held-out score 2.100 0.000 before the reward" in text
    # A line for each in the charts of what both log, each in its own colour.
    assert "Score short (ppo) 1.9 polite (ppo) 2 held-out 2.1" in text
    assert (
        "KL to the reference short (ppo) 9.5 polite (ppo) 10 0 2 4 6 8 10 short (ppo) 0.05 polite (ppo) 0.05"
        in text
    )
    assert "Learning rate sft 0.001 short (ppo) 0.001 polite (ppo) 0.001" in text
    assert '<span class="key orange"><i></i>short (ppo)' in page
    assert '<span class="key pink"><i></i>polite (ppo)' in page
    assert "A step of short (ppo), on average" in text
    assert "A step of polite (ppo), on average" in text
    short, polite = page.split("<h2>Rewards of ")[1:]
    assert "brief" in short
    assert "tone" not in short
    assert "over the last tenth of the short steps" in short
    assert "brief" not in polite.partition("<h2>")[0]
    assert "Judge: taste" in polite
    assert "Held-out change" in polite


def test_a_run_that_trains_a_classifier_too_shows_all_three(tmp_path):
    label = [step(i, "labels", "classifier", loss=0.6, accuracy=0.75, learning_rate=1e-3) for i in (25, 26)]
    heads = {"evaluation/labels/accuracy": 0.7, "evaluation/labels/loss": 0.65, "evaluation/labels/brier": 0.2}
    last = evaluated(27) | heads | {"evaluation/perplexity": 7.4}
    page = write(tmp_path / "all", [*one_of_each("sft", "ppo"), *label, last], config_of("sft", "ppo"))
    text = text_of(page)
    assert "Held-out accuracy of labels 70.0% at the end" in text
    assert "Loss: sft training 0.5 held-out 2 " in text
    assert "Loss: labels (classifier) training 0.6 held-out 0.65 " in text
    assert "Brier held-out 0.2 " in text
    glossary = dict(re.findall("<dt><code>(.*?)</code></dt><dd>(.*?) <span>", page))
    assert glossary["sft/loss"] == glossary["evaluation/loss"]
    assert glossary["sft/loss"].startswith("Mean negative log-likelihood of the target tokens")
    assert glossary["labels/loss"].startswith("Cross-entropy of the labels")
    assert glossary["evaluation/labels/loss"] == glossary["labels/loss"]
    assert glossary["evaluation/labels/accuracy"].startswith("Share of the held-out texts")
    assert "Accuracy training 0.75 held-out 0.7" in text
    progress = page.partition("<h2>Progress</h2>")[2].partition("<section>")[0]
    assert re.findall("<h3>(.*?)</h3>", progress) == ["Score", "KL to the reference", "Accuracy", "Loss: sft"]


def test_more_phases_than_colours_are_told_apart_by_dashes(tmp_path):
    page = write(tmp_path / "six", [learnt_by_example(i, f"s{i}") for i in range(6)] + [evaluated(6)])
    colours = re.findall(r'<span class="key ([a-z ]+)"><i></i>s\d', page)
    assert set(colours) == {"blue", "orange", "pink", "brown", "blue dashed", "orange dashed"}


def test_a_probed_memory_has_its_charts_a_table_over_distance_and_maps_of_its_heads(tmp_path):
    def probed(number: int, gradient: float) -> dict:
        found = {"gradient_1": gradient, "recall_1": 0.9, "chance_1": 0.16, "last_token_1": 0.4}
        found["layer_0/gate"] = 0.7
        return step(number, "evaluation", **{f"memory/{name}": value for name, value in found.items()})

    def heads(number: int) -> dict:
        layer = {"write": [[[50, 0], [0, 20]]], "read": [[[0, 0], [100, 7]]]}
        where = {"step": number, "phase": "evaluation", "split": "held_out"}
        return {**where, "memory": {"read": ["<", " "], "layers": [layer]}}

    records = [probed(0, 0.25), learnt_by_example(0), probed(1, 0.125)]
    samples = "".join(json.dumps(heads(number)) + "\n" for number in (0, 1))
    write(run := tmp_path / "run", records)
    (run / "samples.jsonl").write_text(samples)
    page = write_report(run).read_text()
    text = text_of(page)
    for title in (
        "Gradient of the last loss, by distance in tokens",
        "Gates of layer 0",
        "Write head · step 1 · darkest 50 %",
    ):
        assert title in text
    charts = re.findall(r"<h3>(?:Gradient of|Recall,).*?</figure>", page, re.S)
    # The gradient falls from 0.25 to 0.125 on an axis from 0.1 to 1 in logarithms; recall stays at 0.9 of 1.
    heights = [re.findall(r'class="dots [a-z ]+" d="M0.0 ([0-9.]+)h0"', chart) for chart in charts]
    assert heights == [["60.21", "90.31"], ["10.00", "10.00", "60.00"]]
    assert [("log scale" in chart) for chart in charts] == [True, False]
    row = ("1", "0.25", "0.125", "0.9", "0.9", "0.4", "0.16")
    assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in page
    assert "gradient at first gradient at last recall at first recall at last from the last token alone" in text
    assert "The same share of the best guess from the last token alone." in text
    assert (
        page.count('<rect x="1" y="1" width="1" height="1" opacity="0.40"/>') == 2
    )  # of the first and the last
    assert page.count("<span>&lt;</span><span>␣</span>") == 4
    assert "Mean of each gate over tokens and channels." in text
