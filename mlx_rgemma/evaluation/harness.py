"""The lm-evaluation-harness with this package's model, through mlx-lm's adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.io.atomic import atomic_file
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
        batch_size: Prompts per batch; the results do not depend on it.
        num_shots: Examples before each question. Default: the task's.
        max_tokens: Tokens per answer, at most. Default: the task's.
        limit: Questions per task.
        seed: Seed of the choice of examples.
        fewshot_as_multiturn: Give examples as turns of a conversation.
        apply_chat_template: Apply the chat template to questions. Default: if there is one.
        chat_template_args: More arguments for the template.
        confirm_run_unsafe_code: Allow tasks that run generated code.
        log_samples: Save every question and answer.
        sampler: Sampler of tokens. Default: greedy.

    Returns:
        The result of the harness: metrics by task under `results`.

    Raises:
        UserError: If the harness is not installed, or a task is unknown.
    """
    try:
        import lm_eval
        from mlx_lm.evaluate import MLXLM, chat_template_fn
    except ImportError as error:
        raise UserError(f"{MISSING} ({error})") from error
    register()
    # mlx-lm's adapter loads a model in its constructor; here is one already.
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
    """Return a task manager; the harness's own tasks are indexed only if they are needed."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else os.fspath(include_path)
    unknown = list(tasks)
    for defaults in (False, True) if folder is not None else (True,):
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(f"there is no task {shown(unknown[0])}; see 'lm-eval ls tasks'.")


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results of tasks as a Markdown table, one line per metric."""
    rows = []
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, name = key.partition(",")
            if not isinstance(value, (int, float)) or not name or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{name}")
            spread = f"{error:.4f}" if isinstance(error, (int, float)) else ""
            rows.append([task, f"{metric} ({name})", f"{value:.4f}", spread])
    return markdown_table(["task", "metric", "value", "standard error"], rows)


def write_results(
    folder: Path, name: str, tasks: Sequence[str], results: Mapping[str, Any]
) -> Path:
    """Write results as a JSON file with mlx-lm's name, atomically.

    Raises:
        UserError: If the folder cannot be created or written.
    """
    path = folder / "_".join(["eval", name.replace("/", "_"), *tasks])
    path = path.with_name(f"{path.name[:200]}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(results, indent=4, default=str) + "\n", encoding="utf-8")
    return path
