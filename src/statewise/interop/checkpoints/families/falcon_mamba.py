"""transformers `falcon_mamba`: Mamba with RMS norms without weights on the coefficients."""

from __future__ import annotations

from dataclasses import replace

from ..family import Config, first
from ..fields import Fields
from . import mamba


def read(fields: Fields) -> Config:
    config = mamba.read(fields)
    eps = fields.number("mixer_rms_eps", 1e-6, above=0)
    return config | {"mixer": config["mixer"] | {"coefficient_norm": "unit", "norm_eps": eps}}


def write(config: Config) -> Config:
    return mamba.write(config) | {
        "model_type": "falcon_mamba",
        "architectures": ["FalconMambaForCausalLM"],
        "mixer_rms_eps": first(config, "mixer", "mamba")["norm_eps"],
    }


FAMILY = replace(mamba.FAMILY, name="falcon_mamba", read=read, write=write)
