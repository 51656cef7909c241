"""The bridge to Hugging Face transformers. Importing it registers the `coterie` experts implementation."""

from coterie.hf.blocks import MoEBlock, find_moe_blocks
from coterie.hf.experts import experts_forward, register
from coterie.hf.layout import BankLayout, BlockLayout, block_layout
from coterie.hf.load import check_files, load, outline
from coterie.hf.record import BlockRecord, recording
from coterie.hf.save import check_expressible, save
from coterie.hf.tensors import ExpertTensors, RouterTensors, pack, unpack

__all__ = [
    "BankLayout",
    "BlockLayout",
    "BlockRecord",
    "ExpertTensors",
    "MoEBlock",
    "RouterTensors",
    "block_layout",
    "check_expressible",
    "check_files",
    "experts_forward",
    "find_moe_blocks",
    "load",
    "outline",
    "pack",
    "recording",
    "register",
    "save",
    "unpack",
]

register()
