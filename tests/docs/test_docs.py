"""The pages are true: every Python block runs, every link leads somewhere, and tables and commands match the code."""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml

from statewise import cli, mixers, ops, recipes
from statewise.models import list_models, model_card

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# README is a page like any other, wherever it exists.
PAGES = sorted([*DOCS.rglob("*.md"), *(p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] if p.exists())])
_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)


class Block(NamedTuple):
    kind: str
    line: int  # of the first line of the body, counted from 1
    body: str


def _blocks(text: str) -> list[Block]:
    return [
        Block(m["kind"], text.count("\n", 0, m.start("body")) + 1, dedent(m["body"])) for m in _FENCE.finditer(text)
    ]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _having(*kinds: str) -> list[Any]:
    found = [p for p in PAGES if any(b.kind in kinds for b in _blocks(p.read_text(encoding="utf-8")))]
    return [pytest.param(p, id=_name(p)) for p in found]


# ---- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", _having("python"))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in order, in one namespace and in an empty directory."""
    monkeypatch.chdir(tmp_path)
    # A real module: torch.compile imports the module in which a class was defined.
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in _blocks(page.read_text(encoding="utf-8")):
        if block.kind == "python":
            # Line breaks in front, so that a traceback shows the line of the page.
            exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), vars(module))


def _commands(page: Path) -> list[list[str]]:
    """Every `statewise ...` in the shell blocks of a page, as words."""
    found = []
    for block in _blocks(page.read_text(encoding="utf-8")):
        if block.kind in ("bash", "sh"):
            for part in re.split(r"\n|&&|\|", block.body.replace("\\\n", " ")):
                # What stands in quotes is one value; a word after # is a comment.
                words = re.sub(r"(\"[^\"]*\"|'[^']*')", "VALUE", part).split("#")[0].split()
                if "statewise" in words:
                    found.append(words[words.index("statewise") + 1 :])
                elif "statewise.cli" in words:
                    found.append(words[words.index("statewise.cli") + 1 :])
    return found


@pytest.mark.parametrize("page", _having("bash", "sh"))
def test_commands_and_their_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in _commands(page):
        command, *rest = words
        recipe = [rest[0]] if command in ("run", "compare") and rest and not rest[0].startswith("-") else []
        assert cli.main([command, *recipe, "--help"]) == 0, f"{_name(page)}: statewise {' '.join(words)}"
        known = set(re.findall(r"--[a-z][a-z.-]*", capsys.readouterr().out)) | {"--help"}
        for word in rest:
            if word.startswith("--"):
                flag = word.partition("=")[0].replace("_", "-")
                assert flag in known, f"{_name(page)}: statewise {command} has no option {flag}"


@pytest.mark.parametrize("page", _having("yaml"))
def test_yaml_blocks_with_a_recipe_are_configurations(page: Path, tmp_path: Path) -> None:
    """Blocks that name a recipe hold options that its function takes."""
    from statewise.cli.run import _options

    for block in _blocks(page.read_text(encoding="utf-8")):
        config = yaml.safe_load(block.body) if block.kind == "yaml" else None
        if isinstance(config, dict) and "recipe" in config:
            _options(config.pop("recipe")).parse([], config)


# ---- what is linked ------------------------------------------------------------------------------------------------


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = [re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower() for h in headings]
    return {re.sub(r"[\s-]+", "-", h) for h in plain}


@pytest.mark.parametrize("page", [pytest.param(p, id=_name(p)) for p in PAGES])
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)", _without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{_name(page)}: there is no {target}"
        if anchor:
            assert anchor in _anchors(there), f"{_name(page)}: {_name(there)} has no heading #{anchor}"


def _nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return list(chain.from_iterable(map(_nav, entry.values() if isinstance(entry, dict) else entry)))


def test_every_page_is_in_the_navigation_and_exists() -> None:
    listed = _nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


# ---- what is listed ------------------------------------------------------------------------------------------------


def _rows(page: Path, header: str) -> dict[str, list[str]]:
    """Rows of the table whose first column is called `header`: first cell -> the others, without backticks."""
    lines = page.read_text(encoding="utf-8").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *others = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        rows[first] = others
    return rows


def _inputs(spec: ops.OpSpec) -> dict[str, Any]:
    import torch

    cases = spec.load_cases()
    generator = torch.Generator().manual_seed(0)
    return cases.sample(cases.VARIANTS[0], 1, 3, dtype=torch.float32, decay="mixed", generator=generator)


def test_the_table_of_ops_is_true() -> None:
    rows = _rows(DOCS / "ops.md", "op")
    assert sorted(rows) == sorted(ops.OPS)
    for name, (backends, views, *_) in rows.items():
        assert backends.split(", ") == list(ops.OPS[name].reasons(**_inputs(ops.OPS[name]))), name
        public = {v for v in ("step", "matrix", "summary", "carry", "combine") if f"{name}_{v}" in ops.__all__}
        assert set(views.split(", ")) == public, name


def test_the_table_of_their_parts_is_true() -> None:
    import torch

    from statewise.ops.dplr.cauchy import reasons as cauchy
    from statewise.ops.lti import convolution, vandermonde

    rows = _rows(DOCS / "ops.md", "function")
    kernel = torch.ones(1, 1)
    reasons = {
        "diagonal_kernel": vandermonde.reasons(kernel, kernel),
        "lti_conv": convolution.reasons(torch.ones(1, 1, 1), kernel),
        "cauchy": cauchy(kernel, kernel),
    }
    assert {name: backends.split(", ") for name, (backends, _) in rows.items()} == {
        name: list(found) for name, found in reasons.items()
    }


def test_every_public_op_is_on_its_page() -> None:
    page = (DOCS / "ops.md").read_text(encoding="utf-8")
    shown = {line.rsplit(".", 1)[1] for line in page.split("\n") if line.startswith("::: ")}
    assert shown == set(ops.__all__)


def test_every_mixer_is_on_its_page() -> None:
    rows = _rows(DOCS / "mixers.md", "name")
    assert sorted(rows) == mixers.names()
    page = (DOCS / "mixers.md").read_text(encoding="utf-8")
    for name, (cls, *_) in rows.items():
        assert mixers.mixer_class(name).__name__ == cls
        assert f"\n::: statewise.mixers.{mixers.mixer_class(name).__module__.rsplit('.', 1)[1]}.{cls}\n" in page


def test_the_table_of_models_is_true() -> None:
    rows = _rows(DOCS / "models.md", "preset")
    assert list(rows) == list_models()
    for name, (parameters, *_) in rows.items():
        assert int(parameters.replace(",", "")) == model_card(name).parameters, name


def test_every_recipe_is_on_the_page_about_training() -> None:
    assert sorted(_rows(DOCS / "training.md", "recipe")) == recipes.names()
