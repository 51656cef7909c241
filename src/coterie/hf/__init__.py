"""The bridge to Hugging Face transformers. Importing it registers the `coterie` experts implementation."""

from coterie.hf.blocks import MoEBlock, find_moe_blocks
from coterie.hf.calibration import calibration_ids, holds_ids, load_tokenizer
from coterie.hf.checkpoint import Checkpoint
from coterie.hf.experts import experts_forward, register
from coterie.hf.layout import BankLayout, BlockLayout, block_layout
from coterie.hf.load import check_files, load, outline
from coterie.hf.packed import PackedExperts
from coterie.hf.record import BlockRecord, recording
from coterie.hf.rewrite import Writer, rewriting, save_pruned
from coterie.hf.routings import route
from coterie.hf.save import bytes_on_disk, check_expressible, save
from coterie.hf.speed import interleaved_speed
from coterie.hf.stream import stream_layers, stream_records
from coterie.hf.tensors import ExpertTensors, RouterTensors, pack, unpack
from coterie.hf.top_any import PrefixMask, masks_of, place_masks, unmasked

__all__ = [
    "BankLayout",
    "BlockLayout",
    "BlockRecord",
    "Checkpoint",
    "ExpertTensors",
    "MoEBlock",
    "PackedExperts",
    "PrefixMask",
    "RouterTensors",
    "Writer",
    "block_layout",
    "bytes_on_disk",
    "calibration_ids",
    "check_expressible",
    "check_files",
    "experts_forward",
    "find_moe_blocks",
    "holds_ids",
    "interleaved_speed",
    "load",
    "load_tokenizer",
    "masks_of",
    "outline",
    "pack",
    "place_masks",
    "recording",
    "register",
    "rewriting",
    "route",
    "save",
    "save_pruned",
    "stream_layers",
    "stream_records",
    "unmasked",
    "unpack",
]

register()
