"""Which family of decoder, and within it what it alone has: a space that depends on what was drawn before (define by
run).

Parameters are drawn under their configuration keys, so that the default configuration is found in the space and tried
first.
"""

import optuna


def space(trial: optuna.Trial) -> dict[str, object]:
    """Configuration key -> value of one trial."""
    decoder = trial.suggest_categorical("model/decoder", ["pyramid", "effpose"])
    params: dict[str, object] = {
        "model/decoder": decoder,
        "optimizer.lr": trial.suggest_float("optimizer.lr", 5e-5, 3e-3, log=True),
        "heatmap.sigma": trial.suggest_float("heatmap.sigma", 0.006, 0.05, log=True),
    }
    if decoder == "pyramid":
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 5)
        params["model.decoder.skips"] = trial.suggest_categorical("model.decoder.skips", ["none", "add"])
    return params
