"""A trainer of TRL as a peer: it calls back after each step, and waits there for its turn. See `bench.py`."""

import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback


class TakeTurns(TrainerCallback):
    def __init__(self, turns):
        self.turns = turns

    def on_train_begin(self, *_, **__):
        self.turns.begin(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__)

    def on_step_end(self, *_, **__):
        self.turns.step_ended()


def word(number):
    return f"w{number}_"  # no word begins another, since special ones are looked for inside of words


def tokenizer(vocab_size):
    """The tokenizer of texts of words, spaces between; number 0 is the end."""
    words = Tokenizer(models.WordLevel({word(i): i for i in range(vocab_size)}, unk_token=word(1)))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    end, unknown = word(0), word(1)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown, pad_token=end, eos_token=end)
