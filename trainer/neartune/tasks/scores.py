"""Measures of classification, from predicted and true classes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def scores(pairs: Sequence[tuple[int, int]], labels: Sequence[str]) -> dict[str, Any]:
    """`pairs` of (true, predicted). Accuracy, the mean of the classes' F1, and the confusion matrix (rows: true)."""
    count = len(labels)
    confusion = [[0] * count for _ in range(count)]
    for true, predicted in pairs:
        confusion[true][predicted] += 1
    right = sum(confusion[i][i] for i in range(count))
    f1s = []
    for i in range(count):
        predicted = sum(row[i] for row in confusion)
        true = sum(confusion[i])
        if predicted + true:  # a class that is neither there nor predicted says nothing
            f1s.append(2 * confusion[i][i] / (predicted + true))
    return {
        "accuracy": right / max(1, len(pairs)),
        "f1": sum(f1s) / max(1, len(f1s)),
        "confusion": confusion,
        "labels": list(labels),
    }


def sorted_labels(values: Sequence[Any]) -> tuple[str, ...]:
    """Classes in a fixed order: numbers by value, else words."""
    words = {str(value) for value in values}
    if all(word.lstrip("-").isdigit() for word in words):
        return tuple(sorted(words, key=int))
    return tuple(sorted(words))
