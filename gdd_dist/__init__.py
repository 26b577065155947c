"""Distil a labelled image data set into a class-conditional generator, on as many machines as there are."""

from typing import TYPE_CHECKING, Any

from sharding import __version__ as __version__

if TYPE_CHECKING:
    from gdd_dist.product.sampler import load_generator as load_generator

__all__ = ["__version__", "load_generator"]


def __getattr__(name: str) -> Any:
    """Import ``load_generator`` on first use, so that programs that never draw do not load torch."""
    if name == "load_generator":
        from gdd_dist.product.sampler import load_generator

        return load_generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
