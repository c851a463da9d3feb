"""Show rows as the model will see them: decoded, supervised tokens in colour, or in [[ ]] where there is none, document boundaries, counts.

python -m tools.show_batch +exp=quickstart
python -m tools.show_batch model=hf model.id=DIR data=files data.path=FILE --rows 5
python -m tools.show_batch --rollout RUN_DIR/rollouts/step-000010
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from launcher.compose import compose
from launcher.config import run_config
from tools.command import ended, parser_of
from trainers.batch import WEIGHT
from trainers.config.derived import SAMPLED
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import RunConfig, read_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainers.data.table import TokenTable

SUPERVISED, CONTEXT, BOUNDARY = "bold green", "dim", "bold magenta"


def main(arguments: list[str] | None = None) -> int:
    """Print the first rows of the first step; returns the exit code."""
    parser = parser_of("show_batch", __doc__)
    parser.add_argument("overrides", nargs="*", help="settings as for `python -m launcher`, such as +exp=quickstart data.packing=false")
    parser.add_argument("--rows", type=int, default=3, help="rows to show (default 3)")
    parser.add_argument("--split", choices=["train", "eval"], default="train", help="which rows (default train)")
    parser.add_argument(
        "--rollout", type=Path, metavar="DIR", help="a rollout of a run with objective=grpo or ppo, and no settings: its answers"
    )
    options = parser.parse_args(arguments)
    if options.rollout is not None:
        return ended(lambda: show_rollout(options.rollout, options.rows))
    return ended(lambda: show(run_config(compose(options.overrides)), options.rows, options.split))


def show(config: RunConfig, num_rows: int, split: str) -> None:
    """Prepare the data of a run if need be, and print `num_rows` rows: of the train split those of the first steps."""
    import numpy as np

    from trainers.data.loader import row_order
    from trainers.data.prepare import prepare
    from trainers.data.report import summary
    from trainers.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config)
    if config.objective.name in SAMPLED:
        from trainers.rl.prompts import prepare_prompts

        prepared = prepare_prompts(config, tokenizer, progress=True)
    else:
        prepared = prepare(config, progress=True, tokenizer=tokenizer)
    table = prepared.train if split == "train" else prepared.eval
    if table is None:
        raise ConfigError("data.eval_fraction", config.data.eval_fraction, "there are no held-out rows to show", "data.eval_fraction=0.05")
    console = Console()
    console.print(summary(prepared.report, prepared.reused), highlight=False, markup=False)
    if split == "train" and table.sources:
        from trainers.data.mixture import mixture_of

        order = mixture_of(config, table).row_ids(np.arange(num_rows))
    else:
        order = row_order(config.seed, 0, len(table)) if split == "train" else np.arange(len(table))
    for row in order[:num_rows]:
        console.print(render_row(table, int(row), tokenizer, marks=console.color_system is None or console.no_color), soft_wrap=True)


def show_rollout(folder: Path, num_rows: int) -> None:
    """Print the first answers of a rollout with their prompts; raises ConfigError for another folder."""
    from trainers.data.table import open_table
    from trainers.data.tokenizer import load_tokenizer

    run_dir = folder.resolve().parent.parent
    if not (folder / "answers.jsonl").is_file() or not (run_dir / "config.yaml").is_file():
        raise ConfigError("--rollout", str(folder), "is not a rollout of a run", "RUN_DIR/rollouts/step-000001")
    table, tokenizer, console = open_table(folder), load_tokenizer(read_at(run_dir)), Console()
    for row, line in zip(range(min(num_rows, len(table))), (folder / "answers.jsonl").open(encoding="utf-8"), strict=False):
        answer = json.loads(line)
        console.print(render_row(table, row, tokenizer, marks=console.color_system is None or console.no_color), soft_wrap=True)
        advantage = f", advantage {answer['advantage']:.4g}" if "advantage" in answer else ""  # of PPO each token has its own
        console.print(f"reward {answer['reward']}{advantage}, {answer['finish']}", highlight=False)


def render_row(table: TokenTable, row: int, tokenizer: PreTrainedTokenizerBase, marks: bool = False) -> Text:
    """Return a row as coloured text, each of its documents under a heading with its counts; `marks` puts what is trained into [[ ]]."""
    documents = table.documents(row)
    source = next((f" of {name}" for name, rows in table.rows_of_sources().items() if row in rows), "")
    text = Text(f"── row {row}{source}: {plural(len(documents), 'document')} ", style=BOUNDARY)
    for document in documents:
        span = slice(int(table.offsets[document]), int(table.offsets[document + 1]))
        tokens, supervised = table.tokens[span].tolist(), table.supervised[span].tolist()
        about = f"{plural(len(tokens), 'token')}, {sum(supervised)} supervised{_weight(table, int(document))}"
        text.append(f"\n── document {document}: {about} ──\n", style=BOUNDARY)
        for ids, trained in runs_of(tokens, supervised):
            said = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            text.append(f"[[{said}]]" if trained and marks else said, style=SUPERVISED if trained else CONTEXT)
    return text


def _weight(table: TokenTable, document: int) -> str:
    """Return what a document's labels weigh, in words; nothing where each weighs 1."""
    if WEIGHT not in table.signals:
        return ""
    of = table.signals[WEIGHT]
    own = of[table.label_starts[document] : table.label_starts[document + 1]] if of.ndim == 2 else of[document : document + 1]
    low, high = float(own.min()), float(own.max())
    return f", weight {low:.4g}" if low == high else f", weights from {low:.4g} to {high:.4g}"


def runs_of(tokens: list[int], supervised: list[int]) -> list[tuple[list[int], bool]]:
    """Return stretches of tokens that are all supervised, or all not."""
    stretches: list[tuple[list[int], bool]] = []
    for token, mark in zip(tokens, supervised, strict=True):
        if not stretches or stretches[-1][1] != bool(mark):
            stretches.append(([], bool(mark)))
        stretches[-1][0].append(token)
    return stretches


if __name__ == "__main__":
    sys.exit(main())
