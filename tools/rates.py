"""python -m tools.rates: the peak learning rate of each experiment with each preset of conf/peft, as a Markdown table."""

from __future__ import annotations

import sys

from launcher.compose import unchecked
from launcher.presets import CONF
from tools.command import parser_of
from tools.markdown import cell_of
from trainers.config.derived import Peak, peak_lr

EXPERIMENTS = sorted(file.stem for file in (CONF / "exp").glob("*.yaml"))
PRESETS = sorted(file.stem for file in (CONF / "peft").glob("*.yaml"))


def main() -> int:
    """Print the table, and which settings the rates come from."""
    parser_of("rates", __doc__).parse_args()
    peaks = {(exp, peft): peak_of([f"+exp={exp}", f"peft={peft}"]) for exp in EXPERIMENTS for peft in PRESETS}
    print("\n".join([*table(peaks), "", *sources(peaks)]))
    return 0


def peak_of(overrides: list[str]) -> Peak:
    """Return the peak learning rate of a command line, whether or not it can be started as it is."""
    job = unchecked(overrides)
    return peak_lr(job.optim, job.peft)


def table(peaks: dict[tuple[str, str], Peak]) -> list[str]:
    """Return the lines of the table: a row an experiment, a column a preset."""
    experiments, presets = (list(dict.fromkeys(pair[at] for pair in peaks)) for at in (0, 1))
    lines = [["experiment", *presets], ["---", *("---:" for _ in presets)]]
    lines += [[exp, *(f"{peaks[exp, peft].value:g}" for peft in presets)] for exp in experiments]
    return [f"| {' | '.join(map(cell_of, line))} |" for line in lines]


def sources(peaks: dict[tuple[str, str], Peak]) -> list[str]:
    """Return a line for each setting that rates come from, and for each factor."""
    settings, factors = {peak.setting for peak in peaks.values()}, {peak.factor for peak in peaks.values()} - {1.0}
    lines = []
    for setting in sorted(settings):
        lines.append((f"from {setting}", list(dict.fromkeys(peft for (_, peft), peak in peaks.items() if peak.setting == setting))))
    for factor in sorted(factors):
        lines.append(
            (f"x optim.lr_factor {factor:g}", list(dict.fromkeys(exp for (exp, _), peak in peaks.items() if peak.factor == factor)))
        )
    return [f"- {what}: {', '.join(names)}" for what, names in lines]


if __name__ == "__main__":
    sys.exit(main())
