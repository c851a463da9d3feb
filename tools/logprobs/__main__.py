"""Write a teacher's likeliest tokens at each label of a run's rows, with their log-probabilities: what objective=distil learns from.

python -m tools.logprobs --model DIR +exp=quickstart                     a model of this machine or the hub, the settings of a run
python -m tools.logprobs --model OWNER/NAME --run-dir runs/mine          the rows of a run that has begun
python -m tools.logprobs --endpoint http://host:8000/v1 --tokenizer DIR model.id=STUDENT data=files data.path=FILE

Settings are those of `python -m launcher`; the same rows are prepared, or read where they are already. The k tokens of each label,
their log-probabilities in nats, and that of all others together go to a directory next to the prepared rows. A run of the same rows
finds it by itself, or with objective.teacher=DIR. It is named after teacher, rows and k, and is written once. A stopped command
continues where it was. The teacher must have the run's own vocabulary: token ids are compared by content.

An endpoint takes prompts as token ids at /completions and gives their log-probabilities: with `prompt_logprobs` (vLLM), else with
`echo` and `logprobs`, where tokens are named by ids. vLLM gives at most --max-logprobs of them, 20 unless it was started with more.
The key of an endpoint is read from FULLTUNE_TEACHER_KEY, or OPENAI_API_KEY.

Exit codes: 0 written, or there already, 1 an endpoint fails, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.compose import compose
from launcher.config import run_config
from tools.command import Refused, ended, parser_of
from trainers.config.choices import ObjectiveName
from trainers.config.derived import rows_as
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig

if TYPE_CHECKING:
    from tools.logprobs.shards import Teacher

TYPES = ("bfloat16", "float32")
STORED = ("float32", "float16")


def main(arguments: list[str] | None = None) -> int:
    """Write the log-probabilities; returns the exit code."""
    options = _parser().parse_args(arguments)
    from tools.logprobs.shards import Failed

    return ended(
        lambda: measure(options), lambda: "stopped: what was written is kept, and the same command continues from there", (Failed,)
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("logprobs", __doc__)
    parser.add_argument("overrides", nargs="*", help="settings as for `python -m launcher`, such as +exp=quickstart")
    parser.add_argument("--run-dir", type=Path, metavar="RUN", help="take the settings of this run, and no overrides")
    parser.add_argument("--top-k", type=int, default=64, metavar="K", help="likeliest tokens at each label (default 64)")
    parser.add_argument("--stored", choices=STORED, default=STORED[0], help="type of what is written (default float32)")
    parser.add_argument("--tokenizer", metavar="DIR|ID", help="the teacher's tokenizer (default that of --model)")
    parser.add_argument("--shard", type=int, default=16384, metavar="N", help="labels written at once, the most that a kill loses")
    local = parser.add_argument_group("a teacher that is opened here, with plain transformers")
    local.add_argument("--model", metavar="DIR|ID", help="a model directory, such as a run's export, or a hub id")
    local.add_argument("--revision", metavar="COMMIT", help="hub revision of --model")
    local.add_argument("--trust-remote-code", action="store_true", help="run the Python code of --model's repository")
    local.add_argument("--dtype", choices=TYPES, default=TYPES[0], help="type to compute in (default bfloat16)")
    local.add_argument("--batch", type=int, default=8, metavar="N", help="documents at once, fewer where their logits would be large")
    local.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto is the GPUs where there are some")
    remote = parser.add_argument_group("a teacher that is served")
    remote.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible endpoint up to its version, as http://host:8000/v1")
    remote.add_argument("--endpoint-model", metavar="NAME", help="its model (default the only one that it lists)")
    remote.add_argument("--at-once", type=int, default=16, metavar="N", help="requests in flight (default 16)")
    remote.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for one reply (default 120)")
    remote.add_argument("--attempts", type=int, default=5, metavar="N", help="tries for one reply (default 5)")
    return parser


def measure(options: argparse.Namespace) -> None:
    """Prepare the rows if need be, ask the teacher, and print where the result is; raises ConfigError, Refused and Failed."""
    check(options)
    config = _config(options)
    from tools.logprobs import shards
    from trainers.data.prepare import prepare
    from trainers.data.tokenizer import load_tokenizer, pad_id

    tokenizer = load_tokenizer(config)
    shards.require_same_vocabulary(tokenizer, options)
    data = prepare(config, progress=True, tokenizer=tokenizer)
    teacher = _teacher(options, tokenizer.get_vocab(), pad_id(tokenizer))
    folder, reused = shards.write(data, teacher, config.data.prepared_dir, options)
    print(f"{'there already' if reused else 'written'}: {folder}\nobjective=distil objective.teacher={folder}")


def _teacher(options: argparse.Namespace, vocabulary: dict[str, int], padding: int) -> Teacher:
    num_ids = max(vocabulary.values()) + 1
    if options.top_k > num_ids:
        raise ConfigError("--top-k", options.top_k, f"the vocabulary has {num_ids} tokens", f"--top-k {num_ids}")
    if options.endpoint:
        from tools.logprobs.endpoint import Served

        return Served(options, num_ids)
    from tools.logprobs.local import Local

    return Local(options, num_ids, padding)


def _config(options: argparse.Namespace) -> RunConfig:
    """Return the settings of the run; raises ConfigError where it has no labels of single answers."""
    if options.run_dir is not None:
        from trainers.rundir.base import config_of

        config = config_of(options.run_dir)
    else:
        config = run_config(compose(options.overrides))
    if rows_as(config.objective.name) is not ObjectiveName.sft:
        raise ConfigError("objective.name", str(config.objective.name), "has other rows than objective=distil", "objective=distil")
    return replace(config, data=replace(config.data, streaming=False))  # a teacher is asked about all rows


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError or Refused for options that cannot be, or do not go together."""
    for name in ("top_k", "shard", "batch", "at_once", "timeout", "attempts"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "must be greater than 0")
    if bool(options.model) == bool(options.endpoint):
        raise Refused("a teacher is --model DIR|ID, or --endpoint URL: one of the two")
    if options.endpoint and not options.tokenizer:
        raise Refused("an endpoint does not say which tokens its ids are: --tokenizer DIR|ID, the served model's own")
    if options.run_dir is not None and options.overrides:
        raise Refused(f"--run-dir takes the settings of {options.run_dir}, and these are others: {' '.join(options.overrides)}")
    if options.run_dir is not None and not (options.run_dir / "config.yaml").is_file():
        raise ConfigError("--run-dir", str(options.run_dir), "is not a run directory: it has no config.yaml")


if __name__ == "__main__":
    sys.exit(main())
