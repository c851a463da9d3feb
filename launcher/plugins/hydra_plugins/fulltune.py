"""What Hydra takes from a module of `hydra_plugins` alone: what sweepers start their points through, and one's own presets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from launcher import presets, sweep, ways


class Points(Launcher):  # type: ignore[misc]
    """Hands every batch of a sweeper to launcher/sweep.py."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what composes a point, and which settings the command line gives to all."""
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {override.key_or_group: override.is_sweep_override() for override in parsed}  # the last one of a key counts
        self.constant = {key for key, is_swept in swept.items() if not is_swept}
        ways.require_own_settings(config.hydra)
        self.folder = Path(os.path.abspath(Path(str(config.hydra.sweep.dir)).expanduser()))
        sweep.look(self.folder)
        self.config, self.loader = config, sweep.PointLoader(hydra_context.config_loader, self.constant)
        context: Any = hydra_context
        context.config_loader = self.loader  # the sweeper composes every point too, to see whether it can be

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run or submit a batch of points; a sweeper that looks for the best gets their held-out losses."""
        points = ((list(given), self.loader.load_sweep_config(self.config, list(given))) for given in job_overrides)
        return sweep.launch(points, self.folder, self.constant)


class OwnPresets(SearchPathPlugin):  # type: ignore[misc]
    """Lets a command line choose from ./conf too."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Look there after our own presets, which no file of another project can replace."""
        if (folder := presets.beside()) is not None:
            search_path.append("./conf", f"file://{folder}")
