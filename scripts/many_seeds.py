"""Trains many seeds of one PPO experiment in one compiled program: `vmap` over seeds of a `scan` over steps.

    python scripts/many_seeds.py --config configs/many_seeds.yaml --seeds 8

The config has one phase, of PPO, and a reward on the device. Prints the mean score of every seed over time.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.experiment import Experiment, build, load_config
from hybrid_jax.parallel.devices import check_devices
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.training.state import TrainState


def check_config(config: Any) -> None:
    """Refuses what cannot be one program on the device.

    Raises:
        UserError: another phase than PPO runs, or a part of the reward reads texts on the host.
    """
    phases = {name: type(config.phases[name]) for name in config.scheduler.phases}
    if phases != {"ppo": PPO} or config.steps < 1:
        raise UserError(
            "many seeds are one program of PPO steps alone: the scheduler must choose ppo and nothing else, "
            f"for at least 1 step, got {', '.join(config.scheduler.phases)} for {config.steps} steps"
        )
    reward = config.phases["ppo"].reward
    if not reward.on_device:
        raise UserError(
            "many seeds are one program, so the reward must be on the device (token_count, token_length); "
            f"phases.ppo.reward has {', '.join(reward.parts)}: train one seed after the other with "
            "python -m hybrid_jax.train … seed=1"
        )


def train_seed(experiment: Experiment, prompts: tuple[jax.Array, jax.Array], seed: jax.Array):
    """A whole run as a pure function of its seed: returns the final state and the metrics of every step."""
    phase = experiment.phases["ppo"]
    functions, optimizer = phase.functions, phase.config.optimizer
    key = root_key(seed, Purpose.TRAINING)
    state = initial_state(experiment, root_key(seed, Purpose.MODEL))
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
    batches = [phase.rollouts.prompts.batch(step * rows, rows) for step in range(experiment.steps)]
    return jnp.stack([b.tokens for b in batches]), jnp.stack([b.mask for b in batches])


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/many_seeds.yaml", metavar="FILE")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="how many, from 0 on")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over those of the file")
    options = parser.parse_intermixed_args(arguments)
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    set_up_logging()
    check_devices()
    config = load_config(options.config, options.overrides)
    check_config(config)
    experiment = build(config)
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
    run_command(main)
