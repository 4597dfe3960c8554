"""The private parts of mlx-lm that the server overrides are those of the installed version."""

from __future__ import annotations

import inspect

import pytest
from mlx_lm import server

from mlx_rgemma.errors import UserError
from mlx_rgemma.server.command import build_parser
from mlx_rgemma.server.engine import Generator, Provider, serve
from mlx_rgemma.server.handler import Handler
from mlx_rgemma.server.mlx_lm_api import EXPECTED, check_mlx_lm
from mlx_rgemma.server.states import PromptCacheStore

FUNCTIONS = [(owner, name) for owner, functions in EXPECTED.items() for name in functions]


@pytest.mark.parametrize(
    ("owner", "name"), FUNCTIONS, ids=[f"{owner.__name__}.{name}" for owner, name in FUNCTIONS]
)
def test_the_installed_mlx_lm_has_it(owner, name):
    assert ", ".join(inspect.signature(getattr(owner, name)).parameters) == EXPECTED[owner][name]


@pytest.mark.parametrize("own", [Provider, Generator, PromptCacheStore, Handler])
def test_every_override_is_listed(own):
    (parent,) = own.__bases__
    overridden = {name for name in vars(own) if inspect.isfunction(getattr(parent, name, None))}
    overridden -= set(vars(object))  # __init__ is listed where its parameters are used
    inherited = {name for name in overridden if name not in vars(parent)}  # from http.server
    assert overridden - inherited <= set(EXPECTED[parent])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("_run_generate", None),
        ("_tokenize", lambda self, request: None),
        ("_make_state_machine", lambda self, key, tokenizer, stops: None),
    ],
)
def test_a_changed_mlx_lm_is_refused_at_the_start(monkeypatch, name, change):
    if change is None:
        monkeypatch.delattr(server.ResponseGenerator, name)
    else:
        monkeypatch.setattr(server.ResponseGenerator, name, change)
    with pytest.raises(UserError, match=rf"ResponseGenerator\.{name}\(self.*install mlx-lm") as e:
        serve(build_parser().parse_args(["--port", "0"]))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError):
        check_mlx_lm()
