"""Sweep, retrain the winner, predict the test split: `python tune.py`, with any configuration key as key=value."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from handpose.config import compose, location_overrides, plain, quote_override, script, task_overrides
from handpose.report.terminal import summary
from handpose.sweep.preflight import check_space, check_sweep, prepare_data
from handpose.sweep.provenance import provenance
from handpose.sweep.run import SweepInterruptedError, run_sweep
from handpose.sweep.scheduler import build_scheduler
from handpose.sweep.select import NoWinnerError, select_winner, write_best
from handpose.sweep.space import flattened, load_space
from handpose.sweep.trial import TrainingObjective, TrialRecipe, training_overrides, with_params
from handpose.training.fit import prepare_folders, train_and_test


def main(config: DictConfig) -> None:
    """Sweep, retrain, test, and print what came out."""
    sweep, cluster = instantiate(config.sweep), instantiate(config.ray)
    overrides = training_overrides(task_overrides())
    space = load_space(config.search_space)
    check_sweep(sweep, cluster)
    check_space(space, overrides, is_grid=config.searcher.sampler is None)
    scheduler = build_scheduler(instantiate(config.scheduler), space)
    origin = provenance(data=prepare_data(config))
    defaults = flattened(plain(config)) | dict(HydraConfig.get().runtime.choices)
    recipe = TrialRecipe(overrides, location_overrides(config), sweep.max_epochs, sweep.cpus_per_trial)

    table = run_sweep(
        sweep=sweep,
        cluster=cluster,
        space=space,
        searcher=instantiate(config.searcher),
        scheduler=scheduler,
        objective=TrainingObjective(recipe, sweep.metric, sweep.checkpoint_every_epochs),
        command=recipe.command,
        defaults=defaults,
        description={"config": plain(config), **origin},
    )

    # The finalists are not confirmed over seeds yet; it belongs here, between the table and the winner.
    winner = select_winner(table, folder=sweep.path)
    best = sweep.path / "best.yaml"
    write_best(
        best, table=table, row=winner, overrides=with_params(overrides, winner.params), sweep=sweep, origin=origin
    )
    retrained = retrain(sweep.path) if sweep.retrain else None
    print(summary(table=table, winner=winner, defaults=defaults, retrained=retrained, folder=sweep.path))


def retrain(folder: Path) -> dict[str, float]:
    """Train best.yaml of the sweep in that folder as train.py would, with its full schedule, and test it."""
    places = {"logs": "retrain", "checkpoints": "retrain/checkpoints", "predictions": "retrain"}
    overrides = [quote_override(f"paths.{name}", str(folder / place)) for name, place in places.items()]
    config = compose("train", [quote_override("best", str(folder / "best.yaml")), *overrides])
    result = train_and_test(config, prepare_folders(config))
    return (result.training.metrics if result.training else {}) | result.test_metrics


def guarded(config: DictConfig) -> None:
    """Leave with a sentence and a status of its own where the sweep came to nothing or was ended by hand."""
    try:
        main(config)
    except NoWinnerError as error:
        sys.exit(f"error: {error}")
    except (SweepInterruptedError, KeyboardInterrupt) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    script("tune", guarded)
