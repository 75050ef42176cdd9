"""TAB in a real bash and a real zsh, on a terminal: what is typed, completed, and what is never said there."""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from fake_kubernetes import FakeKubernetes
from registries import require

from tuner.cli.completion import instance_types, presets, read_bash_words
from tuner.presets import find_preset, load_presets
from tuner.training_config import IGNORED, REFUSED, resolve_training_config, words_of_settings

SHELLS = ("bash", "zsh")
PROMPT = "ready> "
TAB, SHOW, CLEAR = b"\t", b"\x14", b"\x15"
DEADLINE_S = 60.0

# What makes a shell's line readable for a test: ^T writes it to a file, and TAB lists at once what it may be.
START = {
    "bash": """
PS1='ready> '
bind 'set enable-bracketed-paste off'; bind 'set show-all-if-ambiguous on'
bind 'set completion-query-items 0'; bind 'set page-completions off'
bind -x '"\\C-t": printf %s "$READLINE_LINE" >"$LINE.new"; mv "$LINE.new" "$LINE"'
""",
    "zsh": """
PS1='ready> '; LISTMAX=1000; unsetopt beep list_ambiguous
autoload -Uz compinit; compinit -u -D
show() { printf %s "$BUFFER" >"$LINE.new"; mv "$LINE.new" "$LINE" }
zle -N show; bindkey '^T' show
""",
}
RC = {"bash": ".bashrc", "zsh": ".zshrc"}
ON_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """An interactive shell in a directory, with a home of its own."""

    def __init__(self, shell: str, directory: Path, home: Path, **environment: str) -> None:
        self.line = home / "line"
        self.seen = ""
        ours, theirs = os.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 100, 160, 0, 0))
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "ZDOTDIR": str(home),
            "LINE": str(self.line),
            "TERM": "xterm",
            **environment,
        }
        self._terminal = ours
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, require(shell), "-i"],
            cwd=directory,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        self._await_prompt()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._terminal)

    def tab(self, typed: str) -> str:
        """The command line after TAB; `seen` is what was on the screen meanwhile."""
        self.line.unlink(missing_ok=True)
        self.seen = ""
        os.write(self._terminal, typed.encode() + TAB + SHOW + CLEAR)
        deadline = time.monotonic() + DEADLINE_S
        while not self.line.exists():
            assert time.monotonic() < deadline, f"no answer to TAB; on the screen: {self.seen}"
            self._read()
        return self.line.read_text()

    def press_until(self, typed: str, completed: str) -> None:
        """TAB again where nothing came: a machine that is busy makes a cluster late."""
        deadline = time.monotonic() + DEADLINE_S
        while (line := self.tab(typed)) != completed:
            assert line == typed
            assert time.monotonic() < deadline, f"{typed} is not completed; on the screen: {self.seen}"

    def _read(self) -> None:
        if select.select([self._terminal], [], [], 0.1)[0]:
            self.seen += os.read(self._terminal, 65536).decode(errors="replace")

    def _await_prompt(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while PROMPT not in self.seen:
            assert time.monotonic() < deadline, f"no prompt; on the screen: {self.seen}"
            self._read()


def start(shell: str, directory: Path, home: Path, **environment: str) -> Terminal:
    home.mkdir(exist_ok=True)
    (home / RC[shell]).write_text(START[shell] + "source <(tuner --show-completion)\n")
    return Terminal(shell, directory, home, **environment)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to work in."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "workspace.yaml").touch()
    (directory / "models").mkdir()
    (directory / "tuner-work/my-run/adapter-0123456789ab").mkdir(parents=True)
    return directory


@pytest.fixture(scope="module", params=SHELLS)
def terminal(
    request: pytest.FixtureRequest, work: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Terminal]:
    with start(request.param, work, tmp_path_factory.mktemp("home")) as running:
        yield running


LINES = [
    ("tuner rende", "tuner render "),
    ("tuner data pre", "tuner data preview "),
    ("tuner run --smo", "tuner run --smoke "),
    ("tuner run --model phi-3-mini-4", "tuner run --model phi-3-mini-4k-instruct "),
    ("tuner init --preset qwen3-0", "tuner init --preset qwen3-0.6b "),
    ("tuner run --set LoraConfig.lora_al", "tuner run --set LoraConfig.lora_alpha="),
    ("tuner run --set DatasetConfig.over_length=d", "tuner run --set DatasetConfig.over_length=drop "),
    ("tuner run --disable varl", "tuner run --disable varlen-attention "),
    ("tuner plan workspace.yaml --gpu H100-9", "tuner plan workspace.yaml --gpu H100-94 "),
    ("tuner render --instance-type Standard_NC24a", "tuner render --instance-type Standard_NC24ads_A100_v4 "),
    ("tuner render --serving v", "tuner render --serving vllm "),
    ("tuner run --work-dir tun", "tuner run --work-dir tuner-work/my-run "),
    ("tuner push tun", "tuner push tuner-work/my-run/adapter-0123456789ab "),
    ("tuner run work", "tuner run workspace.yaml "),
    ("tuner run --base-model mod", "tuner run --base-model models/"),
    ("tuner run --config work", "tuner run --config workspace.yaml "),
]


@pytest.mark.parametrize(("typed", "completed"), LINES)
def test_tab_completes(terminal: Terminal, typed: str, completed: str) -> None:
    assert terminal.tab(typed) == completed


def test_what_may_follow_is_listed(terminal: Terminal) -> None:
    assert terminal.tab("tuner run --model ph") == "tuner run --model phi-"
    for name in ("phi-3-mini-4k-instruct", "phi-3.5-mini-instruct", "phi-4"):
        assert name in terminal.seen
    assert terminal.tab("tuner render --") == "tuner render --"
    for name in ("--set-image", "--allow-cidr", "--help", "--check-job"):
        assert name in terminal.seen


@pytest.fixture(scope="module")
def bash(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with start("bash", work, tmp_path_factory.mktemp("home")) as running:
        yield running


def test_in_bash_a_value_may_follow_an_equals_sign(bash: Terminal) -> None:
    assert bash.tab("tuner run --model=phi-3-mini-4") == "tuner run --model=phi-3-mini-4k-instruct "
    assert bash.tab("tuner run --set DatasetConfig.over_length=") == "tuner run --set DatasetConfig.over_length="
    assert all(word in bash.seen for word in ("drop", "error", "truncate"))


@pytest.mark.parametrize(
    ("words", "index", "read", "last"),
    [
        ("tuner run --model = ph", 4, "tuner run --model ph", 3),
        ("tuner run --model =", 3, "tuner run --model ''", 3),
        ("tuner run --set LoraConfig.r = 3 work", 6, "tuner run --set LoraConfig.r=3 work", 4),
        ("tuner status --namespace = ml ", 5, "tuner status --namespace=ml ''", 3),
        ("tuner run --output localhost : 5000/x --sm", 6, "tuner run --output localhost:5000/x --sm", 4),
        ("tuner run --set LoraConfig.r = --sm", 5, "tuner run --set LoraConfig.r= --sm", 4),
        ("tuner run 'my file.yaml' --sm", 3, "tuner run 'my file.yaml' --sm", 3),
        ("tuner run 'my fi", 2, "tuner run 'my fi", 2),
        ("tuner ", 1, "tuner ''", 1),
    ],
)
def test_bashs_pieces_become_the_words_that_were_typed(words: str, index: int, read: str, last: int) -> None:
    env = {"COMP_WORDS": words, "COMP_CWORD": str(index)}
    read_bash_words(env)
    assert env["COMP_WORDS"] == read
    assert int(env["COMP_CWORD"]) == last


@pytest.mark.parametrize("shell", SHELLS)
def test_what_tuner_installs_completes_in_a_new_shell(shell: str, work: Path, tmp_path: Path) -> None:
    (tmp_path / RC[shell]).write_text(START[shell])
    program = f"{Path(sys.executable).parent}/tuner"
    environment = {**os.environ, "HOME": str(tmp_path)}
    # zsh and bash find themselves as the parent of what they run
    subprocess.run([require(shell), "-c", f"{program} --install-completion; exit $?"], env=environment, check=True)
    with Terminal(shell, work, tmp_path) as terminal:
        terminal.tab("tuner ")  # with which zsh loads the function
        assert terminal.tab("tuner rende") == "tuner render "


# ── names that a cluster knows ───────────────────────────────────────────────────────────────────────────────────────


def job(name: str, namespace: str = "default", owner: str = "tuner") -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": owner}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
    }


@pytest.mark.parametrize("shell", SHELLS)
def test_runs_are_those_of_the_namespace_that_was_typed(shell: str, work: Path, tmp_path: Path) -> None:
    with FakeKubernetes(namespaces=("default", "other", "ml")) as cluster:
        for each in (job("support-answers"), job("survey", owner="helm"), job("summaries", "ml"), job("faq", "other")):
            cluster.put(each)
        kubeconfig = str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))
        with start(shell, work, tmp_path / "home", KUBECONFIG=kubeconfig) as terminal:
            for typed, name in (("status su", "support-answers"), ("logs -n ml su", "summaries")):
                terminal.press_until(f"tuner {typed}", f"tuner {typed.removesuffix('su')}{name} ")
            if shell == "bash":
                terminal.press_until("tuner delete --context other f", "tuner delete --context other faq ")


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def kubeconfig(path: Path, server: str, user: dict[str, Any]) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(json.dumps(config))
    return path


def test_a_cluster_that_does_not_answer_costs_a_moment_and_no_word(silent: str, work: Path, tmp_path: Path) -> None:
    asked = complete("tuner status su", KUBECONFIG=str(kubeconfig(tmp_path / "kubeconfig", silent, {})))
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "", "")
    nobody = complete("tuner status su", KUBECONFIG=str(tmp_path / "nope"))
    assert (nobody.returncode, nobody.stdout.strip(), nobody.stderr) == (0, "", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_plugin_that_asks_for_a_password_gets_no_terminal_and_is_ended(
    shell: str, silent: str, work: Path, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    asks = f"echo $$ >{pid}; echo Password: >&2; echo Password: >/dev/tty; read answer </dev/tty; sleep 600"
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", asks]}}
    path = kubeconfig(tmp_path / "kubeconfig", silent, user)
    with start(shell, work, tmp_path / "home", KUBECONFIG=str(path)) as terminal:
        deadline = time.monotonic() + DEADLINE_S
        while not pid.exists():
            assert time.monotonic() < deadline, "the plugin was not started"
            assert terminal.tab("tuner status su") == "tuner status su"
            assert "Password" not in terminal.seen
    while Path(f"/proc/{pid.read_text().strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ── what is offered, and at what cost ────────────────────────────────────────────────────────────────────────────────


def complete(typed: str, *, python: str = "from tuner.cli import main; main([])", **environment: str) -> Any:
    """What bash would get."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1), "_TUNER_COMPLETE": "complete_bash"}
    return subprocess.run(
        [sys.executable, "-c", python],
        env={**os.environ, **words, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "typed",
    ["tuner ", "tuner run --", "tuner run --model ph", "tuner run --set Lora", "tuner plan --gpu ", "tuner status x"],
)
def test_completing_imports_nothing_heavy(typed: str, tmp_path: Path) -> None:
    code = "import sys; from tuner.cli import main; main([]); print(*sys.modules)"
    with FakeKubernetes() as cluster:
        done = complete(typed, python=code, KUBECONFIG=str(cluster.write_kubeconfig(tmp_path / "kubeconfig")))
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"torch", "pyarrow", "transformers", "huggingface_hub", "oras", "numpy"}
    assert "typer" in loaded
    assert ("kubernetes" in loaded) == typed.startswith("tuner status")


def test_every_preset_that_is_offered_is_one() -> None:
    assert set(presets()) == set(load_presets())


def test_every_setting_that_is_offered_is_taken() -> None:
    words = words_of_settings()
    assert len(words) > 100
    assert not words.keys() & {*IGNORED, *REFUSED}
    typed = [f"{path}={word}" for path, each in words.items() for word in each]
    assert len(typed) > 50
    preset = find_preset("phi-3-mini-4k-instruct")
    for one in typed:
        method: Any = "lora" if one.startswith("QuantizationConfig.load_in_4bit=false") else "qlora"
        config = resolve_training_config(method=method, preset=preset, overrides=[one])
        assert not any("ignored" in note for note in config.notes), one


def test_no_machine_is_offered_on_which_nothing_trains() -> None:
    assert "Standard_NC24ads_A100_v4" in instance_types()
    assert not {"Standard_NC6s_v3", "inf2.xlarge"} & set(instance_types())
