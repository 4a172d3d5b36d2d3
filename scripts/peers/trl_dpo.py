"""The peer of dpo: ``DPOTrainer`` of TRL 1.16.0 with the reference's log-probs computed before. See `bench.py`.

Against TRL's defaults: float32 in place of bfloat16, no gradient checkpointing, nothing logged. Rows are of one
length, so that nothing is padded.
"""

import json
import os
import sys

os.environ |= {"WANDB_DISABLED": "true", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
sys.path.append(sys.path.pop(0))  # behind the packages: `trl.py` beside this file bears the name of one

import numpy as np
import torch
from datasets import Dataset
from hf import gpt2_config
from transformers import GPT2LMHeadModel
from trl import DPOConfig, DPOTrainer
from trl_turns import TakeTurns, tokenizer, word
from turns import Turns

STEPS = 100_000  # more than any measurement takes
BATCHES = 2  # as many as on the other side


def main():
    turns, work = Turns(), json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(work["threads"])
    trainer = DPOTrainer(
        model=GPT2LMHeadModel(gpt2_config(work)),
        args=dpo_config(work),
        processing_class=tokenizer(work["vocab_size"]),
        train_dataset=pairs(work),
        callbacks=[TakeTurns(turns)],
    )
    lengths = {len(row["prompt_ids"] + row[f"{side}_ids"]) for row in trainer.train_dataset for side in SIDES}
    expected = work["length"] + work["new_tokens"]
    assert lengths == {expected}, f"rows must have {expected} tokens, got {lengths}"
    trainer.train()


SIDES = ("chosen", "rejected")


def pairs(work):
    """Random words, as many as on the other side."""
    random, rows = np.random.default_rng(0), BATCHES * work["rows"]

    def texts(length):
        numbers = random.integers(1, work["vocab_size"], (rows, length))
        return [" ".join(map(word, row)) for row in numbers]

    answers = {side: [f" {text} {word(0)}" for text in texts(work["new_tokens"] - 1)] for side in SIDES}
    return Dataset.from_dict({"prompt": texts(work["length"]), **answers})


def dpo_config(work):
    return DPOConfig(
        output_dir=".",
        per_device_train_batch_size=work["rows"],
        max_steps=STEPS,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        learning_rate=1e-6,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=0,
    )


if __name__ == "__main__":
    main()
