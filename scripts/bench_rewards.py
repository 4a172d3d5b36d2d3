"""The load of a device that rewards: the time of all parts together against the larger of device and host.

    python scripts/bench_rewards.py --encoder FOLDER [--texts 256] [--tokens 128] [--repeats 7]

Device time is that of the model reward alone, from texts that are tokenised already; host time is that of the
other parts and of the tokenisation. Together they should take no longer than the larger one: the ratio is 1
where the overlap is perfect, and (device + host) / max(device, host) where there is none. On a CPU the device
gets one core, the host the other. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from hybrid_jax.rewards import model_based
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.overlap import Bleu, Rouge
from hybrid_jax.rewards.similarity import CosineSimilarity
from hybrid_jax.runs.identity import environment

STORY = (
    "the film is a slow and quiet story about two people who meet on a train and talk all night of love music "
    "work death and the small things that nobody else would ever notice while outside rain falls on fields"
)


def texts(count: int, words: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(STORY.split(), words)) for _ in range(count)]


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, help="folder of a sentence encoder")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # the threads that XLA makes when it is first used stay there

    prompts = ["" for _ in range(options.texts)]
    responses = texts(options.texts, options.tokens - 2, 0)  # a token a word, and two special ones
    columns = {"references": [[text] for text in texts(options.texts, options.tokens - 2, 1)]}
    model = Part(CosineSimilarity(options.encoder))
    host = {"bleu": Part(Bleu()), "rouge": Part(Rouge())}
    both = CompositeReward({"similarity": model, **host})
    on_host, on_device = CompositeReward(host), CompositeReward({"similarity": model})

    encoder = model_based.text_encoder(options.encoder)
    tokenise = lambda: [list(encoder.rows(t)) for t in (responses, [r[0] for r in columns["references"]])]  # noqa: E731

    def run(reward: CompositeReward) -> Callable[[], object]:
        return lambda: reward.raw(prompts, responses, columns)

    run(both)()  # compiles
    if jax.default_backend() == "cpu":
        os.sched_setaffinity(0, cores[1:2])  # this thread leaves the core to them
    found = {"together": [], "host": [], "device": []}
    for _ in range(options.repeats):
        tokens = seconds(tokenise)
        found["together"].append(seconds(run(both)))
        found["host"].append(seconds(run(on_host)) + tokens)
        found["device"].append(seconds(run(on_device)) - tokens)
    ratios = [t / max(h, d) for t, h, d in zip(*found.values(), strict=True)]
    none = [(h + d) / max(h, d) for _, h, d in zip(*found.values(), strict=True)]
    result = {
        **{f"{name}_seconds": round(statistics.median(values), 4) for name, values in found.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_without_overlap": round(statistics.median(none), 3),
        **vars(options),
        "encoder": f"{encoder.model.config.num_layers} layers, width {encoder.model.config.width}",
        "device": jax.devices()[0].device_kind,
        "commit": environment()["commit"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
