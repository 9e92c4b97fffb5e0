"""No secret leaves: what `redact` takes out and what it leaves, and a whole run folder after a real run."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlat.errors import UserError
from hlat.observe import failures
from hlat.observe.environment import variables
from hlat.observe.redact import line_with_secret, names_secret, redact, redact_all
from hlat.recipe import load
from hlat.supervise.events import Events
from hlat.supervise.logs import LogMirror

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYplanted1",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEplanted2/session+token==",
    "HF_TOKEN": "hf_PLANTED3abcdefghijklmnopqrstuv",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefplanted4",
    "NEURON_PROXY_PASSWORD": "planted5-p@ss:word",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.planted6planted6.c2lnbmF0dXJl",
}
CARRIERS = {  # variables that are recorded, with a secret in the value
    "NEURON_CC_FLAGS": f"--model-type=transformer --token={PLANTED['HF_TOKEN']}",
    "NEURON_COMPILE_CACHE_URL": "https://me:planted7-password@host/cache",
    "NCCL_HOSTID": PLANTED["WANDB_API_KEY"],
    "SLURM_JOB_COMMENT": f"key {PLANTED['AWS_SECRET_ACCESS_KEY']}",
    "XLA_EXTRA": "Authorization: Bearer planted8abcdefgh",
}
WORDS = [f"planted{number}" for number in range(1, 9)]


def holds(text: str) -> list[str]:
    return [word for word in WORDS if word in text.lower()]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("s3://bucket/run?X-Amz-Credential=AK/x&X-Amz-Signature=planted1", "s3://bucket/run?X-Amz-Credential=***"),
        ("git clone https://planted1@github.com/a/b", "git clone https://github.com/a/b"),
        ("postgres://me:planted1@db:5432/x failed", "postgres://db:5432/x failed"),
        ("WANDB_API_KEY=planted1planted1", "WANDB_API_KEY=***"),
        ("--api-key planted1x --lr 3e-4", "--api-key *** --lr 3e-4"),
        ('{"password": "planted1 is long"}', '{"password": "***"}'),
        ("token: planted1abc", "token: ***"),
        ("aws_secret_access_key = planted1/abc", "aws_secret_access_key = ***"),
        ("Authorization: Bearer planted1planted1", "Authorization: Bearer ***"),
        ("AUTH=planted1planted1", "AUTH=***"),
        ("MY_JWT=planted1planted1 next", "MY_JWT=*** next"),
        ("export ENCRYPTION_KEY='planted1x'", "export ENCRYPTION_KEY='***'"),
        ("SSH_KEY: planted1planted1", "SSH_KEY: ***"),
        ("MY_KEY=planted1x DB_PASS=planted1x DB_PWD=planted1x", "MY_KEY=*** DB_PASS=*** DB_PWD=***"),
        ("GITHUB_PAT=planted1x", "GITHUB_PAT=***"),
        ("SENTRY_DSN=https://planted1@o1.ingest.sentry.io/7 next", "SENTRY_DSN=*** next"),
        ("CARD_PIN=planted1 DSN: planted1", "CARD_PIN=*** DSN: ***"),
        ("webhook_url: 'https://hooks.example.com/planted1'", "webhook_url: '***'"),
        ("SLACK_WEBHOOK=https://hooks.example.com/planted1", "SLACK_WEBHOOK=***"),
        ("--connection-string planted1x CONN_STR=planted1x", "--connection-string *** CONN_STR=***"),
        ("signing-key: planted1x, Name=a;AccountKey=planted1x==", "signing-key: ***, Name=a;AccountKey=***"),
        ('{"auth": "planted1planted1", "b": 1}', '{"auth": "***", "b": 1}'),
        ("Authorization: planted1planted1", "Authorization: ***"),
        ("-H 'authorization: Token planted1' -v", "-H 'authorization: Token ***' -v"),
        ("Authorization: Bearer planted1 failed", "Authorization: Bearer *** failed"),
        ('Authorization: Digest username="a", response="planted1"\nb', "Authorization: Digest ***\nb"),
        ("{'Authorization': 'planted1planted1', 'b': 1}", "{'Authorization': '***', 'b': 1}"),
        ("Proxy-Authorization: Basic planted1=", "Proxy-Authorization: Basic ***"),
        ("Set-Cookie: session=planted1; Path=/", "Set-Cookie: ***"),
        ("AKIAIOSFODNN7EXAMPLE and ghp_planted1planted1planted1", "*** and ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nplanted1\n-----END RSA PRIVATE KEY-----\nafter", "***\nafter"),
    ],
)  # fmt: skip
def test_secrets_are_taken_out(text: str, kept: str) -> None:
    assert kept in redact(text, {}) and not holds(redact(text, {}))


@pytest.mark.parametrize(
    "text",
    [
        "step 17 · loss 2.345 · 163,840 tokens/s · tokens: 12345678901",
        "data.tokenizer=bytes-tokenizer, token_ids=[1,2,3], per_token: 0.12345678",
        "tokens_per_second=123456.789 keys=embedding.weight author: somebody-known",
        "monkey=bananas-and-more turkey: istanbul-ankara",
        "rank 2 (node-a, pid 4711) is gone: last sign 1.2 s ago in step 17 (training)",
        "s3://bucket/checkpoints/step-20 and file:///data/x@y",
        "NEURON_CC_FLAGS=--model-type=transformer -O1",
        "sha256 0123456789abcdef0123456789abcdef",
        "PATH=/usr/local/bin:/usr/bin PWD=/home/me/a-folder OLDPWD=/home/me/another",
        "PYTHONHASHSEED=12345678 MASTER_PORT=29500000 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=0,1,2,3,4",
        "eos_token=<|endoftext|> pad_token: <|pad|>, 'bos_token': '<s>', token: 50256",
        "KeyError: 'model.layers.0.weight' sort_key=length_ab forward_pass=12345678 auth: denied by server",
        "password: null, secret=None, passphrase: none, password=true",
        "OMP_SPIN=12345678 PINNED=12345678 pin_memory=12345678 dsname=12345678 webhooks: 12345678",
        "authority=something-long authorization is missing, cookies: 12345678",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert redact(text, {"TOKENIZERS_PARALLELISM": "false", "XDG_SESSION_KEYS": "1234567890"}) == text


def test_values_of_secret_variables_are_found_anywhere() -> None:
    text = f"GET {PLANTED['AWS_SESSION_TOKEN']} as {PLANTED['NEURON_PROXY_PASSWORD']}\nsecond line"
    assert redact(text, PLANTED) == "GET *** as ***\nsecond line"
    assert redact_all({"a": [text, 3, None, {"b": PLANTED["HF_TOKEN"]}]}, PLANTED) == {
        "a": ["GET *** as ***\nsecond line", 3, None, {"b": "***"}]
    }


NUMERIC = {"MY_TOKEN": "4929123412341234", "PIN_PASSWORD": "12345678", "MAX_TOKENS": "10000000000"}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x 4929123412341234 y", "x *** y"),
        ("4929123412341234.", "***."),
        ('{"a": 4929123412341234}', '{"a": ***}'),
        ("a4929123412341234b", "a***b"),
        ("49291234\n12341234", "***\n***"),
        ("[rank0]: 49291234\n[rank0]: 12341234 z", "[rank0]: ***\n[rank0]: *** z"),
        ("MY_TOKEN=99999999, pin 12345678", "MY_TOKEN=***, pin ***"),
        ("step 912345678 of 10000000000", "step 912345678 of 10000000000"),
        ("loss 0.12345678, 1,12345678.5", "loss 0.12345678, 1,12345678.5"),
        ("at token 104857600", "at token 104857600"),
    ],
)
def test_numbers_can_be_secrets_and_a_part_of_another_number_is_none(text: str, kept: str) -> None:
    assert redact(text, NUMERIC) == kept


@pytest.mark.parametrize(
    "name",
    ["PASSWORD", "PASSWD", "PASSPHRASE", "PASSCODE", "SECRET", "PASS", "MY_PASS", "SSHPASS", "DB_PWD", "KEY",
     "TOKEN", "CREDENTIAL", "AUTH", "MY_JWT", "COOKIE", "ENCRYPTION_KEY", "SSH_KEY", "GITHUB_PAT",
     "PIN", "CARD_PIN", "DSN", "SENTRY_DSN", "SLACK_WEBHOOK", "WEBHOOK_URL", "ALERT_WEBHOOK_URI",
     "AZURE_STORAGE_CONNECTION_STRING", "DB_CONN_STR", "CONNECTIONSTRING"],
)  # fmt: skip
def test_the_value_of_every_such_name_is_hidden(name: str) -> None:
    for value in ("12345678", "4929123412341234", "1234.56789", "abcdefghijk"):
        assert redact(f"x {value} y", {name: value}) == "x *** y"
    assert redact_all({"a": 4929123412341234, "b": 49}, {name: "4929123412341234"}) == {"a": "***", "b": 49}
    assert variables({f"NCCL_{name}": "1"}) == {}


def test_names_that_say_no_secret() -> None:
    plain = "PATH PWD OLDPWD PYTHONHASHSEED MASTER_PORT COMPASS BYPASS SPATIAL PATH_PAT_X"
    near = "SPIN OMP_SPIN PINNED PIN_MEMORY I_MPI_PIN_DOMAIN DSNAME WEBHOOK_PORT CONNECTION_STRINGS_MAX"
    for name in (*plain.split(), *near.split()):
        assert not names_secret(name), name
        assert redact("x 12345678 y", {name: "12345678"}) == "x 12345678 y"


def test_the_names_in_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/operations/security.md").read_text()
    listed = page.partition("whose name says secret (")[2].partition(")")[0]
    names = re.findall(r"`(\w+)`", listed)
    assert len(names) >= 13 and all(names_secret(f"A_{name.strip('_')}") for name in names)


def test_short_passwords_are_hidden_as_whole_words_and_short_words_and_numbers_are_not() -> None:
    for value in ("hunter2", "a-b-c", "x1y2"):
        text = f"login {value}, {value}x and x{value}."
        assert redact(text, {"DB_PASSWORD": value}) == f"login ***, {value}x and x{value}."
        assert line_with_secret(f"a: 1\nb: {value}", {"DB_PASSWORD": value}) == 2
        assert redact(text, {"SORT_KEY": value}) == text
        for form in (
            f"password={value}",
            f"--password={value}",
            f"'password': '{value}'",
            f"secret: '{value}'",
        ):
            assert value not in redact(form, {}), form
    assert redact("password: hunter2, --db-password hunter2", {}) == "password: ***, --db-password ***"
    for value in ("1234567", "1234", "train", "a1"):
        assert redact(f"x {value} y", {"DB_PASSWORD": value}) == f"x {value} y"


def test_what_a_key_of_data_names() -> None:
    data = {
        "api_key": "planted1x",
        "password": "hunter2",
        "tokens": "12345678",
        "eos_token": "<|end|>",
        "key": "a.b",
    }
    assert redact_all(data, {}) == {**data, "api_key": "***", "password": "***"}


def test_a_secret_is_found_in_the_forms_that_libraries_print(tmp_path: Path) -> None:
    value = 'pl4nted/word+with="quotes" and a\nsecond-line-of-it\n--'
    environ = {"MY_SECRET": value, "OTHER_KEY": "pl4nted5-p@ss/word"}
    texts = [value, repr(value), json.dumps({"a": value}), quote(value), quote_plus(value), quote(value, "")]
    texts += [value.replace("\n", "\n[rank3]: "), "\n".join(value[i : i + 9] for i in range(0, 30, 9))]
    for before in ("", "a", "ab"):
        data = f"{before}{environ['OTHER_KEY']}{before}".encode()
        texts += [base64.b64encode(data).decode(), base64.encodebytes(b"x" * 57 + data).decode()]
        texts += [base64.urlsafe_b64encode(data).decode()]
    texts += [
        f"https://me:{environ['OTHER_KEY']}@host/x",
        "https://me:a@b:c@host/x secret: |\n  pl4nted-block",
    ]
    coded = base64.b64encode(b"pl4nted5-p@ss/word").decode()[2:14]
    for text in texts:
        hidden = redact(text, environ)
        assert "pl4nted" not in hidden and "second-line" not in hidden and coded not in hidden, (text, hidden)
        assert "a@b" not in hidden and "b:c@" not in hidden


HARD = ("QUJD", "_", "://", "a://", "token ", "token=", 'a_token"  ', "eyJ-", "eyJaaaaaaaaaa.", "hf_", "1",
        "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "Bearer ", "http://a@:",
        "xoxb-", "github_pat_", "\n[rank0]: ", " ", "\t\n", "aaaaaaab", "password   ", "sk-",
        "Authorization: ", "authorization: Digest ",
        "cookie: ", "secret=", "_KEY=", "-password ")  # fmt: skip


def test_the_work_grows_with_the_length_and_no_faster() -> None:
    """60 kB of each; with a square somewhere some of them take a minute of this process's own time."""
    environ = {"A_TOKEN": "aaaaaaaaaaaaaaab", "B_KEY": "1111111111111112"}
    began = time.process_time()
    for word in HARD:
        redact((word * 60_000)[:60_000], environ)
        line_with_secret((word * 60_000)[:60_000], environ)
        assert time.process_time() - began < 20, word


@given(st.text(max_size=300))
def test_any_text_keeps_its_lines_and_is_left_alone_the_second_time(text: str) -> None:
    once = redact(text, {})
    assert redact(once, {}) == once
    assert redact_all(json.loads(json.dumps({"x": text})), {})["x"] == once


@pytest.mark.parametrize(
    ("lines", "overrides", "where"),
    [
        ("run: {name: a}\n# https://me:secret@host/x\n", (), "a.yaml:2: a login or token"),
        (
            "run: {name: a}\n\ndata: {tokenizer: hf_abcdefghijklmnopqrstuv}\n",
            (),
            "a.yaml:3: a login or token",
        ),
        (
            "run: {name: a}\n",
            ("run.dir=https://me:secret@host/x",),
            "command line: run.dir: a login or token",
        ),
        ("run: {name: a}\n# hf_abcdefghijklmnopqrstuv\n", (), "a.yaml:2: a login or token"),
        ("base: b.yaml\nrun: {name: a}\n", (), "b.yaml:3: a login or token"),
        ('run:\n  name: "hf\\u005fabcdefghijklmnopqrstuv"\n', (), "a.yaml:2: run.name: a login or token"),
        ("run: {name: a}\ndata:\n  sources: [x, 4929123412341234]\n", (), "a.yaml:3: a login or token"),
        ("run: {name: 4929123412341234}\n", (), "a.yaml:1: a login or token"),
        (
            "run: {name: a}\ninit: |\n  -----BEGIN PRIVATE KEY-----\n  MHcC\n",
            (),
            "a.yaml:3: a login or token",
        ),
        ("run: {name: a}\n", ("run.name=my-wORD-nr-7-of-many",), "command line: run.name: a login or token"),
    ],
)
def test_a_recipe_with_a_secret_is_refused(
    tmp_path: Path, lines: str, overrides: tuple[str, ...], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text(lines)
    (tmp_path / "b.yaml").write_text("run: {name: b}\n\n# ghp_abcdefghijklmnopqrstuv\n")
    monkeypatch.setenv("CARD_TOKEN", "4929123412341234")
    monkeypatch.setenv("SOME_PASSWORD", "my-wORD-nr-7-of-many")
    monkeypatch.setenv("MAX_TOKENS", "10000000000")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.yaml", overrides)
    assert where in caught.value.line() and "security.md" in caught.value.line()
    assert not re.search("secret@|hf_abc|ghp_abc|4929123412341234|my-wORD", caught.value.line())


def test_no_shipped_recipe_is_refused() -> None:
    root = Path(__file__).resolve().parents[2] / "recipes"
    assert all(line_with_secret(file.read_text()) is None for file in root.rglob("*.yaml"))


def test_what_a_rank_prints_and_tells_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    error = ValueError(f"https://me:planted7@host refuses {PLANTED['HF_TOKEN']}")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    failures.say_traceback("rank 1 (node-a)", error)
    failures.write_error_file(error)
    printed = capsys.readouterr().err
    assert (
        "rank 1 (node-a) failed:" in printed and "https://host refuses ***" in printed and not holds(printed)
    )
    written = json.loads((tmp_path / "error.json").read_text())
    assert "refuses ***" in written["message"]["message"] and not holds(json.dumps(written))


RECIPE = """
run: {name: small, steps: 2, seed: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 320, max_seq_len: 16}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 4, holdout: 0.2}
checkpoint: {every: 1, keep: 2}
eval: {every: 1, rows: 2}
log: {every: 1, tensorboard: true}
compile: false
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "supervise"])
def test_a_run_folder_holds_no_planted_secret(how: str, tmp_path: Path) -> None:
    """A real run of two ranks with planted variables, then every byte it and its launcher wrote."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"some words of text number {number} " * 20)
    environ: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environ |= PLANTED | CARRIERS | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--log-dir={tmp_path}/logs", "--redirects=3", "-m", "hlat", "train", "small.yaml"]
    if how == "supervise":
        command = [sys.executable, "-m", "hlat", "supervise", "small.yaml", "--nproc-per-node=2"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "runs/small/environment.json").read_text())
    assert "--model-type=transformer --token=***" in json.dumps(record), (
        "the variables themselves are recorded"
    )
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name.startswith("events.out") for file in files)
    found = {str(file): holds(file.read_bytes().decode("latin-1")) for file in files}
    assert {name: words for name, words in found.items() if words} == {}
    assert not holds(done.stdout + done.stderr)


def test_a_supervised_ranks_log_and_the_restart_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a library prints, in lines and halves of lines; byte for byte where there is no secret."""
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    source = tmp_path / "scratch/a/attempt_0/0"
    source.mkdir(parents=True)
    mirror, copy = LogMirror(tmp_path / "scratch", tmp_path / "logs"), tmp_path / "logs/rank-00000-stderr.log"
    with (source / "stderr.log").open("wb") as file:
        for piece in (
            b"before \xff\n",
            b"GET hf_PLANTED3abc",
            b"defghijklmnopqrstuv\nafter",
            b" it\r50 %\rend",
        ):
            file.write(piece)
            file.flush()
            mirror.sync()
            assert not copy.exists() or not holds(copy.read_bytes().decode("latin-1"))
    assert copy.read_bytes() == b"before \xff\nGET ***\nafter it\r50 %\r"
    mirror.sync(last=True)
    mirror.sync(last=True)
    assert copy.read_bytes() == b"before \xff\nGET ***\nafter it\r50 %\rend"
    events = Events(tmp_path, quiet=True)
    events.add("end", reason=f"refused {PLANTED['HF_TOKEN']}", rank=3)
    assert json.loads((tmp_path / "events.jsonl").read_text())["reason"] == "refused ***"


@pytest.mark.parametrize("name", ["password", "api_key", "passphrase", "access_token"])
@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_quoted_secret_may_hold_blanks(name, quote):
    text = f"{quote}{name}{quote}: {quote}correctly horse, battery{quote}, 'b': 'plain words here'"
    hidden = redact(text, {})
    assert not any(word in hidden for word in ("correctly", "horse", "battery"))
    assert hidden.endswith(f"{quote}, 'b': 'plain words here'")
    assert redact(f"{name}: {quote}a{quote}, b: {quote}plain words here{quote}", {}).endswith(
        f"words here{quote}"
    )


def test_a_container_of_azure_is_no_login() -> None:
    for url in ("abfs://container@account/folder", "abfss://c-1@account.dfs.core.windows.net/x"):
        assert redact(f"write {url}", {}) == f"write {url}"
    assert "hunter22" not in redact("abfs://user:hunter22@account/folder", {})
    assert redact("s3://user@bucket/x", {}) == "s3://bucket/x"
