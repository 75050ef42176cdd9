"""`tuner` and `python -m tuner`."""

import sys


def main() -> None:
    from tuner.cli import main as run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
