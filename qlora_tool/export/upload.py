"""An exported folder to the model hub."""

from __future__ import annotations

from pathlib import Path

from qlora_tool.errors import MachineError, UserError


def refuse_bad_name(repo: str) -> None:
    """
    Raises:
        UserError: `repo` cannot be the name of a repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it names no owner")
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--push-to-hub {repo}: no hub id, which is OWNER/NAME: {reason}") from error


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload a finished folder, making the repository where there is none.

    Returns:
        The address of what was uploaded.

    Raises:
        MachineError: the hub is out of reach, or does not let us; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export by qlora-tool")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        cure = "log in with `hf auth login`, with a token that may write there" if status in (401, 403) else "try again"
        raise MachineError(
            f"--push-to-hub {repo}: the hub refused ({' '.join(str(error).split())[:120]}); {cure}; the export stays "
            f"in {folder}"
        ) from error
    except Exception as error:  # what its HTTP client raises has changed from version to version
        raise MachineError(
            f"--push-to-hub {repo}: the model hub is out of reach ({type(error).__name__}); the export stays in "
            f"{folder}: `hf upload {repo} {folder}` once there is a connection"
        ) from error
    return str(url)
