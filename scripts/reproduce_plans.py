"""Plans of the shipped TPU configs, and how an SFT update scales, as tables. Needs the extra tpu.

    python scripts/reproduce_plans.py scaling                  # 16, 256 and 1,024 chips, the same rows for each
    python scripts/reproduce_plans.py shipped [--only NAME]    # writes configs/tpu/NAME.plan.txt

Scaling: parameters lie in as many parts as there are chips (fsdp). Work and traffic of a chip should not grow,
and its part of the parameters should shrink as 1/chips. Without rematerialisation of layers the FLOPs are those
of the formula, but for the scores and the attention weights, which their gradients compute again.
"""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stdout
from pathlib import Path

from hybrid_jax import plan
from hybrid_jax.experiment import ExperimentConfig, load_config, plan_phases
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.flops import matmul_parameters, train_flops
from hybrid_jax.planning.step import compile_step, device_bytes
from hybrid_jax.planning.table import number, size
from hybrid_jax.planning.topology import find_topology

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "configs" / "models"
SLICES = ("v5p:2x2x4", "v5p:4x8x8", "v5p:8x8x16")
SHIPPED = {
    "llama31_8b": ("v5e:4x4", "llama-3.1-8b"),
    "llama31_8b_lora": ("v5e:2x4", "llama-3.1-8b"),
    "gemma2_2b": ("v5e:2x2", "gemma-2-2b"),
    "llama31_70b": ("v5p:4x4x4", "llama-3.1-70b"),
}


def scaling(config_file: Path, model: Path, rows: int, remat: str, slices: list[str]) -> None:
    """One line for each slice, with ratios to the first."""
    columns = ("slice", "chips", "parameters/chip", "× chips", "peak/chip", "FLOPs/chip", "ratio", "of formula")
    columns += ("of 6N + 12LTHC", "sent/chip", "ratio", "compile")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    first: dict[str, float] = {}
    for name in slices:
        topology = find_topology(name)
        chips = len(topology.devices)
        overrides = [
            f"model.path={model}",
            f"model.execution.remat={remat}",
            f"mesh.fsdp={chips}",
            "mesh.data=1",
        ]
        overrides += ["mesh.tensor=1", f"phases.sft.batch_size={rows * chips}"]
        config = load_config(config_file, overrides)
        # Rows of a PPO step must fit the mesh as well; nothing of that phase is compiled here.
        config = load_config(config_file, [*overrides, *_ppo_rows(config, rows * chips)])
        phases, state = plan_phases(config, topology.devices)
        (program,) = phases["sft"].programs(state)
        step = compile_step(program, topology.platform)
        if step.cost is None or step.memory is None:
            print(f"| {name} | {chips} | {step.problem} |")
            continue
        parameters = device_bytes((state.train.params["model"], state.base))
        flops, sent = step.cost.total.flops, step.cost.total.collective_bytes
        first = first or {"flops": flops, "sent": sent}
        decoder, length = config.model.build(None).config, config.phases["sft"].length
        needed = train_flops(decoder, program.tokens, length)
        whole = _with_hidden_half(decoder, program.tokens, length)
        cells = [
            *(name, f"{chips:,}", size(parameters), size(parameters * chips), size(step.memory.peak)),
            *(number(flops), f"{flops / first['flops']:.4f}", f"{flops * chips / needed:.4f}"),
            f"{flops * chips / whole:.4f}",
            *(size(sent), f"{sent / first['sent']:.3f}", f"{step.compile_seconds:.0f} s"),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def _with_hidden_half(decoder: DecoderConfig, tokens: int, length: int) -> float:
    """The formula of papers that count the attention above the diagonal too: 6·N + 12·L·T·H·C a token."""
    attention = 12 * decoder.num_layers * length * decoder.num_heads * decoder.channels
    return tokens * (6 * matmul_parameters(decoder) + attention)


def _ppo_rows(config: ExperimentConfig, rows: int) -> list[str]:
    """Overrides that give the PPO phases, if there are any, ``rows`` rows in each part of a minibatch."""
    overrides = []
    for name, phase in config.phases.items():
        if hasattr(phase, "prompts_per_step"):
            prompts = rows * phase.minibatches * phase.microbatches // phase.samples_per_prompt
            overrides.append(f"phases.{name}.prompts_per_step={prompts}")
    return overrides


def shipped(only: str | None) -> None:
    """The plan of each config, beside it."""
    for name, (topology, model) in SHIPPED.items():
        if only not in (None, name):
            continue
        arguments = ["--config", str(ROOT / "configs" / "tpu" / f"{name}.yaml"), "--topology", topology]
        out = io.StringIO()
        with redirect_stdout(out):
            plan.main([*arguments, f"model.path={MODELS / model}"])
        command = f"python -m hybrid_jax.plan --config configs/tpu/{name}.yaml --topology {topology}"
        text = f"$ {command} model.path=configs/models/{model}\n{out.getvalue()}"
        (ROOT / "configs" / "tpu" / f"{name}.plan.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {out.getvalue().splitlines()[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    scale = kinds.add_parser("scaling")
    scale.add_argument("--config", type=Path, default=ROOT / "configs" / "tpu" / "llama31_8b.yaml")
    scale.add_argument("--model", type=Path, default=MODELS / "llama-3.1-8b", help="a folder with config.json")
    scale.add_argument("--rows", type=int, default=2, help="a chip")
    scale.add_argument("--remat", default="none")
    scale.add_argument("--slices", nargs="+", default=list(SLICES))
    kinds.add_parser("shipped").add_argument("--only", choices=SHIPPED)
    options = parser.parse_args()
    if options.kind == "scaling":
        scaling(options.config, options.model, options.rows, options.remat, options.slices)
    else:
        shipped(options.only)


if __name__ == "__main__":
    main()
