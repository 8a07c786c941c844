"""Pictures as sequences, pixel by pixel."""

from __future__ import annotations

from .classification import Task, classification

fashion_mnist = classification(
    Task("image.fashion_mnist", "fashion_mnist", "fashion"),
    "Sequential Fashion-MNIST: clothing from 784 pixels, one after the other.",
)
mnist = classification(
    Task("image.mnist", "mnist", "mnist"),
    "Sequential MNIST: digits from 784 pixels, one after the other.",
)
digits = classification(
    Task("image.digits", "digits", "digits"),
    "Handwritten digits from 64 pixels, one after the other; a first try that takes a minute.",
)
cifar = classification(
    Task("image.cifar", "cifar", "cifar"),
    "Sequential CIFAR-10: objects from 1024 coloured pixels, one after the other.",
)
