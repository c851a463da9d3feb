"""The methods, a file each: a function of Work that returns the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.synthesise.methods.answers import answers
from tools.synthesise.methods.critique import critique
from tools.synthesise.methods.documents import documents
from tools.synthesise.methods.evol_instruct import evol_instruct
from tools.synthesise.methods.magpie import magpie
from tools.synthesise.methods.raft import raft
from tools.synthesise.methods.rephrase import back_translation, paraphrase
from tools.synthesise.methods.safety import safety
from tools.synthesise.methods.self_instruct import self_instruct
from tools.synthesise.methods.tree import tree
from tools.synthesise.work import Work

METHODS: dict[str, Callable[[Work], list[dict[str, Any]]]] = {
    "self_instruct": self_instruct,
    "evol_instruct": evol_instruct,
    "answers": answers,
    "documents": documents,
    "paraphrase": paraphrase,
    "back_translation": back_translation,
    "magpie": magpie,
    "tree": tree,
    "critique": critique,
    "safety": safety,
    "raft": raft,
}
