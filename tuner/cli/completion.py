"""What a shell completes a value to, as in `tuner run --model ph<TAB>`. Where nothing is known, it offers files.

Typer calls one of these in a process that the shell waits for: quick, and silent whatever goes wrong.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

_PATIENCE_S = 2.0  # with a cluster: who presses TAB waits for the prompt
_BREAKS = ("=", ":")
_key_in_bash = ""  # of a KEY=VALUE whose value is completed


def read_bash_words(env: MutableMapping[str, str]) -> None:
    """Changes COMP_WORDS, which bash splits at "=" and ":", too, to the words that were typed.

    What bash gets takes the place of the last piece alone: `--model = ph` becomes `--model ph`, and `--set KEY = v`
    becomes `--set v` with KEY remembered.
    """
    global _key_in_bash
    with suppress(ValueError):  # a quote that is not closed yet
        index = int(env["COMP_CWORD"])
        *before, last = [*shlex.split(env["COMP_WORDS"]), ""][: index + 1]
        words: list[str] = []
        for word in [*before, last] if last in _BREAKS else before:
            if words and (word in _BREAKS or (words[-1][-1:] in _BREAKS and not word.startswith("-"))):
                words[-1] += word
            else:
                words.append(word)
        if words[-1][-1:] in _BREAKS and not last.startswith("-"):
            head = words.pop()[:-1]
            words += [head] if head.startswith("-") else []
            _key_in_bash = head
        env["COMP_CWORD"] = str(len(words))
        env["COMP_WORDS"] = shlex.join([*words, "" if last in _BREAKS else last])


def words(*known: str) -> Callable[[], tuple[str, ...]]:
    return lambda: known


def presets() -> list[str]:
    from tuner.data import data_dir

    return sorted(path.stem for path in data_dir("presets").glob("*.yaml"))  # a preset is named as its file


def levers() -> list[str]:
    from tuner.levers import LEVERS

    return list(LEVERS)


def stages() -> tuple[str, ...]:
    from tuner.runspec import STAGES

    return STAGES


def gpus() -> list[str]:
    from tuner.instance_types import GPUS

    return [name for name, gpu in GPUS.items() if gpu.problem is None]


def instance_types() -> list[str]:
    from tuner.instance_types import instance_types

    return [name for name, machine in instance_types().items() if machine.gpu.problem is None]


def settings(incomplete: str) -> list[str]:
    """`LoraConfig.r=`, and when one is left what it may be: `DatasetConfig.over_length=drop`."""
    from tuner.training_config import words_of_settings

    known = words_of_settings()
    if _key_in_bash:
        return [word for word in known.get(_key_in_bash, ()) if word.startswith(incomplete)]
    keys = [key for key in known if f"{key}=".startswith(incomplete) or incomplete.startswith(f"{key}=")]
    if len(keys) > 1:
        return [f"{key}=" for key in keys]
    # Where two are left no shell puts a blank behind "="; null takes back what the file says.
    return [f"{key}={word}" for key in keys for word in known[key] or ("", "null")]


def work_directories() -> list[str]:
    return sorted(str(path) for path in Path().glob("tuner-work/*/"))


def adapters() -> list[str]:
    return sorted(str(path) for path in Path().glob("tuner-work/*/adapter-*/"))


def runs(ctx: typer.Context) -> list[str]:
    """The Jobs in the namespace that was typed, else in the context's."""
    names: list[str] = []
    with suppress(Exception):
        import kubernetes.config  # noqa: F401  # takes as long as it takes; the cluster is what may not answer

        from tuner.cluster.api import JOB, OUR_JOBS, Api

        with _briefly(_PATIENCE_S):
            api = Api.from_config(ctx.params["context"], ctx.params["namespace"], patience_s=0)
            names += [str(job["metadata"]["name"]) for job in api.list(JOB, label_selector=OUR_JOBS).items]
    return names


@contextmanager
def _briefly(seconds: float) -> Iterator[None]:
    """The process ends in good order when the block takes longer, and with it what a kubeconfig's plugin has started.

    A plugin would ask for a password in the middle of the command line: it has no terminal here.
    """

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(os.getpgrp(), signal.SIGTERM)
        os._exit(0)

    with suppress(PermissionError):  # it leads a session already
        os.setsid()
    with Path(os.devnull).open("r+b") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
        os.dup2(nothing.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
