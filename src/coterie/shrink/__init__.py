"""Smaller mixtures: low-bit weights, and the expert bank that computes with them."""

from coterie.kernels import PackedWeight
from coterie.shrink.experts import QuantizedExperts
from coterie.shrink.gptq import HessianMean, gptq
from coterie.shrink.quantize import awq, rtn

__all__ = ["HessianMean", "PackedWeight", "QuantizedExperts", "awq", "gptq", "rtn"]
