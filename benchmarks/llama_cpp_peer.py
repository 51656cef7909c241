"""llama.cpp as a contender: the same weights in a GGUF file, run through `llama-cpp-python`.

`pip install llama-cpp-python gguf`; the first compiles llama.cpp for this machine's instruction set.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


def missing() -> list[str]:
    """Which of the two packages are not installed."""
    return [
        name
        for module, name in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf"))
        if not find_spec(module)
    ]


def write_gguf(model: Qwen3MoeForCausalLM, file: Path, dtype: torch.dtype) -> None:
    """Writes a Qwen3-MoE without a tokenizer; matrices in `dtype`, norms and routers in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: Tensor) -> None:
        wide = tensor.dim() == 1 or "gate_inp" in name  # llama.cpp keeps these in float32
        kind = torch.float32 if wide else dtype
        stored = tensor.detach().to(kind).contiguous()
        if kind == torch.bfloat16:
            raw = stored.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, stored.numpy())

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        for theirs, name in _NAMES.items():
            add(f"blk.{i}.{name}.weight", layer.get_submodule(theirs).weight)
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        add(f"blk.{i}.ffn_gate_exps.weight", gate)
        add(f"blk.{i}.ffn_up_exps.weight", up)
        add(f"blk.{i}.ffn_down_exps.weight", layer.mlp.experts.down_proj)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A GGUF file in llama.cpp, with as many threads as asked; `close` frees it."""

    def __init__(self, file: Path, *, threads: int, context: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def reset(self) -> None:
        """Forgets all tokens."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Reads further tokens; the logits [vocabulary] after the last."""
        tokens = (self._lib.llama_token * len(ids))(*ids)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), shape=(self._vocab,))

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
