"""Answers of a model that is open: token by token, several prompts at once, each answer the same whatever the others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from trainers.data.ends import stop_ids
from trainers.generate.request import LENGTH, STOP, Sampling
from trainers.model.blueprint import positions_limit
from trainers.model.seq2seq import decoder_cache

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Difference of two logits below which a batch's rounding might decide: far above it, and rare."""
NO_SEED = 0


@dataclass(frozen=True)
class Decoded:
    """An answer's ids through the token that ends it, the log-probability of each, and STOP or LENGTH."""

    ids: list[int]
    logps: list[float]
    finish: str


def stops_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: those of the model's generation config, and the end of a turn."""
    known = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return sorted({*([known] if isinstance(known, int) else known or []), *stop_ids(tokenizer)})


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Mapping[int, Sequence[int]],
    batch: int,
    sampling: Sampling,
    stops: Sequence[int],
    pad_id: int,
    seeds: Mapping[int, int] | None = None,
    heard: Callable[[int], None] | None = None,
    apart: bool = True,
) -> Iterator[tuple[int, Decoded]]:
    """Yield key and answer of each prompt, up to `batch` at a time; the same for any batch. `heard` gets each token of a single prompt.

    A prompt that leaves no room for so many tokens in the model's positions is answered alone, as far as they go.
    Without `apart` rounding in a batch may decide a token, as it may in training: nothing is computed twice, and the same prompts in the
    same batch have the same answers.
    """
    limit = positions_limit(model.config)[0] or 1 << 60
    _plainly(model, stops, pad_id)
    roomy = {key: ids for key, ids in prompts.items() if len(ids) + sampling.max_new_tokens <= limit}
    cramped = [[key] for key in prompts if key not in roomy]
    for chunk in [*_chunks(model, roomy, batch, pad_id), *cramped]:
        room = min(sampling.max_new_tokens, limit - max(len(prompts[key]) for key in chunk))
        if room <= 0:
            yield chunk[0], Decoded([], [], LENGTH)
            continue
        own = [NO_SEED if seeds is None else seeds[key] for key in chunk]
        close = CLOSE[model.dtype] if apart else 0.0
        asked = [prompts[key] for key in chunk]
        yield from zip(chunk, _continue(model, asked, room, sampling, stops, pad_id, own, heard, close), strict=True)


@torch.no_grad()
def logps_of(model: PreTrainedModel, ids: Sequence[int], count: int, temperature: float) -> list[float]:
    """Return the log-probabilities of the last `count` of some ids, in nats, of logits / temperature; at least one id is before these."""
    if not count:
        return []
    whole = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=whole, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].float() / temperature
    found: list[float] = logits.log_softmax(-1).gather(1, whole[0, -count:, None])[:, 0].tolist()
    return found


def _plainly(model: PreTrainedModel, stops: Sequence[int], pad_id: int) -> None:
    """Leave the choice of tokens to `Choice` alone."""
    for module in model.modules():  # peft reads it from one of the models that it is made of, by method
        if hasattr(module, "generation_config"):
            begin = getattr(module.config, "decoder_start_token_id", None)
            own = GenerationConfig(eos_token_id=list(stops), pad_token_id=pad_id, do_sample=False, decoder_start_token_id=begin)
            module.generation_config = own  # type: ignore[assignment]


def _chunks(model: PreTrainedModel, prompts: Mapping[int, Sequence[int]], batch: int, pad_id: int) -> list[list[int]]:
    """Return prompts to answer at once: any, or where padding in front of a prompt changes its answer, those of one length."""
    by_length: dict[int, list[int]] = {}
    for key, ids in prompts.items():
        by_length.setdefault(len(ids), []).append(key)
    groups = list(by_length.values())
    if batch > 1 and len(groups) > 1:
        ends = [prompts[by_length[length][0]] for length in (min(by_length), max(by_length))]
        groups = [list(prompts)] if _ignores_padding(model, ends, pad_id) else groups
    return [group[at : at + batch] for group in groups for at in range(0, len(group), batch)]


def _ignores_padding(model: PreTrainedModel, prompts: list[Sequence[int]], pad_id: int) -> bool:
    """Tell whether a short prompt's next token is as likely next to a long one as alone: not so with peft's prompt tuning, which counts
    positions from the padding's front, and with models that have no attention mask to obey.
    """
    together, alone = (_padded(model, some, pad_id) for some in (prompts, prompts[:1]))
    first, other = (_next_logits(model, *inputs)[0] for inputs in (together, alone))
    return bool((first - other).abs().max() < CLOSE[model.dtype])


def _next_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
        **decoder_cache(model.config),
    )
    logits: Tensor = output.logits[0].float()
    return logits


def _padded(model: PreTrainedModel, prompts: list[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return prompts as one tensor, filled up in front, and its attention mask; both (B, S)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    return ids, mask


def _continue(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    room: int,
    sampling: Sampling,
    stops: Sequence[int],
    pad_id: int,
    seeds: list[int],
    heard: Callable[[int], None] | None,
    close: float,
) -> list[Decoded]:
    """Return what the model writes after each prompt, through its first stop."""
    first = max(map(len, prompts))
    ids, mask = _padded(model, prompts, pad_id)
    begins, sources = [first - len(prompt) for prompt in prompts], None
    if model.config.is_encoder_decoder:  # writes after one token that begins every answer, and reads its prompt elsewhere
        first, begins, sources = 1, [0] * len(prompts), prompts
    choice = Choice(model, begins, first, stops, sampling, seeds, heard, close, sources)
    more = {"logits_processor": LogitsProcessorList([choice])} | decoder_cache(model.config)
    output: Any = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **more)  # type: ignore[operator]
    logps = torch.stack(choice.logps, 1).tolist()
    return [_through_stop(row, values, stops) for row, values in zip(output[:, first:].tolist(), logps, strict=True)]


def _through_stop(ids: list[int], logps: list[float], stops: Sequence[int]) -> Decoded:
    end = next((at for at, number in enumerate(ids) if number in stops), None)
    kept = len(ids) if end is None else end + 1
    return Decoded(ids[:kept], logps[:kept], LENGTH if end is None else STOP)


class Choice(LogitsProcessor):  # type: ignore[misc]
    """Choose each row's next token, and leave it as the only one that there is.

    A draw is the highest of logits / temperature + Gumbel noise, which comes from the row's own seed alone. Where rounding in a batch
    might decide (two tokens are nearly as high, or a limit is nearly met), the row alone decides, as batches differ.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        begins: list[int],
        prompt_length: int,
        stops: Sequence[int],
        sampling: Sampling,
        seeds: list[int],
        heard: Callable[[int], None] | None = None,
        close: float | None = None,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Take the column in which each row's prompt begins, and the one after all prompts; `close` is a difference of two logits.

        `sources` are what an encoder has read of each row.
        """
        self.model, self.begins, self.prompt_length, self.stops = model, begins, prompt_length, set(stops)
        self.sampling, self.close, self.heard = sampling, CLOSE[model.dtype] if close is None else close, heard
        self.sources = sources
        self.generators = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]
        self.logps: list[Tensor] = []
        """Of each token that was chosen, (B,), under the model itself or, where it is `tempered`, what is drawn from."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) with 0 at each row's token and -inf elsewhere; `scores` are logits (B, V)."""
        noise = self._noise(scores)
        tokens, is_sure = choose(scores, self.sampling, noise, self.close)
        for row in (~is_sure).nonzero().flatten().tolist():
            ids = input_ids[row, self.begins[row] :]
            if self.stops.isdisjoint(ids[self.prompt_length - self.begins[row] :].tolist()):
                scores[row] = self._logits(ids) if self.sources is None else self._written(ids, self.sources[row])
                tokens[row] = choose(scores[row : row + 1], self.sampling, None if noise is None else noise[row : row + 1], 0.0)[0][0]
        logits = scores / self.sampling.temperature if self.sampling.tempered and self.sampling.temperature else scores
        self.logps.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        if self.heard is not None:
            self.heard(int(tokens[0]))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def _noise(self, scores: Tensor) -> Tensor | None:
        """Return a row of Gumbel noise from each generator, (B, V); None where nothing is drawn."""
        if self.sampling.temperature == 0:
            return None
        drawn = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in enumerate(self.generators):
            drawn[row].exponential_(generator=generator)
        return -drawn.log()

    def _logits(self, ids: Tensor) -> Tensor:
        """Return the logits of what follows ids (S,), without a batch and a cache, (V,)."""
        positions = torch.arange(len(ids), device=ids.device)[None]
        last = torch.tensor([len(ids) - 1], device=ids.device)
        output = self.model(input_ids=ids[None], position_ids=positions, use_cache=False, logits_to_keep=last)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def _written(self, ids: Tensor, source: Sequence[int]) -> Tensor:
        """Return the logits of what a decoder writes after ids (S,) of a source alone, (V,)."""
        read = torch.tensor([list(source)], device=ids.device)
        logits: Tensor = self.model(input_ids=read, decoder_input_ids=ids[None], use_cache=False).logits[0, -1].float()
        return logits


def choose(logits: Tensor, sampling: Sampling, noise: Tensor | None, close: float) -> tuple[Tensor, Tensor]:
    """Return each row's token, (B,), and whether logits that differ by less than `close` would choose the same; `logits` are (B, V)."""
    if noise is None:
        two = logits.topk(2)
        return two.indices[:, 0], two.values[:, 0] - two.values[:, 1] >= close
    scaled, near = logits / sampling.temperature, close / sampling.temperature
    could, would = torch.ones_like(scaled, dtype=torch.bool), torch.ones_like(scaled, dtype=torch.bool)
    is_sure = torch.ones(len(scaled), dtype=torch.bool, device=scaled.device)
    if 0 < sampling.top_k < scaled.shape[1]:
        highest = scaled.topk(sampling.top_k + 1).values
        is_sure &= highest[:, -2] - highest[:, -1] >= near
        could = would = scaled >= highest[:, -2:-1]
    if sampling.top_p < 1:
        shares, order = scaled.masked_fill(~could, -torch.inf).softmax(-1).sort(descending=True, stable=True)
        before = torch.empty_like(shares).scatter(1, order, shares.cumsum(-1) - shares)
        would = could & (before < sampling.top_p * (1 - 2 * near))
        could = could & (before < min(sampling.top_p * (1 + 2 * near), 1.0))
    best = (scaled + noise).masked_fill(~could, -torch.inf).topk(2)
    tokens = best.indices[:, 0]
    is_sure &= (best.values[:, 0] - best.values[:, 1] >= near) & would.gather(1, tokens[:, None])[:, 0]
    return tokens, is_sure
