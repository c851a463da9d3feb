"""The doctor survives whatever is broken and names the remedy; DeepSpeed's ops are built once, never hang, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REQUIRE, start_require

from tools.doctor import _probe_look
from trainers.config.errors import ConfigError
from trainers.engines import ops

ROOT = Path(__file__).parents[1]


def doctor(*arguments: str, expect: int = 0, timeout_s: float = 200, **environment: str) -> str:
    line = [sys.executable, "-m", "tools.doctor", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + (done.stderr if expect == 2 else "")


def checks(*arguments: str, expect: int = 0, **environment: str) -> dict[str, dict[str, str]]:
    result = json.loads(doctor(*arguments, "--json", "-", expect=expect, **environment))
    assert result["works"] == (expect == 0)
    return {check["name"]: check for check in result["checks"]}


def require(folder: Path, op: str = "cpu_adam", limit_s: float = 100, timeout_s: float = 150, **environment: str) -> tuple[int, str]:
    with start_require(folder, op, limit_s, **environment) as process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
    return process.returncode, said


def processes_of(folder: Path) -> list[int]:
    """Return the live processes whose environment names this test's build folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            here = f"TORCH_EXTENSIONS_DIR={folder}".encode() in (entry / "environ").read_bytes()
            if here and "\nState:\tZ" not in (entry / "status").read_text() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def compiling(folder: Path) -> bool:
    """Tell whether this test's compiler is at work."""
    return any(b"sleep\x00600" in command(pid) for pid in processes_of(folder))


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def compiler_that(folder: Path, does: str) -> str:
    """A compiler that answers questions about itself, and fails or hangs when it is to compile."""
    return script(folder / "g++", f'case "$*" in --version|-v|-dump*) exec /usr/bin/g++ "$@";; *) {does};; esac')


def broken_package(folder: Path, name: str, code: str) -> str:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A build folder of this test's own, whose processes are gone at the end."""
    yield tmp_path / "extensions"
    assert processes_of(tmp_path / "extensions") == []


def test_doctor_says_what_works(tmp_path: Path) -> None:
    found = checks("--no-build", HF_HUB_OFFLINE="1", TORCH_EXTENSIONS_DIR=str(tmp_path), PYTHONPATH="")
    for name in ("Python", "cores", "host memory", "disk here", "/dev/shm", "open files", "torch", "bf16 on cpu", "gloo", "DeepSpeed"):
        assert found[name]["status"] in ("ok", "warn"), found[name]
    assert {"DeepSpeed's cpu_adam", "DeepSpeed's async_io", "SLURM", "W&B", "flash-attn", "torchao", "bitsandbytes"} <= set(found)
    assert "two processes" in found["gloo"]["found"]
    assert "HF_HUB_OFFLINE" in found["Hugging Face hub"]["found"]
    assert all(check["remedy"] for check in found.values() if check["status"] in ("warn", "fail"))


def test_table_json_file_and_arguments(tmp_path: Path) -> None:
    said = doctor("--only", "host", "--json", str(tmp_path / "doctor.json"))
    assert "host memory" in said
    assert "what every run needs works" in said
    assert json.loads((tmp_path / "doctor.json").read_text())["works"] is True
    assert "python -m tools.doctor" in doctor("--help")
    assert "there is host" in doctor("--only", "hosts", expect=2)
    assert "No such file" in doctor("--only", "host", "--json", str(tmp_path / "no" / "such"), expect=2)


@pytest.mark.parametrize(
    ("code", "words"),
    [("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"), ("import os; os.abort()", "SIGABRT")],
)
def test_a_broken_flash_attn_is_survived(tmp_path: Path, code: str, words: str) -> None:
    found = checks("--only", "flash", PYTHONPATH=broken_package(tmp_path, "flash_attn", code))["flash-attn"]
    assert found["status"] == "warn"
    assert words in found["found"]
    assert "model.attention=sdpa" in found["remedy"]


def test_a_broken_deepspeed_is_survived(tmp_path: Path) -> None:
    found = checks("--only", "deepspeed", PYTHONPATH=broken_package(tmp_path, "deepspeed", "raise OSError('libcudart.so.12 is not there')"))
    assert [check["status"] for check in found.values()] == ["warn"]
    assert "libcudart.so.12" in found["DeepSpeed"]["found"]


@pytest.mark.for_real
def test_without_torch_the_core_fails(tmp_path: Path) -> None:
    found = checks(
        "--only", "torch,gloo", expect=1, PYTHONPATH=broken_package(tmp_path, "torch", "raise ImportError('libgomp is not there')")
    )
    assert [check["status"] for check in found.values()] == ["fail", "fail"]
    assert "libgomp is not there" in found["torch"]["found"]


def test_no_compiler_has_a_remedy(tmp_path: Path, folder: Path) -> None:
    found = checks("--only", "deepspeed", PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(folder))
    for op in ("cpu_adam", "async_io"):
        assert found[f"DeepSpeed's {op}"]["status"] == "warn"
        assert "no C++ compiler" in found[f"DeepSpeed's {op}"]["found"]
        assert "apt-get install g++" in found[f"DeepSpeed's {op}"]["remedy"]


def test_no_ninja_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g++", "c++"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    missing = ops.missing_for("cpu_adam")
    assert missing is not None
    assert "ninja" in missing.reason
    assert "pip install ninja" in missing.remedy


def test_no_libaio_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = 'echo "fatal error: libaio.h: No such file or directory" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, says))
    missing = ops.missing_for("async_io")
    assert missing is not None
    assert "libaio.h: No such file" in missing.reason
    assert "apt-get install libaio-dev" in missing.remedy
    assert ops.missing_for("cpu_adam") is None


def test_a_compiler_that_does_not_run_is_quoted(tmp_path: Path, folder: Path) -> None:
    broken = script(tmp_path / "cc", "echo no licence for this compiler >&2; exit 1")
    found = checks("--only", "deepspeed", CXX=broken, TORCH_EXTENSIONS_DIR=str(folder))["DeepSpeed's cpu_adam"]
    assert "no licence for this compiler" in found["found"]
    assert "CXX=PROGRAM" in found["remedy"]


@pytest.mark.slow
def test_a_build_that_fails_is_quoted(tmp_path: Path, folder: Path) -> None:
    broken = compiler_that(tmp_path, 'echo "cc1plus: error: bad value for -march" >&2; exit 1')
    code, said = require(folder, CXX=broken)
    assert code == 1
    assert "`engine.name` = 'zero3': DeepSpeed's cpu_adam: does not build" in said
    assert "cc1plus: error: bad value for -march" in said
    assert "-DTORCH_EXTENSION_NAME" not in said  # the command line, a screen long
    (log,) = folder.glob("*.log")
    assert f"remedy: the whole log is {log}" in said
    assert "-DTORCH_EXTENSION_NAME" in log.read_text()


@pytest.mark.slow
def test_a_lock_that_torch_left_or_holds_is_not_waited_for(tmp_path: Path, folder: Path) -> None:
    (folder / "cpu_adam").mkdir(parents=True)
    lock = folder / "cpu_adam" / "lock"
    lock.touch()
    found = checks("--no-build", "--only", "deepspeed", TORCH_EXTENSIONS_DIR=str(folder))["DeepSpeed's cpu_adam"]
    assert "not built yet" in found["found"]
    with lock.open("w"):  # as a live torch does
        code, said = require(folder, limit_s=60, CXX=compiler_that(tmp_path, "echo no space left >&2; exit 1"))
    assert code == 1
    assert "no space left" in said
    assert lock.exists()


@pytest.mark.slow
def test_a_build_has_a_limit_and_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    slow = compiler_that(tmp_path, "sleep 600")
    with start_require(folder, limit_s=12, CXX=slow) as process:
        wait_for(lambda: compiling(folder))
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was not built in 12 s" in said
    assert {path.suffix for path in folder.iterdir()} - {".lock"} == {".log"}


@pytest.mark.slow
def test_ctrl_c_on_the_doctor_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    variables = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "CXX": compiler_that(tmp_path, "sleep 600")}
    process = subprocess.Popen([sys.executable, "-m", "tools.doctor", "--only", "deepspeed"], cwd=ROOT, env=variables)
    try:
        wait_for(lambda: compiling(folder))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
    assert processes_of(folder) == []
    assert list(folder.glob("*.tmp")) == []


@pytest.mark.slow
def test_a_killed_build_takes_its_compilers_along_and_the_next_goes_on(tmp_path: Path, folder: Path) -> None:
    slow = compiler_that(tmp_path, "sleep 600")
    with start_require(folder, CXX=slow) as first:
        wait_for(lambda: compiling(folder))
        first.kill()
    wait_for(lambda: processes_of(folder) == [], timeout_s=20)
    assert [path.name for path in folder.glob("*.tmp/cpu_adam/lock")] == ["lock"]
    code, said = require(folder, CXX=compiler_that(tmp_path, "echo no space left >&2; exit 1"))
    assert code == 1
    assert "no space left" in said
    assert list(folder.glob("*.tmp")) == []


@pytest.mark.slow
def test_one_builds_and_the_others_wait(tmp_path: Path, folder: Path) -> None:
    slow = compiler_that(tmp_path, "sleep 600")
    with start_require(folder, limit_s=60, CXX=slow) as first:
        wait_for(lambda: compiling(folder))
        code, said = require(folder, limit_s=2, CXX=slow)
        first.send_signal(signal.SIGTERM)
    assert code == 1
    assert f"process {first.pid} is building" in said
    assert "another process is still building" in said
    wait_for(lambda: processes_of(folder) == [], timeout_s=20)


@pytest.mark.timeout(1000)
def test_cpu_adam_is_built_once_past_an_old_lock(built: tuple[Path, list[str]]) -> None:
    folder, said = built
    assert sum("built DeepSpeed's cpu_adam" in words for words in said) == 1
    assert (folder / "cpu_adam" / "lock").exists()  # which is torch's
    assert all("loaded in" in words for words in said)


@pytest.mark.timeout(1000)
def test_a_built_op_needs_no_compiler(built: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = built
    code, said = require(folder, timeout_s=60, PATH=str(tmp_path))
    assert code == 0, said
    assert "loaded in" in said
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    assert [(row.status, row.found) for row in _probe_look("cpu_adam")] == [("ok", "built")]
    monkeypatch.setenv("CXX", "/bin/false")
    assert not ops.is_built("cpu_adam")  # another compiler asks for another build


@pytest.mark.timeout(1000)
def test_an_op_of_another_processor_is_refused(built: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built[0], tmp_path / "copy")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "copy"))
    (ops.folder_of("cpu_adam") / "instructions.json").write_text('["avx9000"]')
    with pytest.raises(ConfigError, match="avx9000") as refused:
        ops.require_op("cpu_adam")
    assert "TORCH_EXTENSIONS_DIR" in refused.value.remedy


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("async_io")
def test_async_io_is_built_and_moves_bytes(tmp_path: Path) -> None:
    program = REQUIRE + (
        "from deepspeed.ops.op_builder import AsyncIOBuilder\n"
        "handle = AsyncIOBuilder().load().aio_handle(block_size=4096)\n"
        "data, back = torch.arange(4096, dtype=torch.int32), torch.zeros(4096, dtype=torch.int32)\n"
        "handle.sync_pwrite(data, sys.argv[3]); handle.sync_pread(back, sys.argv[3])\n"
        "print('same', bool((data == back).all()))\n"
    )
    line = [sys.executable, "-c", program, "async_io", "1100", str(tmp_path / "file")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert "same True" in done.stdout, done.stdout + done.stderr
