"""The peer of sft and rollout: a plain loop of PyTorch, and ``generate`` of transformers. See `bench.py`."""

import json
import sys

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from turns import Turns


def main():
    turns, work = Turns(), json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(work["threads"])
    model = GPT2LMHeadModel(gpt2_config(work))
    tokens = torch.randint(1, work["vocab_size"], (work["rows"], work["length"]))
    step = sft_step(model, tokens) if work["kind"] == "sft" else rollout_step(model, tokens, work)
    turns.begin(torch=torch.__version__, transformers=transformers.__version__)
    while True:
        step()
        turns.step_ended()


def gpt2_config(work):
    return GPT2Config(
        n_layer=work["num_layers"],
        n_embd=work["width"],
        n_head=work["num_heads"],
        vocab_size=work["vocab_size"],
        n_positions=1024,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def sft_step(model, tokens):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rollout_step(model, tokens, work):
    model.eval()

    @torch.no_grad()
    def step():
        new = work["new_tokens"]
        answers = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            top_k=work["top_k"] or 0,  # 0 cuts nothing off
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
        assert answers.shape == (work["rows"], work["length"] + new)

    return step


if __name__ == "__main__":
    main()
