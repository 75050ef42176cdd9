"""What every test gets: no home directory, token or proxy of the person who runs it."""

import os
import signal
from collections.abc import Iterator

import pytest

from tuner.gpus import visible_gpus
from tuner.redaction import forgotten

# Tiny models gain nothing from threads, and two test processes that spin on the same cores lose a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# In the background of a script SIGINT is ignored, and would be by every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LEAKS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "DOCKER_CONFIG",
    "SOURCE_DATE_EPOCH",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "NETRC",
    "AZURE_CLIENT_ID",
    "AZURE_TENANT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_AUTHORITY_HOST",
    "REQUESTS_CA_BUNDLE",
    "TUNER_IMAGE",
    "KUBECONFIG",
    "KUBERNETES_SERVICE_HOST",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew, to be read in review")
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_long = pytest.mark.skip(reason="takes minutes: --long")
    skip_gpu = pytest.mark.skip(reason="no CUDA GPU here")
    for item in items:
        if "long" in item.keywords and not config.getoption("--long"):
            item.add_marker(skip_long)
        if "gpu" in item.keywords and not visible_gpus(os.environ):
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def _nobodys_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    for name in _LEAKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _nobodys_secrets() -> Iterator[None]:
    """A password of one test may be a word that another one is looking for."""
    with forgotten():
        yield
