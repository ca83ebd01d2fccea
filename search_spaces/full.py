"""Network, losses, optimiser and augmentation together; what only some choices have is drawn only for those.

Each parameter is drawn under its configuration key, so that the default configuration is found in the space.
"""

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """Configuration key -> value of one trial."""
    return {**_network(trial), **_loss(trial), **_optimisation(trial), **_augmentation(trial)}


def _network(trial: optuna.Trial) -> dict[str, object]:
    depth = trial.suggest_int("model.decoder.depth", 0, 5)
    params: dict[str, object] = {
        "model.decoder.depth": depth,
        "model.decoder.width": trial.suggest_int("model.decoder.width", 16, 128, step=16),
        "model.decoder.head": trial.suggest_categorical("model.decoder.head", ["heatmaps", "axes"]),
        "model.decoder.bins_per_cell": trial.suggest_categorical("model.decoder.bins_per_cell", [1, 2]),
        "model.encoder.drop_path": trial.suggest_float("model.encoder.drop_path", 0.0, 0.3),
        "heatmap.sigma": trial.suggest_float("heatmap.sigma", 0.006, 0.08, log=True),
        "heatmap.target": trial.suggest_categorical("heatmap.target", ["gaussian", "laplacian"]),
    }
    if depth > 0:  # blocks that there are
        params["model.decoder.conv"] = trial.suggest_categorical("model.decoder.conv", ["separable", "dense"])
        params["model.decoder.skips"] = trial.suggest_categorical("model.decoder.skips", ["none", "add"])
    return params


def _loss(trial: optuna.Trial) -> dict[str, object]:
    return {
        "loss.divergence": trial.suggest_categorical("loss.divergence", ["kl", "jsd"]),
        "loss.coordinate_weight": trial.suggest_float("loss.coordinate_weight", 0.1, 10.0, log=True),
        "loss.depth_weight": trial.suggest_float("loss.depth_weight", 0.5, 5.0, log=True),
    }


def _optimisation(trial: optuna.Trial) -> dict[str, object]:
    schedule = trial.suggest_categorical("lr_schedule", ["warmup_cosine", "flat_cosine"])
    params: dict[str, object] = {
        "lr_schedule": schedule,
        "optimizer.lr": trial.suggest_float("optimizer.lr", 2e-4, 2e-2, log=True),
        "optimizer.weight_decay": trial.suggest_float("optimizer.weight_decay", 1e-4, 1e-1, log=True),
        "encoder_lr_factor": trial.suggest_categorical("encoder_lr_factor", [0.1, 0.3, 1.0]),
        "ema_decay": trial.suggest_categorical("ema_decay", [0.0, 0.99, 0.998]),
    }
    if schedule == "flat_cosine":
        params["lr_schedule.flat"] = trial.suggest_float("lr_schedule.flat", 0.2, 0.8)
    return params


def _augmentation(trial: optuna.Trial) -> dict[str, object]:
    return {
        "augment.rotation_deg": trial.suggest_float("augment.rotation_deg", 0.0, 180.0),
        "augment.scale": trial.suggest_float("augment.scale", 0.0, 0.4),
        "augment.perspective_deg": trial.suggest_float("augment.perspective_deg", 0.0, 20.0),
        "augment.occlusion": trial.suggest_categorical("augment.occlusion", [0.0, 0.3]),
        "augment.blur": trial.suggest_categorical("augment.blur", [0.0, 0.2]),
    }
