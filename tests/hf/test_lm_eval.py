"""lm-evaluation-harness: its requests and a task of its own, without a network."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from statewise.hf import byte_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval (extra: lm-eval)")
pytestmark = pytest.mark.slow

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def directory(build, tmp_path):
    build("mamba2", vocab_size=256).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, doc={}, arguments=arguments, idx=0)


def test_requests(directory):
    from lm_eval.api.registry import get_model

    import statewise
    import statewise.hf.lm_eval

    lm = get_model("statewise")(pretrained=str(directory), batch_size=2)
    core = statewise.load(directory)
    pairs = [("the state", " is"), ("a", " tree of tensors")]
    got = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (likelihood, greedy) in zip(pairs, got):
        tokens = torch.tensor([list((context + continuation).encode())])
        chosen = core(tokens).log_softmax(-1)[0, len(context.encode()) - 1 : -1]
        target = tokens[0, len(context.encode()) :]
        assert likelihood == pytest.approx(chosen.gather(1, target[:, None]).sum().item(), rel=1e-5)
        assert greedy == bool((chosen.argmax(-1) == target).all())
    (empty,) = lm.loglikelihood([request("loglikelihood", "", "x")])
    assert empty[0] == pytest.approx(core(torch.tensor([[10]])).log_softmax(-1)[0, 0, ord("x")].item(), rel=1e-5)
    (made,) = lm.generate_until([request("generate_until", "the state", {"until": ["\n\n"], "max_gen_toks": 5})])
    tokens = torch.stack(list(statewise.inference.generate(core, [list(b"the state")], 5, temperature=0)), 1)
    assert made == bytes(tokens[0].tolist()).decode("utf-8", "replace")


def test_wrong_arguments(directory, build):
    from statewise.hf.lm_eval import StatewiseLM

    with pytest.raises(ValueError, match="dtype: want 'auto' or the name of a dtype of torch, got 'flaot32'"):
        StatewiseLM(str(directory), dtype="flaot32")
    with pytest.raises(ValueError, match="tokenizer: there is none beside the model, which has 61 tokens"):
        StatewiseLM(build("mamba"))
    lm = StatewiseLM(build("mamba", vocab_size=256).core, tokenizer=byte_tokenizer())
    assert lm.tok_encode("é") == [0xC3, 0xA9]


def test_a_task_from_the_command_line(directory, tmp_path):
    import json

    rows = [
        {"question": "the state is", "choices": [" a tree", " zzz"]},
        {"question": "one", "choices": [" two", " 2"]},
    ]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    command = [
        sys.executable, "-m", "statewise.hf.lm_eval", "--model", "statewise", "--model_args", f"pretrained={directory}",
        "--tasks", "tiny_choice", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(file.read_text())["results"]["tiny_choice"]["acc,none"]
    assert accuracy in (0.0, 0.5, 1.0)
    assert math.isfinite(accuracy)
