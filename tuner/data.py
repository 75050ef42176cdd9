"""Where the data folders of the project (presets, job_templates) are."""

from pathlib import Path


def data_dir(name: str) -> Path:
    """The folder `name` as installed (in the package) or as in a checkout (beside the package)."""
    packaged = Path(__file__).parent / "_data" / name
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / name
