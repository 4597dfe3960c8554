"""Teach the embedded model to answer questions about Griffin, and print what came of it.

    python examples/finetune/run.py

Trains with lora.yaml, measures the loss and the answers before and after, fuses the adapters, and
queries the fused model again in plain mlx-lm: four and a half CPU minutes. All goes to `--folder`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_rgemma import batch_generate, load

HERE = Path(__file__).parent
SHOWN = 8
MAX_TOKENS = 40

ASK_MLX_LM = """
import json, sys
from mlx_lm import generate, load
model, tokenizer = load(sys.argv[1])
assert type(model).__module__.startswith("mlx_lm")
print(json.dumps([generate(model, tokenizer, p, max_tokens=40) for p in json.load(sys.stdin)]))
"""


def examples(split: str) -> list[dict[str, str]]:
    """Prompts and completions of a split."""
    lines = (HERE / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def command(name: str, *arguments: Any) -> str:
    """Run one of the package's commands; -> what it printed."""
    words = [sys.executable, "-m", f"mlx_rgemma.{name}", *map(str, arguments)]
    print("$ python -m", " ".join(words[2:]), flush=True)
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE).stdout


def answers(model: Any, tokenizer: Any, split: str) -> list[str]:
    """Return a model's greedy answer to each question of a split."""
    prompts = [example["prompt"] for example in examples(split)]
    texts = batch_generate(model, tokenizer, prompts, max_tokens=MAX_TOKENS).texts
    return [text.strip() for text in texts]


def exact(split: str, said: list[str]) -> str:
    """How many answers are right to the letter."""
    wanted = [example["completion"].strip() for example in examples(split)]
    right = sum(a == b for a, b in zip(said, wanted, strict=True))
    return f"{right} of {len(wanted)}"


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path("griffin_questions"))
    parser.add_argument("--trained", action="store_true", help="The adapters are there already.")
    args = parser.parse_args()
    adapters, fused = (args.folder / "adapters").resolve(), (args.folder / "fused").resolve()
    test = ["--test", "-c", "lora.yaml", "--test-batches", -1]
    before = command("lora", *test, "--adapter-path", "").splitlines()[-1]
    if not args.trained:
        print(command("lora", "--train", "-c", "lora.yaml", "--adapter-path", adapters))
    after = command("lora", *test, "--adapter-path", adapters).splitlines()[-1]
    if not fused.exists():
        command("fuse", "--adapter-path", adapters, "--save-path", fused)

    plain, tuned = load(), load(adapter_path=adapters)
    said = {(n, s): answers(*m, s) for n, m in enumerate((plain, tuned)) for s in ("train", "test")}
    prompts = json.dumps([example["prompt"] for example in examples("train")])
    asked = [sys.executable, "-c", ASK_MLX_LM, str(fused)]
    found = subprocess.run(asked, input=prompts, check=True, stdout=subprocess.PIPE, text=True)
    in_mlx_lm = [text.strip() for text in json.loads(found.stdout.splitlines()[-1])]

    print("\n| | before | after |\n| --- | --- | --- |")
    print(f"| unseen wordings | {before} | {after} |")
    for split, title in (("train", "questions of the data"), ("test", "unseen wordings")):
        print(
            f"| {title}, exact answers | {exact(split, said[0, split])} |"
            f" {exact(split, said[1, split])} |"
        )
    print(f"| fused, in plain mlx-lm, exact answers | | {exact('train', in_mlx_lm)} |")
    print("\n| question (unseen wording) | before | after |\n| --- | --- | --- |")
    rows = list(zip(examples("test"), said[0, "test"], said[1, "test"], strict=True))
    for example, first, second in rows[:: len(rows) // SHOWN]:
        question = example["prompt"].split("\n")[0].removeprefix("Question: ")
        print(f"| {question} | {' '.join(first.split())[:50]} | {second} |")
    wrong = [
        (example, text)
        for example, text in zip(examples("test"), said[1, "test"], strict=True)
        if text != example["completion"].strip()
    ]
    print("\nUnseen wordings answered otherwise:")
    for example, text in wrong:
        question = example["prompt"].split("\n")[0].removeprefix("Question: ")
        print(f"- {question} {text} (in the data: {example['completion'].strip()})")


if __name__ == "__main__":
    main()
