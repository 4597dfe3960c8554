"""Bounds on the modules that the model class imports, and on the files that a decode step runs.

A decode step is measured with MLX's own operations. With Metal kernels it runs `ops/metal.py` in
place of `ops/causal_conv1d.py`, `ops/rg_lru.py`, `ops/scan.py` and `ops/linear.py`. Both numbers
follow from one file per operation. Lower a bound when files are merged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

MAX_IMPORTED_MODULES = 30
MAX_FILES_PER_TOKEN = 25

IMPORTED = """
import json, sys
from mlx_rgemma import Model
print(json.dumps([name for name in sys.modules if name.partition(".")[0] == "mlx_rgemma"]))
"""

PER_TOKEN = """
import json, sys
from pathlib import Path
import mlx_rgemma
from mlx_rgemma import load, stream_generate

package = Path(mlx_rgemma.__file__).parent
files = set()

def note(frame, event, argument):
    path = Path(frame.f_code.co_filename)
    if event == "call" and path.is_relative_to(package):
        files.add(str(path.relative_to(package)))

responses = stream_generate(*load(), "Once upon a time", 10)
for _ in range(5):
    next(responses)
sys.setprofile(note)
next(responses)
sys.setprofile(None)
responses.close()
print(json.dumps(sorted(files)))
"""


def run(code: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MLX_RGEMMA_BACKEND": "mlx"},
    )
    assert result.returncode == 0, result.stderr
    found: list[str] = json.loads(result.stdout)
    return found


def test_modules_imported_with_the_model_class():
    found = run(IMPORTED)
    assert "mlx_rgemma.griffin.model" in found
    assert len(found) <= MAX_IMPORTED_MODULES, found


def test_files_run_per_token():
    found = run(PER_TOKEN)
    assert {"generation/decode.py", "griffin/model.py", "ops/rms_norm.py"} <= set(found)
    assert not any(name.startswith("cpu/") for name in found)
    assert len(found) <= MAX_FILES_PER_TOKEN, found
