"""Checkpoints of this library, of `mamba_ssm` and of transformers: loading, and converting in every direction.

How a family is added. Write `families/NAME.py`, and one line in `families/__init__.py`:

    def read(fields: Fields) -> Config:        # their config.json -> the arguments of our constructor
        fields.only("hidden_act", "silu", default="silu")
        return {"vocab_size": fields.integer("vocab_size"), "d_model": fields.integer("hidden_size"), ...}

    def write(config: Config) -> Config:       # a complete configuration -> their config.json
        mixer = first(config, "mixer", "mamba")
        return {"model_type": "name", "hidden_size": config["d_model"], ...}

    def rules(config: Config) -> list[Rule]:   # a complete configuration -> the table of names
        table = [Rule("embedding.weight", "model.embed_tokens.weight"), ...]
        for i, layer in enumerate(config["layers"]):
            table += within(f"layers.{i}.mixer", f"model.layers.{i}.mamba", MIXER)
        return table

    FAMILY = Family("name", "transformers", read, write, rules)

`fields.py` says how fields are read and checked, `rules.py` what a rule can be, `family.py` what a family is and what
each of the three functions may leave to the framework, `describe.py` what a complete configuration is. A table may hold
rules for names that a model does not have; `bind` fails where a name of the model is in no rule or in two.
"""

from __future__ import annotations

from .converting import convert
from .families import names as family_names
from .loading import load

__all__ = ["convert", "family_names", "load"]
