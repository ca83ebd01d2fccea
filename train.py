"""Train one configuration and predict the test split: `python train.py`, with any configuration key as key=value."""

from omegaconf import DictConfig

from handpose.config import script
from handpose.training.fit import prepare_folders, train_and_test


def main(config: DictConfig) -> None:
    """Fit, test with the best checkpoint, and print what came out; with test=true only test."""
    print(train_and_test(config, prepare_folders(config)).summary())


if __name__ == "__main__":
    script("train", main)
