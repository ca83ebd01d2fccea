"""Which family of decoder, and what that family alone has: parameters that depend on what was drawn before.

Each is drawn under its configuration key, so that the default configuration is found in the space and tried first.
"""

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """Configuration key -> value of one trial."""
    decoder = trial.suggest_categorical("model/decoder", ["pyramid", "effpose"])
    params: dict[str, object] = {
        "model/decoder": decoder,
        "optimizer.lr": trial.suggest_float("optimizer.lr", 2e-4, 1e-2, log=True),
        "heatmap.sigma": trial.suggest_float("heatmap.sigma", 0.01, 0.08, log=True),
    }
    if decoder == "pyramid":
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 5)
        params["model.decoder.skips"] = trial.suggest_categorical("model.decoder.skips", ["none", "add"])
    return params
