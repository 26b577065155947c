"""Distil a labelled image data set into a class-conditional generator, on as many machines as there are."""

__version__ = "0.1.0"
