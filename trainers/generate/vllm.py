"""A vLLM server: started here by the Python of an environment of its own, or one that runs already. It is asked as `Local` is. No torch."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.generate.endpoint import Server, once
from trainers.generate.local import STOP_S, Broken, nothing
from trainers.generate.request import LENGTH, NO_ROOM, Answer, Request, Sampling
from trainers.generate.served import ask
from trainers.processes import prepare_child
from trainers.rundir.files import read_json

NAME = "policy"
"""Of the model of a server that is started here."""
HEALTH_S, LOOK_S = 5.0, 0.5
OURS = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""Variables of a server that is started here, where they are not set: its own switches, and 1 GiB for keys and values on a CPU."""
RENEW: tuple[tuple[str, dict[str, str]], ...] = (
    ("pause?mode=abort", {}),
    ("collective_rpc", {"method": "reload_weights"}),
    ("reset_prefix_cache", {}),
    ("resume", {}),
)
"""What makes a server answer with other weights, in this order: without the third, prompts that it knows keep their old beginnings."""


class Vllm:
    """The server. One that was started here ends with this process, with all that it has started, whatever ends that."""

    def __init__(
        self,
        folder: Path,
        *,
        python: str | None = None,
        url: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        at_once: int = 64,
        words: Sequence[str] = (),
        timeout_s: float = 600.0,
        open_s: float | None = 600.0,
        look: Callable[[], None] = nothing,
    ) -> None:
        """Start `python` -m vllm on a model's directory, or take the server at `url`, such as http://host:8000, which has its model.

        `words` are more of its command line. `open_s` may pass until it answers, and `timeout_s` for an answer. `look` is called now and
        then, and may raise. Raises ConfigError for a directory of an adapter, or a Python that cannot be started.
        """
        _require_model(folder)
        self.ends = ends_of(folder)
        self.open_s, self.look, self.process = open_s, look, None
        self.place = tempfile.TemporaryDirectory()
        self.log = Path(self.place.name) / "log"
        self.positions, key = 0, ""
        if url is None:
            key = secrets.token_hex(16)  # the environment's VLLM_API_KEY would lock this process out
            port = _free_port()
            url = f"http://127.0.0.1:{port}"
            own = ["--enforce-eager"] if device == "cpu" else []
            line = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", NAME]
            line += ["--dtype", dtype, "--generation-config", "vllm", "--host", "127.0.0.1", "--port", str(port), *own, *words]
            self.process = self._start(line, key)
        root = url.rstrip("/").removesuffix("/v1")
        self.root = Server(url=root, model=NAME, timeout_s=timeout_s, at_once=at_once, attempts=2, own_key=key)

    def _start(self, line: list[str], key: str) -> subprocess.Popen[bytes]:
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "trainers.generate.guard", *line],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=OURS | os.environ | {"VLLM_API_KEY": key},
                start_new_session=True,
                preexec_fn=prepare_child(),
            )

    def __enter__(self) -> Vllm:
        """Wait until it answers, and learn its model's name and longest row; raises Broken."""
        try:
            began, health = time.monotonic(), replace(self.root, timeout_s=HEALTH_S)
            while failure := once(health, "health")[1]:
                self._look()
                if self.open_s is not None and time.monotonic() - began > self.open_s:
                    raise Broken(f"the server gives no answer after {self.open_s:g} s: {failure}{self._said()}")
                time.sleep(LOOK_S)
            listed, failure = once(health, "v1/models")
            try:
                self.root = replace(self.root, model=str(listed["data"][0]["id"]))
                self.positions = int(listed["data"][0]["max_model_len"])
            except (LookupError, TypeError, ValueError):
                raise Broken(f"{self.root.at('v1/models')} does not list a model as vLLM does {failure}") from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End what was started."""
        self.close()

    def ask(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        took: Callable[[Answer], None],
        stops: Sequence[int] = (),
        apart: bool = False,
    ) -> None:
        """Ask for all answers; `took` gets each as soon as it is there. Raises Broken where one does not come.

        Each draws from its own seed. vLLM batches requests as they arrive, so that rounding may let an answer depend on its neighbours,
        with `apart` too.
        `stops` are ids that end an answer, next to those of the model's generation config.
        """
        open_ones: dict[int, str] = {}
        asked = []
        for request in requests:
            if len(request.ids) < self.positions:
                asked.append(request)
                open_ones[request.key] = "it was not asked"
            else:
                took(Answer(key=request.key, ids=[], logps=[], finish=LENGTH, failure=NO_ROOM))

        def heard(answer: Answer) -> None:
            if answer.failure:
                open_ones[answer.key] = answer.failure
            else:
                del open_ones[answer.key]
                took(answer)

        plainly = {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}  # and not what a generation config says
        server = replace(self.root, url=self.root.at("v1"))
        ask(
            asked,
            sampling,
            server,
            heard,
            more=plainly | {"stop_token_ids": sorted({*self.ends, *stops})},
            positions=self.positions,
            look=self._look,
        )
        if open_ones:
            self._look()
            why = ", ".join(sorted(set(open_ones.values())))
            raise Broken(
                f"the server at {self.root.url} gave no answer to {len(open_ones)} of {len(requests)} requests: {why}{self._said()}"
            )

    def open(self, folder: Path) -> None:
        """Have it take the weights of a directory of the same model, which it must see; raises ConfigError and Broken.

        A tied head is written next to them: vLLM says that it has reloaded such weights, and has neither the old nor the new ones.
        """
        from trainers.generate.tied import add_head  # torch is for those who open other weights

        _require_model(folder)
        add_head(folder)
        for path, body in RENEW:
            more = {"kwargs": {"weights_path": str(folder)}} if path == "collective_rpc" else {}
            failure = once(self.root, path, body | more)[1]
            self._look()
            if failure:
                hint = " It needs VLLM_SERVER_DEV_MODE=1." if "HTTP 404" in failure else ""
                raise Broken(f"the server did not take the weights of {folder}: {failure}.{hint}{self._said()}")

    def close(self) -> None:
        """End the server and all that it has started; one that ran already stays."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.place.cleanup()

    def _look(self) -> None:
        """Raise Broken where the server that was started here has ended."""
        self.look()
        if self.process is not None and self.process.poll() is not None:
            raise Broken(f"the server has ended{self._said()}")

    def _said(self) -> str:
        return f"\n{self.log.read_text('utf-8', 'replace')[-2000:].strip()}" if self.process is not None and self.log.exists() else ""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ends_of(folder: Path) -> list[int]:
    """Return the ids that end an answer by the generation config of a model's directory, and by its config."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = (read_json(folder / name) or {}).get("eos_token_id")
        found += [ids] if isinstance(ids, int) else ids or []
    return sorted(set(found))


def _require_model(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        remedy = f"python -m tools.merge {folder}, or a run of whole weights"
        raise ConfigError("vllm", str(folder), "holds an adapter, and vLLM is given whole models here", remedy)
