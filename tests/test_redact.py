"""What leaves a process: without secrets, and without control sequences of somebody's names."""

import io
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.redact import RedactedStream, printable, redact

PASSWORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\"'<>"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"optim": {"lr": 0.1}, "mask_token_count": None}, {"optim": {"lr": 0.1}, "mask_token_count": None}),
        ({"comet": {"api_key": "K"}}, {"comet": {"api_key": "***"}}),
        ({"HF_TOKEN": "K", "num_tokens": 5, "apiKey": "K"}, {"HF_TOKEN": "***", "num_tokens": 5, "apiKey": "***"}),
        ({"credentials": {"user": "me"}, "key": "k"}, {"credentials": "***", "key": "k"}),
        ([{"aws_secret_access_key": "K"}], [{"aws_secret_access_key": "***"}]),
        ({"token": 0.25, "pin": 5}, {"token": 0.25, "pin": 5}),  # a score of a class of this name
        (["--password", "K", "--name", "n"], ["--password", "***", "--name", "n"]),
        ("s3://bucket/data", "s3://bucket/data"),
        ("s3://bucket/a@b.tar", "s3://bucket/a@b.tar"),
        ("s3://bucket/what? is@this", "s3://bucket/what? is@this"),
        ("https://me:pa@ss@host:80/a?b=c&d#e", "https://***@host:80/a?***"),
        ("https://me:pa/ss@host/a", "https://***@host/a"),
        ("https://me:1/2@host/a", "https://***@host/a"),
        ("https://me:pa?ss@host/a", "https://***@"),
        ("https://host?sig=x and http://u@h/", "https://host?*** and http://***@h/"),
        ("at https://me:pass@host:1/a/b.tar?X-Amz-Signature=abc, twice", "at https://***@host:1/a/b.tar?*** twice"),
        ("simplecache::https://me:p/w@host/a", "simplecache::https://***@host/a"),
        ("http://host/a?token", "http://host/a?***"),
        ("url=/a/b.tar?sig=abc&x", "url=/a/b.tar?***"),
        ("https://host/#access_token=K", "https://host/#access_token=***"),
        ("engine.deepspeed.comet.api_key=K L", "engine.deepspeed.comet.api_key=***"),
        ("engine.deepspeed={comet: {api_key: K, team: t}}", "engine.deepspeed={comet: {api_key: ***"),
        ("optim.lr=1e-3", "optim.lr=1e-3"),
        ("models:/pvt@champion", "models:/pvt@champion"),
        ("postgresql+psycopg2://u:p@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("export HF_TOKEN=K\nmodule load cuda", "export HF_TOKEN=***\nmodule load cuda"),
        ("curl -H 'Authorization: Basic K' x", "curl -H 'Authorization: ***"),
        ('{"X-Api-Key": "K"}', '{"X-Api-Key": ***'),
        ("sent Bearer K L", "sent Bearer ***"),
        ("run --password K --name n", "run --password ***"),
        ("run --token=K", "run --token=***"),
        ("engine.token: no such setting; valid here: stage", "engine.token: no such setting; valid here: stage"),
        ("size mismatch for cls_token: copying", "size mismatch for cls_token: copying"),
        ("a token or signed URL may have expired: renew it", "a token or signed URL may have expired: renew it"),
    ],
)
def test_redact_masks_secrets_and_nothing_else(value: Any, expected: Any) -> None:
    assert redact(value) == expected
    assert redact(redact(value)) == redact(value)


@given(PASSWORDS, PASSWORDS)
@settings(max_examples=100, deadline=None)
def test_redact_masks_any_password_and_signature(password: str, signature: str) -> None:
    password, signature = (f"Zq7{secret}Zq7" for secret in (password, signature))
    for text in (
        f"fetching https://me:{password}@host:80/a.tar?sig={signature} failed",
        f"--set data.train=https://me:{password}@host/a",
        f"Authorization: Bearer {password}",
        f"MY_TOKEN={password} python",
        f"--api-key {password}",
    ):
        assert "Zq7" not in redact(text)


@pytest.mark.parametrize(
    "piece", ["a", "://", "a://", "?", "?a", "@", "=", "a:", "-", "--a ", "token ", " ", "\t", "#", "http://a?"]
)
def test_redact_takes_linear_time(piece: str) -> None:
    def seconds(num_chars: int) -> float:
        began = time.process_time()
        redact(piece * (num_chars // len(piece)))
        return time.process_time() - began

    assert min(seconds(80_000) for _ in range(2)) < 0.2 + 12 * min(seconds(20_000) for _ in range(3))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Käse 猫", "Käse 猫"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\r\nerror: b", r"a\r\nerror: b"),
        ("cat\u202egpj.exe", r"cat\u202egpj.exe"),
        ("\x9b31m\u2028\udcff", r"\x9b31m\u2028\udcff"),
    ],
)
def test_printable_escapes_control_characters(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_redacted_stream_masks_secrets_and_control_sequences() -> None:
    stream = io.StringIO()
    print("50 %\r", "\x1b]0;title\x07", "https://me:p/w@host/", "\tend", file=RedactedStream(stream))
    assert stream.getvalue() == "50 %\r \\x1b]0;title\\x07 https://***@host/ \tend\n"
