"""Small tables and language models that the tests of forecasters share."""

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SMALL = {"seq_len": 48, "token_len": 12, "epochs": 2, "hidden": 16, "random_state": 0}


def table(rows=400, start="2020-01-01", step="h"):
    """Two columns of different period and scale."""
    hours = np.arange(rows)
    noise = np.random.default_rng(0).normal(size=(2, rows))
    return pd.DataFrame(
        {
            "date": pd.date_range(start, periods=rows, freq=step),
            "load": 10 + 3 * np.sin(2 * np.pi * hours / 24) + 0.1 * noise[0],
            "heat": -200 + 50 * np.cos(2 * np.pi * hours / 12) + noise[1],
        }
    )


def save_language_model(folder, dim=16, seed=0):
    """A random GPT-2 with a tokenizer of words, as a folder of transformers."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=40, n_positions=128, n_embd=dim, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = ["Its", "mean", "is", "deviation", "change", "The", "runs", "from", "to", ".", ":", "-"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *words, *map(str, range(10))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return str(folder)
