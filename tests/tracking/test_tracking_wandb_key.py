import pytest
from wandb_server import KEY

from nanochat.errors import UsageError
from nanochat.tracking.wandb_key import DEFAULT_URL, Key, base_url, check_key, find_key


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_key_is_found_in_its_variable_then_in_env_files_then_in_netrc(folder):
    workspace = folder / "workspace"
    workspace.mkdir()
    environment = {"NANOCHAT_BASE_DIR": str(workspace), "HOME": str(folder)}
    assert find_key(environment) is None
    for path, content in (
        (folder / ".netrc", f"machine api.wandb.ai login user password {'n' * 40}\n"),
        (workspace / ".env", f"HF_TOKEN=x\nexport WANDB_API_KEY='{'w' * 40}'\n"),
        (folder / ".env", f"# mine\nWANDB_API_KEY={'e' * 40}\n"),
    ):
        path.write_text(content)
        path.chmod(0o600)
        found = find_key(environment)
        assert found is not None
        assert (found.value, found.source, found.warning) == (found.value[0] * 40, str(path), "")
        assert found.value in content
    found = find_key({**environment, "WANDB_API_KEY": KEY})
    assert found is not None
    assert (found.value, found.source) == (KEY, "WANDB_API_KEY")


def test_a_key_of_another_host_is_not_taken(folder):
    (folder / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    environment = {"HOME": str(folder)}
    assert find_key(environment) is not None
    assert find_key({**environment, "WANDB_BASE_URL": "http://127.0.0.1:1"}) is None


def test_an_env_file_that_others_can_read_is_a_warning_with_its_fix(folder):
    path = folder / ".env"
    path.write_text(f"WANDB_API_KEY={KEY}\n")
    path.chmod(0o644)
    found = find_key({})
    assert found is not None
    assert found.warning == f"{path} can be read by others (mode 0644) — chmod 600 {path}"


def test_an_env_file_without_a_key_or_without_text_is_passed_over(folder):
    for content in (b"HF_TOKEN=x\n", b"WANDB_API_KEY=\n", b"\xff\xfe"):
        (folder / ".env").write_bytes(content)
        assert find_key({}) is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (KEY + "\n", "begins or ends with a blank"),
        (KEY[:39], "has 39 characters, a key has 40 or more"),
        (KEY.replace("a", "ä"), "has characters that no key has"),
        (KEY[:20] + " " + KEY[20:], "has characters that no key has"),
        ("local-" + KEY[:39], "has 39 characters"),
    ],
)
def test_what_cannot_be_a_key_is_told_without_showing_it(value, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        check_key(Key(value, "WANDB_API_KEY"))
    assert KEY[:20] not in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("value", [KEY, "local-" + KEY, "wandb_v1_" + KEY, ".".join([KEY] * 3)])
def test_what_can_be_a_key_is_left_alone(value):
    assert check_key(Key(value, "somewhere")).value == value


def test_a_key_is_not_in_what_python_prints_of_it():
    assert KEY not in repr(Key(KEY, "WANDB_API_KEY"))


def test_the_address_is_the_variables_or_what_wandb_login_stored(folder):
    environment = {"HOME": str(folder)}
    assert base_url(environment) == DEFAULT_URL
    settings = folder / ".config/wandb/settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org/\n")
    assert base_url(environment) == "https://wandb.example.org"
    assert base_url({**environment, "WANDB_BASE_URL": "http://127.0.0.1:1"}) == "http://127.0.0.1:1"
