"""The server's memory under load for minutes: `python -m benchmarks.server_soak --minutes 10`.

Clients request completions and chats of any length, stream, disconnect and send invalid requests.
Fails if a checked answer is wrong, if the server fails, or if memory grows by more than `GROWTH_MB`
after the first fifth of the time.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections import Counter

from tests.helpers.running_server import BAD_BODIES, BAD_FIELDS, CHAT, COMPLETIONS, STORY, Running

GROWTH_MB = 40
"""Tolerance for the allocator; 10 minutes make tens of thousands of states of 0.1 MB."""

PROMPTS = [STORY[: 5 + 17 * n] for n in range(8)]


def memory_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def client(running: Running, n: int, end: float, alone: dict[str, str], seen: Counter) -> None:
    rng = random.Random(n)
    while time.monotonic() < end:
        kind = rng.choice(["plain", "plain", "stream", "chat", "leave", "bad", "sampled"])
        try:
            if kind == "plain":
                prompt = rng.choice(PROMPTS)
                right = running.complete(prompt, 10) == alone[prompt]
                seen["right" if right else "wrong"] += 1
            elif kind == "stream":
                prompt = rng.choice(PROMPTS)
                events = running.events(COMPLETIONS, prompt=prompt, max_tokens=10)
                text = "".join(event["choices"][0]["text"] for event in events)
                seen["right" if text == alone[prompt] else "wrong"] += 1
            elif kind == "chat":
                content = STORY[rng.randrange(200) :][: rng.randrange(1, 300)]
                messages = [{"role": "user", "content": content}]
                seen[running.post(CHAT, messages=messages, max_tokens=rng.randrange(1, 30))[0]] += 1
            elif kind == "leave":
                wanted = {"prompt": rng.choice(PROMPTS), "max_tokens": 500}
                running.leave(COMPLETIONS, rng.random(), **wanted, stream=rng.random() < 0.5)
                seen["left"] += 1
            elif kind == "bad":
                seen[running.post(COMPLETIONS, **rng.choice(BAD_FIELDS))[0]] += 1
                seen[running.send("POST", COMPLETIONS, rng.choice(BAD_BODIES))[0]] += 1
            else:
                prompt = str(rng.random())
                status, _ = running.post(COMPLETIONS, prompt=prompt, temperature=1.0, max_tokens=15)
                seen[status] += 1
        except Exception as error:
            seen[f"{kind}: {type(error).__name__}: {error}"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    running = Running("--dtype", "float32")
    seen: Counter = Counter()
    try:
        alone = {prompt: running.complete(prompt, 10) for prompt in PROMPTS}
        start = time.monotonic()
        end = start + 60 * args.minutes
        threads = [
            threading.Thread(target=client, args=(running, n, end, alone, seen))
            for n in range(args.clients)
        ]
        for thread in threads:
            thread.start()
        measured = []
        while time.monotonic() < end:
            time.sleep(min(10.0, 60 * args.minutes / 20))
            measured.append(memory_mb(running.process.pid))
            passed = time.monotonic() - start
            print(f"{passed:6.0f} s  {measured[-1]:8.1f} MB  {dict(seen)}", flush=True)
        for thread in threads:
            thread.join()
        assert running.complete(PROMPTS[2], 10) == alone[PROMPTS[2]]
        status = json.loads(running.send("GET", "/health")[1])
    finally:
        errors = running.stop()
    assert status == {"status": "ok"}
    assert "Traceback" not in errors, errors[-2000:]
    assert set(seen) <= {"right", "left", 200, 400}, seen
    settled = measured[len(measured) // 5]
    growth = max(measured[-3:]) - settled
    print(f"memory grew by {growth:.1f} MB after the first fifth; requests: {sum(seen.values())}")
    assert growth < GROWTH_MB


if __name__ == "__main__":
    main()
