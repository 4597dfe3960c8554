"""The commands lora and fuse, from data to a model that plain mlx-lm runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.models import golden_model
from mlx.utils import tree_flatten

import mlx_rgemma.fuse as fuse
import mlx_rgemma.lora as lora
from mlx_rgemma import load
from mlx_rgemma.adapters.files import AdapterConfig, add_adapters
from mlx_rgemma.ops.backend import Backend, active
from mlx_rgemma.tuner.data.batches import DataLoader, PackedDataset
from mlx_rgemma.tuner.data.packing import Documents
from mlx_rgemma.tuner.grad_checkpoint import checkpoint_layers
from mlx_rgemma.tuner.loss import batch_loss
from mlx_rgemma.tuner.train_state import TrainingState
from mlx_rgemma.tuner.trainer import LoopSettings, fit

pytestmark = pytest.mark.slow

QUESTIONS = {
    "What is Griffin?": "A model by Google.",
    "Who reads the text?": "The recurrent state.",
    "What is the cap?": "Thirty.",
    "How many gates?": "Two.",
    "What does the window hold?": "The last keys.",
}
LAYERS = ["--num-layers", "-1", "--batch-size", "5", "--learning-rate", "5e-4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [
        json.dumps({"prompt": f"Q: {question}\nA:", "completion": f" {answer}"})
        for question, answer in QUESTIONS.items()
    ]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(command, *arguments) -> int:
    return command.main([str(argument) for argument in arguments])


def losses(text: str, kind: str) -> list[float]:
    """Values of the lines like "Iter 10: Train loss 2.345, ..."."""
    found = [line.split(f"{kind} loss ")[1] for line in text.splitlines() if f"{kind} loss" in line]
    return [float(line.split(",")[0]) for line in found]


def test_from_data_to_plain_mlx_lm(data, tmp_path, capsys):
    adapters, fused = tmp_path / "adapters", tmp_path / "fused"
    arguments = ["--data", data, "--adapter-path", adapters, "--mask-prompt", "--lora-gates"]
    training = ["--train", "--iters", 60, "--save-every", 30, "--test", *LAYERS]
    assert run(lora, *arguments, *training) == 0
    printed = capsys.readouterr().out
    validation = losses(printed, "Val")
    assert validation[0] > 4 and validation[-1] < 0.1
    assert {file.name for file in adapters.iterdir()} == {
        "0000030_adapters.safetensors",
        "0000060_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "training_state.safetensors",
    }
    # Afterwards, from the files, the same loss.
    assert run(lora, *arguments, "--test") == 0
    assert losses(capsys.readouterr().out, "Test") == losses(printed, "Test")

    assert run(fuse, "--adapter-path", adapters, "--save-path", fused) == 0
    assert run(fuse, "--adapter-path", adapters, "--save-path", fused) == 1
    assert "exists already" in capsys.readouterr().err
    assert mx.load(str(fused / "model.safetensors"))["model.embed_tokens.weight"].dtype == (
        mx.bfloat16
    )
    program = (
        "import json, sys; from mlx_lm import load, generate;"
        "model, tokenizer = load(sys.argv[1]); assert 'mlx_lm' in type(model).__module__;"
        "print(json.dumps([generate(model, tokenizer, q, max_tokens=20) for q in sys.argv[2:]]))"
    )
    prompts = [f"Q: {question}\nA:" for question in QUESTIONS]
    plain = subprocess.run(
        [sys.executable, "-c", program, fused, *prompts], capture_output=True, text=True, check=True
    )
    said = [text.strip() for text in json.loads(plain.stdout.splitlines()[-1])]
    assert said == list(QUESTIONS.values())


def test_quantized_base_stays_quantized(data, tmp_path, capsys):
    from mlx_rgemma.checkpoints.convert import convert as convert_checkpoint

    embedded = Path(lora.__file__).parent / "assets" / "embedded"
    quantized, adapters = tmp_path / "quantized", tmp_path / "adapters"
    convert_checkpoint(embedded, quantized, quantize=True, q_bits=4, q_group_size=32)
    arguments = ["--model", quantized, "--data", data, "--adapter-path", adapters]
    arguments += ["--mask-prompt"]
    assert run(lora, *arguments, "--train", "--iters", 20, *LAYERS) == 0
    printed = capsys.readouterr().out
    assert losses(printed, "Val")[-1] < 1.5
    assert ("held in float32 too" in printed) == (active() is Backend.CPU)
    # Who asks for little memory gets it.
    assert run(lora, *arguments, "--test", "--grad-checkpoint") == 0
    assert "held in float32 too" not in capsys.readouterr().out
    assert run(lora, *arguments, "--test") == 0
    adapted = losses(capsys.readouterr().out, "Test")[0]
    for name, flags, bits in (
        ("same", [], [4]),
        ("plain", ["--dequantize"], []),
        ("anew", ["--dequantize", "-q", "--q-bits", "8", "--q-group-size", "32"], [8]),
    ):
        target = tmp_path / name
        assert (
            run(
                fuse,
                "--model",
                quantized,
                "--adapter-path",
                adapters,
                "--save-path",
                target,
                *flags,
            )
            == 0
        )
        config = json.loads((target / "config.json").read_text())
        assert [config["quantization"]["bits"]] == bits if bits else "quantization" not in config
        capsys.readouterr()
        options = ["--model", target, "--data", data, "--adapter-path", "", "--mask-prompt"]
        assert run(lora, *options, "--test") == 0
        assert abs(losses(capsys.readouterr().out, "Test")[0] - adapted) < 0.1, name
    assert run(fuse, "--model", quantized, "--adapter-path", adapters, "-q") == 1
    assert "quantized already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--pack", "--max-seq-length", "32", "--lora-gates"],
        ["--carry-state", "--max-seq-length", "16", "--batch-size", "2"],
        ["--fine-tune-type", "full", "--optimizer", "adamw", "--grad-accumulation-steps", "2"],
        ["--grad-checkpoint", "-c", "dropout.yaml"],
    ],
    ids=lambda flags: flags[0].strip("-"),
)
def test_resumed_run_gives_the_same_bits(data, tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dropout.yaml").write_text("lora_parameters: {rank: 4, scale: 4.0, dropout: 0.2}\n")
    for folder, steps in (("whole", [8]), ("parts", [4, 8])):
        for number, iters in enumerate(steps):
            resume = ["--resume"] if number else []
            arguments = ["--train", "--data", data, "--adapter-path", folder, "--iters", iters]
            assert run(lora, *arguments, *LAYERS, *flags, *resume) == 0
    whole, parts = (mx.load(f"{name}/adapters.safetensors") for name in ("whole", "parts"))
    assert set(whole) == set(parts)
    for name, value in whole.items():
        assert mx.array_equal(value, parts[name]), name


def test_resume_refuses_other_settings(data, tmp_path, capsys):
    arguments = ["--train", "--data", data, "--adapter-path", tmp_path, "--iters", 2, *LAYERS]
    assert run(lora, *arguments) == 0
    assert run(lora, *arguments, "--resume", "--seed", 3) == 1
    assert "seed = 0, this one has 3" in capsys.readouterr().err


def test_resume_adapter_file_begins_with_its_weights(data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--data", data, "--mask-prompt", "--train", *LAYERS]
    assert run(lora, *arguments, "--adapter-path", first, "--iters", 20) == 0
    ended = losses(capsys.readouterr().out, "Val")[-1]
    arguments += ["--resume-adapter-file", first / "adapters.safetensors"]
    assert run(lora, *arguments, "--adapter-path", second, "--iters", 1) == 0
    assert losses(capsys.readouterr().out, "Val")[0] == ended


@pytest.mark.parametrize("base", ["bfloat16", "quantized"])
def test_200_steps_are_finite(base):
    """tiny-9b has gates at exactly a = 1, where the multiplier's slope has no bound of its own."""
    dtype = mx.bfloat16 if base == "bfloat16" else mx.float32
    model = golden_model("tiny-9b", dtype, fuse=False)
    saturated = [
        mx.min(layer.temporal_block.rg_lru.recurrent_param).item()
        for layer in model.layers
        if "rg_lru" in layer.temporal_block
    ]
    assert min(saturated) <= -40
    kind = "full"
    if base == "quantized":
        kind = "lora"
        nn.quantize(
            model,
            32,
            4,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
            ),
        )
    add_adapters(model, AdapterConfig(kind, -1, rank=4, scale=4.0, gates=kind == "lora"))
    checkpoint_layers(model)
    rng = np.random.default_rng(0)
    documents = Documents.of([rng.integers(3, 90, n) for n in rng.integers(2, 24, 20)])
    state = TrainingState(model, lora_optimizer())
    batches = DataLoader(PackedDataset(documents, 24, 0), 1)
    seen = []

    class Callback:
        def on_train_loss_report(self, info):
            seen.append(info["train_loss"])

        def on_val_loss_report(self, info):
            raise AssertionError("there is nothing to evaluate")

    fit(state, batches, LoopSettings(200, steps_per_report=1), batch_loss, callback=Callback())
    assert len(seen) == 200 and np.isfinite(seen).all()
    assert np.mean(seen[-20:]) < np.mean(seen[:20])
    for name, value in tree_flatten(model.parameters()):
        assert mx.all(mx.isfinite(value)).item(), name


def lora_optimizer():
    import mlx.optimizers as optim

    return optim.Adam(learning_rate=1e-3)


def test_flags_are_those_of_mlx_lm():
    from mlx_lm import lora as reference

    def flags(parser):
        return {flag for action in parser._actions for flag in action.option_strings}

    ours, theirs = flags(lora.build_parser()), flags(reference.build_parser())
    assert theirs <= ours
    added = {"--pack", "--carry-state", "--lora-gates", "--resume", "--dtype", "--window"}
    assert ours - theirs == added | {"--version"}
    missing = set(reference.CONFIG_DEFAULTS) - set(lora.DEFAULTS)
    assert not missing
    for key, value in reference.CONFIG_DEFAULTS.items():
        if key not in ("model", "data", "optimizer_config"):
            assert lora.DEFAULTS[key] == value, key


def test_more_layers_than_there_are_by_default(data, tmp_path):
    """16 layers are mlx-lm's default; a smaller model is trained in all of its own."""
    arguments = ["--train", "--data", data, "--iters", 1, "--adapter-path", tmp_path]
    assert run(lora, *arguments) == 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_layers"] == 6


def test_cut_off_examples_give_a_warning(data, tmp_path, capsys):
    arguments = ["--train", "--data", data, "--iters", 1, "--adapter-path", tmp_path]
    assert run(lora, *arguments, "--max-seq-length", 12) == 0
    assert "Warning: 5 of 5 training examples are longer" in capsys.readouterr().out
    assert run(lora, *arguments, "--max-seq-length", 12, "--pack") == 0
    assert "Warning" not in capsys.readouterr().out


def test_completions_of_a_model_without_chats(data):
    """A completion simply follows its prompt, so that the prompt alone asks for it."""
    from mlx_rgemma.tuner.data.datasets import read_examples

    _, tokenizer = load()
    args = SimpleNamespace(data=str(data), mask_prompt=True, train=True, test=False)
    documents = read_examples(args, tokenizer)["train"]
    first = documents.ids[: documents.offsets[1]].tolist()
    prompt = tokenizer.encode("Q: What is Griffin?\nA:")
    assert first[: len(prompt)] == prompt
    assert first[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(first[len(prompt) : -1]).strip() == "A model by Google."
    assert documents.first_targets[0] == len(prompt)
