"""`perception-r1 push`: an exported folder on the Hugging Face hub.

Folder -> checked -> repository and branch -> files and one commit.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OIDCError
from huggingface_hub.utils.tqdm import enable_progress_bars

from perception_r1.commands.options import new_parser, parse, run_command
from perception_r1.errors import UserError

_MAIN = "main"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write permission"


def main(argv: Sequence[str]) -> int:
    """Upload a folder; the result is the exit status."""
    return run_command("push", _push, argv)


def _push(argv: Sequence[str]) -> int:
    parser = new_parser("push", "Upload an exported folder to the Hugging Face hub.")
    parser.add_argument("folder", type=Path, help="Folder that `export` has written.")
    parser.add_argument("repo_id", type=str, help="Repository of the hub, USER/NAME; it is made if it is not there.")
    parser.add_argument("--private", action="store_true", help="Nobody else may see the repository.")
    parser.add_argument("--revision", type=str, default=_MAIN, help="Branch; it is made if it is not there.")
    parser.add_argument("--message", type=str, default="Upload with perception-r1", help="Message of the commit.")
    options = parse(parser, argv)
    check_exported(options.folder)
    sizes = [path.stat().st_size for path in options.folder.rglob("*") if path.is_file()]
    if sys.stderr.isatty():
        enable_progress_bars()
    sys.stderr.write(f"Uploading {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, to {options.repo_id}.\n")
    url = upload_folder(
        options.folder,
        options.repo_id,
        is_private=options.private,
        revision=options.revision,
        message=options.message,
    )
    sys.stderr.write(f"Uploaded {options.folder}: {url}\n")
    return 0


def check_exported(folder: Path) -> None:
    """Refuse what is no exported folder, before anything is sent.

    Raises:
        UserError: It is not there, or lacks configuration, weights or model card.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that `perception-r1 export` has written")
    has_config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    found = {
        "config.json": has_config,
        "safetensors": any(folder.glob("*.safetensors")),
        "README.md": (folder / "README.md").is_file(),
    }
    if missing := [name for name, is_there in found.items() if not is_there]:
        raise UserError(
            f"{folder} has no {', no '.join(missing)}: give a folder that `perception-r1 export` has written"
        )


def upload_folder(folder: Path, repo_id: str, *, is_private: bool, revision: str, message: str) -> str:
    """Upload all files of a folder in one commit; repository and branch are made where they are missing.

    Args:
        folder: What is uploaded.
        repo_id: USER/NAME, or NAME alone for the user whose token it is.
        is_private: Nobody else may see the repository.
        revision: Branch.
        message: That of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: There is no token, it may not do this, the hub cannot be reached or refuses; or the repository is
            there already and public, where a private one is asked for.
    """
    try:
        token = get_token()
        if token is None:
            raise UserError(f"there is no token of the hub: {_LOG_IN}")
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=is_private or None, exist_ok=True).repo_id
        if is_private and not hub.model_info(repo_id).private:
            raise UserError(f"{repo_id} is there already and public: leave out --private, or give another name")
        if revision != _MAIN:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision)
    except UserError:
        raise
    except (HTTPError, OSError, OIDCError, RuntimeError, ValueError) as error:
        raise UserError(_reason(error, folder, repo_id)) from error
    return commit.commit_url


def _reason(error: BaseException, folder: Path, repo_id: str) -> str:
    """Why an upload failed, and what would help."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # that of one file among several
        error = error.__cause__
    if isinstance(error, HFValidationError):
        return f"{repo_id} is no name of a repository, which is USER/NAME of letters, digits, '-', '_' and '.'"
    if isinstance(error, HfHubHTTPError):
        told = " ".join((error.server_message or str(error)).split())
        reasons = {
            401: f"the hub does not accept the token: {_LOG_IN}",
            403: f"the token may not write to {repo_id} ({told}): {_LOG_IN}",
            404: f"this token finds no repository {repo_id}: {_LOG_IN}",
        }
        return reasons.get(error.response.status_code, f"the hub refuses {folder}: {told}")
    if isinstance(error, HTTPError | OfflineModeIsEnabled):
        return f"{constants.ENDPOINT} cannot be reached ({error}): the same command uploads what is missing"
    return f"{folder} cannot be uploaded: {error}"
