"""W&B: a mirror of metrics.jsonl that never blocks or ends a run."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from trainers.config.derived import peak_lr
from trainers.config.schema import RunConfig, WandbMode, plain
from trainers.rundir.files import read_json
from trainers.rundir.paths import MANIFEST
from trainers.rundir.rows import Row

log = logging.getLogger("fulltune")
WANDB_WAIT_S = 20.0
OLD_HOST = "api.wandb.ai"
"""Under which earlier versions of wandb have stored a key; newer ones still take it."""


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

        config, online = self.config, self._is_online()
        keywords: dict[str, Any] = {
            "project": config.log.project,
            "entity": config.log.entity,
            "group": config.log.group,
            "name": config.name,
            "id": wandb_id(config),
            "resume": "allow",
            "dir": config.run_dir,
            "config": plain(config) | {"peak_lr": peak_lr(config.optim, config.peft).value},
            "tags": ["full" if config.peft.method == "none" else str(config.peft.method), str(config.engine.name), *config.log.tags],
        }
        settings = {"silent": True, "console": "off", "init_timeout": WANDB_WAIT_S / 2, "login_timeout": 1}
        if online:
            with contextlib.suppress(wandb.errors.CommError, wandb.errors.UsageError):
                return _with_steps(wandb.init(mode="online", settings=wandb.Settings(**settings), **keywords))
            log.warning("W&B does not answer: this run is recorded offline, `wandb sync` sends it later")
            wandb.teardown()
        return _with_steps(wandb.init(mode="offline", settings=wandb.Settings(**settings), **keywords))

    def _is_online(self) -> bool:
        """Tell whether to go online: asked for or left open, a key is at hand, and the server takes a connection."""
        if self.config.log.wandb is WandbMode.offline or os.environ.get("WANDB_MODE", "online") != "online":
            return False
        import wandb

        url = urlparse(wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url)  # which `wandb login --host` may have set
        host = url.hostname or OLD_HOST
        if not ("WANDB_API_KEY" in os.environ or any(map(_has_netrc, (host, OLD_HOST)))):
            if self.config.log.wandb is WandbMode.online:
                log.warning("log.wandb=online, but there is no W&B key: recorded offline; `wandb login` stores a key")
            return False
        try:
            socket.create_connection((host, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
        except OSError as error:
            log.warning("W&B cannot be reached at %s (%s): recorded offline, `wandb sync` sends it later", host, error)
            return False
        return True


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
