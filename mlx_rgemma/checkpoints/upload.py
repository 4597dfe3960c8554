"""A converted folder as a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mlx_rgemma.checkpoints.model_card import MODEL_CARD, THIS_FOLDER
from mlx_rgemma.errors import CheckpointError, UserError, shown
from mlx_rgemma.io.reading import reason


def check_repository(name: str) -> None:
    """Refuse a name that no repository can have, or a user who is not logged in.

    This is looked at before a conversion begins, which may take long.

    Raises:
        UserError: Saying what to do.
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
    """Upload a folder, in one commit; the repository is made if there is none.

    Its model card then says how to run the repository, not the folder.

    Args:
        folder: What `convert` made.
        repository: As in `owner/name`.

    Returns:
        The address of the repository.

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
    except Exception as error:  # the network's many ways to fail
        raise CheckpointError(
            f"{repository}: cannot be uploaded ({reason(error)}). {folder} is complete; try again"
            f" with 'hf upload {repository} {folder}'."
        ) from error
    return f"{api.endpoint}/{repository}"
