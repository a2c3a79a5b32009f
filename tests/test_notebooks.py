"""The notebooks: paired with their text, pinned to the versions that are tested, and running from top to bottom."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
COLAB = REPOSITORY / "colab"
TEXTS = sorted(path for path in COLAB.glob("*.py") if path.name != "pair.py")

# In a process of its own: the kernel's client has threads and warnings that are no concern of these tests.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def names(path: Path) -> str:
    return path.stem


def test_all_are_found():
    assert {path.stem for path in TEXTS} == {path.stem for path in COLAB.glob("*.ipynb")} >= {"generate"}


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_notebook_is_its_text(text: Path):
    program = (
        "import sys; from pathlib import Path; from pair import notebook; print(notebook(Path(sys.argv[1])), end='')"
    )
    made = subprocess.run([sys.executable, "-c", program, text], cwd=COLAB, capture_output=True, check=True).stdout
    assert made == text.with_suffix(".ipynb").read_bytes(), f"{text.name} was changed: run `make notebooks`"
    notebook = json.loads(made)
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_pins_are_the_tested_versions(text: Path):
    pins = re.findall(r'"(\w+==[\d.]+)"', text.read_text(encoding="utf-8"))
    tested = (REPOSITORY / ".ci" / "constraints.txt").read_text(encoding="utf-8").split()
    assert {pin.split("==")[0] for pin in pins} >= {"jax", "jaxlib", "tokenizers"}
    assert [pin for pin in pins if pin not in tested] == []


def execute(notebook: Path, folder: Path) -> tuple[int, str]:
    """How many pictures it draws and what it says, without a network, in an empty folder, where pip would fail."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "PIP_NO_INDEX": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
    done = folder / "done.ipynb"
    command = [sys.executable, "-W", "ignore", "-c", EXECUTE, str(notebook), str(done)]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    cells = json.loads(done.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return pictures, "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def changed(name: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """A notebook of which a reader changed some cells."""
    text = (COLAB / f"{name}.ipynb").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "changed.ipynb").write_text(text, encoding="utf-8")
    return folder / "changed.ipynb"


def test_a_prompt_that_is_changed_is_changed_everywhere():
    for name in ("decoding", "generate"):
        text = (COLAB / f"{name}.py").read_text(encoding="utf-8")
        assert text.count("The old house stood at the end of the road, and") == 1, name


def test_plan_and_shard_over_other_devices(tmp_path):
    fewer = ("device_count=8", "device_count=4"), ("fsdp=4,tensor=2", "fsdp=2,tensor=2")
    pictures, said = execute(changed("plan_and_shard", tmp_path, *fewer), tmp_path)
    assert pictures >= 2 and "4 devices of cpu" in said and "the same on one device: True" in said


def test_plan_and_shard_runs(tmp_path):
    """Without the TPU compiler the plans are left out; what is spread over devices is not."""
    pictures, said = execute(COLAB / "plan_and_shard.ipynb", tmp_path)
    compiled = importlib.util.find_spec("libtpu") is not None
    assert pictures == 2 + compiled and said.count("left out:") == 1 - compiled
    assert "8 devices of cpu" in said and "the same on one device: True" in said


def test_decoding_runs(tmp_path):
    """It holds itself to its claims: guessed texts are the greedy ones."""
    pictures, said = execute(COLAB / "decoding.ipynb", tmp_path)
    assert pictures == 4
    passes = dict(re.findall(r"^([\w ,]+): log p .* (\d+) passes$", said, re.MULTILINE))
    assert int(passes["prompt lookup"]) < int(passes["greedy"]) == 40 and len(passes) == 7


def test_pretrain_runs(tmp_path, monkeypatch):
    """A few steps on a part of the text; it is killed half way, and learns all the same."""
    monkeypatch.setenv("OPTJAX_NOTEBOOK_STEPS", "12")
    shorter = changed("pretrain", tmp_path, ("for path in library]", "for path in library[::4]]"))
    pictures, said = execute(shorter, tmp_path)
    assert pictures == 1
    killed = int(re.findall(r"killed after step (\d+) of 12", said)[0])
    steps = [int(step) for step in re.findall(r"^step (\d+):", said, re.MULTILINE)]
    assert 6 <= killed < 12 and steps[-1] == 12 and 2 < steps[0] <= killed + 1
    [(first, last)] = re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", said, re.MULTILINE)
    assert float(last) < float(first) - 2


def test_pretrain_says_why_a_run_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTJAX_NOTEBOOK_STEPS", "12")
    odd = changed("pretrain", tmp_path, ('num_attention_heads\\": 4', 'num_attention_heads\\": 5'))
    with pytest.raises(AssertionError, match="hidden_size.*num_attention_heads") as raised:
        execute(odd, tmp_path)
    assert "No such file" not in str(raised.value)  # of checkpoints, which are none


def test_finetune_runs(tmp_path, monkeypatch):
    """On a few docstrings: what is learned of them is shown, not judged."""
    monkeypatch.setenv("OPTJAX_NOTEBOOK_EXAMPLES", "80")
    pictures, said = execute(COLAB / "finetune.ipynb", tmp_path)
    assert pictures == 1
    assert said.count("left out:") == 1  # the hub's model
    assert re.search(r"^accuracy [\d.]+, F1", said, re.MULTILINE)
    assert re.search(r"^[\d,]+ numbers were trained beside 5,388,288$", said, re.MULTILINE)
    before, after = (text.splitlines()[1:] for text in said.split("--- ")[1:])
    assert before[: len(after)] != after


def test_generate_runs(tmp_path):
    pictures, said = execute(COLAB / "generate.ipynb", tmp_path)
    assert pictures == 4
    assert said.count("left out:") == 1  # the hub's model
    assert said.count("The old house stood at the end of the road, and") >= 4
