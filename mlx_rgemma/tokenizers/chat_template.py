"""Chat templates with a time limit.

A template is a program from the publisher of a model. Jinja's sandbox isolates it from the machine,
but does not limit its running time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2

from mlx_rgemma.errors import UserError

MAX_SECONDS = 5.0
"""CPU time per rendering; a thousand messages take a tenth of a second."""

LINES_PER_CHECK = 50

TEMPLATE = "<template>"
"""File name of a compiled template that was not read from a file."""

JINJA = str(Path(jinja2.__file__).parent)


def limit_rendering(tokenizer: Any, seconds: float | None = None) -> None:
    """Limit the time in which a tokenizer renders its chat template.

    Args:
        tokenizer: A tokenizer of transformers. Its `apply_chat_template` raises a `UserError` after
            the limit.
        seconds: CPU time. Default: `MAX_SECONDS`.
    """
    tokenizer.apply_chat_template = partial(_limited, tokenizer.apply_chat_template, seconds)


def _limited(render: Callable[..., Any], seconds: float | None, *args: Any, **kwargs: Any) -> Any:
    """Render with a trace function that reads the clock every few lines of the template.

    The time starts with the template's first line: the checks before and the tokenizer after are
    not part of it.
    """
    allowed = MAX_SECONDS if seconds is None else seconds
    end: float | None = None
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal end, lines
        file = frame.f_code.co_filename
        if file != TEMPLATE and not file.startswith(JINJA):
            return None
        if end is None:
            if file != TEMPLATE:
                return None
            end = time.thread_time() + allowed
        lines += 1
        if lines % LINES_PER_CHECK == 0 and time.thread_time() > end:
            raise UserError(f"rendering took more than {allowed:g} s and may not end")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return render(*args, **kwargs)
    finally:
        sys.settrace(before)
