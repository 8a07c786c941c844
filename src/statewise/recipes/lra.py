"""The Long Range Arena: six tasks on long sequences.

Source: Tay et al. 2020 (arXiv 2011.04006); training as in S4 (arXiv 2111.00396).
"""

from __future__ import annotations

from .classification import Task, classification

listops = classification(
    Task("lra.listops", "listops", "listops"),
    "Long Range Arena, ListOps: the value of nested lists of operators and digits.",
)
text = classification(
    Task("lra.text", "text", "text"),
    "Long Range Arena, Text: the class of a document, character by character.",
)
retrieval = classification(
    Task("lra.retrieval", "retrieval", "retrieval"),
    "Long Range Arena, Retrieval: whether two documents belong together, character by character.",
)
image = classification(
    Task("lra.image", "cifar_grey", "image"),
    "Long Range Arena, Image: grey CIFAR-10, pixel by pixel.",
)
pathfinder = classification(
    Task("lra.pathfinder", "pathfinder32", "pathfinder"),
    "Long Range Arena, Pathfinder: whether two dots are joined by a dashed line, 32 x 32 pixels.",
)
pathx = classification(
    Task("lra.pathx", "pathfinder128", "pathx"),
    "Long Range Arena, Path-X: Pathfinder with 128 x 128 pixels, 16,384 steps.",
)
