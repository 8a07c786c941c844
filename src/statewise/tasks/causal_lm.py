"""A model and its cross-entropy: next tokens of text (`CausalLM`), answers at marked positions or for whole rows
(`Recall`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from ..data.steps import IGNORE, Batch


class NonFinite(RuntimeError):
    """The loss or a gradient is infinite or not a number. The message names the step and the parameter group."""


class Task(pl.LightningModule):
    """A model that maps (tokens (B, L), seg) to logits (B, L, V) or (B, V), and its loss in nats per scored target.

    Args:
        model: `model(tokens, seg)`; logits past `vocab_size` (padding of the vocabulary) are not used.
        vocab_size: number of tokens, or of classes.
        optimize: `optimize(model) -> what LightningModule.configure_optimizers returns`;
            `statewise.training.adamw` makes one.
        clip: gradients are scaled so that their global norm is at most this; 0 leaves them alone.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss",)  # names in the order of metrics.csv
    headline: ClassVar[str] = "loss"  # the metric that progress, curve and report are about
    lower_is_better: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int,
        *,
        optimize: Callable[[nn.Module], Any] | None = None,
        clip: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.vocab_size, self.optimize, self.clip = model, vocab_size, optimize, clip
        self.shard: Callable[[nn.Module, Any], None] | None = None  # set where a strategy shards the weights
        self._sharded = False
        self.gradient_norm = math.nan
        self._loss = torch.zeros(())
        self._means = nn.ModuleDict({name: MeanMetric() for name in self.metrics})

    def _mean(self, name: str) -> MeanMetric:
        return cast(MeanMetric, self._means[name])

    def configure_model(self) -> None:
        # Lightning calls this once per fit or validate; weights can be sharded only once.
        if self.shard is not None and not self._sharded:
            self.shard(self.model, self.device_mesh["data_parallel"])  # type: ignore[index]
            self._sharded = True

    def forward(self, tokens: Tensor, seg: Any = None) -> Tensor:
        return self.model(tokens, seg)

    def measure(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """(means over the scored targets, "loss" among them; number of scored targets)."""
        outputs = self(batch.tokens, batch.seg)[..., : self.vocab_size]
        scored = batch.targets != IGNORE
        count = scored.sum()
        # Sum and divide by hand: the mean over no position at all must be 0, not NaN.
        values = {"loss": self.total_loss(outputs, batch.targets) / count.clamp(min=1)}
        self.add_metrics(values, outputs.detach(), batch.targets, scored)
        return values, count

    def total_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over all targets that are not IGNORE: here cross-entropy, in nats."""
        return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    def add_metrics(self, values: dict[str, Tensor], logits: Tensor, targets: Tensor, scored: Tensor) -> None:
        """Add this task's other metrics to `values`."""

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        values, _count = self.measure(batch)
        self._loss = values["loss"].detach()
        if self.trainer.world_size == 1:
            return values
        # For the log: the mean over all devices. The loss itself stays local; the strategy averages gradients.
        shown = torch.stack([values[name].detach() for name in self.metrics])
        shown = self.trainer.strategy.reduce(shown, reduce_op="mean")
        return {**dict(zip(self.metrics, shown)), "loss": values["loss"], "shown_loss": shown[0]}

    def validation_step(self, batch: Batch, _: int) -> None:
        values, count = self.measure(batch)
        for name, value in values.items():
            self._mean(name).update(value.detach(), weight=count)

    def on_validation_epoch_end(self) -> None:
        means = {f"val_{name}": self._mean(name).compute() for name in self.metrics}
        for name in self.metrics:
            self._mean(name).reset()
        # `compute` has gathered over all devices already; the mean of equal numbers does no harm.
        self.log_dict(means, sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimize is None:
            raise ValueError("optimize: this task was built without one, so it cannot be trained; "
                             "give e.g. statewise.training.adamw(steps=1000)")  # fmt: skip
        return self.optimize(self.model)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.gradient_norm = float(norm)
        if not (math.isfinite(self.gradient_norm) and math.isfinite(self._loss)):
            raise NonFinite(self._diagnose(optimizer))
        if self.clip > 0 and self.gradient_norm > self.clip:
            for p in parameters:
                p.grad.mul_(self.clip / self.gradient_norm)

    def _diagnose(self, optimizer: torch.optim.Optimizer) -> str:
        names = {p: name for name, p in self.model.named_parameters()}
        bad = []
        for group in optimizer.param_groups:
            wrong = [names[p] for p in group["params"] if p.grad is not None and not _finite(p.grad)]
            if wrong:
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                bad.append(f"parameter group {group.get('name', '?')!r} ({wrong[0]}{more})")
        where = " and ".join(bad) or "the norm over all parameter groups, though each gradient by itself is finite"
        loss = float(self._loss)
        return f"step {self.global_step + 1}: the loss is {loss:.4g} and the gradient is not finite in {where}"


def _finite(t: Tensor) -> bool:
    t = t.to_local() if hasattr(t, "to_local") else t
    return bool(torch.isfinite(t).all())


def shown(names: Iterable[str], outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """What `training_step` returned, as numbers over all devices, for logs."""
    return {name: float(outputs.get(f"shown_{name}", outputs[name])) for name in names}


class CausalLM(Task):
    """Every next token counts. Beside the loss: bits per byte.

    Args:
        bytes_per_token: how many bytes of text a token stands for on average; 1 for byte models.
    """

    metrics = ("loss", "bits_per_byte")
    headline = "bits_per_byte"

    def __init__(
        self, model: nn.Module, vocab_size: int = 256, *, bytes_per_token: float = 1.0, **options: Any
    ) -> None:
        super().__init__(model, vocab_size, **options)
        self.bytes_per_token = bytes_per_token

    def add_metrics(self, values: dict[str, Tensor], logits: Tensor, targets: Tensor, scored: Tensor) -> None:
        values["bits_per_byte"] = values["loss"].detach() / (math.log(2) * self.bytes_per_token)


class Recall(Task):
    """Answers at scored positions, or one for each row. Beside the loss: the share of answers that are right."""

    metrics = ("loss", "accuracy")
    headline = "accuracy"
    lower_is_better = False

    def add_metrics(self, values: dict[str, Tensor], logits: Tensor, targets: Tensor, scored: Tensor) -> None:
        right = (logits.argmax(-1) == targets) & scored
        values["accuracy"] = right.sum() / scored.sum().clamp(min=1)
