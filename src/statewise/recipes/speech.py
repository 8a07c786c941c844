"""Speech as raw samples."""

from __future__ import annotations

from .classification import Task, classification

commands = classification(
    Task("speech.commands", "speech_commands", "speech"),
    "Speech Commands: spoken words from raw samples, 16,000 a second.",
)
