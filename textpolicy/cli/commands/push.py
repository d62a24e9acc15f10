"""`textpolicy push`: upload the folder of an export to a model hub."""

import shlex
from argparse import Namespace
from dataclasses import asdict

from huggingface_hub.utils import disable_progress_bars

from textpolicy.cli.answer import Answer
from textpolicy.cli.output import error_stream, print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.export.push import LOG_IN, Upload, has_token, plan_upload, push_export


def run(options: Namespace) -> Answer:
    """Upload, or show what would be uploaded."""
    planned = plan_upload(options.folder, options.repo, public=options.public)
    if options.dry_run or not has_token():
        return _not_uploaded(planned, options)
    print_note(f"uploading {planned}")
    if not error_stream().isatty():
        # The hub's client draws bars, which are noise in a file.
        disable_progress_bars()
    with showing_progress(print_note):
        upload = push_export(options.folder, options.repo, public=options.public)
    text = f"uploaded to {upload.url}"
    if upload.others:
        text += f"\nThe repository keeps files of before: {', '.join(upload.others[:5])}"
    return Answer(data=asdict(upload) | {"uploaded": True}, text=text)


def _not_uploaded(planned: Upload, options: Namespace) -> Answer:
    """Return what would be uploaded. Without a token the command has not done what was asked."""
    text = f"nothing was uploaded. This would be:\n{planned}"
    if not has_token():
        line = ["textpolicy", "push", str(options.folder), "--repo", options.repo]
        line += ["--public"] if options.public else []
        text += (
            f"\nThere is no token of the hub on this machine. Log in: {LOG_IN}\n"
            f"and then type: {shlex.join(line)}"
        )
    return Answer(
        data=asdict(planned) | {"uploaded": False},
        text=text,
        exit_code=0 if options.dry_run else 2,
    )
