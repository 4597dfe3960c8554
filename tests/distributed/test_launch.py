"""Commands under mlx.launch: several processes on this machine, which find each other by loopback.

They share two cores, and MLX's ring waits by spinning: nothing is measured here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.launching import Launched, free_ports, launch
from helpers.random_models import EMBEDDED, random_checkpoint
from helpers.running_server import Running

from mlx_rgemma import convert, generate, load
from mlx_rgemma.generate import main as generate_alone
from mlx_rgemma.lora import main as lora
from mlx_rgemma.train import main as train

pytestmark = [pytest.mark.slow, pytest.mark.network]

STORIES = EMBEDDED.parent / "stories.txt"
GENERATE = ("-m", "mlx_rgemma.generate", "--prompt", "Once upon a time", "--verbose", "F")

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds processes in /proc"
)


def own_lines(errors: str) -> str:
    """What has been written to stderr, without what mlx.launch itself says of the end.

    Its line may be cut in two by a process's own: the colour's end then stands alone.
    """
    errors = errors.replace("\x1b[0m\n", "\n").replace("\n\n", "\n")
    return "".join(line for line in errors.splitlines(keepends=True) if "WARN" not in line)


QUANTIZED = {
    "4-bit": {"q_bits": 4},
    "8-bit": {"q_bits": 8},
    "mxfp4": {"q_bits": 4, "q_mode": "mxfp4"},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """A folder with a model that four processes can share, quantized in several ways."""
    folder = tmp_path_factory.mktemp("quantized")
    plain = random_checkpoint(folder / "plain")
    for name, how in QUANTIZED.items():
        convert(plain, folder / f"quantized-{name}", quantize=True, q_group_size=32, **how)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_processes_compute_what_one_does(size, quantized):
    launched = launch(size, str(Path(__file__).parent / "ranks.py"), str(quantized))
    assert launched.text == "all well\n", launched.errors


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["embedded", *QUANTIZED])
def test_generate_writes_the_text_of_one_process(name, size, quantized, capsys):
    path = EMBEDDED if name == "embedded" else quantized / f"quantized-{name}"
    command = [*GENERATE[2:], "--max-tokens", "8", "--model", str(path)]
    assert generate_alone(command) == 0
    alone = capsys.readouterr().out
    launched = launch(size, *GENERATE[:2], *command)
    assert launched.text == alone and len(alone) > 20, launched.errors
    assert launched.errors.count("held in float32") <= 1  # one process speaks


def test_a_seed_draws_the_text_of_one_process(capsys):
    command = [*GENERATE[2:], "--max-tokens", "20", "--temp", "0.9", "--seed", "5"]
    assert generate_alone(command) == 0
    assert launch(2, *GENERATE[:2], *command).text == capsys.readouterr().out


def test_one_process_under_mlx_launch_is_by_itself(capsys):
    command = [*GENERATE[2:], "--max-tokens", "8"]
    assert generate_alone(command) == 0
    assert launch(1, *GENERATE[:2], *command).text == capsys.readouterr().out


@pytest.mark.parametrize(
    "size, name, sizes", [(3, "embedded", "2, 4"), (4, "64", "2")], ids=["plain", "quantized"]
)
def test_a_number_of_processes_that_cannot_share_is_one_line(size, name, sizes, quantized):
    path = EMBEDDED if name == "embedded" else quantized / "groups-of-64"
    if name != "embedded":
        convert(quantized / "plain", path, quantize=True, q_group_size=64)
    launched = launch(size, *GENERATE, "--model", str(path))
    assert launched.text == ""
    expected = rf"error: {size} processes cannot share .* numbers that can: {sizes}\.\n"
    assert re.fullmatch(expected, own_lines(launched.errors)), launched.errors


def test_a_mistake_is_one_line():
    launched = launch(2, *GENERATE, "--model", "nonsense")
    line = own_lines(launched.errors)
    assert re.fullmatch(r"error: nonsense: no such folder.*\n", line), launched.errors
    assert launched.text == ""


def test_input_without_an_end_is_refused():
    launched = launch(2, "-m", "mlx_rgemma.generate", "--prompt", "-")
    assert "error: --prompt - never ends under mlx.launch; use a file." in launched.errors


@needs_proc
def test_a_process_that_is_killed_while_it_generates_ends_all():
    with Launched(2, *GENERATE[:-2], "-m", "100000") as launched:
        launched.wait_until(lambda text: len(text) > 60, 200)
        os.kill(launched.rank(1), signal.SIGKILL)
        launched.end(60)
        errors = launched.errors()
    assert "error: rank 1 of 2 has ended or cannot be reached; ending." in errors


@needs_proc
def test_a_process_that_stands_still_ends_all():
    command = (*GENERATE[:-2], "-m", "100000")
    with Launched(2, *command, MLX_RGEMMA_PEER_TIMEOUT="3") as launched:
        launched.wait_until(lambda text: len(text) > 60, 200)
        still = launched.rank(1)
        os.kill(still, signal.SIGSTOP)
        message = "error: rank 1 of 2 has been silent for 3 s; ending."
        launched.wait_until(lambda text: message in text, 60)
        os.kill(still, signal.SIGCONT)  # mlx.launch has told it to end
        launched.end(60)


@needs_proc
def test_nothing_is_left_of_tests_that_are_killed():
    start = (
        "from helpers.launching import Launched; import time; l = Launched(2, *{}); time.sleep(0.5)"
    )
    start += "; print(l.process.pid, flush=True); time.sleep(100)"
    command = [sys.executable, "-c", start.format(["-c", "import time; time.sleep(100)"])]
    folder = str(Path(__file__).parents[1])
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as tests:
        group = int(tests.stdout.readline())
        os.killpg(group, 0)
        tests.kill()
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)


def test_a_process_that_never_comes_ends_the_wait(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    environment = {**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}
    result = subprocess.run(
        [sys.executable, *GENERATE],
        env={**environment, "MLX_RGEMMA_PEER_TIMEOUT": "1.5"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(
        r"error: rank 0 of 2 timed out after 1\.5 s waiting for rank 1 \(127\.0\.0\.1:\d+\); .*\n",
        result.stderr,
    )


TRAIN = (
    "-m", "mlx_rgemma.train", "--data", str(STORIES), "--init-from", "embedded",
    "--batch-size", "4", "--context-length", "32", "--iters", "5", "--warmup", "1",
    "--steps-per-report", "1", "--steps-per-eval", "3", "--steps-per-save", "2",
    "--sample-tokens", "1", "--average-decay", "0.9",
)  # fmt: skip


def losses(folder: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        (line["iteration"], key, line[key])
        for line in lines
        for key in ("train_loss", "val_loss", "trained_tokens")
        if key in line
    ]


@needs_proc
def test_training_has_the_losses_of_one_process_through_a_kill(tmp_path):
    """Two processes, one of them killed; three finish it, with two, one and one row of a batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train([*TRAIN[2:], "--save-path", str(one)]) == 0
    command = (*TRAIN, "--save-path", str(two))
    with Launched(2, *command) as launched:
        launched.wait_until(lambda text: "Iter 3: Train" in text, 200)
        os.kill(launched.rank(1), signal.SIGKILL)
        launched.end(60)
        assert "error: rank 1 of 2 has ended" in launched.errors()
    launched = launch(3, *command)
    assert re.search(r"^Resuming after iteration [24]$", launched.text, re.M), launched.errors
    assert launched.text.count("Iter 5: Train") == 1
    assert [found[:2] for found in losses(two)] == [expected[:2] for expected in losses(one)]
    for found, expected in zip(losses(two), losses(one), strict=True):
        assert abs(found[2] - expected[2]) < 1e-5, (found, expected)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


def test_fine_tuning_by_two_ranks_continues_in_one_process(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    stories = STORIES.read_text().split("\n\n")
    for name, chosen in (("train", stories[:8]), ("valid", stories[8:10])):
        lines = [json.dumps({"text": story[: 80 + 10 * i]}) for i, story in enumerate(chosen)]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    command = [
        "-m", "mlx_rgemma.lora", "--train", "--data", str(data), "--num-layers", "2",
        "--steps-per-report", "1", "--learning-rate", "1e-3", "--save-every", "2",
    ]  # fmt: skip
    assert lora([*command[2:], "--iters", "4", "--adapter-path", str(tmp_path / "one")]) == 0
    by_one = capsys.readouterr().out
    folder = str(tmp_path / "two")
    launched = launch(2, *command, "--iters", "2", "--adapter-path", folder)
    assert lora([*command[2:], "--iters", "4", "--resume", "--adapter-path", folder]) == 0
    rest = capsys.readouterr().out
    found = re.findall(r"Train loss ([\d.]+)", launched.text + rest)
    assert found == re.findall(r"Train loss ([\d.]+)", by_one) and len(found) == 4
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "two")]
    assert names[0] == names[1]


@needs_proc
def test_the_server_answers_as_one_process_and_ends_with_all():
    port = free_ports(9)[-1]
    prompts = ["Once upon a time", "A cat"]
    command = ("-m", "mlx_rgemma.server", "--port", str(port), "--log-level", "ERROR")
    with Launched(2, *command) as launched:
        launched.wait_until(lambda text: "Serving at" in text, 200)
        assert launched.text().count("Serving at") == 1
        server = Running.__new__(Running)
        server.port = port
        found = [server.complete(prompt, 8) for prompt in prompts]
        seeded = [server.complete("The king", 6, temperature=1.0, seed=5) for _ in range(2)]
        assert seeded[0] == seeded[1]
        os.kill(launched.rank(0), signal.SIGINT)
        launched.end(60)
        assert launched.errors() == ""
    model, tokenizer = load()
    assert found == [generate(model, tokenizer, prompt, max_tokens=8) for prompt in prompts]
