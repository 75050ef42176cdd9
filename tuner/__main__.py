"""`tuner` and `python -m tuner`."""

import os
import sys


def main() -> None:
    # TRL reports every trainer through huggingface_hub, mlflow itself: a run tells nobody whom its file does not name.
    os.environ.setdefault("DO_NOT_TRACK", "true")
    from tuner.cli import main as run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
