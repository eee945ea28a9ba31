"""
Pushing to the Hub: what can not work is said before a model loads, and a push that failed says how to go on.

Uploads are `huggingface_hub`'s: run again, they skip the files that are there and the data that has arrived.
"""

import logging
import os
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from .records import write_atomically

logger = logging.getLogger(__name__)

NOT_MODEL = ("_*", "checkpoint-*")
"""What [`~transformers.Trainer`] leaves out of a push, too."""
PRIVATE_FILES = """\
# A push leaves these out: they show questions and pictures of your data. Take a line away to push what it names.
rollouts.jsonl
pictures.jsonl
rollouts.html
report.html
completions/
preflight/
runs/
"""
LATER = "Or train without `--push_to_hub`, and push later: `python -m mgpo_trl.push DIRECTORY --repo_id OWNER/NAME`."


class PushError(RuntimeError):
    """A push did not finish, or can not work."""


def quiet_requests() -> None:
    """Keep the client of the Hub from logging every request, for commands that show what is logged."""
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)


def prepare_push(args) -> None:
    """
    Make sure that a push will find its way, where `push_to_hub` is set: token, permission, repository. Asks the Hub on
    the first process only, and sets `hub_model_id` to the full name of the repository.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): The options; without `hub_model_id` the output directory gives the name.

    Raises:
        PushError: There is no network, no valid token, no permission, or the repository is not as asked for.
    """
    if not args.push_to_hub:
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        check_online()
        token = find_token(args.hub_token)
        if args.process_index == 0:
            check_token(token, name)
            args.hub_model_id = open_repository(name, token, args.hub_private_repo, args.hub_revision)
            leave_out_private(args.output_dir)
    except PushError as error:
        raise PushError(f"{error} {LATER}") from error.__cause__


def check_online() -> None:
    """Refuse a push that `HF_HUB_OFFLINE` forbids."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise PushError("A push needs the Hub, and HF_HUB_OFFLINE is set. Unset it.")


def find_token(token: str | None = None) -> str:
    """The token that was given, else that of `HF_TOKEN` or of `hf auth login`."""
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise PushError(
            "A push needs a token of the Hub, and there is none. Make one that may write at "
            f"{_endpoint()}/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    return token


def check_token(token: str, name: str) -> None:
    """
    Ask the Hub who the token belongs to, and whether it may write to a repository.

    Args:
        token (`str`): The token.
        name (`str`): `name` or `owner/name`.

    Raises:
        PushError: The Hub does not know the token or can not be asked, or the token may not write there.
    """
    from huggingface_hub import whoami
    from huggingface_hub.errors import HfHubHTTPError

    try:
        user = whoami(token=token, cache=True)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429:  # this route is limited strictly, and says nothing of the token
            logger.warning("The Hub was asked too often to check the token now: it is used as it is.")
            return
        if status in (401, 403):
            raise PushError(
                f"The Hub at {_endpoint()} does not accept the token ({status}). Run `hf auth login` again, or set "
                "HF_TOKEN to a valid one; HF_TOKEN goes before what `hf auth login` stored."
            ) from error
        raise _unreachable(error) from error
    except Exception as error:  # of the network, whatever the client of this version raises
        raise _unreachable(error) from error
    for problem in _permission_problems(user, name):
        raise PushError(problem)


def _unreachable(error: Exception) -> PushError:
    return PushError(f"The Hub at {_endpoint()} could not be asked ({_said(error)}). Check the network.")


def _permission_problems(user: dict, name: str) -> Iterator[str]:
    """What the Hub's description of a token and its owner says against a push; nothing where it says nothing."""
    me, owner = user.get("name"), name.split("/")[0] if "/" in name else user.get("name")
    organisations = {org.get("name"): org.get("roleInOrg") for org in user.get("orgs") or []}
    if owner != me and owner not in organisations:
        yield (
            f"'{name}' belongs to '{owner}', and the token to '{me}', who is not in that organisation. Push to "
            f"'{me}/{name.split('/')[-1]}', or give the token of a member."
        )
    if organisations.get(owner) == "read":
        yield f"'{me}' may only read in the organisation '{owner}'. Ask for the right to write, or push to '{me}'."
    token = (user.get("auth") or {}).get("accessToken") or {}
    wanted = f"Make one of the kind `write` at {_endpoint()}/settings/tokens; `hf auth login` or HF_TOKEN takes it."
    if token.get("role") == "read":
        yield f"The token of '{me}' may only read. {wanted}"
    names = {owner, f"{owner}/{name.split('/')[-1]}"}
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None and not _may_write(scopes, names):
        yield f"The fine-grained token of '{me}' has no `repo.write` for '{owner}'. {wanted}"


def _may_write(scopes: list[dict], names: set[str | None]) -> bool:
    return any(
        scope.get("entity", {}).get("name") in names and "repo.write" in scope.get("permissions", ())
        for scope in scopes
    )


def open_repository(name: str, token: str, private: bool | None = None, revision: str | None = None) -> str:
    """
    Make the repository, and the branch, where they are not there yet.

    Args:
        name (`str`): `name` or `owner/name`.
        token (`str`): Token that may write.
        private (`bool`, *optional*): Whether others may not see it; the owner's default when not given.
        revision (`str`, *optional*): Branch to push to in place of `main`.

    Returns:
        `str`: Its full name.

    Raises:
        PushError: It can not be made, or it is there and public where a private one was asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        is_private = api.model_info(repo_id).private if private else None
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    except Exception as error:  # of the Hub, the network, or a name that is none
        raise PushError(
            f"The repository '{name}' can not be opened at {_endpoint()} ({_said(error)}). Give another name "
            "(`--hub_model_id`), or a token that may write there."
        ) from error
    if is_private is False:
        raise PushError(
            f"'{repo_id}' is there and public, and a private repository was asked for: that option makes new ones "
            f"only. Make it private at {_endpoint()}/{repo_id}/settings, or give another name."
        )
    return repo_id


def download(repo_id: str, revision: str | None = None) -> str:
    """
    Download a model or an adapter, without the checkpoints that lie beside it.

    Args:
        repo_id (`str`): `owner/name`.
        revision (`str`, *optional*): Branch, tag or commit.

    Returns:
        `str`: The directory with its files.

    Raises:
        ValueError: A directory was named, or the Hub does not give out that repository or revision.
    """
    from huggingface_hub import snapshot_download

    if os.path.isdir(repo_id):
        raise ValueError(f"'{repo_id}' is a directory here, and only a repository on the Hub has revisions.")
    try:
        return snapshot_download(repo_id, revision=revision, ignore_patterns="*checkpoint-*/*")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The Hub does not give out '{repo_id}', revision {revision or 'main'} ({reason})."
        ) from error


def leave_out_private(directory: str | os.PathLike) -> None:
    """Write the `.gitignore` that keeps rollouts of the user's data out of a push, unless there is one."""
    path = Path(directory, ".gitignore")
    if not path.exists():
        write_atomically(path, PRIVATE_FILES.encode())


def left_out(directory: str | os.PathLike) -> list[str]:
    """
    What the names in a directory's `.gitignore` are as patterns of an upload: the Hub would leave those files out
    anyway, and make a commit of nothing. `completions/` gives `completions/*` and `*/completions/*`.
    """
    lines = Path(directory, ".gitignore").read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if re.fullmatch(r"\s*[\w.-]+/?\s*", line)]
    patterns = [f"{name}*" if name.endswith("/") else name for name in names]
    return [wanted for pattern in patterns for wanted in (pattern, f"*/{pattern}")]


def push_directory(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload model",
) -> str:
    """
    Upload a model's directory without its checkpoints. What has arrived already is not sent again.

    Args:
        directory (`str` or `os.PathLike`): The directory.
        repo_id (`str`): `owner/name`; the repository is there.
        token (`str`, *optional*): Token; the one at hand when not given.
        revision (`str`, *optional*): Branch.
        message (`str`, *optional*): Title of the commit.

    Returns:
        `str`: Address of the commit.

    Raises:
        PushError: The upload did not finish.
    """
    from huggingface_hub import HfApi

    leave_out_private(directory)
    with telling_failure(directory, repo_id, revision):
        return HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            ignore_patterns=[*NOT_MODEL, *left_out(directory)],
            commit_message=message,
            revision=revision,
        )


@contextmanager
def telling_failure(directory: str | os.PathLike, repo_id: str | None, revision: str | None = None) -> Iterator[None]:
    """Whatever goes wrong inside is raised as a [`PushError`] that says where the model lies and how to push it."""
    try:
        yield
    except Exception as error:
        raise PushError(
            f"The push to '{repo_id or 'the Hub'}' did not finish ({_said(error)}). What was saved lies in "
            f"'{directory}'; push it again, what has arrived is not sent twice:\n"
            f"    {push_command(directory, repo_id, revision)}"
        ) from error


def tell_failed_job(job: Future, args) -> None:
    """Warn of a push in the background that failed: training goes on, and the next save pushes again."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning(
            f"A push to '{args.hub_model_id}' while training did not finish ({_said(job.exception())}). Training goes "
            f"on, checkpoints lie in '{args.output_dir}', and the next save pushes again."
        )


def push_command(directory: str | os.PathLike, repo_id: str | None, revision: str | None = None) -> str:
    """The command that pushes a saved model."""
    words = ["python", "-m", "mgpo_trl.push", str(directory), "--repo_id", repo_id or "OWNER/NAME"]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _said(error: BaseException) -> str:
    """The first line of an error; an upload that failed says why in its cause only."""
    cause = f" {_said(error.__cause__)}" if isinstance(error, RuntimeError) and error.__cause__ is not None else ""
    return (str(error).strip().splitlines() or [type(error).__name__])[0] + cause
