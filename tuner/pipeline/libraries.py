"""The training libraries: whether they are there, which versions, and that they keep quiet."""

import logging
import os
import sys
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from tuner.errors import ConfigError

TRAIN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets")
_DECIDE_NUMBERS = (*TRAIN_PACKAGES, "accelerate", "tokenizers", "numpy")
_DECIDE_NUMBERS_WHERE_THERE = ("triton", "liger-kernel")


def check_packages() -> None:
    """Raises ConfigError when the train extra is not installed. Nothing is imported."""
    missing = [name for name in TRAIN_PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"training needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint="pip install 'tuner[train]'",
        )


def versions() -> dict[str, str]:
    """Name → version of the libraries that decide a run's numbers."""
    found = {name: version(name) for name in _DECIDE_NUMBERS}
    for name in _DECIDE_NUMBERS_WHERE_THERE:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def report_nothing() -> None:
    """Have libraries tell nobody whom a run's file does not name: TRL would report every trainer through
    huggingface_hub, and mlflow itself. Whoever has set DO_NOT_TRACK has decided that already."""
    if "DO_NOT_TRACK" in os.environ:
        return
    os.environ["DO_NOT_TRACK"] = "true"
    if constants := sys.modules.get("huggingface_hub.constants"):  # which has read it
        constants.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]


def quiet_logs() -> None:
    """What of quiet() needs no import."""
    report_nothing()
    for name in ("bitsandbytes", "liger_kernel"):  # kernels for other hardware that are not there
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|transformers|trl|peft)\.")


def quiet() -> None:
    """No bars, notices and deprecations of libraries between our lines; their errors still come.

    Call it before bitsandbytes is imported: on a CPU that import itself warns of an optional kernel.
    """
    quiet_logs()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
