"""What a classifier's name says, without building it (and without torch)."""

TORCHVISION = "torchvision:"
"""Before the names of torchvision's networks, which only serve as teachers that somebody else trained."""
_BATCH_NORM = "_bn"


def has_batch_norm(name: str) -> bool:
    """Whether what a classifier learns depends on how its batches are cut."""
    return name.partition(":")[0].endswith(_BATCH_NORM)
