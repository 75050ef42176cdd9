"""tuner/registry/push_state.py: a push that was begun can be finished, and says so."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_registry import fake_registry
from tests.registries import Fault, docker_config, faulty
from tests.test_registry_image import ADAPTER, write
from tests.test_registry_push import QUICK, Recorder
from tests.test_registry_robustness import adapter, deliver, image_of
from tuner.errors import ConfigError, DataError, InputMissingError, NotPushedError
from tuner.open_files import OpenDirectory
from tuner.registry.push_state import PUSH_STATE, PushOptions, PushState, interrupted_by_signals, load_push_state

__all__ = ["adapter"]  # a fixture


def test_what_a_later_push_needs_is_written_down_before_the_first_byte(adapter: Path) -> None:
    seen: list[PushState] = []
    with fake_registry() as fake:
        fake.on_request = lambda method, path: seen.append(load_push_state(OpenDirectory.at(adapter.parent)))
        deliver(adapter, fake.host, compression="zstd", docker_configs=(docker_config(fake.host, "ci", "hunter2"),))
    first = seen[0]
    assert (str(first.reference), first.pushed) == (f"{fake.host}/adapters/phi:v1", False)
    assert first.open_adapter(OpenDirectory.at(adapter.parent)).path == adapter
    assert first.options == PushOptions(compression="zstd")
    assert first.network.plain_http
    assert "hunter2" not in (adapter.parent / PUSH_STATE).read_text()


@pytest.mark.parametrize("written", ["../elsewhere", "{}/elsewhere", "link", "adapter/../../elsewhere"])
def test_a_state_leads_nowhere_but_below_itself(adapter: Path, written: str) -> None:
    """Whoever can write there could have another directory pushed, and to another registry."""
    elsewhere = adapter.rename(adapter.with_name("elsewhere"))
    work = adapter.with_name("work")
    work.mkdir()
    (work / "link").symlink_to(elsewhere)
    state = PushState(adapter_dir=written.format(elsewhere.parent), reference="a.b/c:v1", digest="sha256:0")
    with OpenDirectory.at(work) as beside, pytest.raises((DataError, InputMissingError)):
        state.open_adapter(beside)


def test_pushing_again_sends_no_blob_and_another_card_only_the_small_layer(adapter: Path) -> None:
    with fake_registry() as fake:
        deliver(adapter, fake.host)
        assert deliver(adapter, fake.host).bytes_sent == 0
        (adapter / "README.md").write_text("# Another card\n")
        image = image_of(adapter)
        assert deliver(adapter, fake.host).bytes_sent == image.config.size_bytes + image.layers[0].size_bytes


def test_files_that_are_not_those_of_the_push_are_not_pushed_in_their_place(adapter: Path) -> None:
    with fake_registry() as fake:
        deliver(adapter, fake.host)
    (adapter / "README.md").write_text("# Another card\n")
    state = load_push_state(OpenDirectory.at(adapter.parent))
    with pytest.raises(DataError, match="have changed since the push began") as caught:
        state.check_image(image_of(adapter), OpenDirectory.at(adapter))
    assert f"tuner push {adapter} " in str(caught.value.hint)


def test_a_directory_where_nothing_was_begun_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no push was begun"):
        load_push_state(OpenDirectory.at(tmp_path))


def test_a_state_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / PUSH_STATE).write_text('{"reference": "a.b/c:v1"}')
    with pytest.raises(ConfigError, match="not a PushState"):
        load_push_state(OpenDirectory.at(tmp_path))


def test_a_state_that_can_not_be_written_does_not_stop_the_push(adapter: Path) -> None:
    (adapter.parent / f".{PUSH_STATE}.tmp").mkdir()
    reporter = Recorder()
    with fake_registry() as fake:
        assert deliver(adapter, fake.host, reporter=reporter).digest == image_of(adapter).digest
    assert "goes on without it" in reporter.warnings[0]


@pytest.mark.parametrize("where", ["in a blob", "between tries", "in a long wait"])
def test_a_push_past_its_deadline_is_stopped_and_can_be_finished(adapter: Path, where: str) -> None:
    patient, reporter = replace(QUICK, deadline_s=60), Recorder()
    with fake_registry() as fake, faulty(fake) as proxy:
        held = threading.Event()
        if where == "between tries":
            fake.answers[:] = [("HEAD", "/blobs/", 503)] * 10_000
        elif where == "in a long wait":
            proxy.faults.append(Fault("HEAD", "/blobs/", 503, {"Retry-After": "20"}))
        else:
            fake.on_request = lambda method, path: held.wait(1.5) if method == "PATCH" else None
        with pytest.raises(NotPushedError, match="not pushed within 1 s, the push deadline") as caught:
            deliver(adapter, proxy.host, deadline_s=1, patience=patient, reporter=reporter)
        # a wait that ends after the deadline is not begun
        assert not any("trying again in 20" in warning for warning in reporter.warnings)
        assert f"tuner push --resume {adapter.parent}" in str(caught.value.hint)
        held.set()
        fake.answers.clear()
        assert deliver(adapter, fake.host).digest == image_of(adapter).digest


def test_an_error_after_the_push_has_begun_keeps_what_the_tag_had(adapter: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other/adapter", {**ADAPTER, "README.md": b"other"})["README.md"].parent
    with fake_registry() as fake:
        before = deliver(other, fake.host)
        fake.answers[:] = [("PATCH", "", 400)]
        with pytest.raises(NotPushedError):
            deliver(adapter, fake.host)
        assert load_push_state(OpenDirectory.at(adapter.parent)).previous_digest == before.digest
        reporter = Recorder()
        assert deliver(adapter, fake.host, reporter=reporter).previous_digest == before.digest
    assert reporter.warnings == []


def test_a_tag_that_may_not_be_overwritten_is_not(adapter: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other/adapter", {**ADAPTER, "README.md": b"other"})["README.md"].parent
    with fake_registry() as fake:
        before = deliver(other, fake.host)
        with pytest.raises(NotPushedError, match="exists already"):
            deliver(adapter, fake.host, overwrite=False)
        assert fake.repository("adapters/phi").tags == {"v1": before.digest}


def test_signals_are_left_alone_in_another_thread() -> None:
    entered: list[bool] = []

    def enter() -> None:
        with interrupted_by_signals():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


def test_a_push_waits_for_a_registry_that_is_slow_to_come_up_only_as_long_as_it_may(adapter: Path) -> None:
    with pytest.raises(NotPushedError, match="nothing listens there"):
        deliver(adapter, "127.0.0.1:1", patience=QUICK)
    assert not load_push_state(OpenDirectory.at(adapter.parent)).began
