"""Tokens, keys and passwords do not reach what a run keeps or sends: config.yaml, manifest.json, logs, status.json, code.diff, W&B."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, environment

from launcher.config import JobConfig
from launcher.job import make_job, manifest
from trainers.config import secrets
from trainers.config.schema import plain

LETTERS = "Q7wXz3Kd9Lm2Rt5Vb8Nc4Hj6Pf1Sg0Ya"
KINDS = {
    "Hugging Face": f"hf_{LETTERS}",
    "OpenAI": f"sk-proj-{LETTERS}",
    "Anthropic": f"sk-ant-api03-{LETTERS}",
    "GitHub": f"ghp_{LETTERS}abcd",
    "GitHub, fine-grained": f"github_pat_{LETTERS}",
    "GitLab": f"glpat-{LETTERS[:20]}",
    "AWS": "AKIAQ7XZ3KD9LM2RT5VB",
    "Google": f"AIza{LETTERS}abc",
    "Google OAuth": f"ya29.{LETTERS}",
    "Slack": f"xoxb-{LETTERS}",
    "Slack webhook": f"https://hooks.slack.com/services/T00/B00/{LETTERS}",
    "W&B": f"wandb_v1_{LETTERS}",
    "NVIDIA": f"nvapi-{LETTERS}",
    "Groq": f"gsk_{LETTERS}",
    "Databricks": "dapi0123456789abcdef0123456789abcdef",
    "Stripe": f"sk_live_{LETTERS}",
    "npm": f"npm_{LETTERS}abcd",
    "PyPI": f"pypi-AgE{LETTERS}",
    "SendGrid": f"SG.{LETTERS[:22]}.{LETTERS}",
    "JSON web token": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{LETTERS}",
    "Telegram": f"123456789:{LETTERS}abc",
    "password of a URL": f"https://me:{LETTERS}@example.org/x",
    "token of a URL": f"https://{LETTERS}@example.org/x.git",
    "signature of a URL": f"https://example.org/x?X-Amz-Signature={LETTERS}&b=1",
    "Azure": f"AccountKey={LETTERS}==;x",
    "header": f"Authorization: Bearer {LETTERS}",
    "variable": f"WANDB_API_KEY={LETTERS}",
    "option": f"--api-key {LETTERS}",
    "JSON": f'{{"password": "{LETTERS}"}}',
    "JSON in a command": json.dumps(json.dumps({"api_key": LETTERS})),
    "assignment": f"client_secret = '{LETTERS}'",
}
HARMLESS = [
    "model.add_tokens=['<|im_start|>'] train.sample_tokens=8 evaluation.max_new_tokens=256",
    "model.tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct model.train_tokenizer=4096",
    "0123456789abcdef0123456789abcdef01234567 is a commit, and a sha256 has 64 of these: " + "ab" * 32,
    "runs/sweeps/a/optim.lr=0.003,peft=lora and https://huggingface.co/acme/tiny and me@example.org",
    "token = tokenizer.decode(ids); secret = read(); password: the field's name",
    "step 3: held-out loss 1.2345 over 12,345 tokens; hf_transfer sk-learn",
    """{"eos_token": "<|im_end|>", "pad_token": "<pad>"} tokenizer.pad_token = '</s>' """,
    "model.id=acme/sk-learn-tiny-model-v2 /opt/pypi-more-packages-list/x hf_internaltestingmodels",
    "data.path=/home/me/key/data.jsonl http://127.0.0.1:8000/v1",
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_masked_wherever_it_is(kind: str) -> None:
    secret = KINDS[kind]
    core = LETTERS[:20] if LETTERS[:20] in secret else secret
    for text in (secret, f"a {secret} b", f"'{secret}'", f"log.tags=[{secret}]", f"+x = 1  # {secret}"):
        assert core not in secrets.masked(text), text
    diff = f"diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+{secret}\n".encode()
    assert core.encode() not in secrets.mask_diff(diff)
    assert secrets.mask_diff(diff).startswith(b"diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secrets.masked(text) == text


def test_private_keys_are_masked_line_by_line() -> None:
    lines = ["-----BEGIN OPENSSH PRIVATE KEY-----", *(LETTERS + str(number) for number in range(3)), "-----END OPENSSH PRIVATE KEY-----"]
    assert LETTERS not in secrets.masked("\n".join(lines))
    assert LETTERS.encode() not in secrets.mask_diff("".join(f"+{line}\n" for line in lines).encode())


def test_the_values_of_secret_variables_are_masked_whatever_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MY_TOKEN": "correct horse battery",
        "DB_PASSWORD": "tiger1234",
        "PLAIN": "stays here",
        "SHORT_KEY": "a",
        "DATA_KEY": "messages",
        "SSH_KEY": "/home/me/2/id",
    }.items():
        monkeypatch.setenv(name, value)
    secrets._of_environment.cache_clear()
    assert secrets.masked("correct horse battery, tiger1234, stays here, a, messages, /home/me/2/id") == (
        "***, ***, stays here, a, messages, /home/me/2/id"
    )
    monkeypatch.undo()
    secrets._of_environment.cache_clear()


def test_words_of_a_command_line_are_masked_after_the_options_of_secrets() -> None:
    words = ["--api-key", "tok", "--x_token", "a b", "--hf-token", "--y", "--max-tokens", "8", "--tokenizer", "a/b", "--top-k", "4"]
    assert secrets.mask(words) == ["--api-key", "***", "--x_token", "***", "--hf-token", "***", *words[6:]]
    assert secrets.mask(["rl.vllm_words=[--api-key,tok,--y,1]"]) == ["rl.vllm_words=[--api-key,***,--y,1]"]
    assert secrets.mask(["""x=['--api-key', 'tok']"""]) == ["""x=['--api-key', '***']"""]


def test_settings_and_the_command_are_masked_before_they_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = JobConfig(run_dir=str(tmp_path))
    config.log.tags, config.data.path, config.model.id = list(KINDS.values()), KINDS["password of a URL"], "acme/tiny"
    run = make_job(config).run
    assert LETTERS[:20] not in json.dumps(plain(run))
    assert (run.model.id, run.data.path) == ("acme/tiny", "https://***@example.org/x")
    monkeypatch.setattr(sys, "argv", ["launcher", *KINDS.values(), "model.id=acme/tiny"])
    command = manifest({})["command"]
    assert LETTERS[:20] not in json.dumps(command)
    assert command[-1] == "model.id=acme/tiny"


def test_what_is_logged_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("masked")
    logger.addFilter(secrets.MaskRecords())
    logger.warning("%s cannot be fetched: %d", KINDS["password of a URL"], 404)
    assert caplog.messages == ["https://***@example.org/x cannot be fetched: 404"]


def test_a_run_keeps_no_secret(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Secrets in settings and in the environment, and an error that tells one."""
    run_dir, quoted = tmp_path / "run", ",".join(json.dumps(value) for value in KINDS.values())
    rows = tmp_path / "rows.jsonl"
    rows.write_text(chats.read_text())
    line = [sys.executable, "-m", "launcher", "model=hf", f"model.id={base}", "data=files", f"data.path={rows}", "data.template=chatml"]
    line += [f"run_dir={run_dir}", "data.seq_len=64", "train.steps=1", "train.global_batch=4", "train.precision=fp32", "optim.lr=1e-2"]
    line += ["launch.processes=1", "log.wandb=offline", f"log.tags=[{quoted}]", f"log.group={KINDS['OpenAI']}", f"name={KINDS['AWS']}"]
    env = environment(cache) | {"MY_API_KEY": "correct horse battery", "OTHER_TOKEN": KINDS["Hugging Face"]}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "log.tags" in done.stderr  # which were masked is said
    kept = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()}
    assert any(path.suffix == ".wandb" for path in kept)
    core = LETTERS[:20].encode()
    assert [path for path, data in kept.items() if core in data or KINDS["AWS"].encode() in data] == []
