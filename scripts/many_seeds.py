"""Trains many seeds of one PPO experiment in one compiled program: `vmap` over seeds of a `scan` over steps.

    python scripts/many_seeds.py --config configs/many_seeds.yaml --seeds 8

The reward must be on the device. Prints the mean score of every seed over time.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.experiment import Experiment, build, load_config
from hybrid_jax.training.state import TrainState


def train_seed(experiment: Experiment, prompts: tuple[jax.Array, jax.Array], seed: jax.Array):
    """A whole run as a pure function of its seed: returns the final state and the metrics of every step."""
    phase = experiment.phases["ppo"]
    functions, optimizer = phase.functions, phase.config.optimizer
    init_key, key = jax.random.split(jax.random.key(seed))
    state = initial_state(experiment, init_key)
    references = {name: state.params["model"] for name in phase.config.references}

    def step(state: TrainState, inputs):
        number, (tokens, mask) = inputs
        rate = optimizer.rate(number, experiment.steps)
        return functions.iteration(state, references, tokens, mask, jax.random.fold_in(key, number), rate)

    return jax.lax.scan(step, state, (jnp.arange(experiment.steps), prompts))


def initial_state(experiment: Experiment, key: jax.Array) -> TrainState:
    phase = experiment.phases["ppo"]
    params = {"model": experiment.model.init(key)}
    added = phase.init(params, key)
    return TrainState(
        params={**params, **added.params}, opt_state={phase.optimizer_key: added.opt_state}, extra=added.extra
    )


def stacked_prompts(experiment: Experiment) -> tuple[jax.Array, jax.Array]:
    """The prompts of every step, [steps B P]."""
    phase = experiment.phases["ppo"]
    rows = phase.config.prompts_per_step
    batches = [phase.prompts.batch(step * rows, rows) for step in range(experiment.steps)]
    return jnp.stack([b.tokens for b in batches]), jnp.stack([b.mask for b in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/many_seeds.yaml")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    experiment = build(load_config(options.config, options.overrides))
    prompts = stacked_prompts(experiment)
    program = jax.jit(jax.vmap(lambda seed: train_seed(experiment, prompts, seed)))
    started = time.monotonic()
    _, metrics = jax.block_until_ready(program(jnp.arange(options.seeds)))
    score, kl = np.asarray(metrics["score"]), np.asarray(metrics["kl"])
    seconds = time.monotonic() - started
    print(f"{options.seeds} seeds × {experiment.steps} steps in {seconds:.1f} s, compiling included")
    print("seed " + "".join(f"{f'step {step}':>10}" for step in shown_steps(experiment.steps)) + "   final KL")
    for seed in range(options.seeds):
        row = "".join(f"{score[seed, step]:10.3f}" for step in shown_steps(experiment.steps))
        print(f"{seed:4d} {row} {kl[seed, -1]:10.3f}")


def shown_steps(steps: int) -> list[int]:
    return sorted({*range(0, steps, max(steps // 5, 1)), steps - 1})


if __name__ == "__main__":
    main()
