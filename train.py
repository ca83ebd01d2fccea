"""Train one configuration and predict the test split: `python train.py key=value ...`"""

import sys

from omegaconf import DictConfig

from handpose.files import expand_home
from handpose.program import run_script


def main(config: DictConfig) -> None:
    """Train, test with the best checkpoint, and print the results. With test=true, only test."""
    # These imports take seconds. --help and messages about mistakes need not wait for them.
    from pytorch_lightning.utilities import rank_zero_only

    from handpose.training.fit import train_and_test

    if config.best is not None:
        rank_zero_only(_print_differences)(config)
    rank_zero_only(print)(train_and_test(config).format_summary())


def _print_differences(config: DictConfig) -> None:
    """Print to stderr what differs from when best.yaml was written: configuration, versions, revision, data."""
    from handpose.sweep.record.provenance import describe_differences
    from handpose.training.build import build_data

    for sentence in describe_differences(expand_home(config.best), data=build_data(config).fingerprint):
        print(f"best.yaml   {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script("train", main)
