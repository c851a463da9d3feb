"""W&B: a mirror of metrics.jsonl that never blocks or ends a run."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from trainers.config.choices import WandbMode
from trainers.config.derived import peak_lr
from trainers.config.schema import RunConfig, plain
from trainers.rundir.files import read_json
from trainers.rundir.paths import MANIFEST
from trainers.rundir.rows import Row

log = logging.getLogger("fulltune")
WANDB_WAIT_S = 20.0
OLD_HOST = "api.wandb.ai"
"""Under which earlier versions of wandb have stored a key; newer ones still take it."""
KEYS = {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"}
NOT_USED = {
    "WANDB_RESUME": "all attempts of a run continue one W&B run, whose id is in manifest.json (WANDB_RUN_ID chooses it)",
    "WANDB_CONSOLE": "RUN_DIR/logs has what ranks print",
}
"""Variables of W&B's that a run does not follow, and why. All others are W&B's own matter, or the launcher's."""


def mode_of(asked: WandbMode, environment: Mapping[str, str]) -> WandbMode:
    """Return whether and how W&B mirrors a run: what is asked for, and never more than WANDB_MODE and WANDB_DISABLED allow."""
    allowed = environment.get("WANDB_MODE", "").lower()
    if environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on") or allowed == "disabled":
        return WandbMode.disabled
    if allowed in ("offline", "dryrun") and asked is not WandbMode.disabled:
        return WandbMode.offline
    return WandbMode.online if allowed == "online" and asked is WandbMode.auto else asked


class Mirror:
    """W&B in a thread of its own: slow, failing or absent, it never blocks or ends a run, and never prompts."""

    def __init__(self, config: RunConfig) -> None:
        """Start the thread; rows wait in a queue until W&B answers."""
        self.config = config
        self.rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, row: Row) -> None:
        """Hand over a row; returns at once."""
        self.rows.put(row)

    def close(self) -> None:
        """Let W&B finish within WANDB_WAIT_S; what it could not send stays in metrics.jsonl."""
        self.rows.put(None)
        self.thread.join(WANDB_WAIT_S)
        if self.thread.is_alive():
            log.warning("W&B did not finish within %.0f s and is abandoned; metrics.jsonl has every row", WANDB_WAIT_S)

    def _work(self) -> None:
        try:
            run = self._begin()
            while (row := self.rows.get()) is not None:
                run.log({key: value for key, value in row.items() if key != "kind"})
            run.finish()
        except Exception as error:  # whatever W&B raises, the run continues
            log.warning("W&B is off for this run (%s: %s); metrics.jsonl has every row", type(error).__name__, error)

    def _begin(self) -> Any:
        import wandb

        for name, why in NOT_USED.items():
            if name in os.environ:
                log.warning("%s=%s is not used: %s", name, os.environ[name], why)
        config, online = self.config, self._is_online()
        keywords: dict[str, Any] = {
            "project": config.log.project or "fulltune",
            "entity": config.log.entity,
            "group": config.log.group,
            "name": os.environ.get("WANDB_NAME") or config.name,
            "id": wandb_id(config),
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR") or config.run_dir,
            "config": plain(config) | {"peak_lr": peak_lr(config.optim, config.peft).value, "code": _code(config)},
            "tags": ["full" if config.peft.method == "none" else str(config.peft.method), str(config.engine.name), *config.log.tags],
        }
        settings = {"silent": True, "console": "off", "login_timeout": 1, "disable_git": True}  # it sends uncommitted changes as they are
        settings |= {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": WANDB_WAIT_S / 2}
        if online:
            with contextlib.suppress(wandb.errors.CommError, wandb.errors.UsageError):
                return _with_steps(wandb.init(mode="online", settings=wandb.Settings(**settings), **keywords))
            log.warning("W&B does not answer: this run is recorded offline, `wandb sync` sends it later")
            wandb.teardown()
        return _with_steps(wandb.init(mode="offline", settings=wandb.Settings(**settings), **keywords))

    def _is_online(self) -> bool:
        """Tell whether to go online: asked for or left open, a key is at hand, and the server takes a connection."""
        if mode_of(self.config.log.wandb, os.environ) is WandbMode.offline:
            return False
        import wandb

        url = urlparse(wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url)  # which `wandb login --host` may have set
        host = url.hostname or OLD_HOST
        if not (KEYS & os.environ.keys() or any(map(_has_netrc, (host, OLD_HOST)))):
            if self.config.log.wandb is WandbMode.online:
                log.warning("log.wandb=online, but there is no W&B key: recorded offline; `wandb login` stores a key")
            return False
        try:
            socket.create_connection((host, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
        except OSError as error:
            log.warning("W&B cannot be reached at %s (%s): recorded offline, `wandb sync` sends it later", host, error)
            return False
        return True


def _code(config: RunConfig) -> dict[str, Any]:
    """Return the commit of the code, and the hash of its uncommitted changes, by the manifest."""
    code = read_json(Path(config.run_dir) / MANIFEST).get("code") or {}
    return {name: code.get(name) for name in ("git_sha", "diff_sha256")}


def _has_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _with_steps(run: Any) -> Any:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def wandb_id(config: RunConfig) -> str:
    """Return the id kept in manifest.json, so that every attempt continues one W&B run."""
    return str(read_json(Path(config.run_dir) / MANIFEST)["wandb_id"])
