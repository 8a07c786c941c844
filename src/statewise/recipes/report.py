"""What a finished run leaves behind: model, results.json, curve.png, a model card, and a table on the screen."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._version import __version__
from .._words import counted
from ..inference import bits_per_token, generate
from ..training.directory import RunDirectory, read_metrics, times
from .curve import plot_curve

if TYPE_CHECKING:
    from .recipe import Recipe

N_SAMPLES, SAMPLE_BYTES = 3, 240
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


def pick_prompts(text: bytes, count: int = N_SAMPLES, size: int = 24) -> list[str]:
    """Beginnings of lines from `count` even places of a text, cut at a word, for sampling."""
    prompts: list[str] = []
    for i in range(count):
        after = text[len(text) * (2 * i + 1) // (2 * count) :]
        lines = [line.strip() for line in after.split(b"\n")[1:]]
        # A sentence says more about a language model than a list item or a grammar rule.
        good = [x for x in lines if len(x) > size and x[:1].isupper()] or [x for x in lines if x] or [after or b"\n"]
        candidates = []
        for line in good[:50]:
            words = line[:size].decode("utf-8", "ignore")
            candidates.append(words.rsplit(" ", 1)[0] if " " in words and len(line) > size else words)
        prompts.append(next((c for c in candidates if c not in prompts), candidates[0]) or " ")
    return prompts


def _continue(model: Any, prompts: list[str], seed: int) -> list[str]:
    steps = generate(model, [list(p.encode()) for p in prompts], SAMPLE_BYTES, seed=seed, **SAMPLING)
    rows = torch.stack(list(steps), 1).tolist()
    return [bytes(row).decode("utf-8", "replace") for row in rows]


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _speed(rows: list[dict[str, float]]) -> tuple[float, float]:
    """(tokens per second, seconds) of the training, validations not counted."""
    seconds = times(rows)[0][-1]
    return rows[-1]["tokens"] / max(seconds, 1e-9), seconds


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _common(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    rate, seconds = _speed(read_metrics(run.metrics))
    return {
        "recipe": recipe.name,
        "parameters": _parameters(recipe.model),
        "steps": recipe.training.steps,
        "tokens_per_second": round(rate),
        "training_seconds": round(seconds, 1),
        "statewise": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}",
    }


def finish_language(recipe: Recipe, run: RunDirectory, console: Console) -> None:
    """Bits per byte of the held-out text beside the baselines, three continuations, and the files of the run."""
    from ..data.baselines import baselines

    corpus = recipe.data.corpus  # type: ignore[attr-defined]
    train, held_out = b"".join(corpus.train), b"".join(corpus.held_out)
    recipe.model.save_pretrained(run.path)
    with console.status("Evaluating"):
        bits = bits_per_token(recipe.model, torch.frombuffer(bytearray(held_out), dtype=torch.uint8))
        others = baselines(train, held_out)
        prompts = pick_prompts(held_out)
        texts = _continue(recipe.model, prompts, recipe.training.seed)
    results = {
        **_common(recipe, run),
        "text": corpus.name,
        "training_bytes": len(train),
        "held_out_bytes": len(held_out),
        "bits_per_byte": round(bits, 4),
        "baselines": {name: round(value, 4) for name, value in others.items()},
        "samples": [(prompt, _printable(text)) for prompt, text in zip(prompts, texts)],
    }
    _write(run.results, json.dumps(results, indent=2) + "\n")
    plot_curve(run, recipe.task, "bits per byte", others, final=bits)
    samples = results["samples"]
    _write(run.card, _language_card(recipe, results, samples))
    _show_language(console, results, samples)
    _show_directory(console, run)


def _show_language(console: Console, results: dict[str, Any], samples: list[tuple[str, str]]) -> None:
    table = Table(title=f"Held-out text, {results['held_out_bytes']:,} bytes", title_justify="left", min_width=36)
    table.add_column("model (lower is better)")
    table.add_column("bits per byte", justify="right")
    rows = [*results["baselines"].items(), ("this model", results["bits_per_byte"])]
    for name, value in sorted(rows, key=lambda row: -row[1]):
        style = "bold green" if name == "this model" else ""
        table.add_row(name, f"{value:.3f}", style=style)
    console.print()
    console.print(table)
    for prompt, text in samples:
        console.print()
        console.print(f"[bold]{escape(prompt)}[/]{escape(text)}", highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    # Bytes from a half-trained model could be control codes that move the cursor.
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _show_directory(console: Console, run: RunDirectory) -> None:
    console.print()
    console.print(f"Saved in [bold]{escape(str(run))}[/] (start with report.html). Next:", highlight=False)
    console.print(f'  statewise generate {escape(str(run))} --prompt "The "', highlight=False, soft_wrap=True)


def finish_probe(recipe: Recipe, run: RunDirectory, console: Console) -> None:
    """Accuracy on fresh rows beside chance, and the files of the run."""
    last = [row for row in read_metrics(run.metrics) if "val_accuracy" in row][-1]
    data = recipe.data
    chance = 1 / (data.n_symbols if hasattr(data, "n_symbols") else data.n_values)  # type: ignore[attr-defined]
    recipe.model.save_pretrained(run.path)
    results = {**_common(recipe, run), "accuracy": round(last["val_accuracy"], 4), "chance": round(chance, 4)}
    _write(run.results, json.dumps(results, indent=2) + "\n")
    plot_curve(run, recipe.task, "share of answers that are right", {"chance": chance}, final=last["val_accuracy"])
    _write(run.card, _probe_card(recipe, results))
    table = Table(title=recipe.name, title_justify="left")
    table.add_column("model")
    table.add_column("answers that are right", justify="right")
    table.add_row("chance", f"{chance:.1%}")
    table.add_row(describe(recipe), f"{last['val_accuracy']:.1%}", style="bold green")
    console.print()
    console.print(table)
    console.print(f"\nSaved in [bold]{escape(str(run))}[/] (start with report.html)", highlight=False)


def describe(recipe: Recipe) -> str:
    """E.g. "mamba2, 4 layers of width 192"."""
    config = recipe.model.config
    mixer = config["mixer"]
    entries = mixer if isinstance(mixer, list) else [mixer]
    names = [e if isinstance(e, str) else e["name"] for e in entries]
    return f"{', '.join(names)}, {counted(config['n_layer'], 'layer')} of width {config['d_model']}"


def _yaml(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump({"recipe": recipe.name, **recipe.config()}, sort_keys=False).strip()


def _facts(recipe: Recipe, results: dict[str, Any]) -> list[str]:
    return [
        f"- Model: {describe(recipe)}; {results['parameters']:,} parameters",
        f"- Training: {results['steps']:,} steps of {recipe.training.batch_size} rows, "
        f"{results['training_seconds']:,.0f} s at {results['tokens_per_second']:,} tokens/s "
        f"({results['machine']}, PyTorch {results['torch']})",
        f"- Made with statewise {results['statewise']}",
    ]


def _language_card(recipe: Recipe, results: dict[str, Any], samples: list[tuple[str, str]]) -> str:
    rows = [f"| {name} | {value:.3f} |" for name, value in results["baselines"].items()]
    lines = [
        "# Byte-level language model",
        "",
        f"- Text: {results['text']}; {results['training_bytes']:,} bytes to train on, the last "
        f"{results['held_out_bytes']:,} held out",
        *_facts(recipe, results),
        "",
        "## Held-out text, bits per byte",
        "",
        "| model | bits per byte |",
        "|---|---|",
        f"| **this model** | **{results['bits_per_byte']:.3f}** |",
        *rows,
        "",
        "The model and the n-gram baselines learned from the training part. The model reads the held-out part once,",
        "from beginning to end, and carries its state along. The compressors see the held-out part alone; compressing",
        "it after the training part would be another, stronger baseline.",
        "",
        "![Training curve](curve.png)",
        "",
        "## Continuations",
        "",
        f"The first words are the prompt (temperature {SAMPLING['temperature']}, top-p {SAMPLING['top_p']}).",
        "",
    ]
    for prompt, text in samples:
        lines += ["```text", f"{prompt}{text}".replace("```", "'''"), "```", ""]
    lines += [
        "## Use",
        "",
        "```python",
        "import statewise",
        "",
        'model = statewise.load("this/directory")',
        "```",
    ]
    lines += ["", "## Options", "", "```yaml", _yaml(recipe), "```", ""]
    return "\n".join(lines)


def _probe_card(recipe: Recipe, results: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            f"- Share of answers that are right: **{results['accuracy']:.1%}** (chance {results['chance']:.1%})",
            *_facts(recipe, results),
            "",
            "![Training curve](curve.png)",
            "",
            "## Options",
            "",
            "```yaml",
            _yaml(recipe),
            "```",
            "",
        ]
    )
