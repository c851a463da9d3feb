"""A pipeline: stages in one line, checked before the first begins, stopped anywhere and continued, shown as a tree and as a page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from command import ROOT, environment, launch, tool, trace, wait_for_step, wait_until_gone
from piping import call, pipeline_of, three_stages, written

from launcher import in_turn, pipeline, stage_checks, stages
from launcher.presets import CONF
from launcher.stages import read
from tools import commands, runs
from tools.command import Refused
from tools.compare.stages import Part, Story, conclusions
from tools.evaluate.record import Evaluation
from tools.merge.__main__ import make_parser as merge_parser
from trainers.config.errors import ConfigError
from trainers.data.sources import digits


def test_words_of_a_command_line_reach_the_stage_that_they_name(tmp_path: Path) -> None:
    content = {"values": {"rows": "a.jsonl"}, "every": ["seed=1"], "stages": [{"name": "one", "run": ["+exp=x", "data.path={rows}"]}]}
    content["stages"] += [{"name": "two", "before": ["merge {one}/export {dir}/m"], "run": ["seed=2"]}]
    made = pipeline_of(tmp_path, "two.train.steps=3", "+two.model.architecture.x=1", "values.rows=b.jsonl", "optim.lr=1e-3", **content)
    assert made.stages[0].run == ["seed=1", "+exp=x", "data.path=b.jsonl", "optim.lr=1e-3"]
    assert made.stages[1].run == ["seed=2", "optim.lr=1e-3", "train.steps=3", "+model.architecture.x=1"]
    assert (made.folder, made.mode) == (Path.cwd() / "runs" / "tiny", "run")
    names = stages.names_of(made.stages, made.stages[1], Path("/p"))
    assert names["model"] == "/p/one/export"
    assert stages.command_words(made.stages[1].before[0], names, "") == ["merge", "/p/one/export", "/p/m"]
    assert "model" not in stages.names_of(made.stages, made.stages[0], Path("/p"))
    assert stages.filled_override("data.path={dir}/a b", {"dir": "/p"}, "") == 'data.path="/p/a b"'


def test_a_path_is_one_word_of_a_command_and_other_values_are_several(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("my test.jsonl", "Bob's.jsonl")}
    for file in files.values():
        file.touch()
    content = {"values": {"rows": "", "more": ""}, "stages": [{"name": "one", "run": ["data.path={rows}", "data.eval_path={dir}/{rows}"]}]}
    content["stages"][0]["after"] = ["sample m {rows} {more}", "sample m \"{rows}\" '{rows}' --out={dir}/x"]
    for file in files.values():
        made = pipeline_of(tmp_path, f"values.rows={file}", "values.more=--n 8", **content)
        words = [stages.command_words(command, {"dir": "/a b"}, "") for command in made.stages[0].after]
        assert words == [["sample", "m", str(file), "--n", "8"], ["sample", "m", str(file), str(file), "--out=/a b/x"]]
        assert made.stages[0].run[0] == f'data.path="{file}"'
        assert stages.filled_override(made.stages[0].run[1], {"dir": "/p"}, "") == f'data.eval_path="/p/{file}"'
    assert stages.command_words(pipeline_of(tmp_path, **content).stages[0].after[0], {}, "") == ["sample", "m"]
    with pytest.raises(ConfigError, match="a file that is there"):
        pipeline_of(tmp_path, "values.rows=/none/Bob's.jsonl", **content)


@pytest.mark.parametrize("more", ["", "--no-probe", "--dtype bfloat16 --trust-remote-code", "--seed=1"])
def test_what_a_merge_writes_is_known_whatever_follows_it(more: str) -> None:
    assert stages.outputs(["merge", *more.split(), "a=0.5", "b", "merged"]) == ["merged"]
    assert stages.outputs(["merge", "a=0.5", "b", "merged", *more.split()]) == ["merged"]
    alone = [option for action in merge_parser()._actions if action.nargs == 0 for option in action.option_strings]
    assert {*stages.ALONE, "-h", "--help"} == set(alone)


def test_a_merge_that_was_stopped_is_done_again(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """It has written its model, and was stopped while it compared it."""
    folder = tmp_path / "run"

    def merge(words: list[str]) -> int:
        out = Path(words[2])
        assert not out.exists()
        out.mkdir()
        (out / "config.json").touch()
        return 130 if len(called) == 1 else 0

    called = tools_of(monkeypatch, merge)
    presets = written(tmp_path, stages=[{"name": "one", "after": ["merge adapter {dir}/sub/merged --no-probe"]}])
    line = ["--config-dir", presets, "+pipeline=tiny", f"run_dir={folder}"]
    assert call(monkeypatch, capfd, *line)[0] == 130
    code, said = call(monkeypatch, capfd, *line)
    assert (code, len(called)) == (0, 2), said
    assert "the merge that wrote it did not end" in said


@pytest.mark.parametrize(
    "words", ["a {dir}", "a {dir}/..", "{dir}/m {dir}/m", "{dir}/m/a=0.5 {dir}/m", "a {dir}/one/export", "a {elsewhere}"]
)
def test_no_merge_removes_what_it_has_not_written(words: str, tmp_path: Path) -> None:
    made = pipeline_of(tmp_path, f"run_dir={tmp_path / 'run'}", stages=RUN)
    for folder in ("run", "run/m", "run/m/a", "run/one/export", "elsewhere", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "config.json").touch()
    before = sorted(tmp_path.rglob("*"))
    names = {"dir": str(made.folder), "elsewhere": str(tmp_path / "elsewhere")}
    in_turn._make_room(made, stages.command_words(f"merge {words}", names, ""))
    assert sorted(tmp_path.rglob("*")) == before


RUN = [{"name": "one", "run": ["seed=1"]}]
WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no stages": ({"stages": []}, [], "has no list of `stages`"),
    "an unknown key": ({"stages": [{"name": "one", "runs": []}]}, [], "did you mean run?"),
    "another key of the file": ({"stages": RUN, "evry": []}, [], "did you mean every?"),
    "nothing to do": ({"stages": [{"name": "one"}]}, [], "has nothing to do"),
    "a stage without a name": ({"stages": [{"run": ["seed=1"]}]}, [], "a mapping with a `name`"),
    "a name that is a group": ({"stages": [{"name": "model", "run": ["seed=1"]}]}, [], "is not a valid name of a stage"),
    "a name twice": ({"stages": RUN * 2}, [], "name: one_2"),
    "a run_dir of a stage": ({"stages": [{"name": "one", "run": ["run_dir=x"]}]}, [], "leave out run_dir"),
    "no override": ({"stages": [{"name": "one", "run": ["seed"]}]}, [], "sets nothing"),
    "texts that are none": ({"stages": [{"name": "one", "run": [1]}]}, [], "is not a text"),
    "no list": ({"stages": [{"name": "one", "run": "seed=1"}]}, [], "must be a list of texts"),
    "a tool that no stage calls": ({"stages": [{"name": "one", "after": ["sampel x"]}]}, [], "did you mean sample?"),
    "quotes that do not close": ({"stages": [{"name": "one", "after": ["sample 'x"]}]}, [], "quotes in pairs"),
    "a place that there is not": ({"stages": [{"name": "one", "run": ["data.path={rows}"]}]}, [], "nothing is called {rows} here"),
    "values that are none": ({"values": {"x": [1]}, "stages": RUN}, [], "must be names with one value each"),
    "a value that there is not": ({"values": {"rows": "x"}, "stages": RUN}, ["values.row=y"], "did you mean rows?"),
    "an experiment of all stages": ({"stages": RUN}, ["+exp=quickstart"], "one.exp=VALUE"),
    "a model of all stages": ({"stages": RUN}, ["model.id=x"], "remedy: one.model.id=x"),
    "a model in `every`": ({"stages": RUN, "every": ["model.id=x"]}, [], "none with the export of the one before"),
    "a mode that there is not": ({"stages": RUN}, ["mode=dry"], "of run, plan, dry_run"),
    "a setting of a stage without a run": ({"stages": [{"name": "one", "after": ["sample x"]}]}, ["one.seed=1"], "has no run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_pipeline_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, overrides, words = WRONG[case]
    with pytest.raises(ConfigError) as refused:
        pipeline_of(tmp_path, *overrides, **content)
    assert words in str(refused.value)


def test_a_pipeline_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean quickstart_pipeline\?"):
        read(["+pipeline=quickstart"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["last.optim.lrr=1"], ["nearest optim.lr", "stage last, or the command line", "stage 3 of 3, last", "nothing was started"]),
        (["last.data.path={dir}/choosen.jsonl"], ["no such file or directory", "/run/choosen.jsonl"]),
        (["launch=torchrun"], ["a pipeline runs its stages on this machine, or as jobs of SLURM"]),
        (["last.launch=slurm", "last.launch.gpus_per_node=0"], ["all stages of a pipeline have one backend"]),
        (["sft.peft=lora"], ["begins with the export of `sft`, which is an adapter", "merge {sft}/export {dir}/sft_merged"]),
        (["-m"], ["--multirun", "mode=dry_run prints every stage"]),
    ],
)
def test_a_wrong_setting_of_the_last_stage_is_found_before_the_first(
    words: list[str], said: list[str], base: Path, chats: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    presets = written(tmp_path, **three_stages(base, chats))
    code, text = call(monkeypatch, capfd, "--config-dir", presets, "+pipeline=tiny", f"run_dir={tmp_path / 'run'}", *words)
    assert code == 2, text
    assert all(part in text for part in said), text
    assert not (tmp_path / "run").exists()
    assert "pipeline-" not in text, "a folder that is not there any more"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate run --rows many", "argument --rows: invalid int value"),
        ("evaluate run --judge http://x", "nothing says which model"),
        ("evaluate run --path tset.jsonl", "no such file or directory"),
        ("evaluate run --metrics exactmatch", "there is no such metric"),
        ("sample model promts.jsonl --out x", "no such file or directory"),
        ("sample model owner/prompts --out x --n 0", "must be greater than 0"),
        ("select answers --reward exakt --out x", "there is no reward `exakt`"),
        ("merge adapter merged --shard-gib 0", "must be a number greater than 0"),
        ("compare run --html .", "is a directory"),
    ],
)
def test_a_tool_refuses_its_words_before_it_runs(words: str, said: str) -> None:
    with pytest.raises((ConfigError, Refused), match=re.escape(said)):
        commands.require(words.split())


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("gate {stage} --rules {conf}/gate/none.yaml", "cannot be read"),
        ("sample {model} {dir}/prompts.jsonl --out {dir}/x.jsonl", "nothing before it writes {dir}/prompts.jsonl"),
    ],
)
def test_a_wrong_word_of_the_last_command_is_found_before_the_first_stage(
    after: str, said: str, base: Path, chats: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    content = three_stages(base, chats)
    content["stages"][2]["after"] = [after]
    presets = written(tmp_path, **content)
    code, text = call(monkeypatch, capfd, "--config-dir", presets, "+pipeline=tiny", f"run_dir={tmp_path / 'run'}")
    assert code == 2, text
    assert said in text
    assert "last.after[0]" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_every_stage_and_leaves_nothing(base: Path, chats: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    presets, folder = written(tmp_path, **three_stages(base, chats)), tmp_path / "run"
    code, said = call(monkeypatch, capfd, "--config-dir", presets, "+pipeline=tiny", f"run_dir={folder}", "mode=dry_run")
    assert code == 0, said
    assert said.index("stage 1 of 3, sft") < said.index("tools.sample") < said.index("tools.select") < said.index("stage 3 of 3, last")
    assert said.count("-m trainers ") == 3
    assert f"id: {folder}/sft/export" in said
    assert f"id: {folder}/rejection/export" in said
    assert not folder.exists()


def test_a_plan_takes_the_first_model_for_what_a_stage_will_give(
    base: Path, chats: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    """Also where it is named, and merged; a pipeline of commands alone has no plan."""
    content = three_stages(base, chats)
    content["stages"][0]["run"].append("peft=lora")
    merged = ["merge {sft}/export {dir}/merged", *content["stages"][1]["before"]]
    content["stages"][1] |= {"before": merged, "run": [*content["stages"][1]["run"], "model.id={dir}/merged"]}
    content["stages"][2]["run"].append("model.id={rejection}/export")
    planned: list[Any] = []
    monkeypatch.setattr(pipeline.plan, "plan", lambda jobs: planned.extend(jobs) or 0)
    monkeypatch.setattr(stage_checks, "require_commands", lambda asked: None)
    line = ["--config-dir", written(tmp_path, **content), "+pipeline=tiny", f"run_dir={tmp_path / 'run'}", "mode=plan"]
    code, said = call(monkeypatch, capfd, *line)
    assert code == 0, said
    assert [job.run.model.id for job in planned] == [str(base)] * 3
    written(tmp_path, stages=[{"name": "one", "after": ["sample m rows --out x"]}])
    code, said = call(monkeypatch, capfd, *line)
    assert code == 2
    assert "no stage of this pipeline has a run to plan" in said


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "pipeline").glob("*.yaml")))
def test_every_pipeline_composes_and_help_lists_it(name: str, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    from launcher.help import pipelines

    content = yaml.safe_load((CONF / "pipeline" / f"{name}.yaml").read_text())
    files = {
        key: tmp_path / Path(value).name for key, value in content["values"].items() if str(value).endswith(".jsonl") and "{" not in value
    }
    for file in files.values():
        file.write_text('{"question": "1", "answer": "1"}\n')
    more = [f"values.{key}={file}" for key, file in files.items()]
    code, said = call(monkeypatch, capfd, f"+pipeline={name}", f"run_dir={tmp_path / 'run'}", "mode=dry_run", *more)
    assert code == 0, said
    assert f"+pipeline={name}" in pipelines()


def test_the_questions_of_the_quickstart_are_those_of_the_digits() -> None:
    rows = [
        json.loads(line) for part in ("digits", "digits_test") for line in (CONF / "pipeline" / f"{part}.jsonl").read_text().splitlines()
    ]
    assert sorted(map(str, rows)) == sorted(map(str, digits()))


def tools_of(monkeypatch: pytest.MonkeyPatch, done: Any = lambda words: 0) -> list[list[str]]:
    """Let a function stand for the tools that a pipeline calls; returns the list that their words come to."""
    called: list[list[str]] = []

    def run(words: list[str], lock: int) -> int:
        called.append(words)
        return int(done(words))

    monkeypatch.setattr(in_turn, "_call", run)
    monkeypatch.setattr(stage_checks, "require_commands", lambda asked: None)
    return called


def test_a_secret_is_not_kept_and_the_same_command_still_continues(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Nor are the stages one W&B run."""
    called = tools_of(monkeypatch)
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    presets = written(tmp_path, stages=[{"name": "one", "after": ["select a --reward {reward} --out {dir}/x"]}], values={"reward": "exact"})
    line = [
        "--config-dir",
        presets,
        "+pipeline=tiny",
        f"run_dir={tmp_path / 'run'}",
        "values.reward=judge:url=http://u:pa55word@h/v1,model=m",
    ]
    code, said = call(monkeypatch, capfd, *line)
    assert code == 0, said
    assert "http://u:pa55word@h/v1" in called[0][3]
    assert "WANDB_RUN_ID=chosen is not used" in said
    assert "WANDB_RUN_ID" not in os.environ
    assert "pa55word" not in (tmp_path / "run" / "pipeline.json").read_text() + said
    code, said = call(monkeypatch, capfd, *line)
    assert (code, len(called)) == (0, 1), said
    assert "one: is done already" in said


def test_changed_commands_alone_are_done_again_until_a_run_is_made_of_them(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Then the launcher names what to remove, the answers of `sample` with it."""
    folder = tmp_path / "run"
    called = tools_of(monkeypatch)
    two = {"name": "two", "before": ["sample m rows --out {dir}/b.jsonl"], "run": ["seed=1"]}
    content = {"values": {"n": 1}, "stages": [{"name": "one", "after": ["sample m rows --n {n} --out '{dir}/a.jsonl'"]}, two]}
    presets = written(tmp_path, stages=content["stages"][:1], values=content["values"])
    line = ["--config-dir", presets, "+pipeline=tiny", f"run_dir={folder}"]
    assert call(monkeypatch, capfd, *line)[0] == 0
    code, said = call(monkeypatch, capfd, *line, "values.n=2")
    assert (code, [words[4] for words in called]) == (0, ["1", "2"]), said
    written(tmp_path, **content)
    (folder / "two").mkdir()
    for name in ("two/config.yaml", "a.jsonl", "a.jsonl.json", "b.jsonl.part"):
        (folder / name).touch()
    code, said = call(monkeypatch, capfd, *line, "values.n=3")
    assert code == 2
    assert "stage `one` is done with other commands" in said
    assert f"rm -r {folder}/two {folder}/a.jsonl {folder}/b.jsonl.part to do it" in said
    assert len(called) == 2


@pytest.mark.parametrize("kept", [None, {"passed": False}, {"passed": True}])
def test_a_gate_that_fails_has_not_refused_the_model(kept: Any, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Only a verdict that it has just written does; folders that a command writes to are there."""
    file = tmp_path / "gated" / "evaluation" / "gate.json"
    file.parent.mkdir(parents=True)
    if kept is not None:
        file.write_text(json.dumps(kept))
        os.utime(file, (1.0, 1.0))

    def gate(words: list[str]) -> int:
        if words[0] == "gate" and len(called) > 2:
            file.write_text('{"passed": false}')
        assert words[0] == "gate" or Path(words[-1]).parent.is_dir()
        return int(words[0] == "gate")

    called = tools_of(monkeypatch, gate)
    after = ["sample m rows --out {dir}/sub/x.jsonl", f"gate {tmp_path / 'gated'}"]
    line = ["--config-dir", written(tmp_path, stages=[{"name": "one", "after": after}]), "+pipeline=tiny", f"run_dir={tmp_path / 'run'}"]
    code, said = call(monkeypatch, capfd, *line)
    assert code == 1
    assert f"gate {tmp_path / 'gated'} failed with exit code 1" in said
    code, said = call(monkeypatch, capfd, *line)
    assert (code, len(called)) == (1, 3), "what is done of a stage is not done again"
    assert "the gate lets the model go no further" in said


def test_what_is_forgotten_in_all_is_of_one_text() -> None:
    def measured(nats: float, text: str) -> Evaluation:
        sums = {"general": (np.full(4, nats), np.full(4, 1.0))}
        return Evaluation(about={"sets": {"general": text}}, documents={"general": [0, 1, 2, 3]}, sums=sums)

    def last(*texts: str) -> str:
        parts: list[Any] = []
        for number, text in enumerate(texts):
            run: Any = SimpleNamespace(ours=measured(number + 1.0, text), base=measured(number, text))
            parts.append(Part(name=f"stage_{number}", run=run, seconds=1.0, ended=True, commands=[]))
        return conclusions(Story(name="p", folder=Path(), parts=parts, planned=2, metric=None))[-1]

    assert "Forgotten in all: +2.000 nats a token" in last("a", "a")
    assert last("a", "b").startswith("Forgotten in all is not given: stages were measured on different general texts; most by `stage_0`")


def gone(folder: Path, pid: int) -> bool:
    wait_until_gone(folder)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_killed_pipeline_continues_exactly_and_keeps_what_is_done(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Killed in stage 3: the same command takes up the run there; all three leave the traces of one that was never stopped."""
    presets = written(tmp_path, **three_stages(base, chats))

    def line(folder: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "launcher", "--config-dir", presets, "+pipeline=tiny", f"run_dir={folder}", *more]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = launch(cache, line(whole))
    assert "stage 3 of 3, last: done in" in said
    assert "pipeline tiny: 3 stages in" in said
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(line(killed), cwd=ROOT, env=environment(cache), stdout=log, stderr=log, text=True)
    try:
        wait_for_step(killed / "last", 4, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
        log.close()
    assert json.loads((killed / "last" / "status.json").read_text())["state"] != "done"
    again = launch(cache, line(killed))
    assert "stage 1 of 3, sft: is done already" in again
    assert "stage 2 of 3, rejection: is done already" in again
    assert "stage 3 of 3, last: continues" in again
    assert "3 of 3 stages done" in again
    for name in ("sft", "rejection", "last"):
        assert trace(killed / name) == trace(whole / name)
    assert json.loads((killed / "pipeline.json").read_text())["state"]["last"]["after"] == ["compare {dir} --csv {dir}/stages.csv"]
    assert (killed / "stages.csv").read_text().count("\n") == 4
    refused = launch(cache, line(killed, "sft.optim.lr=3e-3"), expect=2)
    assert "stage `sft` is a run with other settings" in refused
    assert "optim.lr: 0.01 -> 0.003" in refused
    assert f"rm -r {killed}/sft {killed}/rejection {killed}/last" in refused
    shown = tool(cache, killed, name="runs")
    assert "3/3" in shown
    assert shown.index("├ sft") < shown.index("├ rejection") < shown.index("└ last")
    assert gone(killed, process.pid)


def test_a_tree_of_a_pipeline_shows_its_stages_in_order(tmp_path: Path) -> None:
    """Also those that have not begun."""
    stages_ = [{"name": name, "before": [], "run": ["seed=1"], "after": []} for name in ("sft", "dpo", "alignment")]
    known = {"pipeline": "five", "stages": stages_, "state": {"sft": {"ended": 1.0, "seconds": 60.0}, "dpo": {"seconds": 3.0}}}
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "pipeline.json").write_text(json.dumps(known))
    for name, state in (("sft", "done"), ("dpo", "failed")):
        (tmp_path / "five" / name).mkdir()
        (tmp_path / "five" / name / "config.yaml").write_text("seed: 0\n")
        (tmp_path / "five" / name / "status.json").write_text(json.dumps({"state": state, "step": 3}))
    cells = [list(column.cells) for column in runs.table_of(tmp_path).columns]
    assert [str(cell).split()[-1] for cell in cells[0]] == ["five", "sft", "dpo", "alignment"]
    assert "1/3" in str(cells[2][0])
    assert "waits" in str(cells[1][3])


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_quickstart_ends_with_a_page_that_tells_the_story(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quick"
    line = [sys.executable, "-m", "launcher", "+pipeline=quickstart_pipeline", f"run_dir={folder}"]
    launch(cache, line, timeout_s=1500)
    page = (folder / "pipeline.html").read_text()
    assert all(f"{number}. {name}" in page for number, name in enumerate(("cpt", "sft", "rejection", "dpo", "alignment"), 1))
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert "5 of 5 stages done" in page
    gate = json.loads((folder / "alignment" / "evaluation" / "gate.json").read_text())
    assert gate["passed"]
