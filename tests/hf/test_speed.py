from contextlib import nullcontext

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from coterie.hf import interleaved_speed


def test_the_two_models_take_turns():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).eval()
    order = []

    class Changed(nullcontext):
        def __enter__(self):
            order.append("enter")

        def __exit__(self, *error):
            order.append("exit")

    hook = model.register_forward_hook(lambda *_: order.append("run"))
    before, after = interleaved_speed(model, Changed, torch.zeros(1, 4, dtype=torch.int64), rounds=2)
    hook.remove()
    assert order == ["run", "enter", "run", "exit"] * 3
    assert before > 0
    assert after > 0
