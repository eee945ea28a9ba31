"""
Push a saved model to the Hub, or go on with a push that was interrupted: what has arrived is not sent again.

    python -m mgpo_trl.push outputs/run --repo_id me/zoom
    python -m mgpo_trl.push outputs/run --repo_id me/zoom --private --reports outputs/vstar outputs/hrbench

The model card is written anew, with the results of `--reports`, unless somebody has taken it over.
"""

import argparse
import logging
import sys
from pathlib import Path

from .adapters import ADAPTER_CONFIG, is_adapter
from .conversation import CONVERSATION_FILE
from .hub import PushError, check_online, check_token, find_token, open_repository, push_directory, quiet_requests
from .model_card import CARD_FILE, base_license, is_ours, keep_reports, read_facts, write_card

logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Parse, check, write the card, upload, and tell the address."""
    parser = argparse.ArgumentParser(prog="python -m mgpo_trl.push", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", help="Output directory of a training, or a merged model.")
    parser.add_argument("--repo_id", required=True, help="`OWNER/NAME`, or `NAME` for the owner of the token.")
    parser.add_argument("--private", action="store_true", help="Make the repository private where it is new.")
    parser.add_argument("--revision", help="Branch to push to in place of `main`.")
    parser.add_argument("--reports", nargs="+", default=[], help="Directories of evaluations, for the model card.")
    options = parser.parse_args(arguments)
    url = push(options.directory, options.repo_id, options.private or None, options.revision, options.reports)
    logger.info("Pushed '%s': %s", options.directory, url)


def push(
    directory: str, repo_id: str, private: bool | None = None, revision: str | None = None, reports: list[str] = ()
) -> str:
    """
    Push the model in a directory.

    Args:
        directory (`str`): Directory of a saved model.
        repo_id (`str`): `OWNER/NAME`, or `NAME`.
        private (`bool`, *optional*): Whether a new repository is private; the owner's default when not given.
        revision (`str`, *optional*): Branch.
        reports (`list[str]`, *optional*): Directories of evaluations, for the card.

    Returns:
        `str`: Address of the commit.

    Raises:
        ValueError: There is no model in the directory, or no report where one was named.
        PushError: The push can not work, or did not finish.
    """
    check_model(directory)
    if reports and not is_ours(directory):
        raise ValueError(f"'{Path(directory, CARD_FILE)}' is your own: add the reports there, or take the file away.")
    keep_reports(directory, reports)
    check_online()
    token = find_token()
    check_token(token, repo_id)
    repo_id = open_repository(repo_id, token, private, revision)
    if is_ours(directory):
        base_model = read_facts(directory).base_model
        name, license = repo_id.split("/")[-1], base_license(base_model)
        write_card(directory, name=name, repo_id=repo_id, license=license)
    else:
        logger.info("The model card '%s' is your own and stays as it is.", Path(directory, CARD_FILE))
    return push_directory(directory, repo_id, token=token, revision=revision)


def check_model(directory: str) -> None:
    """
    Refuse a directory that a stranger could not load a model from.

    Raises:
        ValueError: There is no model in it, or it does not say how the model is asked.
    """
    if not Path(directory, "config.json").is_file() and not is_adapter(directory):
        raise ValueError(
            f"There is no model in '{directory}', no `config.json` and no `{ADAPTER_CONFIG}`. Give the directory that "
            "a training was saved to."
        )
    if not Path(directory, CONVERSATION_FILE).is_file():
        raise ValueError(
            f"'{directory}' has no `{CONVERSATION_FILE}`, so nobody could ask the model as it was trained. Give the "
            "directory that `MGPOTrainer` saved, or copy the file from there."
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_requests()
    try:
        main(sys.argv[1:])
    except (PushError, ValueError) as error:  # what was asked for can not work: said, not traced
        sys.exit(str(error))
