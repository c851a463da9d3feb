"""What is evaluated: a run's export, the base that it began with, or any model directory; opened with plain transformers and peft."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from trainers.cache import content_key
from trainers.config.choices import ObjectiveName, Quantisation
from trainers.config.derived import SCORED
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data.tokenizer import load_tokenizer
from trainers.generate.identity import digest_of
from trainers.model.blueprint import Blueprint, make_blueprint, open_config
from trainers.model.rotary import by_document
from trainers.model.seq2seq import opener_of
from trainers.model.weights import origin_of
from trainers.peft.adapt import adapt
from trainers.peft.nf4 import round_base
from trainers.peft.saved import reopen_adapter


def kind_of(device: str) -> str:
    """Return the kind of device that is used where `device` is asked for: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and the run whose rows and settings it is measured with."""

    config: RunConfig
    folder: Path | None
    """Its directory: a run's export, or any model's; None is the run's base."""

    @property
    def is_adapter(self) -> bool:
        """Tell an adapter, which needs the run's base."""
        return self.folder is not None and (self.folder / "adapter_config.json").is_file()

    @property
    def gives_scores(self) -> bool:
        """Tell a model whose head scores documents, and that gives no log-probabilities."""
        return self.config.objective.name in SCORED

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Return the classes that a classifier knows, in the order of its outputs; of any other model nothing."""
        if self.config.objective.name is not ObjectiveName.classify or self.folder is None:
            return ()
        names: dict[int, str] = open_config(self.folder, self.config.model.trust_remote_code).id2label  # type: ignore[assignment]
        return tuple(names[number] for number in sorted(names))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer that rows are encoded with: the run's."""
        return load_tokenizer(self.config)

    @cached_property
    def blueprint(self) -> Blueprint:
        """Return what the run's base is built from; raises ConfigError where it is gone."""
        return make_blueprint(self.config.model, self.config.seed, self.tokenizer)

    @cached_property
    def base(self) -> Path:
        """Return the directory of the run's base; raises ConfigError where it has none, or it is gone."""
        if self.blueprint.folder is None:
            raise ConfigError("model.id", None, "the run began with random weights: there is no base to evaluate", "--no-base")
        return self.blueprint.folder

    @cached_property
    def files(self) -> str:
        """Return what identifies its own files."""
        return digest_of(self.base if self.folder is None else self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """Return what identifies the weights: of adapters those of the base too, and how it was rounded."""
        parts = [self.files]
        if self.is_adapter:
            parts += [digest_of(self.base), str(self.config.peft.quantise)]
        return content_key(*parts)

    def open(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Return the model in `dtype`, ready to be asked; on several GPUs of one machine where one does not hold it."""
        where = "auto" if device.type == "cuda" and device.index is None else {"": device} if device.type == "cuda" else None
        if self.gives_scores:
            return self._open_scores(dtype, where)
        of_base = self.folder is None or self.is_adapter
        folder = self.base if of_base or self.folder is None else self.folder
        trust = self.config.model.trust_remote_code
        config = open_config(folder, trust)
        if of_base and self.blueprint.vocab_on_disk is not None:  # with the rows that new tokens begin with
            model: PreTrainedModel = self.blueprint.build("cpu")
            model.to(dtype=dtype, device=device)  # type: ignore[call-arg]
        else:
            model = opener_of(config).from_pretrained(folder, config=config, dtype=dtype, device_map=where, trust_remote_code=trust)
        model.requires_grad_(False)
        if self.is_adapter:
            assert self.folder is not None
            model = reopen_adapter(self.folder, self._as_trained(model))
        by_document(model)
        model.eval()
        return model

    def _open_scores(self, dtype: torch.dtype, where: Any) -> PreTrainedModel:
        """Return a model of scores; the config of the head is in its directory, also where that is an adapter's."""
        assert self.folder is not None
        folder, trust = self.base if self.is_adapter else self.folder, self.config.model.trust_remote_code
        config = open_config(self.folder, trust)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=dtype, device_map=where, trust_remote_code=trust
        )
        model.requires_grad_(False)
        if self.is_adapter:
            model = reopen_adapter(self.folder, self._as_trained(model))
        by_document(model)
        model.eval()
        return model

    def _as_trained(self, model: PreTrainedModel) -> PreTrainedModel:
        """Give an adapter's base the values that it was trained on: those of 4 bits where it was quantised."""
        config = self.config
        if config.peft.quantise is Quantisation.none:
            return model
        outline = self.blueprint.build()
        begun = dataclasses.replace(config, peft=dataclasses.replace(config.peft, adapter=None))
        return round_base(model, adapt(outline, origin_of(outline, self.blueprint), begun, self.blueprint, torch.float32))
