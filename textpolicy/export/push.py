"""`push_export`: upload the folder of an export to a model hub, by the hub's own client.

The client sends large files in parts. A second call after a lost connection sends what is missing.
"""

import glob
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  the base of all errors of the network
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from textpolicy.activity import doing
from textpolicy.errors import ConfigError, UploadError
from textpolicy.export.target import EXPORT_FILE, files_in, files_of_export
from textpolicy.machine import size_text

# What exports consist of. Anything else in a folder was put there by somebody.
_SUFFIXES = {
    *(".json", ".safetensors", ".gguf", ".md", ".png", ".txt", ".jinja", ".model", ".tiktoken"),
}
_NAMES = {"Modelfile"}
LOG_IN = "hf auth login"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What goes to the hub: the files with their bytes, into which repository, visible to whom.

    `url` is the address of the commit, or None if nothing was uploaded. `others` are files that the
    repository had before and keeps.
    """

    repository: str
    private: bool
    files: Mapping[str, int]
    url: str | None = None
    others: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        """Return a line for the repository and a line for each file."""
        visibility = "private" if self.private else "public: everybody can see it"
        wide, long = max(map(len, self.files)), len(f"{max(self.files.values()):,}")
        lines = [f"  {name:{wide}}  {size:>{long},} bytes" for name, size in self.files.items()]
        count = f"{len(self.files)} files, {size_text(self.bytes)}"
        return "\n".join([f"{self.repository} ({visibility}): {count}", *lines])


def has_token() -> bool:
    """Return whether somebody has logged in to the hub on this machine."""
    return get_token() is not None


def plan_upload(folder: str | Path, repository: str, *, public: bool = False) -> Upload:
    """Return what `push_export` would upload, without a connection.

    Raise `ConfigError` if the folder is no export, or holds a file that is not of the export.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            f"{repository!r} is not the name of a repository: {error}. Name it like USER/MODEL"
        ) from error
    return Upload(repository=repository, private=not public, files=_files_of(Path(folder)))


def push_export(folder: str | Path, repository: str, *, public: bool = False) -> Upload:
    """Upload an export into a repository of the hub, made if it is missing, and return the upload.

    A new repository is private unless `public` is true. The visibility of a repository that exists
    is never changed. A name without a user or an organization is in the account of the token.
    """
    upload = plan_upload(folder, repository, public=public)
    if not has_token():
        raise ConfigError(f"there is no token of the hub on this machine. Log in: {LOG_IN}")
    api = HfApi()
    with doing("uploading to the hub", begins=True), _telling_what_failed(upload):
        name = repository if "/" in repository else f"{api.whoami()['name']}/{repository}"
        others = _prepare_repository(api, name, upload)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[glob.escape(file) for file in upload.files],
            commit_message="Upload an export of TextPolicy",
        )
    return Upload(
        repository=name,
        private=upload.private,
        files=upload.files,
        url=commit.commit_url,
        others=others,
    )


def _prepare_repository(api: HfApi, name: str, upload: Upload) -> tuple[str, ...]:
    """Make the repository if it is missing. Return the files that an existing one will keep."""
    try:
        found = api.model_info(name)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        api.create_repo(name, private=upload.private, exist_ok=True)
        return ()
    if found.private and not upload.private:
        raise ConfigError(
            f"the repository {name} is private, and --public does not change that. Leave out "
            "--public, or make the repository public in its settings on the hub"
        )
    if not found.private and upload.private:
        raise ConfigError(
            f"the repository {name} is public, so everybody would see the upload. Nothing was "
            "uploaded. Name another repository, or add --public"
        )
    names = (file.rfilename for file in found.siblings or ())
    return tuple(name for name in names if name not in upload.files and name != ".gitattributes")


def _files_of(folder: Path) -> dict[str, int]:
    """Return the files of an export with their sizes. Raise `ConfigError` if others are there."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Name the folder of an export")
    listed = files_of_export(folder)
    if listed is None:
        raise ConfigError(
            f"{folder} is no export: it has no {EXPORT_FILE} of one. Only exports are uploaded, "
            f"because a run holds prompts and completions. Export it first: textpolicy export "
            f"{folder} --to peft --output DIR"
        )
    found = files_in(folder)
    if missing := sorted(listed - found):
        raise ConfigError(f"{folder} is not complete: {missing[0]} is missing. Export it again")
    foreign = sorted(
        name for name in found if name not in listed or not _is_of_an_export(folder / name)
    )
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise ConfigError(
            f"{folder} holds files that do not belong to the export: {foreign[0]}{more}. Nothing "
            "was uploaded. Move these files away"
        )
    return {name: (folder / name).stat().st_size for name in sorted(found)}


def _is_of_an_export(path: Path) -> bool:
    is_known = path.suffix in _SUFFIXES or path.name in _NAMES
    return is_known and path.is_file() and not path.is_symlink()


@contextmanager
def _telling_what_failed(upload: Upload) -> Generator[None]:
    """Turn the errors of the hub's client into one error that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        said = _on_one_line(error.server_message or error)
        reason = _REASONS.get(error.response.status_code, _OTHER_STATUS)
        raise UploadError(f"{reason} (the hub says: {said})") from error
    except OfflineModeIsEnabled as error:
        raise UploadError(
            "the environment says HF_HUB_OFFLINE, so the hub is not called. Unset it"
        ) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise UploadError(
            f"the hub refused the upload to {upload.repository}: {_on_one_line(error)}. Correct "
            "what this names, and type the same line again"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        cause = _on_one_line(error.__cause__ or error)
        raise UploadError(
            f"the upload to {upload.repository} broke off: {cause}. Check that "
            f"{constants.ENDPOINT} can be reached, and type the same line again: parts that the "
            "hub has are not sent again"
        ) from error


_LOGGED_IN = f"Log in with a token that may write: {LOG_IN}"
_MOST_CHARACTERS = 300
_REASONS = {
    400: "the hub does not accept what was sent",
    401: f"the hub does not accept the token of this machine. {_LOGGED_IN}",
    403: f"the token of this machine may not write to this repository. {_LOGGED_IN}, or name a "
    "repository of your own account",
    404: "the hub does not know the user or the organization of this repository. Check the name",
    413: "a file is larger than the hub allows",
    429: "the hub has had too many requests from this account. Type the same line again later",
}
_OTHER_STATUS = (
    "the hub failed. Type the same line again later: parts that the hub has are not sent again"
)


def _on_one_line(said: object) -> str:
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
