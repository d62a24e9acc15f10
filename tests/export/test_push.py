"""Uploads of exports by the hub's own client, to a hub on this machine."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys

import hf_xet
import huggingface_hub.utils._http as hub_http
import pytest
from huggingface_hub import constants

import textpolicy as tp
from tests.hub_server import LARGE_FILES, PART_BYTES, TOKEN, USER, Repository, serving_hub
from textpolicy.errors import ConfigError, UploadError
from textpolicy.export.push import plan_upload, push_export

REPO = f"{USER}/sums"
# The hub's client sends large files by a call that its HTTP library wants to be written otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """Return the folder of an export."""
    folder = tmp_path_factory.mktemp("push") / "sums"
    tp.export_adapter(trained(None, 0.05), "peft", folder, model="tiny")
    return folder


@pytest.fixture
def exported(made, tmp_path):
    """Return a copy of an export, which a test may spoil."""
    return shutil.copytree(made, tmp_path / "sums")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Run a hub that the hub's client calls, and be logged in."""
    with serving_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        # The store for large files has a protocol of its own: a test below has a process for it.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The client waits longer and longer between attempts.
        monkeypatch.setattr(hub_http.time, "sleep", lambda seconds: None)
        hub_http.close_session()
        yield server
        hub_http.close_session()


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_arrives_bit_for_bit_in_a_new_private_repository(hub, exported):
    upload = push_export(exported, REPO)
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.files == content_of(exported)
    assert {"README.md", "adapter_model.safetensors", "export.json"} <= set(repository.files)
    assert upload.url == f"{hub.url}/{REPO}/commit/{1:040x}" and upload.private
    assert upload.bytes == sum(map(len, repository.files.values()))


def test_a_file_larger_than_a_part_arrives_in_parts(hub, exported):
    (exported / "adapter_model.safetensors").write_bytes(os.urandom(2 * PART_BYTES + 5))
    push_export(exported, REPO)
    assert len(hub.parts) == 3
    assert hub.repositories[REPO].files == content_of(exported)


def test_a_public_repository_must_be_asked_for(hub, exported):
    assert not push_export(exported, REPO, public=True).private
    assert not hub.repositories[REPO].private
    with pytest.raises(ConfigError, match=r"is public.*add --public"):
        push_export(exported, REPO)
    assert len(hub.repositories[REPO].commits) == 1


def test_the_visibility_of_a_repository_is_never_changed(hub, exported):
    hub.repositories[REPO] = Repository(private=True)
    with pytest.raises(ConfigError, match=r"is private.*Leave out --public"):
        push_export(exported, REPO, public=True)
    assert not hub.repositories[REPO].files


def test_an_upload_into_a_repository_that_exists_names_the_files_that_it_keeps(hub, exported):
    hub.repositories[REPO] = Repository(private=True, files={"old.gguf": b"x", "README.md": b"y"})
    upload = push_export(exported, REPO)
    assert upload.others == ("old.gguf",)
    assert hub.repositories[REPO].files == content_of(exported) | {"old.gguf": b"x"}


def test_a_name_without_an_owner_is_in_the_account_of_the_token(hub, exported):
    assert push_export(exported, "sums").repository == REPO
    assert list(hub.repositories) == [REPO]


def test_a_second_upload_sends_no_large_file_again(hub, exported):
    push_export(exported, REPO)
    hub.requests.clear()
    push_export(exported, REPO)
    assert not [request for request in hub.requests if request.startswith("PUT")]


@pytest.mark.parametrize(
    ("failing", "status", "words"),
    [
        ("GET /api/models", 401, "does not accept the token.*hf auth login"),
        ("POST /api/repos/create", 403, "may not write"),
        ("POST /api/repos/create", 500, "the hub failed.*again later"),
        ("POST /api/models", 500, "the hub failed.*again later"),
        ("POST /api/models", 429, "too many requests"),
        ("PUT /objects", 500, "broke off.*type the same line again"),
        ("POST /api/repos/create", None, "broke off.*type the same line again"),
        ("PUT /objects", None, "broke off.*type the same line again"),
    ],
)
def test_an_error_of_the_hub_is_one_message_that_says_what_to_do(
    hub, exported, failing, status, words
):
    hub.failing[failing] = status
    with pytest.raises(UploadError, match=f"(?s){words}") as raised:
        push_export(exported, REPO)
    assert len(str(raised.value)) < 800 and TOKEN not in str(raised.value)
    assert not [one for one in hub.repositories.values() if one.files]


def test_an_upload_that_broke_off_is_completed_by_the_same_line(hub, exported):
    hub.failing["POST /api/models/ada/sums/commit"] = 500
    with pytest.raises(UploadError):
        push_export(exported, REPO)
    sent = dict(hub.objects)
    hub.failing.clear()
    hub.requests.clear()
    push_export(exported, REPO)
    assert hub.repositories[REPO].files == content_of(exported)
    assert sent and not [request for request in hub.requests if request.startswith("PUT")]


def test_a_card_that_the_hub_refuses_is_named_before_anything_is_sent(hub, exported):
    card = exported / "README.md"
    edited = card.read_text().replace("library_name: peft", "base_model: /home/ada/model")
    card.write_text(edited)
    with pytest.raises(UploadError, match=r'README\.md.*"base_model" is not a model id'):
        push_export(exported, REPO)
    assert not hub.objects and not hub.repositories[REPO].files


def test_a_hub_that_cannot_be_reached_is_named(hub, exported, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", nowhere)
        with pytest.raises(UploadError, match=f"Check that {nowhere} can be reached"):
            push_export(exported, REPO)


def test_a_client_that_is_set_to_be_offline_says_which_variable_does_it(hub, exported, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE"):
        push_export(exported, REPO)
    assert not hub.requests


def test_a_repository_of_somebody_else_is_refused(hub, exported):
    with pytest.raises(UploadError, match="may not write"):
        push_export(exported, "grace/sums")


@pytest.mark.parametrize(
    "name", [".env", "id_rsa", "samples.jsonl", "sub/config.toml", "model.pkl", "weights.bin"]
)
def test_a_file_that_is_not_of_the_export_is_refused(exported, name):
    (exported / name).parent.mkdir(exist_ok=True)
    (exported / name).write_text("secret")
    with pytest.raises(ConfigError, match=f"do not belong to the export: {name}"):
        plan_upload(exported, REPO)


def test_a_file_that_the_list_of_an_export_smuggles_in_is_refused(exported, tmp_path):
    (tmp_path / "secret").write_text("secret")
    listing = exported / "export.json"
    whole = listing.read_text()
    listing.write_text(whole.replace('"files": [', '"files": ["../secret", '))
    with pytest.raises(ConfigError, match="secret is missing"):
        plan_upload(exported, REPO)
    listing.write_text(whole.replace('"files": [', '"files": ["link.json", '))
    (exported / "link.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"do not belong to the export: link\.json"):
        plan_upload(exported, REPO)


def test_a_run_and_any_other_folder_are_no_exports(tmp_path, exported):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no export.*textpolicy export"):
        plan_upload(tmp_path / "run", REPO)
    (exported / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config.json is missing"):
        plan_upload(exported, REPO)


@pytest.mark.parametrize("name", ["a/b/c", "../sums", "a b", "", "x" * 200, "ada/--sums"])
def test_a_name_that_is_no_repository_is_refused(exported, name):
    with pytest.raises(ConfigError, match="is not the name of a repository"):
        plan_upload(exported, name)


def test_without_a_token_the_command_lists_what_it_would_upload_and_how_to_log_in(
    hub, exported, monkeypatch, capsys
):
    monkeypatch.delenv("HF_TOKEN")
    from textpolicy.cli import main

    assert main(["push", str(exported), "--repo", "sums"]) == 2
    shown = capsys.readouterr().out
    assert "nothing was uploaded" in shown and "hf auth login" in shown and "private" in shown
    assert f"textpolicy push {exported} --repo sums" in shown
    for name in content_of(exported):
        assert f"  {name} " in shown
    assert not hub.requests


def test_a_dry_run_uploads_nothing(hub, exported, capsys):
    from textpolicy.cli import main

    assert main(["push", str(exported), "--repo", REPO, "--public", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert not shown["uploaded"] and not shown["private"] and shown["repository"] == REPO
    sizes = {name: len(content) for name, content in content_of(exported).items()}
    assert shown["files"] == sizes
    assert not hub.requests


def run_command(server, folder, tmp_path, **environment) -> str:
    """Upload by the command in a process of its own, and return what it prints to the terminal."""
    known = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    program = "from textpolicy.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "push", str(folder), "--repo", REPO],
        env=os.environ | known | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded to {server.url}/{REPO}/commit/{1:040x}\n"
    return done.stderr


@pytest.mark.slow
def test_the_command_uploads_by_the_environment_alone(exported, tmp_path):
    with serving_hub() as server:
        said = run_command(server, exported, tmp_path, HF_HUB_DISABLE_XET="1")
        assert f"uploading {REPO} (private)" in said
        assert server.repositories[REPO].files == content_of(exported)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:hf_xet:DeprecationWarning")
def test_the_store_for_large_files_has_them_bit_for_bit(exported, tmp_path):
    (exported / "adapter_model.safetensors").write_bytes(os.urandom(3 * PART_BYTES))
    with serving_hub(tmp_path / "store") as server:
        run_command(server, exported, tmp_path)
        files = server.repositories[REPO].files
    for name, content in content_of(exported).items():
        if name.endswith(LARGE_FILES):
            content = hashlib.sha256(content).hexdigest().encode()
        assert files[name] == content
    (known,) = hf_xet.hash_files([str(exported / "adapter_model.safetensors")])
    wanted = hf_xet.PyXetDownloadInfo(str(tmp_path / "back"), known.hash, 3 * PART_BYTES)
    url = f"local://{tmp_path / 'store'}"
    hf_xet.download_files([wanted], url, ("t", 2**40), None, None)
    assert (tmp_path / "back").read_bytes() == (exported / "adapter_model.safetensors").read_bytes()
