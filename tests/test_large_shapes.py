"""Models with the heads of Llama-3-8B, Qwen3-8B and Gemma-3-12B at 32,768 cells: what they take, and how long one compression is planned and done.

One layer that is compressed of each, and embeddings as small as they can be; tests/measure/large_shapes.py has the real ones.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

MEASURE = Path(__file__).with_name("measure")
sys.path.insert(0, str(MEASURE))

from shaped_model import SHAPES, write_shaped_model  # noqa: E402


@pytest.mark.cpu_only
@pytest.mark.parametrize(("name", "n_layer", "policy"), [("llama3-8b", 1, "recall"), ("qwen3-8b", 1, "snapkv"), ("gemma3-12b", 6, "recall")])
def test_memory_and_one_compression_at_32768_cells(smollm2: Path, tmp_path: Path, name: str, n_layer: int, policy: str) -> None:
    path = tmp_path / f"{name}.gguf"
    write_shaped_model(smollm2, path, replace(SHAPES[name], n_layer=n_layer, n_embd=256, n_ff=512))
    command = [sys.executable, str(MEASURE / "large_shapes.py"), "--model", str(path), "--policies", policy, "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cells"] == 32768 + 128 and found["layers"] == [1, n_layer]
    # nothing is missing, and little too much
    assert 0.95 * found["resident"] < found["estimate"] < 1.3 * found["resident"]
    # of a process's own time; a model has 8 to 36 such layers
    assert sum(value for phase, value in found["seconds"].items() if phase != "prefill") < 2
