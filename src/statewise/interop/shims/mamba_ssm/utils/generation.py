"""Generation with the arguments of mamba_ssm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._missing import missing

__all__ = [
    "GenerateDecoderOnlyOutput",
    "GenerationMixin",
    "InferenceParams",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
]

__getattr__ = missing(__name__)


@dataclass
class InferenceParams:
    """What a model carries from call to call.

    Attributes:
        seqlen_offset: how many tokens it has seen; the caller counts.
        key_value_memory_dict: the states of each layer by its index, written in place.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerateDecoderOnlyOutput:
    """sequences (B, T), prompt included; scores: logits (B, V) of each new token, if asked for."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Exclude logits below `min_p`, in place; does nothing unless 0 < min_p < 1."""
    if 0.0 < min_p < 1.0:
        logits.masked_fill_(logits < min_p, -torch.inf)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Exclude all but the `top_k` largest, in place."""
    logits.masked_fill_(logits < logits.topk(top_k).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keep the fewest tokens whose probabilities sum up to `top_p`, in place; does nothing unless 0 < top_p < 1."""
    if not 0.0 < top_p < 1.0:
        return
    ordered, index = logits.sort(-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    logits.masked_fill_(drop.scatter(-1, index, drop), -torch.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Divide the positive logits of tokens seen before, and multiply the negative ones (arXiv 1909.05858); in place."""
    if repetition_penalty == 1.0:
        return logits
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """A token for each row of logits (B, V). top_k = 1 is greedy, 0 has no limit; top_p applies to what it leaves.

    min_p, a share of the largest logit of the first token, applies where top_k is 0, and then top_p does not.
    """
    if top_k == 1:
        return logits.argmax(-1)
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"sample: top_p: want a number from 0 to 1, got {top_p}")
    index = None
    if top_k > 0:
        logits, index = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    elif min_p > 0.0:
        logits = logits.clone()
        modify_logits_for_min_p_filtering(logits, float(logits[..., 0].max()) * min_p)
    logits = logits / temperature
    if index is not None or min_p == 0.0:
        modify_logits_for_top_p_filtering(logits, top_p)
    drawn = torch.multinomial(logits.softmax(-1), 1)
    return (drawn if index is None else index.gather(-1, drawn)).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: Tensor, model: Any, max_length: int, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0,
    temperature: float = 1.0, repetition_penalty: float = 1.0, eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None, vocab_size: int | None = None, cg: bool = False,
    enable_timing: bool = False, output_scores: bool = False, streamer: Any = None,
) -> GenerateDecoderOnlyOutput:  # fmt: skip
    """Continue input_ids (B, L), rows of one length, up to `max_length` tokens or until every row ends at once.

    Args:
        teacher_outputs: (B, T), tokens to take instead of sampled ones as far as they go.
        vocab_size: logits beyond it are padding.
        cg: has no effect: there are no CUDA graphs here.
        enable_timing: print how long it took.
        streamer: gets the prompt and each token by `put`, and `end` at the end.
    """
    from time import perf_counter

    begin = perf_counter()
    params = InferenceParams(max_length, input_ids.shape[0])
    given = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    sequences, scores, new = input_ids, [], input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while True:
        logits = model(new, inference_params=params, num_last_tokens=1).logits[:, -1]
        logits = logits if vocab_size is None else logits[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += new.shape[1]
        logits = modify_logit_for_repetition_penalty(logits, sequences, repetition_penalty)
        if params.seqlen_offset < given:
            token = teacher_outputs[:, params.seqlen_offset]  # type: ignore[index]
        else:
            token = sample(logits, top_k, top_p, min_p, temperature)
        new = token[:, None]
        sequences = torch.cat([sequences, new], 1)
        if streamer is not None:
            streamer.put(new.cpu())
        ended = eos_token_id is not None and bool((token == eos_token_id).all())
        if ended or params.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"Prompt processing + decoding time: {1000 * (perf_counter() - begin):.0f}ms")
    return GenerateDecoderOnlyOutput(sequences, tuple(scores))


class GenerationMixin:
    """`generate` for models that take `inference_params`."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **options: Any) -> Any:
        """The states of all layers; models have their own."""
        raise NotImplementedError

    def generate(
        self, input_ids: Tensor, max_length: int, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0,
        temperature: float = 1.0, return_dict_in_generate: bool = False, output_scores: bool = False, **kwargs: Any,
    ):  # fmt: skip
        """`decode`: the sequences (B, T), or a GenerateDecoderOnlyOutput."""
        output = decode(
            input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores, **kwargs
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences
