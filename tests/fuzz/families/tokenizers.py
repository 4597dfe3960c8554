"""Tokenizers: tokenizer.json and its configuration, SentencePiece models, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz.families.models import convert, damage_json, generate
from fuzz.job import Box, Family, Job
from fuzz.mutations import brief, dumps, mutate_bytes, mutate_text
from fuzz.payloads import files, overlays

TOKENIZER_KEYS = (
    "model",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
)
CONFIG_KEYS = (
    "tokenizer_class",
    "auto_map",
    "chat_template",
    "chat_template_type",
    "tool_parser_type",
    "bos_token",
    "eos_token",
    "added_tokens_decoder",
    "model_max_length",
    "extra_special_tokens",
    "add_bos_token",
)
PIECES = tuple(
    dumps(piece)
    for piece in (
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": True},
        {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
        {"type": "Replace", "pattern": {"Regex": "(?=(.*))"}, "content": "$1$1"},
        {"type": "Strip", "content": " ", "start": 2**40, "stop": 2**63},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "ByteLevel"},
        {"type": "Metaspace", "replacement": "ab"},
        {"type": "Truncate"},
    )
)


def _tokenizer(box: Box, rng: Random) -> Job:
    model = box.copy("tiny")
    draw = rng.random()
    if draw < 0.3:
        note = damage_json(rng, model / "tokenizer_config.json", CONFIG_KEYS)
    elif draw < 0.6:
        path = model / "tokenizer.json"
        values = json.loads(path.read_text())
        key = rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        values[key] = json.loads(rng.choice(PIECES))
        path.write_text(json.dumps(values))
        note = f"{key} = {brief(values[key])}"
    else:
        note = damage_json(rng, model / "tokenizer.json", TOKENIZER_KEYS)
    return generate(box, model, note)


def _bare(box: Box) -> Path:
    """Return a model folder with a SentencePiece tokenizer only."""
    model = box.copy("tiny")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    return model


def _sentencepiece(box: Box, rng: Random) -> Job:
    model = _bare(box)
    path = model / "tokenizer.model"
    content = path.read_bytes()
    if rng.random() < 0.5:
        content, note = mutate_bytes(rng, content)
    else:
        content, note = _damage_protobuf(rng, content)
    path.write_bytes(content)
    return convert(box, model, note) if rng.random() < 0.4 else generate(box, model, note)


def _damage_protobuf(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Damage a SentencePiece model's fields rather than its bytes."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    piece = proto.pieces[rng.randrange(len(proto.pieces))]
    action = rng.randrange(8)
    if action == 0:
        piece.piece = rng.choice(
            ("", "a" * 20_000, "\0", "\n", "<s>", proto.pieces[5].piece, "\u202e")
        )
        note = f"piece {brief(piece.piece)}"
    elif action == 1:
        piece.score = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38))
        note = f"score {piece.score}"
    elif action == 2:
        piece.type = rng.choice((1, 2, 3, 4, 5, 6))
        note = f"type {piece.type}"
    elif action == 3:
        del proto.pieces[rng.randrange(len(proto.pieces)) :]
        note = f"{len(proto.pieces)} pieces"
    elif action == 4:
        spec = proto.trainer_spec
        name = rng.choice(("unk_id", "bos_id", "eos_id", "pad_id", "model_type", "vocab_size"))
        value = (
            rng.choice((-1, 0, 1, 2, 3, 4, 2**31 - 1))
            if name != "model_type"
            else rng.choice((1, 2, 3, 4))
        )
        setattr(spec, name, value)
        note = f"{name} = {value}"
    elif action == 5:
        name = rng.choice(("unk_piece", "bos_piece", "eos_piece", "pad_piece", "unk_surface"))
        setattr(proto.trainer_spec, name, rng.choice(("", "x" * 20_000, "a\nb\x1b[2J", "nowhere")))
        note = f"odd {name}"
    elif action == 6:
        proto.normalizer_spec.precompiled_charsmap = rng.randbytes(rng.choice((1, 4, 100, 5000)))
        note = "random charsmap"
    else:
        for _ in range(rng.choice((1, 10, 5000))):
            proto.pieces.add(piece=rng.choice(("<0x00>", "<0xZZ>", "q", "", "a b")), score=0.0)
        note = "more pieces"
    return proto.SerializeToString(), note


TEMPLATE_PARTS = (
    "{% for i in range(3000) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 2 ** 99999999 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ raise_exception('no\nway\x1b[2J' + 'x' * 5000) }}",
    "{{ undefined.attribute }}",
    "{{ messages[99] }}",
    "{{ 1 / 0 }}",
    "{{ messages | tojson }}",
    "{{ strftime_now('%Y' * 99999) }}",
    "{% break %}",
    "{{ '\0\ud800' }}",
    "{% generation %}{% endgeneration %}",
    "{{",
    "{%",
    "{#",
    "((" * 3000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% if true %}" * 300,
    "{{ range(10000000000) | list }}",
    "{{ messages | map('upper') | list }}",
    "{{ lipsum(n=99999999) }}",
)


def _template(box: Box, rng: Random) -> Job:
    model = box.copy("tiny")
    path = model / "tokenizer_config.json"
    values = json.loads(path.read_text())
    template = values["chat_template"]
    if rng.random() < 0.3:
        template = rng.choice(TEMPLATE_PARTS)
        note = template[:60]
    else:
        template, note = mutate_text(rng, template, TEMPLATE_PARTS)
    return _put_template(box, model, template, f"template: {note}", rng.random() < 0.5)


def _put_template(box: Box, model: Path, template: str, note: str, own_file: bool) -> Job:
    path = model / "tokenizer_config.json"
    values = json.loads(path.read_text())
    if own_file:
        del values["chat_template"]
        raw = template.encode("utf-8", "surrogatepass")
        (model / "chat_template.jinja").write_bytes(raw)
    else:
        values["chat_template"] = template
    path.write_text(json.dumps(values))
    return generate(box, model, note)


def _stored_template(content: bytes) -> Callable[[Box, Random], Job]:
    text = content.decode()
    return lambda box, rng: _put_template(box, box.copy("tiny"), text, text[:60], True)


def _stored_tokenizer(values: dict[str, object]) -> Callable[[Box, Random], Job]:
    def make(box: Box, rng: Random) -> Job:
        model = box.copy("tiny")
        path = model / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return generate(box, model, brief(values))

    return make


def _many_digits(box: Box, rng: Random) -> Job:
    """Return a tokenizer.json with a number that Python refuses to read."""
    model = box.copy("tiny")
    path = model / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.rstrip()[:-1] + ', "x": ' + "9" * 5000 + "}")
    return generate(box, model, "5,000 digits")


def _bytes_piece(box: Box, rng: Random) -> Job:
    """Return a SentencePiece model with a piece that is no UTF-8."""
    model = _bare(box)
    path = model / "tokenizer.model"
    content = path.read_bytes()
    at = content.index(b"<table>")
    path.write_bytes(content[:at] + b"\xff\xfetabl\xc0" + content[at + 7 :])
    return generate(box, model, "a piece is no UTF-8")


def _few_pieces(box: Box, rng: Random) -> Job:
    """Return a SentencePiece model of fewer pieces than the model has tokens."""
    from sentencepiece import sentencepiece_model_pb2

    model = _bare(box)
    path = model / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    del proto.pieces[274:]
    path.write_bytes(proto.SerializeToString())
    return generate(box, model, "274 pieces", "-m", "20")


FAMILIES = (
    Family(
        "tokenizer",
        "command",
        {"sound": lambda box, rng: generate(box, box.copy("tiny"), "")},
        _tokenizer,
        {
            "5,000 digits": _many_digits,
            **{name: _stored_tokenizer(values) for name, values in overlays("tokenizer").items()},
        },
    ),
    Family(
        "sentencepiece",
        "command",
        {"sound": lambda box, rng: generate(box, _bare(box), "")},
        _sentencepiece,
        {"no utf-8": _bytes_piece, "too few pieces": _few_pieces},
    ),
    Family(
        "template",
        "command",
        {"sound": lambda box, rng: generate(box, box.copy("tiny"), "")},
        _template,
        {name: _stored_template(content) for name, content in files("template").items()},
    ),
)
