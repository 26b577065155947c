"""Properties of a classifier that follow from its name, without building it (and without torch)."""

TORCHVISION = "torchvision:"
"""Prefix of torchvision's networks, which can only be pretrained teachers."""
_BATCH_NORM = "_bn"


def has_batch_norm(name: str) -> bool:
    """Whether a classifier has batch normalization, so that its training depends on how batches are split."""
    return name.partition(":")[0].endswith(_BATCH_NORM)
