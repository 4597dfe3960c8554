"""The private parts of mlx-lm's server that this package overrides or calls.

mlx-lm may change them in any version. An override of a method that is no longer called would remove
a check silently, so names and parameters are compared before the server starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import mlx_lm
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache

from mlx_rgemma.errors import UserError

EXPECTED: Mapping[Any, Mapping[str, str]] = {
    server: {
        "_make_sampler": "args, tokenizer",
        "get_system_fingerprint": "",
    },
    server.ModelProvider: {
        "_load": "self, model_path, adapter_path, draft_model_path",
        "load": "self, model_path, adapter_path, draft_model_path",
        "load_default": "self",
    },
    server.ResponseGenerator: {
        "__init__": "self, model_provider, prompt_cache",
        "_generate": "self",
        "_is_batchable": "self, args",
        "_log_cache_stats": "self",
        "_make_state_machine": "self, model_key, tokenizer, stop_words",
        "_next_request": "self, timeout",
        "_run_generate": "self",
        "_share_request": "self, request",
        "_tokenize": "self, tokenizer, request, args",
        "generate": "self, request, generation_args, progress_callback",
        "join": "self",
        "stop_and_join": "self",
    },
    LRUPromptCache: {
        "__init__": "self, max_size, max_bytes",
        "fetch_nearest_cache": "self, model, tokens",
        "insert_cache": "self, model, tokens, prompt_cache, cache_type",
    },
    server.APIHandler: {
        "__init__": "self, response_generator, args, system_fingerprint, kwargs",
        "_set_completion_headers": "self, status_code",
        "_set_cors_headers": "self",
        "_set_stream_headers": "self, status_code",
        "do_GET": "self",
        "do_OPTIONS": "self",
        "do_POST": "self",
        "generate_response": "self, text, finish_reason, prompt_token_count,"
        " completion_token_count, prompt_cache_count, token_logprobs, top_tokens, tokens,"
        " tool_calls, reasoning_text",
        "handle_completion": "self, request, stop_words",
        "handle_models_request": "self",
    },
}
"""Owners, names and parameters in mlx-lm 0.32.2."""


def check_mlx_lm() -> None:
    """Compare the installed mlx-lm with `EXPECTED`.

    Raises:
        UserError: Naming the first function that is missing or has other parameters.
    """
    for owner, functions in EXPECTED.items():
        for name, expected in functions.items():
            function = getattr(owner, name, None)
            found = function and ", ".join(inspect.signature(function).parameters)
            if found != expected:
                raise UserError(
                    f"the server does not support mlx-lm {mlx_lm.__version__}:"
                    f" {owner.__name__}.{name}({expected}) is"
                    f" {'missing' if found is None else f'now ({found})'};"
                    " install mlx-lm>=0.32.2,<0.33."
                )
