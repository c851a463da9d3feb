"""Make a Hugging Face directory of a checkpoint, as the end of a run does of its last step.

python -m tools.export runs/run/checkpoints/step-000400 exported
python -m tools.export runs/run exported                          # the newest one, or the best where the run exports that
python -m tools.export runs/run exported --dtype bfloat16 --shard-gib 2
python -m tools.export runs/run exported --model /new/place/of/the/base

One process on the CPU reads the weights piece by piece, whatever engine and number of ranks saved them, and never the optimizer's
state. OUT is complete or absent.

Exit codes: 0 written, 1 the checkpoint is damaged or not finite, or the disk fails, 2 bad arguments, 130 Ctrl-C.
"""

from __future__ import annotations

import io
import itertools
import math
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tools.command import Refused, ended, parser_of
from trainers.config.choices import Attention, PeftMethod
from trainers.config.derived import SCORED
from trainers.config.errors import ConfigError, plural
from trainers.config.local import require_model_directory
from trainers.config.schema import RunConfig, read
from trainers.rundir import paths
from trainers.rundir.base import pinned

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from trainers.model.weights import Origin

PIECE_BYTES = 1 << 20
DTYPES = ("saved", "float32", "bfloat16", "float16")


class Damaged(Exception):
    """A file of the checkpoint cannot be read."""


def main(arguments: list[str] | None = None) -> int:
    """Export a checkpoint; returns the exit code."""
    parser = parser_of("export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="RUN_DIR/checkpoints/step-NNNNNN, or RUN_DIR")
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to write; absent, or empty")
    parser.add_argument("--shard-gib", type=float, default=4.0, help="largest file in GiB; a larger tensor has its own (default 4)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="type of the weights (default saved: the base model's own)")
    parser.add_argument("--model", metavar="DIR", help="the base model's directory, if it has moved since the run")
    options = parser.parse_args(arguments)
    if not 0 < options.shard_gib < math.inf:
        parser.error(f"--shard-gib {options.shard_gib:g}: must be a number greater than 0")
    return ended(
        lambda: write(options.checkpoint, options.out, int(options.shard_gib * 2**30), options.dtype, options.model),
        lambda: f"stopped: {options.out} was not written",
        failures=(Damaged, RuntimeError, OSError),
    )


def write(checkpoint: Path, out: Path, shard_bytes: int, dtype: str, model: str | None) -> None:
    """Check everything that can be checked before the first weight is read, then write `out` and say how to open it."""
    started = time.monotonic()
    require_absent(out)
    folder = find_checkpoint(checkpoint)
    config = read_config(folder.parent.parent / paths.CONFIG, model)

    import torch

    from trainers.data.ends import stop_ids
    from trainers.data.tokenizer import load_tokenizer
    from trainers.model.blueprint import make_blueprint
    from trainers.model.export import export, generation_config
    from trainers.model.saved_form import saved_form, types_of
    from trainers.model.seq2seq import opener_of
    from trainers.model.weights import origin_of

    tokenizer = load_tokenizer(config)
    require_same_tokenizer(folder.parent.parent, tokenizer)
    blueprint = make_blueprint(config.model, config.seed, tokenizer)
    if config.objective.name in SCORED:
        from trainers.rundir.files import read_json
        from trainers.scoring import headed

        blueprint = headed(blueprint, read_json(folder.parent.parent / paths.MANIFEST)["data"], tokenizer)
    if dtype != "saved":
        blueprint.saved_dtype = getattr(torch, dtype)
    stored = Stored(folder)
    built = blueprint.build()
    has_values = blueprint.folder is None or any(blueprint.folder.glob("*.safetensors"))
    if not has_values:
        print(f"{blueprint.folder} has no weights: names in files are transformers' own for this architecture, and nothing else is copied")
    origin = origin_of(built, blueprint) if has_values else None
    stored.require_fits(built, origin, config.data.seq_len)
    form = saved_form(built, origin, blueprint.config, types_of(built, blueprint.saved_dtype))
    require_space(sum(tensor.nbytes for tensor in form.contents.values()), out)
    weights = with_bar(pieces(form.live, stored, origin), sum(tensor.nbytes for tensor in form.live.values()))
    if refused := generation_config(blueprint, tokenizer, stop_ids(tokenizer))[1]:
        print(f"left out of generation_config.json, since transformers does not save it: {', '.join(refused)}")
    export(weights, form, blueprint, tokenizer, stop_ids(tokenizer), out.resolve(), write=True, shard_bytes=shard_bytes)
    files = list(out.glob("*.safetensors"))
    size, seconds = sum(path.stat().st_size for path in files), time.monotonic() - started
    print(f"{out}: {folder.name} of {folder.parent.parent} in {plural(len(files), 'file')} of weights, {size:,} bytes, {seconds:.1f} s")
    opener = "AutoModelForSequenceClassification" if blueprint.scores else opener_of(blueprint.config).__name__
    print(f'open it: {opener}.from_pretrained("{out}"), AutoTokenizer.from_pretrained("{out}")')


def require_absent(out: Path) -> None:
    """Raise Refused if there is anything at `out` but an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} exists and is not empty: name another directory, or remove it")


def require_space(num_bytes: int, out: Path) -> None:
    """Raise Refused if the disk of `out` has fewer bytes free."""
    place = next(path for path in out.resolve().parents if path.is_dir())
    have = shutil.disk_usage(place).free
    if num_bytes > have:
        raise Refused(f"{out} needs {num_bytes:,} bytes and {place} has {have:,} free: free space, or name a directory on another disk")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that is meant: `path` itself, or of the run there the newest complete one, or the best if it exports that."""
    from trainers.config.derived import exports_best
    from trainers.rundir.checkpoints import best_first, steps, why_incomplete

    path = path.resolve()
    if not path.is_dir():
        raise Refused(f"{path}: no such checkpoint or run directory")
    if not (path / paths.CHECKPOINTS).is_dir() and not (path / paths.CONFIG).is_file():
        if wrong := why_incomplete(path):
            raise Refused(f"{path} is not a complete checkpoint: {wrong}")
        return path
    complete = [folder for folder in steps(path / paths.CHECKPOINTS) if not why_incomplete(folder)]
    if not complete:
        raise Refused(f"{path / 'checkpoints'} has no complete checkpoint")
    best = best_first(complete) if exports_best(read_config(path / paths.CONFIG, None)) else {}
    return next(iter(best), complete[-1])


def read_config(path: Path, model: str | None) -> RunConfig:
    """Read what a run was, with its base at `model` if given; its data need not be there any more."""
    if not path.is_file():
        raise Refused(f"{path} is missing: it says which model a checkpoint is of, and should be two folders above it")
    try:
        config = pinned(read(path), path.parent)
    except ConfigError as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if model is not None and config.model.id is None:
        raise Refused(f"--model {model}: the run started from random weights, {path} names no base model")
    if model is not None:
        config.model.id, config.model.revision = model, None
        require_model_directory("--model", model)
    elif config.model.id is not None and config.model.id.startswith("/") and not (Path(config.model.id) / "config.json").is_file():
        raise Refused(f"the base model's directory {config.model.id} is missing, or has no config.json: --model DIR says where it is now")
    if config.peft.method is not PeftMethod.none:
        raise Refused(
            f"{path} is of a run with peft.method={config.peft.method}, whose checkpoints hold no whole model: see its export folder"
        )
    config.model.attention = Attention.auto  # nothing is computed here, and the export does not say it
    return config


def require_same_tokenizer(run_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise Refused if the run was trained with another tokenizer or chat template than this one, which the export would carry."""
    from trainers.data.tokenizer import template_hash, tokenizer_hash
    from trainers.rundir.files import read_json

    prepared = read_json(run_dir / paths.MANIFEST).get("data") or {}
    for what, now in (("tokenizer", tokenizer_hash(tokenizer)), ("chat template", template_hash(tokenizer))):
        key = f"{what.split()[-1]}_hash"
        if key in prepared and prepared[key] != now:
            raise Refused(f"the {what} is not the one that the run was trained with: it has changed since, or --model is another model")


class Part(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        """Begin at the part's first byte."""
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def seekable(self) -> bool:
        """Say that it is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; raises OSError for a place before the part."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if at < 0:
            raise OSError(f"byte {at} of a file")
        self.at = at
        return at

    def tell(self) -> int:
        """Return the place."""
        return self.at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        left = max(0, self.length - self.at)
        self.file.seek(self.begin + self.at)
        data = self.file.read(left if size < 0 else min(size, left))
        self.at += len(data)
        return data


class Stored:
    """The model's tensors in a distributed checkpoint: whole, or flattened as ZeRO-3 saves them.

    They are in blocks of rows, one for each rank, or several side by side where ranks split layers.
    """

    def __init__(self, folder: Path) -> None:
        """Read the checkpoint's table of contents; raises Damaged."""
        from trainers.engines.stored import Foreign, read_contents

        self.folder = folder
        try:
            metadata = read_contents(folder)
            entries = {name.removeprefix("model."): name for name in metadata.state_dict_metadata if name.startswith("model.")}
            self.tensors: dict[str, Any] = {name: metadata.state_dict_metadata[entry] for name, entry in entries.items()}
            model = set(entries.values())
            self.places = {
                (index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items() if index.fqn in model
            }
            self.shapes = {name: tuple(tensor.size) for name, tensor in self.tensors.items()}
        except Foreign as error:
            raise Damaged(f"{folder} is not a checkpoint: {error}") from error
        except Exception as error:  # whatever bytes other than a pickle unpickle to
            raise Damaged(f"{folder / '.metadata'} is damaged: {error!r}") from error

    def require_fits(self, model: PreTrainedModel, origin: Origin | None, seq_len: int) -> None:
        """Raise Refused unless the checkpoint has the tensors of the model that rows of `seq_len` tokens reach, in their shapes.

        There may be no foreign ones. What else it lacks is the base's: persistent buffers, which ZeRO-3 does not save, and what is
        never reached.
        """
        from trainers.model.reach import find_unreached
        from trainers.model.safetensors_files import listed
        from trainers.model.weights import tied_names

        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        absent = {name for name in shapes if name not in self.shapes} - tied_names(model).keys()
        lacks = {name for name, _ in model.named_parameters(remove_duplicate=False)} & absent
        lacks -= find_unreached(model, seq_len) if lacks else set()
        foreign = [name for name in self.shapes if name not in shapes]
        fits = {name: self.shapes.get(name) in (None, shape, (math.prod(shape),)) for name, shape in shapes.items()}
        misshapen = [f"{name} {list(self.shapes[name])} where the model has {list(shapes[name])}" for name in fits if not fits[name]]
        kinds = (("lacks", sorted(lacks)), ("has also", foreign), ("has", misshapen))
        if wrong := [f"{verb} {listed(names, most=3)}" for verb, names in kinds if names]:
            raise Refused(f"{self.folder} is not of the model that config.yaml names: it {'; it '.join(wrong)}")
        if absent and origin is None:
            raise Refused(f"{self.folder} has no {listed(sorted(absent), most=3)}, and the base's weights are not there: --model DIR")

    def read(self, name: str) -> Iterator[Tensor]:
        """Yield the elements of a tensor in order, as flat pieces in the type they are saved in."""
        tensor, at = self.tensors[name], 0
        chunks = sorted((chunk for chunk in tensor.chunks if math.prod(chunk.sizes)), key=lambda chunk: tuple(chunk.offsets))
        for _, band in itertools.groupby(chunks, key=lambda chunk: tuple(chunk.offsets[:1])):
            side_by_side = list(band)
            if not _are_rows(side_by_side, tensor.size) or at != sum(side_by_side[0].offsets[:1]) * math.prod(tensor.size[1:]):
                raise Damaged(f"{self.folder / '.metadata'} does not split {name} into blocks of rows")
            at += sum(math.prod(chunk.sizes) for chunk in side_by_side)
            yield from self._read_rows(name, side_by_side, tensor.properties.dtype)
        if at != math.prod(tensor.size):
            raise Damaged(f"{self.folder / '.metadata'} places {at:,} elements of {name}, which has {math.prod(tensor.size):,}")

    def _read_rows(self, name: str, chunks: list[Any], dtype: Any) -> Iterator[Tensor]:
        """Yield rows of chunks that are side by side, flat and as many of each at a time."""
        import torch

        wide = max(math.prod(chunk.sizes[1:]) * dtype.itemsize for chunk in chunks)
        rows = max(1, PIECE_BYTES // wide)
        parts = [self._read_chunk(self.places[f"model.{name}", tuple(chunk.offsets)], dtype, chunk.sizes, rows) for chunk in chunks]
        if len(chunks) == 1:
            yield from parts[0]
            return
        for pieces in zip(*parts, strict=True):
            in_rows = [piece.view(-1, math.prod(chunk.sizes[1:])) for piece, chunk in zip(pieces, chunks, strict=True)]
            yield torch.cat(in_rows, 1).view(-1)

    def _read_chunk(self, place: Any, dtype: Any, sizes: Any, rows: int) -> Iterator[Tensor]:
        """Yield what one rank saved of a tensor, so many rows at a time: torch.save's zip archive, of one storage.

        torch.load would hold the chunk twice and does not compare checksums. Here damage shows at the latest with the last piece.
        """
        count, at_once = math.prod(sizes), rows * math.prod(sizes[1:]) * dtype.itemsize
        path = self.folder / place.relative_path
        try:
            with path.open("rb", buffering=0) as file, zipfile.ZipFile(Part(file, place.offset, place.length)) as archive:
                (entry,) = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[0].endswith("/data")]
                if entry.file_size != count * dtype.itemsize:
                    raise ValueError(f"{entry.file_size:,} bytes for {count:,} x {dtype}")
                with archive.open(entry) as storage:
                    for begin in range(0, entry.file_size, at_once):
                        yield _read_piece(storage, min(at_once, entry.file_size - begin)).view(dtype)
        except Exception as error:  # zipfile raises many kinds for bytes other than an archive
            raise Damaged(f"{path} is damaged: {error or type(error).__name__}") from error


def _are_rows(chunks: list[Any], size: Any) -> bool:
    """Tell whether chunks of a tensor, in their order, are whole rows side by side."""
    widths = [chunk.sizes[1] if len(size) > 1 else 1 for chunk in chunks]
    begins = [chunk.offsets[1] if len(size) > 1 else 0 for chunk in chunks]
    fits = all(chunk.sizes[0:1] == chunks[0].sizes[0:1] and chunk.sizes[2:] == size[2:] for chunk in chunks)
    together = begins == list(itertools.accumulate(widths, initial=0))[:-1] and sum(widths) == (size[1] if len(size) > 1 else 1)
    return fits and together


def _read_piece(storage: Any, num_bytes: int) -> Tensor:
    import torch

    piece = torch.empty(num_bytes, dtype=torch.uint8)
    view, filled = memoryview(piece.numpy().data), 0
    while filled < num_bytes:
        count = storage.readinto(view[filled:])
        if not count:
            raise EOFError("it ends too early")
        filled += count
    return piece


def pieces(contents: dict[str, Tensor], stored: Stored, base: Origin | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors in pieces of the type of the export: of the checkpoint, and of the base what that does not hold."""
    from trainers.peft.base import read_whole

    for name, tensor in contents.items():
        for piece in [read_whole(base, name)] if base and name not in stored.tensors else stored.read(name):
            yield name, piece.to(tensor.dtype)


def with_bar(weights: Iterator[tuple[str, Tensor]], num_bytes: int, what: str = "exporting") -> Iterator[tuple[str, Tensor]]:
    """Yield `weights` with a progress bar over their bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=num_bytes)
        for name, piece in weights:
            yield name, piece
            progress.advance(task, piece.nbytes)


if __name__ == "__main__":
    sys.exit(main())
