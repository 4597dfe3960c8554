"""Mistakes in the settings, the files and the data of the command lora: one line each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import mlx_rgemma.lora as lora
from mlx_rgemma.errors import UserError


def schedule(*arguments, **others):
    return {"name": "cosine_decay", "arguments": list(arguments), **others}


def test_command_line_wins_over_the_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "train: true\nlearning_rate: 1e-4\niters: 7\nlora_parameters: {rank: 3, scale: 1e1}\n"
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, 10]}\n"
    )
    args = lora.settings(lora.build_parser().parse_args(["-c", str(config), "--iters", "9"]))
    assert (args.train, args.iters, args.learning_rate) == (True, 9, 1e-4)
    assert args.lora_parameters == {"rank": 3, "scale": 10.0, "dropout": 0.0}
    assert args.lr_schedule["arguments"] == [1e-5, 10]
    assert args.batch_size == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("iters: many\n", "iters is 'many': invalid integer value"),
        ("iters: 0\n", "0 is not at least 1"),
        ("optimizer: adamax\n", "expected one of adam, adamw, muon, sgd, adafactor"),
        ("train: 1\n", "train is 1, expected true or false"),
        ("model: [a]\n", r"model is \['a'\], expected text"),
        ("learnin_rate: 1e-4\n", "unknown setting learnin_rate; did you mean learning_rate?"),
        ("wandb: me\n", "unknown setting wandb; --help lists them"),
        ("lora_parameters: 3\n", "lora_parameters is 3, expected rank, scale"),
        ("lora_parameters: {rnak: 3}\n", "lora_parameters: unknown setting rnak; did you mean"),
        ("a: [\n", "not a YAML file"),
        ("just text\n", "expected lines of the form"),
    ],
)
def test_configuration_files_that_cannot_be(tmp_path, content, message):
    config = tmp_path / "config.yaml"
    config.write_text(content)
    with pytest.raises(UserError, match=message):
        lora.settings(lora.build_parser().parse_args(["-c", str(config), "--test"]))


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        (None, [], "holds no train.jsonl"),
        ("", [], "holds no train.jsonl"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', [], "line 2 is not JSON"),
        ('{"prompt": "a", "completion": "b"}\n{"text": "c"}\n', [], "line 2 lacks"),
        ('{"prompt": "a", "completion": "b"}\n\n[1]\n', [], "line 3 is not a JSON object"),
        (
            '{"prompt": "a", "completion": "b"}\n\n{"prompt": 3, "completion": null}\n',
            [],
            "train.jsonl: line 3: prompt is 3, expected text",
        ),
        ('{"text": ["a"]}\n', [], "train.jsonl: line 1: text is ['a'], expected text"),
        ('{"question": "a"}\n', [], "examples have question; expected messages, prompt"),
        ('{"text": "a b c"}\n', ["--mask-prompt"], "--mask-prompt needs chats or completions"),
        ('{"messages": []}\n', [], "line 1: messages is [], expected messages with their roles"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', [], "has no chat template"),
        ('{"text": "a b c"}\n', [], "has 1 examples, fewer than the batch size 4"),
        ('{"text": "a b c"}\n' * 4, ["--num-layers", "99"], "num-layers is 99"),
        ('{"text": "a b c"}\n' * 4, ["--pack", "--carry-state"], "exclude each other"),
        ('{"text": "a b c"}\n' * 4, ["--adapter-path", ""], "--adapter-path is empty"),
        ('{"text": "a b c"}\n' * 4, ["--report-to", "me"], "'me', expected wandb, swanlab"),
        ('{"text": "a b c"}\n' * 4, ["--data", "a/b/c"], "a/b/c: no such folder"),
        (
            '{"prompt": "a b c d", "completion": "e"}\n' * 4,
            ["--mask-prompt", "--max-seq-length", "3"],
            "nothing to learn within the first 3 tokens",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, lines, flags, message):
    data = tmp_path / "data"
    data.mkdir()
    if lines is not None:
        (data / "train.jsonl").write_text(lines)
    adapters = tmp_path / "adapters"
    arguments = ["--train", "--data", data, "--iters", 1, "--adapter-path", adapters]
    arguments += ["--num-layers", -1, *flags]
    assert lora.main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not adapters.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_schedule": "cosine"}, "lr_schedule is 'cosine', expected name, arguments"),
        ({"lr_schedule": {"name": "cosin"}}, "name is 'cosin', expected one of cosine_decay"),
        ({"lr_schedule": {"name": "cosine_decay"}}, "expected numbers: init, decay_steps, end"),
        ({"lr_schedule": schedule(1e-4)}, "cosine_decay: missing a required argument"),
        ({"lr_schedule": schedule("fast", 10)}, "expected numbers: init, decay_steps, end"),
        ({"lr_schedule": schedule(1e-4, 10, warmpu=3)}, "warmpu; did you mean warmup?"),
        ({"lr_schedule": schedule(1e-4, 10, warmup="a")}, "warmup is 'a', expected"),
        ({"lr_schedule": schedule(1e-4, 10, warmup_init="a")}, "warmup_init is 'a', expected"),
        ({"optimizer_config": 3}, "optimizer_config is 3, expected adam, adamw"),
        ({"optimizer_config": {"adma": {}}}, "adma; did you mean adam"),
        ({"optimizer_config": {"adam": 3}}, "optimizer_config.adam is 3, expected betas, eps"),
        ({"optimizer_config": {"adam": {"btas": 1}}}, "btas; did you mean betas?"),
        (
            {"optimizer_config": {"adam": {"betas": 0.9}}},
            "optimizer_config.adam: is refused by MLX",
        ),
        (
            {"optimizer_config": {"adam": {"betas": [0.9, 2]}}},
            "adam.betas is .*, expected",
        ),
        ({"optimizer_config": {"adam": {"eps": 10**5000}}}, "adam.eps is a int too large to print"),
        ({"optimizer_config": {"adam": {"eps": float("nan")}}}, "adam.eps is nan, expected"),
        ({"lr_schedule": schedule(float("inf"), 10)}, "expected numbers: init, decay_steps, end"),
        ({"lr_schedule": schedule(1e-4, 10, warmup=10**12)}, "warmup is 1000000000000, expected"),
        (
            {"lr_schedule": {"name": "exponential_decay", "arguments": [1e-4, 1e20]}},
            "learning rates are .*inf",
        ),
    ],
)
def test_optimizers_that_cannot_be(settings, message):
    from mlx_rgemma.tuner.optim import make_optimizer

    values = {"optimizer": "adam", "optimizer_config": {}, "learning_rate": 1e-4}
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        make_optimizer(SimpleNamespace(**{**values, "lr_schedule": None, **settings}))
    assert "\n" not in str(error.value)
