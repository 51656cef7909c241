"""Weights in 1, 2, 3, 4 or 8 bits, in the order the native kernel reads them.

A *level* is the small whole number a weight was rounded to: -2^(b-1) … 2^(b-1) - 1 with b bits, and -1 or +1
with one. Levels are stored as two's complement (one bit: +1 is 1) with exactly b bits each. A row block of 16
output rows × a unit of 32 input columns is b vectors of 16 words of 32 bits, one word per row: columns 2i lie
in a word's lower half, columns 2i + 1 in its upper half, so that one shift of a vector brings a pair of
columns of all 16 rows to where a table look-up wants them, without crossing rows. 3 bits do not divide 16: a
half word holds five codes and a spare bit, and the spare bits of the three words of a row are its 16th pair.
So 3-bit weights take exactly 3 bits, at the price of a few instructions per 32 columns, where planes of 2 + 1
bits would need two look-ups for every pair.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (1, 2, 3, 4, 8)
ROWS, COLUMNS = 16, 32  # of one packed unit


@dataclass(eq=False)
class PackedWeight:
    """Matrices [..., out, in] in few bits: weight = input_scale · scale · (level - zero).

    R = ceil(out / 16) row blocks, C = ceil(in / 32) units, G = ceil(32 C / group_size) groups of columns.

    Args:
        codes: int32 [..., R, C, bits, 16]; see the module's docstring.
        scales: bfloat16 [..., R, G, 16]: the range of float32 in 16 bits, and one shift to read.
        zeros: int8 [..., R, G, 16] whole levels; None for symmetric weights (zero = 0).
        input_scale: float32 [..., in], by which inputs are multiplied before the product (AWQ); or None.
        out: rows of a matrix.
        columns: its columns (`in`).
        bits: 1, 2, 3, 4 or 8.
        group_size: columns sharing a scale, a multiple of 32.

    >>> weight = PackedWeight.from_levels(torch.tensor([[1, -2, 0, 1]]), 2, scales=torch.tensor([[0.5]]))
    >>> weight.dequantize().tolist(), weight.shape
    ([[0.5, -1.0, 0.0, 0.5]], (1, 4))
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None
    out: int
    columns: int
    bits: int
    group_size: int

    @classmethod
    def from_levels(
        cls,
        levels: Tensor,
        bits: int,
        *,
        scales: Tensor,
        zeros: Tensor | None = None,
        input_scale: Tensor | None = None,
        group_size: int = -1,
    ) -> "PackedWeight":
        """Packs what a quantiser found.

        Args:
            levels: [..., out, in] whole numbers in the range of `bits` (-1 and +1 with one bit).
            bits: 1, 2, 3, 4 or 8.
            scales: [..., out, G], rounded to bfloat16.
            zeros: [..., out, G] whole levels, or None.
            input_scale: [..., in], or None.
            group_size: a multiple of 32, or -1 for one scale per row.

        Raises ValueError for another width, group size or shape, and for levels out of range.
        """
        group_size = check_group_size(group_size, levels.shape[-1])
        groups = -(-levels.shape[-1] // group_size)
        for name, t in (("scales", scales), ("zeros", zeros)):
            if t is not None and t.shape != (*levels.shape[:-1], groups):
                expected = (*levels.shape[:-1], groups)
                raise ValueError(f"{name} have shape {tuple(t.shape)}; these levels take {expected}")
        return cls(
            pack(levels, bits),
            _to_blocks(scales).bfloat16(),
            None if zeros is None else _to_blocks(zeros).to(torch.int8),
            None if input_scale is None else input_scale.float().contiguous(),
            levels.shape[-2],
            levels.shape[-1],
            bits,
            group_size,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in] of the matrices this stands for."""
        return (*self.codes.shape[:-4], self.out, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored, padding included."""
        return sum(t.nbytes for t in self.tensors().values())

    def __getitem__(self, index: int) -> "PackedWeight":
        """One matrix, or stack of them, along the first leading dimension; a view."""
        return self.from_tensors({name: t[index] for name, t in self.tensors().items()}, self.metadata())

    def levels(self) -> Tensor:
        """[..., out, in] int8."""
        return unpack(self.codes, self.bits)[..., : self.out, : self.columns]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., out, in] computed in `dtype`."""
        weight = self.levels().to(dtype)
        if self.zeros is not None:
            weight = weight - self._per_column(self.zeros, dtype)
        weight = weight * self._per_column(self.scales, dtype)
        return weight if self.input_scale is None else weight * self.input_scale.to(dtype).unsqueeze(-2)

    def tensors(self) -> dict[str, Tensor]:
        """What safetensors stores; `metadata` is the rest."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in found.items() if isinstance(t, Tensor)}

    def metadata(self) -> dict[str, int]:
        """out, columns, bits and group_size: all that the tensors do not say."""
        return {name: getattr(self, name) for name in ("out", "columns", "bits", "group_size")}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, int]) -> "PackedWeight":
        """The inverse of `tensors` and `metadata`."""
        return cls(
            tensors["codes"],
            tensors["scales"],
            tensors.get("zeros"),
            tensors.get("input_scale"),
            metadata["out"],
            metadata["columns"],
            metadata["bits"],
            metadata["group_size"],
        )

    def _per_column(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        values = blocks.transpose(-1, -2).flatten(-3, -2)[..., : self.out, :].to(dtype)
        return values.repeat_interleave(self.group_size, -1)[..., : self.columns]


def check_bits(bits: int) -> int:
    """`bits`; ValueError unless it is a width that can be packed."""
    if bits not in BITS:
        raise ValueError(f"bits={bits} cannot be packed; use one of {BITS}")
    return bits


def check_group_size(group_size: int, columns: int) -> int:
    """`group_size`, or for -1 one that covers a row; ValueError unless it is a multiple of 32."""
    if group_size == -1:
        return -(-columns // COLUMNS) * COLUMNS
    if group_size < COLUMNS or group_size % COLUMNS:
        raise ValueError(f"group_size={group_size}; use a multiple of {COLUMNS}, or -1 for one group per row")
    return group_size


def level_range(bits: int) -> tuple[int, int]:
    """Smallest and largest level.

    >>> level_range(3), level_range(1)
    ((-4, 3), (-1, 1))
    """
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels [..., out, in] as codes int32 [..., ceil(out / 16), ceil(in / 32), bits, 16].

    Raises ValueError for a width that cannot be packed or levels out of range.
    """
    low, high = level_range(check_bits(bits))
    if bool(((levels < low) | (levels > high)).any()) or (bits == 1 and bool((levels == 0).any())):
        raise ValueError(f"levels of {bits} bits are {'-1 or 1' if bits == 1 else f'{low} … {high}'}")
    codes = (levels > 0).int() if bits == 1 else levels.int() & (2**bits - 1)
    out, columns = codes.shape[-2:]
    codes = F.pad(codes, (0, -columns % COLUMNS, 0, -out % ROWS))
    blocks, units = codes.shape[-2] // ROWS, codes.shape[-1] // COLUMNS
    codes = codes.view(*levels.shape[:-2], blocks, ROWS, units, COLUMNS // 2, 2).transpose(-4, -3)
    words = codes.new_zeros(*levels.shape[:-2], blocks, units, bits, ROWS)
    for pair, half, word, shift, taken in _places(bits):
        words[..., word, :] |= ((codes[..., pair, half] >> taken[0]) & taken[1]) << shift
    return words


def unpack(codes: Tensor, bits: int) -> Tensor:
    """The levels behind `pack`'s codes, int8 [..., 16 R, 32 C], padding included."""
    found = codes.new_zeros(*codes.shape[:-2], ROWS, COLUMNS // 2, 2)
    for pair, half, word, shift, taken in _places(bits):
        found[..., pair, half] |= ((codes[..., word, :] >> shift) & taken[1]) << taken[0]
    levels = 2 * found - 1 if bits == 1 else (found ^ 2 ** (bits - 1)) - 2 ** (bits - 1)
    levels = levels.flatten(-2).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return levels.to(torch.int8)


def _places(bits: int) -> list[tuple[int, int, int, int, tuple[int, int]]]:
    """(pair, half, word, shift, (first bit of the code, mask)): where each piece of a unit's codes lies."""
    per_half = 16 // bits
    whole = [
        (pair, half, pair // per_half, bits * (pair % per_half) + 16 * half, (0, 2**bits - 1))
        for pair in range(bits * per_half)
        for half in range(2)
    ]
    spare = [(15, half, word, 15 + 16 * half, (word, 1)) for word in range(3) for half in range(2)]
    return whole + (spare if bits == 3 else [])


def _to_blocks(values: Tensor) -> Tensor:
    """[..., out, G] → [..., R, G, 16]; rows past the last get 0."""
    values = F.pad(values, (0, 0, 0, -values.shape[-2] % ROWS))
    return values.view(*values.shape[:-2], -1, ROWS, values.shape[-1]).transpose(-1, -2).contiguous()
