"""A student's predictions on test as a confusion matrix, and accuracies computed from it. C: classes."""

from __future__ import annotations

import base64
import zlib
from typing import Any, NamedTuple

import numpy as np


class StudentResult(NamedTuple):
    """One student's result: accuracy on test, mean of the classes' accuracies (both percent), distinct images seen."""

    accuracy: float
    balanced: float
    distinct: int


def confusion(labels: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 [C, C]: how many images of the row's class were predicted as the column's class. Arguments: int64 [n]."""
    counts: np.ndarray = np.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)
    return counts


def accuracy(matrix: np.ndarray) -> float:
    """Return the percentage of images on the diagonal."""
    return 100.0 * float(np.trace(matrix) / matrix.sum())


def by_class(matrix: np.ndarray) -> np.ndarray:
    """Return the accuracy of each class in percent, float64 [C]; nan for a class without images."""
    totals = matrix.sum(1)
    shares: np.ndarray = np.where(totals > 0, 100.0 * np.diag(matrix) / np.maximum(totals, 1), np.nan)
    return shares


def balanced(matrix: np.ndarray) -> float:
    """Return the mean accuracy over the classes that have images, in percent."""
    return float(np.nanmean(by_class(matrix)))


def pack(matrix: np.ndarray) -> dict[str, Any]:
    """Compress a matrix for JSON; with 200 classes it has 40,000 numbers per student."""
    raw = zlib.compress(matrix.astype("<i4").tobytes())
    return {"classes": len(matrix), "zlib_int32": base64.b64encode(raw).decode()}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """Return the argument of ``pack``, int64 [C, C]. Raises KeyError, ValueError or zlib.error for other input."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(packed["zlib_int32"], validate=True)), "<i4")
    return values.reshape(packed["classes"], packed["classes"]).astype(np.int64)
