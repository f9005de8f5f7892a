"""Recipes for ``mmkd train --config``: which there are, and errors that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from common.config import ConfigT, StrictModel, load_config, read_yaml
from common.errors import ConfigError
from trainer.config import Stage1Config, Stage2Config

STAGES: dict[str, type[StrictModel]] = {"stage1": Stage1Config, "stage2": Stage2Config}
FOLDER = Path(__file__).resolve().parents[2] / "recipes"
"""Lies beside the packages in a checkout; an installed wheel has none."""


class TrainCommands(TyperGroup):
    """The stages; whoever asks for a recipe instead is told how to use one."""

    # Newer versions of typer have a click of their own, so the context's type depends on the version.
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the stage to run.

        Raises:
            ConfigError: There is no such stage; names the stages and the recipes.
        """
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise ConfigError(
                f"`mmkd train {args[0]}` is no command: train takes {' or '.join(STAGES)}, as in `mmkd train stage1 "
                f"LAKE`, and a recipe is a file for its --config. {known_recipes(*STAGES)}"
            )
        return super().resolve_command(ctx, args)


def recipe_files(stage: str) -> list[str]:
    """The recipes of a stage, as paths that ``--config`` takes from the current folder."""
    here, files = Path.cwd(), sorted(FOLDER.glob(f"*-{stage}.yaml"))
    return [str(file.relative_to(here) if file.is_relative_to(here) else file) for file in files]


def known_recipes(*stages: str) -> str:
    """A sentence that lists the recipes of some stages."""
    listing = "; ".join(f"for {stage} {', '.join(files)}" for stage in stages if (files := recipe_files(stage)))
    return f"Recipes {listing}." if listing else "Recipes are in the folder recipes/ of mmkd's repository."


def load_stage(kind: type[ConfigT], config: str | None, overrides: list[str] | None, **flags: Any) -> ConfigT:
    """The settings of a stage, as :func:`common.config.load_config` reads them.

    Raises:
        ConfigError: Also where the file is missing or is one of the other stage; names the stage's recipes.
    """
    if config is not None:
        (stage,) = (name for name, one in STAGES.items() if one is kind)
        if not Path(config).exists():
            raise ConfigError(
                f"No configuration file at {config}. --config takes the path of a YAML file. {known_recipes(stage)}"
            )
        _insist_on_stage(stage, config)
    return load_config(kind, config, overrides or (), **flags)


def _insist_on_stage(stage: str, config: str) -> None:
    (other,) = set(STAGES) - {stage}
    own, others = (set(STAGES[name].model_fields) for name in (stage, other))
    found = read_yaml(config)
    foreign = [name for name in found if name in others - own]
    # A file that has settings of both is of neither; the usual error then names what is not known.
    if foreign and not set(found) & (own - others):
        raise ConfigError(
            f"{config} is a recipe for {other} (it sets {', '.join(foreign)}) and was given to {stage}: use `mmkd "
            f"train {other}` for it, or give {stage} a file of its own. {known_recipes(stage)}"
        )
