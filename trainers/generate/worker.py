"""Open a model and answer what is asked on stdin, a JSON object a line: python -m trainers.generate.worker, started by `local`.

The first line is the model. What it says goes to stdout, an object a line: {"ready"}, then for each further line that it reads {"answer"}
of every request and {"done"}.
A line with a `folder` opens the weights there in place of those that are open; of one with `rows`, each [ids, count], each is answered
by {"logps"} of its last ids.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from trainers.config.errors import ConfigError
from trainers.config.schema import parse
from trainers.data.tokenizer import pad_id
from trainers.generate.decode import decode, logps_of, stops_of
from trainers.generate.request import Answer, Sampling
from trainers.generate.subject import Subject, kind_of
from trainers.host import cores
from trainers.rundir.ending import Exit


def main() -> int:
    """Answer until stdin ends; returns the exit code."""
    asked = json.loads(sys.stdin.readline())
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(asked["threads"] or cores())
    device = kind_of(asked["device"])
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        subject = Subject(config=parse(asked["config"]), folder=Path(asked["folder"]) if asked["folder"] else None)
        dtype, place = getattr(torch, asked["dtype"]), torch.device(device)
        model = subject.open(dtype, place)
        stops, pad = stops_of(model, subject.tokenizer), pad_id(subject.tokenizer)
        say(ready=True, stops=stops)
        for line in sys.stdin:
            order = json.loads(line)
            if "folder" in order:
                del model  # two need not fit
                model = replace(subject, folder=Path(order["folder"])).open(dtype, place)
            elif "rows" in order:
                for ids, count in order["rows"]:
                    say(logps=logps_of(model, ids, count, order["temperature"]))
            else:
                _answer(model, order, asked["batch"], stops, pad)
            say(done=True)
    except ConfigError as error:
        say(error=error.parts())
        return Exit.bad_input
    except torch.cuda.OutOfMemoryError as error:
        say(failed=f"a GPU's memory is too small for the model with {asked['setting']} = {asked['batch']}: {str(error).splitlines()[0]}")
        return Exit.failed
    return Exit.done


def say(**what: object) -> None:
    """Tell whoever has asked."""
    print(json.dumps(what), flush=True)


def _answer(model: Any, asked: dict[str, Any], batch: int, stops: list[int], pad: int) -> None:
    """Answer all requests of a line, longest prompts first."""
    requests = sorted(asked["requests"], key=lambda request: -len(request["ids"]))
    prompts, seeds = ({request["key"]: request[name] for request in requests} for name in ("ids", "seed"))
    heard = (lambda token: say(token=token)) if asked["stream"] else None
    sampling = Sampling(**asked["sampling"])
    for key, found in decode(model, prompts, batch, sampling, stops, pad, seeds, heard, apart=asked["apart"]):
        failure = "" if found.ids else "the prompt leaves no room for an answer"
        say(answer=asdict(Answer(key=key, ids=found.ids, logps=found.logps, finish=found.finish, failure=failure)))


if __name__ == "__main__":
    sys.exit(main())
