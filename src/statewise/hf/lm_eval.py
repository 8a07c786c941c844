"""Statewise models in EleutherAI's lm-evaluation-harness.

`import statewise.hf.lm_eval` registers the model type "statewise". As a command, with the options of `lm_eval`:

    python -m statewise.hf.lm_eval --model statewise --model_args pretrained=DIRECTORY --tasks lambada_openai
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("statewise.hf.lm_eval needs lm-eval: pip install 'statewise[lm-eval]'") from error

from transformers import AutoTokenizer, PreTrainedModel

from ..models import load
from . import StatewiseForCausalLM
from .tokenizers import byte_tokenizer

_log = logging.getLogger(__name__)


@register_model("statewise")
class StatewiseLM(HFLM):
    """A model that `statewise.load` reads, with every task of the harness.

    Args:
        pretrained: directory or Hub name of a model, or a model, wrapped for transformers or not.
        tokenizer: directory, Hub name or tokenizer; None: files beside the model, or bytes for a model of 256 tokens.
        device: "cuda", "cpu", ...; None: CUDA if there is one.
        dtype: of the weights, e.g. "bfloat16"; "auto": as stored.
        peft: directory of an adapter of peft to put on the model.
        kwargs: other arguments of `lm_eval.models.huggingface.HFLM`, e.g. batch_size, max_length.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        peft: str | None = None,
        **kwargs: Any,
    ):
        if isinstance(dtype, str):
            if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"dtype: want 'auto' or the name of a dtype of torch, got {dtype!r}")
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        cuda = torch.cuda.is_available()
        if device is not None and device.startswith("cuda") and not cuda:
            # What the command asks for when nobody does.
            _log.warning("device: there is no CUDA here, so %s becomes cpu", device)
            device = "cpu"
        place = device or ("cuda" if cuda else "cpu")
        model = load(pretrained, dtype=dtype) if isinstance(pretrained, str) else pretrained
        if not isinstance(model, PreTrainedModel):
            model = StatewiseForCausalLM.wrap(model)
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = _tokenizer(tokenizer or pretrained, model.config.vocab_size)
        if tokenizer.bos_token_id is None and model.config.vocab_size == 256:
            kwargs.setdefault("prefix_token_id", ord("\n"))  # what a text begins after
        if peft is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, peft)
        kwargs.setdefault("backend", "causal")
        super().__init__(model.to(place).eval(), tokenizer=tokenizer, **kwargs)


def _tokenizer(source: Any, vocab_size: int) -> Any:
    held = isinstance(source, str) and (
        not Path(source).is_dir() or any(Path(source).glob("tokenizer*")) or any(Path(source).glob("vocab*"))
    )
    if held:
        return AutoTokenizer.from_pretrained(source)
    if vocab_size == 256:
        return byte_tokenizer()
    raise ValueError(f"tokenizer: there is none beside the model, which has {vocab_size} tokens; give one")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
