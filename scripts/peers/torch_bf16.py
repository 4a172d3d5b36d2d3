"""The peer of sft and rollout in bfloat16: PyTorch and `transformers`. See `bench_accelerator.py`.

Weights are bfloat16 and attention is `sdpa`. The optimizer updates float32 masters, from which the weights are
copied after every update, or, with ``master: bfloat16``, the weights themselves.
"""

import json
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from turns import Turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    turns, work = Turns(), json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(work["threads"])
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**work["config"]), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        tokens = torch.randint(1, work["vocab_size"], (work["rows"], work["length"]))
    step = sft_step(model, tokens, work) if work["kind"] == "sft" else rollout_step(model, tokens, work)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    turns.begin(torch=torch.__version__, transformers=transformers.__version__, torch_device=name)
    while True:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        turns.step_ended()


def sft_step(model, tokens, work):
    model.train()
    weights = list(model.parameters())
    learnt = weights
    if work["master"] == "float32":
        learnt = [weight.detach().float().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(learnt, lr=1e-5, fused=True)
    compute = torch.compile(model) if work["compile"] else model

    def update():
        compute(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if learnt is not weights:
            for master, weight in zip(learnt, weights, strict=True):
                master.grad = weight.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        if learnt is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, learnt)
            model.zero_grad()

    def step():
        for _ in range(work["burst"]):
            update()

    return step


def rollout_step(model, tokens, work):
    model.eval()
    model.generation_config.eos_token_id = None  # every row goes to the end
    settings = {"cache_implementation": "static"} if work["compile"] else {}

    @torch.no_grad()
    def step():
        answers = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            top_k=0,  # nothing is cut off
            max_new_tokens=work["new_tokens"],
            pad_token_id=0,
            **settings,
        )
        assert answers.shape == (work["rows"], work["length"] + work["new_tokens"])

    return step


if __name__ == "__main__":
    main()
