"""Chat templates that do not end are stopped; others give the same text as before."""

from __future__ import annotations

import copy
import sys
import time

import pytest

from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.prompts import chat_text
from mlx_rgemma.io.hub import EMBEDDED
from mlx_rgemma.tokenizers import chat_template
from mlx_rgemma.tokenizers.chat_template import limit_rendering
from mlx_rgemma.tokenizers.load import load_tokenizer
from mlx_rgemma.tokenizers.sentencepiece import CHAT_TEMPLATE

MESSAGES = [
    {"role": "user" if n % 2 == 0 else "assistant", "content": f"text {n}"} for n in range(201)
]

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{{ m(n-1) ~ m(n-1) if n }}{% endmacro %}{{ m(60) }}",
    "lists": "{% for i in range(99999) %}{% set x = range(99999)|list %}{% endfor %}",
    "a function of Jinja": "{{ lipsum(n=100000000) }}",
}


@pytest.fixture
def tokenizer():
    return load_tokenizer(EMBEDDED)


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_templates_without_an_end(tokenizer, monkeypatch, template):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    tokenizer.chat_template = template
    tokenizer.has_chat_template = True
    started = time.thread_time()
    with pytest.raises(UserError, match=r"rendering took more than 0\.3 s and may not end"):
        tokenizer.apply_chat_template(MESSAGES)
    with pytest.raises(UserError, match="the model's chat template refuses the prompt: rendering"):
        chat_text(tokenizer, [{"role": "user", "content": "a"}])
    assert time.thread_time() - started < 5


def test_the_same_text_and_tokens(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    inner = copy.deepcopy(tokenizer._tokenizer)
    del inner.apply_chat_template
    options = {"add_generation_prompt": True, "return_dict": False}
    assert rendered == inner.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert tokens == inner.apply_chat_template(MESSAGES, **options)
    assert "text 200" in rendered


def test_only_the_template_is_limited(tokenizer):
    """Neither what comes before it nor the tokens after count."""

    class Slow:
        def apply_chat_template(self, text):
            until = time.thread_time() + 0.2
            while time.thread_time() < until:
                pass
            return text

    slow = Slow()
    limit_rendering(slow, 0.05)
    assert slow.apply_chat_template("x") == "x"


def test_a_trace_function_is_kept(tokenizer):
    """A debugger's, or that of a coverage measurement."""
    tokenizer.chat_template = CHAT_TEMPLATE

    def trace(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        tokenizer.apply_chat_template(MESSAGES[:1])
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
