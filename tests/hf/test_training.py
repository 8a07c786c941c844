"""Trainer, TRL's SFTTrainer: they train, save and resume."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

import statewise

pytest.importorskip("accelerate", reason="Trainer needs accelerate")


class Rows(Dataset):
    def __init__(self, count=16, lengths=(9, 9)):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(count):
            n = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
            row = torch.randint(0, 5, (n,), generator=generator)
            self.rows.append({"input_ids": row, "labels": row.clone()})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def train(model, directory, steps, *, resume=None, rows=None, collate=None, **options):
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=4,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows or Rows(), data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_checkpoint_resumes(build, tmp_path):
    whole, parts, last = build(), build(), build()
    losses = train(whole, tmp_path / "whole", 8)
    assert losses[-1] < losses[0] - 0.5
    train(parts, tmp_path / "parts", 4)
    resumed = train(last, tmp_path / "parts", 8, resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert resumed == losses
    for (name, a), (_, b) in zip(whole.state_dict().items(), last.state_dict().items()):
        assert torch.equal(a, b), name
    x = torch.randint(0, 61, (1, 7))
    for read in (statewise.load, AutoModelForCausalLM.from_pretrained):
        model = read(tmp_path / "parts" / "checkpoint-8")
        got = model(x)
        assert torch.equal(got if isinstance(got, torch.Tensor) else got.logits, last.eval()(x).logits)


def test_packed_rows_and_recomputation_change_nothing(build, tmp_path):
    rows = Rows(lengths=(3, 12))
    packed, padded, recomputed = build(), build(), build()
    flatten = DataCollatorWithFlattening(return_tensors="pt", return_seq_idx=True)

    def pad(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        fill = lambda name, value: torch.stack(  # noqa: E731
            [torch.nn.functional.pad(row[name], (longest - len(row[name]), 0), value=value) for row in batch]
        )
        return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": fill("mask", 0)}

    for row in rows.rows:
        row["mask"] = torch.ones_like(row["input_ids"])
        row["labels"][0] = -100  # nothing stands before it that could predict it
    options = {"rows": rows, "remove_unused_columns": False}
    clean = lambda batch: flatten([{"input_ids": row["input_ids"]} for row in batch])  # noqa: E731
    a = train(packed, tmp_path / "a", 4, collate=clean, **options)
    b = train(padded, tmp_path / "b", 4, collate=pad, **options)
    c = train(recomputed, tmp_path / "c", 4, collate=clean, gradient_checkpointing=True, **options)
    assert a == pytest.approx(b, rel=1e-4)
    assert a == pytest.approx(c, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning_with_lora(build, packing, tmp_path):
    trl = pytest.importorskip("trl", reason="SFT needs trl")
    peft = pytest.importorskip("peft", reason="LoRA needs peft (extra: peft)")
    datasets = pytest.importorskip("datasets", reason="SFT needs datasets")
    from statewise.hf import byte_tokenizer, lora_targets

    model, tokenizer = build(vocab_size=256), byte_tokenizer()
    data = datasets.Dataset.from_dict({"text": ["the state is a tree", "and the tree is the state"] * 8})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=5e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, max_length=32, packing=packing, logging_steps=1, save_steps=6, bf16=False,
        dataset_text_field="text", lr_scheduler_type="constant",
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules=lora_targets(model))

    def trainer():
        return trl.SFTTrainer(
            build(vocab_size=256), args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )

    first = trainer()
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.15
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == pytest.approx(losses, rel=1e-4)
