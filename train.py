"""Train one configuration and predict the test split: `python train.py`, with any configuration key as key=value."""

from omegaconf import DictConfig

from handpose.config import script


def main(config: DictConfig) -> None:
    """Fit, test with the best checkpoint, and print what came out; with test=true only test."""
    # Seconds of imports, which --help and typing errors need not wait for.
    from pytorch_lightning.utilities import rank_zero_only

    from handpose.training.fit import train_and_test

    rank_zero_only(print)(train_and_test(config).summary())


if __name__ == "__main__":
    script("train", main)
