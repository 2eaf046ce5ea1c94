"""Building the object of a config group, with an error that names the group."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_module.errors import RunError


def build(what: str, config: DictConfig, **arguments: Any) -> Any:
    """The object that a group of the config describes.

    Args:
        what: name of the group, for the error.
        config: config of the group.
        arguments: more arguments of its `_target_`.

    Raises:
        RunError: it cannot be built; names the group and the cause.
    """
    try:
        return instantiate(config, **arguments)
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        text = " ".join(str(cause).split("\n    full_key")[0].split())
        raise RunError(f"the settings of {what} cannot be used: {text}") from error
