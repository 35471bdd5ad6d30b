from __future__ import annotations

import logging
import sys
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.secrets import SecretMask, secrets_hidden
from sft_job.contract import ExitCode
from sft_job.errors import Problem

ENVIRON = {
    "WANDB_API_KEY": "0123456789abcdef0123",
    "HF_TOKEN": "canary-hf-token",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret",
    "MY_PASSWORD": "canary 'quoted' \"pass\"\nword",
    "TOKENIZERS_PARALLELISM": "false-or-true",
    "HF_TOKEN_PATH": "/run/secrets/hf_token",
    "DB_PASSWORD": "short",
    "HOME": "/home/somebody",
}


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"])
def test_values_of_secret_variables_are_hidden(name: str) -> None:
    mask = SecretMask(ENVIRON)
    for said in (ENVIRON[name], repr(ENVIRON[name]), f"model = {ENVIRON[name]!r}: must not be"):
        hidden = mask.text(said)
        assert f"<secret {name}>" in hidden
        assert ENVIRON[name] not in hidden


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "DB_PASSWORD", "HOME"])
def test_other_values_stand(name: str) -> None:
    assert SecretMask(ENVIRON).text(f"a {ENVIRON[name]} b") == f"a {ENVIRON[name]} b"


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD",
        "MYSQL_PWD",
        "SSHPASS",
        "HF_AUTH",
        "AUTHORIZATION",
        "ACCESSTOKEN",
        "SECRETKEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "SENTRY_DSN",
        "AZURE_SAS",
        "AZURE_STORAGE_SAS_TOKEN",
        "PROXY_AUTHORIZATION",
        "APIKEY",
        "dbPassword",
        "HF_TOKEN_2",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert SecretMask({name: "canary-value"}).text("a canary-value") == f"a <secret {name}>"


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "SSH_AUTH_SOCK",
        "AUTH_TYPE",
        "XAUTHORITY",
        "TOKENIZERS_PARALLELISM",
        "KEYBOARD",
        "PGPASSFILE",
        "COMPASS",
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert SecretMask({name: "/some/folder"}).text("in /some/folder") == "in /some/folder"


@pytest.mark.parametrize("length", [5, 10, 199, 405])
def test_a_secret_that_was_cut(length: int) -> None:
    """What shows a long value cuts it; hundreds of characters of a token are no less secret than all."""
    value = ("canary" + "0123456789" * 40)[:406]
    mask = SecretMask({"A_TOKEN": value, "B_TOKEN": "another-" + value})
    said = f"optim.lr = '{value[:length]}…\n    must be a number, found {value}"
    assert mask.text(said) == "optim.lr = '<secret A_TOKEN>…\n    must be a number, found <secret A_TOKEN>"
    assert mask.text("nothing… of can… it…") == "nothing… of can… it…"


def test_a_problem_with_a_long_secret() -> None:
    value = "canary" + "0123456789" * 40
    text = Problem(ExitCode.CONFIG, "optim.lr", "must be a number", value=["a", value]).text()
    assert "canary" in text
    assert SecretMask({"A_TOKEN": value}).text(text) == "optim.lr = ['a', '<secret A_TOKEN>…\n    must be a number"


@pytest.mark.parametrize("said", ["hf_a1B2c3…", "s3://user:pass-and-mo…"])
def test_forms_that_were_cut(said: str) -> None:
    assert SecretMask({}).text(f"x {said}") in ("x <secret>…", "x s3://<secret>…")


def test_one_secret_that_begins_with_another() -> None:
    mask = SecretMask({"A_KEY": "canary-1", "B_KEY": "canary-1-and-more"})
    assert mask.text("canary-1-and-more, canary-1") == "<secret B_KEY>, <secret A_KEY>"


@pytest.mark.parametrize(
    "said",
    [
        "hf_" + "a1B2" * 8,
        "AKIA" + "ABCD1234" * 2,
        "ghp_" + "x9" * 18,
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_values_that_look_like_secrets_are_hidden_without_a_variable(said: str) -> None:
    assert SecretMask({}).text(f"x {said} y") == "x <secret> y"


def test_a_password_in_an_address() -> None:
    shown = SecretMask({}).text("s3://user:pass@bucket/runs and hdfs://host:8020/runs")
    assert shown == "s3://<secret>@bucket/runs and hdfs://host:8020/runs"


def test_trees() -> None:
    mask = SecretMask({"A_TOKEN": "canary-token"})
    tree = {"a": ["canary-token", 1, None], "canary-token": {"b": ("x canary-token",)}}
    assert mask.tree(tree) == {"a": ["<secret A_TOKEN>", 1, None], "<secret A_TOKEN>": {"b": ["x <secret A_TOKEN>"]}}


def test_streams_hide_what_logs_and_tracebacks_say(capsys: pytest.CaptureFixture[str]) -> None:
    with secrets_hidden({"A_TOKEN": "canary-token"}):
        logger = logging.getLogger("a-logger")
        logger.addHandler(handler := logging.StreamHandler(sys.stderr))
        logger.warning("with canary-token in it")
        logger.removeHandler(handler)
        try:
            raise ValueError("no canary-token here")
        except ValueError:
            traceback.print_exc()
        sys.stdout.write("and canary-token\n")
        sys.stdout.writelines(["one canary-token", "\n"])
        assert sys.stdout.isatty() is False
    shown = capsys.readouterr()
    assert "canary-token" not in shown.out + shown.err
    assert shown.err.count("<secret A_TOKEN>") == 3  # the traceback shows the line of code, too
    assert shown.out == "and <secret A_TOKEN>\none <secret A_TOKEN>\n"


@given(st.text(), st.text(min_size=8), st.text())
def test_no_value_survives(before: str, value: str, after: str) -> None:
    hidden = SecretMask({"X_SECRET": value}).text(before + value + after)
    if value not in before + "<secret X_SECRET>" + after:
        assert value not in hidden
