"""The lm-evaluation-harness with this package's model, through mlx-lm's adapter for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.markdown import markdown_table
from mlx_rgemma.register import register

MISSING = "the lm-evaluation-harness is not installed: pip install '.[evaluate]' in a clone."


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    num_shots: int | None = None,
    max_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 123,
    fewshot_as_multiturn: bool = False,
    apply_chat_template: bool | None = None,
    chat_template_args: Mapping[str, Any] | None = None,
    confirm_run_unsafe_code: bool = False,
    log_samples: bool = False,
    sampler: Callable[[mx.array], mx.array] | None = None,
) -> dict[str, Any]:
    """Run tasks of the lm-evaluation-harness.

    Args:
        model, tokenizer: From `load`.
        tasks: Names of tasks or groups of tasks.
        include_path: Folder with more tasks, as YAML files.
        batch_size: Prompts that are answered at once; the answers are those of each alone.
        num_shots: Examples before each question; by default what the task says.
        max_tokens: Most tokens of an answer; by default what the task says.
        limit: Questions of each task to ask.
        seed: Of the choice of examples.
        fewshot_as_multiturn: Give examples as turns of a conversation.
        apply_chat_template: Put questions in the chat template, by default if there is one.
        chat_template_args: More arguments for the template.
        confirm_run_unsafe_code: Allow tasks that run code which the model wrote.
        log_samples: Keep every question and answer.
        sampler: How tokens are chosen; by default the most probable one.

    Returns:
        What the harness returns: figures by task under `results`.

    Raises:
        UserError: If the harness is not installed, or there is no such task.
    """
    try:
        import lm_eval
        from mlx_lm.evaluate import MLXLM, chat_template_fn
    except ImportError as error:
        raise UserError(f"{MISSING} ({error})") from error
    register()
    # mlx-lm's adapter would load the model itself; this one is here already.
    adapter = object.__new__(MLXLM)
    super(MLXLM, adapter).__init__()
    adapter._model, adapter.tokenizer = model, tokenizer
    adapter._max_tokens, adapter._batch_size, adapter._sampler = max_tokens, batch_size, sampler
    chat = tokenizer.has_chat_template if apply_chat_template is None else apply_chat_template
    adapter.use_chat_template = chat
    template = chat_template_fn(**(chat_template_args or {}))
    adapter.apply_chat_template = template.__get__(adapter)
    manager = _task_manager(tasks, include_path)
    found = lm_eval.simple_evaluate(
        model=adapter,
        tasks=list(tasks),
        task_manager=manager,
        fewshot_as_multiturn=fewshot_as_multiturn,
        apply_chat_template=chat,
        num_fewshot=num_shots,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        log_samples=log_samples,
    )
    return dict(found)


def _task_manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    """Where the harness finds tasks; its own are looked through only if they are asked for."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else os.fspath(include_path)
    unknown = list(tasks)
    for defaults in (False, True) if folder is not None else (True,):
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(f"there is no task {unknown[0]!r}; see 'lm-eval ls tasks'.")


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results of tasks as a table in Markdown, one line per metric."""
    rows = []
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, name = key.partition(",")
            if not isinstance(value, (int, float)) or not name or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{name}")
            spread = f"{error:.4f}" if isinstance(error, (int, float)) else ""
            rows.append((task, f"{metric} ({name})", f"{value:.4f}", spread))
    return markdown_table(("task", "metric", "value", "standard error"), rows)


def write_results(
    folder: Path, name: str, tasks: Sequence[str], results: Mapping[str, Any]
) -> Path:
    """Keep results as a JSON file, which is named as mlx-lm names it.

    Raises:
        UserError: If the folder cannot be made or written.
    """
    path = folder / "_".join(["eval", name.replace("/", "_"), *tasks])
    path = path.with_name(f"{path.name[:200]}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=4, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return path
