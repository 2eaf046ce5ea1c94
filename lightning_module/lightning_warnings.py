"""Lightning's warnings about choices that this project makes on purpose."""

import logging
import warnings


def quiet() -> None:
    """Silences them."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        # Chunks are gathered from a memory map in microseconds: workers would slow that down.
        ".*does not have many workers",
        # `train` has checked that the run directory is new, or that of the resumed run.
        "Experiment logs directory .* exists and is not empty",
        "Checkpoint directory .* exists and is not empty",
        # The metrics are sums over all ranks before they are logged.
        "It is recommended to use .*sync_dist=True",
        # configure_model acts for strategy=fsdp alone, which is refused with averaging.
        "You're using the WeightAveraging callback with a model that overrides",
        # Lightning 2.6 under torch 2.13, once a run.
        ".*LeafSpec.* is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
