"""Data made worse on purpose, to test models that were trained on clean ones."""

import torch
from torch import Tensor

KINDS = ("gaussian", "impulse", "contrast")


def attack_tokens(
    ids: Tensor, rate: float, token_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """A copy in which random tokens are swapped for one generic token (word-swap attack).

    Args:
        ids: int64, any shape.
        rate: chance of each token, 0 ≤ rate ≤ 1.
        token_id: what they are swapped for.
        generator: of the choice of tokens.

    Raises:
        ValueError: rate out of range.

    >>> attack_tokens(torch.arange(1, 6), 1.0, token_id=0).tolist()
    [0, 0, 0, 0, 0]
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate}; should lie in 0 ≤ rate ≤ 1")
    swapped = torch.rand(ids.shape, generator=generator, device=ids.device) < rate
    return ids.masked_fill(swapped, token_id)


def corrupt_images(
    images: Tensor, kind: str, level: float, generator: torch.Generator | None = None
) -> Tensor:
    """A copy with noise, or with less contrast.

    Args:
        images: values in 0 … 1, any shape with the pixels of an image in its last dimensions.
        kind: "gaussian" adds normal noise; "impulse" sets random pixels to 0 or 1, salt and pepper;
            "contrast" draws every pixel towards 0.5.
        level: the noise's standard deviation; the share of pixels that are set; the share of contrast that
            is taken away. From 0, which changes nothing, the latter two to 1.
        generator: of the noise.

    Returns: values in 0 … 1.

    Raises:
        ValueError: an unknown kind, or a level out of range.

    Source: Hendrycks and Dietterich 2019 (ImageNet-C), the kinds; there, levels are severities 1 to 5.

    >>> corrupt_images(torch.tensor([0.0, 0.5, 1.0]), "contrast", 0.5).tolist()
    [0.25, 0.5, 0.75]
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(KINDS)}")
    most = float("inf") if kind == "gaussian" else 1
    if not 0 <= level <= most:
        raise ValueError(f"level={level}; for {kind} it should lie in 0 ≤ level ≤ {most}")
    if kind == "contrast":
        return 0.5 + (1 - level) * (images - 0.5)
    if kind == "gaussian":
        noise = torch.empty_like(images).normal_(generator=generator)
        return (images + level * noise).clamp(0, 1)
    chance = torch.empty_like(images).uniform_(generator=generator)
    # one draw decides both: below level / 2 pepper, from there to level salt
    return images.masked_fill(chance < level, 1).masked_fill(chance < level / 2, 0)
