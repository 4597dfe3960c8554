"""Uploading a folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mlx_rgemma.checkpoints.model_card import MODEL_CARD, THIS_FOLDER
from mlx_rgemma.errors import CheckpointError, UserError, shown
from mlx_rgemma.io.reading import reason


def check_repository(name: str) -> None:
    """Check the name of a repository and the login, before a conversion that may take long.

    Raises:
        UserError: If the name is invalid or the user is not logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"upload-repo: {reason(error)}") from error
    if "/" not in name:
        raise UserError(f"upload-repo is {shown(name)}, expected owner/name.")
    if get_token() is None:
        raise UserError("upload-repo: log in first, with 'hf auth login'.")


def upload(folder: Path, repository: str) -> str:
    """Upload a folder in one commit; a missing repository is created.

    The model card then names the repository in place of the folder.

    Args:
        folder: A folder that `convert` wrote.
        repository: `owner/name`.

    Returns:
        The URL of the repository.

    Raises:
        CheckpointError: If the Hub refuses it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    card = folder / MODEL_CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(THIS_FOLDER, repository), encoding="utf-8")
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload an MLX model"
        )
    except Exception as error:  # network errors of many types
        raise CheckpointError(
            f"{repository}: cannot be uploaded ({reason(error)}). {folder} is complete; try again"
            f" with 'hf upload {repository} {folder}'."
        ) from error
    return f"{api.endpoint}/{repository}"
