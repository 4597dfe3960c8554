"""Conversion that is stopped, or runs out of room: nothing is left, one tensor is in memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.checkpoint_files import CONFIG, SINGLE
from helpers.models import GOLDEN

from mlx_rgemma import GriffinConfig, convert, load_model
from mlx_rgemma.checkpoints.schema import expected_tensors
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.hub import EMBEDDED

SLOWLY = """
import sys, time
from mlx_rgemma.checkpoints.tensors import ConvertedWeights
from mlx_rgemma.convert import main
converted = ConvertedWeights._converted
def slowly(*arguments):
    print("writing", flush=True)
    time.sleep(0.02)
    yield from converted(*arguments)
ConvertedWeights._converted = slowly
sys.exit(main(["--hf-path", sys.argv[1], "--mlx-path", sys.argv[2], "-q"]))
"""


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 20), (signal.SIGHUP, 50), (signal.SIGKILL, 30)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "SIGKILL"],
)
def test_killed_in_the_middle(tmp_path, number, after):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(EMBEDDED), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(after):
        assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    left = list(tmp_path.iterdir())
    assert not (tmp_path / "out").exists()
    if number == signal.SIGKILL:
        with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
            load_model(left[0])
    else:
        assert left == []
    convert(EMBEDDED, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_disk_that_fills_up(tmp_path):
    """A write that fails in the middle, as on a full disk: a limit on the size of files."""
    code = """
import resource, sys
from mlx_rgemma.convert import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(["--hf-path", sys.argv[1], "--mlx-path", sys.argv[2]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN / "tiny-2b"), str(tmp_path / "a" / "out")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "out was not written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_one_tensor(tmp_path):
    """Fourteen layers more do not need more memory: tensors are freed as they are written."""
    peaks = []
    for layers in (2, 16):
        source = tmp_path / f"source {layers}"
        source.mkdir()
        values = json.loads((GOLDEN / "tiny-2b" / CONFIG).read_text())
        sizes = {"hidden_size": 256, "lru_width": 256, "num_attention_heads": 4, "head_dim": 64}
        sizes |= {"intermediate_size": 2048, "num_hidden_layers": layers}
        (source / CONFIG).write_text(json.dumps({**values, **sizes}))
        config = GriffinConfig.from_dict({**values, **sizes})
        tensors = {w.name: mx.zeros(w.shape, mx.bfloat16) for w in expected_tensors(config)}
        mx.save_safetensors(str(source / SINGLE), tensors)
        del tensors
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        convert(source, tmp_path / f"out {layers}", quantize=True)
        peaks.append(mx.get_peak_memory() - before)
        shutil.rmtree(source)
    assert peaks[1] < 1.2 * peaks[0]


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), original(handle)))
    rename = Path.rename

    def checked(partial: Path, target: Path) -> Path:
        assert len(synced) > len(list(partial.iterdir()))
        return rename(partial, target)

    monkeypatch.setattr(Path, "rename", checked)
    convert(GOLDEN / "tiny-2b", tmp_path / "out")
    assert (tmp_path / "out").is_dir()
