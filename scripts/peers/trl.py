"""The peer of ppo: ``PPOTrainer`` of TRL 1.12.0, the last release that has one. See `bench.py`."""

import json
import os
import sys

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"}
sys.path.append(sys.path.pop(0))  # behind the packages: this file bears the name of one

import torch
from datasets import Dataset
from hf import gpt2_config
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_turns import TakeTurns, tokenizer
from turns import Turns

ITERATIONS = 10_000  # more than any measurement takes


def main():
    turns, work = Turns(), json.loads(sys.argv[1])
    torch.set_num_threads(work["threads"])
    policy, reference = (GPT2LMHeadModel(gpt2_config(work)) for _ in range(2))
    config = gpt2_config(work)
    config.num_labels = 1
    reward, value = (GPT2ForSequenceClassification(config) for _ in range(2))
    prompts = torch.randint(1, work["vocab_size"], (64 * work["rows"], work["length"]))
    data = Dataset.from_dict({"input_ids": prompts.tolist()})
    trainer = PPOTrainer(
        args=ppo_config(work),
        processing_class=tokenizer(work["vocab_size"]),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        callbacks=[TakeTurns(turns)],
    )
    trainer.train()


def ppo_config(work):
    return PPOConfig(
        output_dir=".",
        per_device_train_batch_size=work["rows"],
        local_rollout_forward_batch_size=work["rows"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=work["epochs"],
        total_episodes=ITERATIONS * work["rows"],
        response_length=work["new_tokens"],
        temperature=1.0,
        stop_token=None,
        learning_rate=1e-5,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        fp16=False,
        seed=0,
    )


if __name__ == "__main__":
    main()
