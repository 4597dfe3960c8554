"""The child process: runs the package's commands one after the other, and measures each.

It reads one job per line from stdin and answers each with one line of JSON. What a command prints,
also from C++ or Rust, is read back from the files that stdout and stderr are redirected to.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from fuzz.commands import ADDRESS_SPACE

FILE_SIZE = 2 << 30
KEPT = 40_000
"""Characters of output that are reported."""
INTERRUPT_AFTER_S = 2.0
LINUX = sys.platform == "linux"

_running = False


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    jobs = os.fdopen(os.dup(0), "r")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = _redirect(1), _redirect(2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if LINUX:  # a net for what grows faster than the parent looks
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, _interrupt)
    for line in jobs:
        answers.write(json.dumps(_measure(json.loads(line), *output)) + "\n")
        answers.flush()


def _redirect(number: int) -> int:
    """Send a file descriptor to an anonymous file; returns one to read it with."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
    kept = os.dup(file.fileno())
    os.dup2(kept, number)
    return kept


def _interrupt(number: int, frame: Any) -> None:
    if _running:
        raise KeyboardInterrupt


def _measure(job: dict[str, Any], out: int, err: int) -> dict[str, Any]:
    global _running
    for file in (out, err):
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
    os.chdir(job["cwd"])
    os.environ["TMPDIR"] = tempfile.tempdir = job["tmp"]
    sys.stdin = io.StringIO(job["stdin"])
    _reset_peak()
    written, cpu, started = _written(), time.process_time(), time.monotonic()
    _limit_cpu(job["cpu_s"])
    status: Any = None
    problem = ""
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(job, out, cpu, done), daemon=True)
    _running = True
    try:
        watch.start()
        module = importlib.import_module(job["module"])
        status = module.main(job["argv"])
    except SystemExit as error:
        status = error.code
    except BaseException:
        problem = traceback.format_exc()
    _running = False
    done.set()
    watch.join()
    cpu_s = time.process_time() - cpu
    peak = _peak()
    _clear()
    return {
        "status": status,
        "problem": problem[-KEPT:],
        "out": _read(out, sys.stdout),
        "err": _read(err, sys.stderr),
        "cpu_s": cpu_s,
        "wall_s": time.monotonic() - started,
        "peak": peak,
        "written": _written() - written,
    }


def _watch(job: dict[str, Any], out: int, cpu: float, done: threading.Event) -> None:
    """Send Ctrl-C to a command that was told to do much, or that serves."""
    while not done.wait(0.05):
        busy = time.process_time() - cpu > INTERRUPT_AFTER_S
        serves = job["until"] and job["until"].encode() in os.pread(out, KEPT, 0)
        if (job["interrupt"] and busy) or serves:
            os.kill(os.getpid(), signal.SIGINT)
            return


def _limit_cpu(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _reset_peak() -> None:
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the most bytes of memory since `_reset_peak`; elsewhere than on Linux, ever."""
    if LINUX:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _written() -> int:
    if not LINUX:
        return 0
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def _clear() -> None:
    gc.collect()
    if (mx := sys.modules.get("mlx.core")) is not None:
        mx.clear_cache()


def _read(file: int, stream: Any) -> str:
    stream.flush()
    size = os.fstat(file).st_size
    start = os.pread(file, KEPT, 0)
    end = os.pread(file, KEPT, max(KEPT, size - KEPT)) if size > KEPT else b""
    return (start + end).decode("utf-8", "backslashreplace")


if __name__ == "__main__":
    main()
