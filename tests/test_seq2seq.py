"""An encoder-decoder trains as transformers' Seq2SeqTrainer does, under every engine and split, and is exported as it was opened."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import launch, stop_at_step, trace
from conftest import Ranks
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from launcher.compose import compose
from tools.bench.orders import engine_preset
from tools.evaluate.measurements import with_options
from tools.synthesise.config import Model
from tools.synthesise.writer import writer_of
from trainers.batch import IGNORE, NO_TOKEN
from trainers.config.choices import Activations, Layout, PeftMethod, Precision
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, EvaluationConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from trainers.data.ends import stop_ids
from trainers.data.formats import BadRow
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared, prepare
from trainers.data.seq2seq import render_pair
from trainers.data.table import TokenTable
from trainers.data.tokenizer import load_tokenizer
from trainers.engines.build import build_engine
from trainers.generate.decode import decode
from trainers.generate.models import named
from trainers.generate.request import Sampling
from trainers.model import hub
from trainers.model.blueprint import make_blueprint
from trainers.model.export import export, rehearse_export, reopen, sample_answer
from trainers.model.forward import forward
from trainers.model.head import Head, why_not
from trainers.model.saved_form import saved_form, types_of
from trainers.model.weights import origin_of
from trainers.objectives import NextToken
from trainers.plan.inputs import most_of_sources
from trainers.step import take_step
from trainers.world import World

STEPS, ROWS, LR = 5, 6, 1e-2
KINDS = ("tied", "untied", "mt5")
SIZES: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}


def rows() -> list[dict[str, str]]:
    return [
        {
            "instruction": f"What follows {n}?",
            "input": "" if n % 3 else f"Count on from {n}, {n}.",
            "output": "So " * (n % 4) + f"it is {n + 1}.",
        }
        for n in range(60)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5s of random weights with a tokenizer like theirs, in folders of the names of KINDS, and rows.jsonl."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("seq2seq")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tokenizer = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    teacher: Any = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(row.values()) for row in rows()], teacher)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    sizes = SIZES | {"vocab_size": len(fast), "dropout_rate": 0.0, "decoder_start_token_id": 0}
    own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    classes: dict[str, tuple[Any, Any]] = {
        "tied": (T5ForConditionalGeneration, T5Config(**sizes)),
        "untied": (T5ForConditionalGeneration, T5Config(**sizes, **own)),
        "mt5": (MT5ForConditionalGeneration, MT5Config(**sizes)),
    }
    for kind, (model_class, config) in classes.items():
        torch.manual_seed(1)
        model = model_class(config)
        if kind != "tied":  # as Flan-T5's and mT5's files are, whose configs say so
            model._tied_weights_keys = {name: of for name, of in model._tied_weights_keys.items() if name != "lm_head.weight"}
            model.all_tied_weights_keys.pop("lm_head.weight")
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.1)
        model.save_pretrained(folder / kind)
        fast.save_pretrained(folder / kind)
    return folder


def config_for(made: Path, kind: str, engine: str = "fsdp", microbatch: int = ROWS, method: str = "none", **train: Any) -> RunConfig:
    run_dir = made / f"run-{kind}-{engine}"
    run_dir.mkdir(exist_ok=True)
    peft = PeftConfig(method=PeftMethod(method), **({} if method == "none" else {"rank": 4, "alpha": 8.0, "targets": ["all-linear"]}))
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(made / kind), encoder_decoder=True),
        data=DataConfig(path=str(made / "rows.jsonl"), packing=False, seq_len=64, processes=1, prepared_dir=str(made / "prepared")),
        engine=EngineConfig(**engine_preset(engine)),
        optim=OptimConfig(lr=LR, clip=1.0, weight_decay=0.0, betas=(0.9, 0.999)),
        peft=peft,
        train=TrainConfig(**({"precision": Precision.fp32, "steps": STEPS, "global_batch": ROWS, "microbatch": microbatch} | train)),
    )


def prepared(made: Path, kind: str = "tied") -> tuple[RunConfig, Any, Prepared]:
    config = config_for(made, kind)
    tokenizer = load_tokenizer(config)
    return config, tokenizer, prepare(config, tokenizer=tokenizer)


def parts_of(table: TokenTable, document: int) -> tuple[list[int], list[int]]:
    whole = table.tokens[table.offsets[document] : table.offsets[document + 1]].tolist()
    source = table.prompt(document).tolist()
    return source, whole[len(source) :]


def test_source_and_target_are_what_plain_transformers_makes_of_their_texts(made: Path) -> None:
    data = prepared(made)[2]
    plain = AutoTokenizer.from_pretrained(made / "tied")
    for number, row in enumerate(rows()):
        source = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        assert parts_of(data.train, number) == (plain(source)["input_ids"], plain(row["output"])["input_ids"])
    batch = make_batch(data.train, np.arange(3), 4, pad_id=0)
    assert batch.source is not None
    for number in range(3):
        source, target = parts_of(data.train, number)
        assert batch.source[number][batch.source[number] != NO_TOKEN].tolist() == source
        assert batch.labels[number][batch.labels[number] != IGNORE].tolist() == target
        assert batch.input_ids[number, 1 : len(target)].tolist() == target[:-1]
        assert batch.documents[number].tolist() == [number] * len(target) + [-1] * (batch.labels.shape[1] - len(target))
    assert (batch.labels[3] == IGNORE).all()
    assert (batch.source[3] != NO_TOKEN).sum() == 1  # whose attention has something to see
    assert batch.num_tokens == sum(len(part) for number in range(3) for part in parts_of(data.train, number))


def test_a_row_is_one_question_and_its_answer() -> None:
    def turns(*roles: str, **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": role[0]} | (more if role == "assistant" else {}) for role in roles]}

    found, prompt = render_pair(turns("system", "user", "assistant", weight=0.5), Layout.messages, "", "</s>")
    assert (found.text, found.spans, found.weights, prompt) == ("s\nu</s>a</s>", [(7, 12)], [0.5], "u")
    assert render_pair(turns("user", "assistant", train=False), Layout.messages, "", "</s>")[0].spans == []
    for roles in (("user", "assistant", "user", "assistant"), ("user", "user", "assistant")):
        with pytest.raises(BadRow, match="reads one question"):
            render_pair(turns(*roles), Layout.messages, "", "</s>")
    with pytest.raises(BadRow, match="text alone"):
        render_pair(turns("user", "assistant", "user"), Layout.messages, "", "</s>")
    with pytest.raises(BadRow, match="has tools"):
        render_pair(turns("user", "assistant") | {"tools": [{"a": 1}]}, Layout.messages, "", "</s>")


@pytest.mark.parametrize("kind", KINDS)
def test_logps_and_gradients_are_those_of_plain_transformers(made: Path, kind: str) -> None:
    config, tokenizer, data = prepared(made, kind)
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(made / kind)
    blueprint = make_blueprint(config.model, 0, tokenizer)
    outline: Any = blueprint.build()
    assert (outline.lm_head.weight is outline.shared.weight) is (kind == "tied")
    assert outline.encoder.embed_tokens.weight is outline.shared.weight
    assert (plain.lm_head.weight is plain.shared.weight) is (kind == "tied")
    batch = make_batch(data.train, np.arange(5), 6, pad_id=0)
    total = torch.zeros(())
    for number in range(5):
        source, target = (torch.tensor([part]) for part in parts_of(data.train, number))
        total = total + plain(input_ids=source, labels=target).loss * target.numel()
    total.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for tokens in (None, 7):
        model = blueprint.build("cpu")
        assert why_not(blueprint.build()) is None
        logps = forward(model, batch, head=None if tokens is None else Head(model, tokens)).logps
        assert logps.shape == batch.labels.shape
        assert -logps.sum().item() == pytest.approx(total.item(), rel=1e-6)
        (-logps.sum()).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def says_tied(folder: Path) -> bool:
    """Return what config.json says, which transformers 4 and servers go by."""
    found: bool = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_says_whose_its_output_layer_is(made: Path, kind: str, tmp_path: Path) -> None:
    config, tokenizer, data = prepared(made, kind)
    blueprint = make_blueprint(config.model, 0, tokenizer)
    outline, model = blueprint.build(), blueprint.build("cpu")
    form = saved_form(outline, origin_of(outline, blueprint), blueprint.config, types_of(outline, torch.float32))
    rehearse_export(form, blueprint, tokenizer, stop_ids(tokenizer), tmp_path / "export")
    values = ((name, tensor) for name, tensor in model.state_dict().items() if name in form.live)
    export(values, form, blueprint, tokenizer, stop_ids(tokenizer), tmp_path / "export", True)
    assert says_tied(tmp_path / "export") is (kind == "tied")
    read = AutoConfig.from_pretrained(tmp_path / "export")
    assert read.tie_word_embeddings is True  # as every T5 of transformers 5
    assert getattr(read, "scale_decoder_outputs", None) == {"tied": True, "untied": False, "mt5": None}[kind]
    again = reopen(tmp_path / "export", False, encodes=True)
    batch = make_batch(data.train, np.arange(2), 2, pad_id=0)
    torch.testing.assert_close(forward(again, batch).logps, forward(model.eval(), batch).logps, rtol=0, atol=0)


@pytest.mark.parametrize("only", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_an_embedding_of_another_name_is_found(made: Path, only: str, tmp_path: Path) -> None:
    shutil.copytree(made / "untied", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[only] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    _, tokenizer, _ = prepared(made)
    model: Any = make_blueprint(ModelConfig(id=str(tmp_path / "model"), encoder_decoder=True), 0, tokenizer).build("cpu")
    torch.testing.assert_close(model.shared.weight, tensors[only], rtol=0, atol=0)
    torch.testing.assert_close(model.lm_head.weight, tensors["lm_head.weight"], rtol=0, atol=0)


def test_a_decoder_that_is_deeper_than_its_encoder_answers(made: Path) -> None:
    _, tokenizer, data = prepared(made)
    deep = ModelConfig(
        architecture={"model_type": "t5"} | SIZES | {"num_decoder_layers": 4}, tokenizer=str(made / "tied"), encoder_decoder=True
    )
    model: Any = make_blueprint(deep, 0, tokenizer).build("cpu").eval()
    source, end = data.train.prompt(0).tolist(), tokenizer.eos_token_id
    written = [model.config.decoder_start_token_id]
    while len(written) < 6 and written[-1] != end:
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    found = dict(decode(model, {0: source, 1: source[2:]}, 2, Sampling(temperature=0.0, max_new_tokens=5), [end], 0))
    assert found[0].ids == written[1:]
    assert sample_answer(model, tokenizer, source, 5)["answer"] == tokenizer.decode(written[1:], skip_special_tokens=True).strip()


def curve(
    world: World, made: Path, kind: str, engine: str, microbatch: int, method: str = "none", activations: str = "keep"
) -> dict[str, Any]:
    """Train with the run's own parts on this rank; return losses and the exported tensors."""
    config = config_for(made, kind, engine, microbatch, method, activations=Activations(activations))
    tokenizer = load_tokenizer(config)
    data = prepare(config, tokenizer=tokenizer)
    built = build_engine(config, world, make_blueprint(config.model, 0, tokenizer))
    begun = built.adaptation.library_config, {name: tensor.float().numpy() for name, tensor in built.weights()}
    loader = Loader(data.train, config.train, seed=0, pad_id=0, **built.mesh.share_of(world.rank))
    losses = []
    for step in range(STEPS):
        ids = loader.row_ids(step)
        targets = NextToken().targets(loader.sizes(step, ids))
        losses.append(take_step(built, NextToken(), loader.batches(step, ids), world, lr=LR, targets=targets).loss)
    weights = {name: tensor.float().numpy() for name, tensor in built.weights()}
    built.close()
    return {"losses": losses, "weights": weights, "begun": begun}


def trained_by_transformers(made: Path, kind: str, begun: tuple[Any, dict[str, Any]] | None = None) -> list[float]:
    """Return the losses that Seq2SeqTrainer logs of the same rows in the same order; with an adapter as it began, if there is one."""
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    config, tokenizer, data = prepared(made, kind)
    loader = Loader(data.train, config.train, seed=0, rank=0, world_size=1, pad_id=0)
    order = [int(number) for step in range(STEPS) for number in data.train.documents_of(loader.row_ids(step))]
    examples = [dict(zip(("input_ids", "labels"), parts_of(data.train, number), strict=True)) for number in order]
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(made / kind)
    if begun is not None:
        import peft

        model = peft.get_peft_model(model, begun[0])
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        values = {key.replace(".weight", ".default.weight"): torch.from_numpy(value) for key, value in begun[1].items()}
        assert not model.load_state_dict(values, strict=False).unexpected_keys

    class InOrder(Seq2SeqTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(examples)

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(made / "trainer"),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer, model=model))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def references(made: Path) -> Any:
    return cache(lambda kind: trained_by_transformers(made, kind))


QUICK = [("untied", "fsdp", 2, 1, "none"), ("untied", "zero3", 2, 2, "lora")]
SPLITS = [
    *QUICK,
    ("tied", "fsdp", 1, 3, "none"),
    ("tied", "fsdp", 3, 1, "none"),
    ("tied", "zero3", 2, 1, "none"),
    ("untied", "zero3", 3, 2, "none"),
    ("untied", "zero3", 1, 6, "none"),
    ("untied", "fsdp", 2, 3, "lora"),
    ("mt5", "fsdp", 2, 3, "none"),
    ("mt5", "zero3", 2, 3, "none"),
]


@pytest.mark.parametrize(
    ("kind", "engine", "size", "microbatch", "method"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in SPLITS],
)
def test_losses_are_those_of_seq2seqtrainer(
    ranks: Any, references: Any, made: Path, kind: str, engine: str, size: int, microbatch: int, method: str
) -> None:
    group: Ranks = ranks(size)
    found = group.call(curve, made, kind, engine, microbatch, method)
    reference = references(kind) if method == "none" else trained_by_transformers(made, kind, found[0]["begun"])
    assert found[0]["losses"] == pytest.approx(reference, abs=1e-5)
    assert reference[-1] < reference[0] - 0.1


@pytest.mark.parametrize("activations", ["selective", "block"])
@pytest.mark.slow
def test_activations_that_are_made_again_change_no_loss(ranks: Any, references: Any, made: Path, activations: str) -> None:
    for engine in ("fsdp", "zero3"):
        found = ranks(2).call(curve, made, "untied", engine, 3, "none", activations)
        assert found[0]["losses"] == pytest.approx(references("untied"), abs=1e-5)


def command(made: Path, kind: str, run_dir: Path, *more: str) -> list[str]:
    settings = [f"model.id={made / kind}", "model.encoder_decoder=true", f"data.path={made / 'rows.jsonl'}", f"run_dir={run_dir}"]
    settings += [
        "data.packing=false",
        "data.seq_len=64",
        "data.eval_fraction=0.2",
        "train.steps=8",
        "train.global_batch=6",
        "optim.lr=1e-2",
    ]
    settings += ["train.precision=fp32", "train.eval_every=4", "log.wandb=disabled", "launch.processes=2", "launch.gpus_per_node=0"]
    return [sys.executable, "-m", "launcher", "model=hf", "data=files", *settings, *more]


@pytest.fixture(scope="module")
def whole(made: Path, cache: Path) -> Path:
    """A finished run under fsdp, two ranks."""
    launch(cache, command(made, "untied", made / "whole"))
    return made / "whole"


@pytest.mark.slow
def test_a_run_is_planned_exported_and_answers(whole: Path, made: Path, cache: Path, tmp_path: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.5
    assert summary["sample"]["prompt"].endswith("</s>")
    launch(cache, command(made, "untied", tmp_path / "planned", "mode=plan"))
    plan = json.loads((tmp_path / "planned" / "plan.json").read_text())
    assert (plan["parameters"], plan["trainable"]) == (summary["parameters"], summary["trainable_parameters"])
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(whole / "export")
    odd = sum(p[0].numel() for p in model.parameters() if len(p) % 2)  # rows that rank 0, whose the plan is, has more than rank 1
    more = {"frozen": 0, "trainable": 4 * odd, "gradients": 4 * odd, "optimizer": 8 * odd}
    assert {key: 2 * size - more.get(key, 0) for key, size in plan["state"].items()} == summary["state_bytes"]
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert says_tied(whole / "export") is False
    launch(cache, [sys.executable, "-m", "tools.export", str(whole), str(tmp_path / "again")])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    assert says_tied(tmp_path / "again") is False
    asked = ["--device", "cpu", "--rows", "4", "--max-new-tokens", "8", "--no-base"]
    launch(cache, [sys.executable, "-m", "tools.evaluate", str(whole), *asked])
    found = [json.loads(line) for path in (whole / "evaluation").rglob("*.jsonl") for line in path.read_text().splitlines()]
    answers = [row for row in found if "answer" in row]
    assert len(answers) == 4
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    for row in answers:
        ids = tokenizer(row["prompt"].removesuffix("</s>"), return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == row["answer"]


@pytest.mark.slow
def test_a_stopped_run_continues_as_if_nothing_had_happened(whole: Path, made: Path, cache: Path, tmp_path: Path) -> None:
    """With dropout, as T5 has it: what is left out is a function of the step."""
    shutil.copytree(made / "untied", tmp_path / "dropping")
    written = json.loads((tmp_path / "dropping" / "config.json").read_text())
    (tmp_path / "dropping" / "config.json").write_text(json.dumps(written | {"dropout_rate": 0.1}))
    runs = {}
    for name in ("dropped", "stopped"):
        line = [*command(made, "untied", tmp_path / name), f"model.id={tmp_path / 'dropping'}"]
        if name == "stopped":
            stop_at_step(cache, line, tmp_path / name, 3)
        launch(cache, line)
        runs[name] = trace(tmp_path / name)
    assert runs["stopped"] == runs["dropped"]
    assert runs["dropped"] != trace(whole)


@pytest.mark.slow
def test_an_adapter_under_zero3_is_opened_by_plain_peft(made: Path, cache: Path, tmp_path: Path) -> None:
    import peft

    launch(cache, command(made, "untied", tmp_path / "run", "engine=zero3", "peft=lora", "peft.rank=4", "train.eval_every=8"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["sample"] is not None
    opened: Any = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "run" / "export"))
    assert opened.peft_config["default"].task_type == "SEQ_2_SEQ_LM"


def test_a_plan_takes_the_longest_source_and_the_longest_target(made: Path) -> None:
    config, _, data = prepared(made)
    table = data.train
    parts = [parts_of(table, number) for number in range(len(table.offsets) - 1)]
    batch = most_of_sources(config, make_batch(table, np.arange(2), 2, pad_id=0))
    assert batch.source is not None
    longest = [8 * -(-max(len(pair[side]) for pair in parts) // 8) for side in (0, 1)]
    assert [batch.source.shape[1], batch.labels.shape[1]] == longest


def test_disagreements_are_refused_by_name(made: Path) -> None:
    config, tokenizer, _ = prepared(made)
    with pytest.raises(ConfigError, match=r"t5 is an encoder-decoder, and model.encoder_decoder is not set"):
        make_blueprint(ModelConfig(id=str(made / "tied")), 0, tokenizer)
    llama = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"encoder-decoders are t5, mt5 here"):
        make_blueprint(ModelConfig(architecture=llama, tokenizer=str(made / "tied"), encoder_decoder=True), 0, tokenizer)
    (made / "texts.jsonl").write_text('{"text": "a"}\n')
    config.data.path = str(made / "texts.jsonl")
    with pytest.raises(ConfigError, match="rows are texts"):
        prepare(config, tokenizer=tokenizer)


def test_general_text_is_refused_by_tools_evaluate_too(made: Path) -> None:
    options = dict.fromkeys([*(item.name for item in dataclasses.fields(EvaluationConfig)), "lm_eval", "judge"])
    config = config_for(made, "tied")
    config.data.mix["kept"] = DataConfig(path=str(made / "rows.jsonl"))
    assert with_options(config, argparse.Namespace(**options | {"general": "kept"})).evaluation.general == "kept"
    for name in ("sampled", str(made / "rows.jsonl")):
        with pytest.raises(ConfigError, match=r"evaluation.general(.|\n)*a source of data.mix with held-out rows"):
            with_options(config, argparse.Namespace(**options | {"general": name}))


def test_a_sentencepiece_tokenizer_alone_says_what_reads_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text((made / "tied" / "config.json").read_text())
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "sentencepiece" else found(name, *more))
    with pytest.raises(ConfigError, match=r"sentencepiece tokenizer alone \(spiece.model\)(.|\n)*pip install sentencepiece protobuf"):
        load_tokenizer(RunConfig(model=ModelConfig(id=str(tmp_path), encoder_decoder=True)))


def test_a_t5_is_known_by_its_config_wherever_it_is(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *_: (made / "tied", "commit"))
    for name in ("owner/t5", str(made / "tied")):
        assert named(name).config.model.encoder_decoder
    assert named("owner/t5").folder is None


def test_a_t5_that_writes_rows_is_asked_as_it_was_trained(made: Path) -> None:
    writer = writer_of(Model(path=str(made / "untied")))
    ids = writer.request([{"role": "user", "content": "What follows 3?"}], 0, 0).ids
    assert ids == AutoTokenizer.from_pretrained(made / "untied")("What follows 3?")["input_ids"]
    assert ids[-1] == writer.tokenizer.eos_token_id


def test_random_weights_begin_an_answer_with_the_pad_token(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "tied")
    blueprint = make_blueprint(
        ModelConfig(architecture={"model_type": "t5"} | SIZES, tokenizer=str(made / "tied"), encoder_decoder=True), 0, tokenizer
    )
    model: Any = blueprint.build()
    assert model.config.decoder_start_token_id == blueprint.config.decoder_start_token_id == tokenizer.pad_token_id
    assert model.lm_head.weight is model.shared.weight


def test_the_experiment_is_the_seeds_own() -> None:
    job = compose(["+exp=flan_t5_small"])
    assert (job.model.id, job.model.encoder_decoder, job.data.packing) == ("google/flan-t5-small", True, False)
