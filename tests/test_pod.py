"""Where things lie in a pod."""

from pathlib import Path
from typing import Any

import pytest
from tiny import make_job, rows_of

from tuner import pod
from tuner.errors import ConfigError
from tuner.runspec import RunSpec

pytestmark = pytest.mark.train


def spec_with(directory: Path, output_dir: str | None = None, **arguments: Any) -> RunSpec:
    written = {"max_steps": 2, **arguments} | ({"output_dir": output_dir} if output_dir else {})
    return make_job(directory, rows_of("messages", 4), {"TrainingArguments": written}, smoke=True).spec


def test_results_are_where_the_user_wrote_them_else_in_mnt_results(tmp_path: Path) -> None:
    assert pod.results_dir(spec_with(tmp_path)) == Path("/mnt/results")
    assert pod.results_dir(spec_with(tmp_path, "/mnt/mine/out")) == Path("/mnt/mine/out")


def test_a_run_with_another_digest_has_another_work_directory(tmp_path: Path) -> None:
    one, same, other = (spec_with(tmp_path / name, seed=seed) for name, seed in (("a", 2), ("b", 2), ("c", 3)))
    assert one.digest == same.digest != other.digest
    assert pod.work_dir(one) == pod.work_dir(same) != pod.work_dir(other)
    assert pod.work_dir(one) == Path(f"/mnt/results/.tuner/tiny-run-{one.digest[7:19]}")


@pytest.mark.parametrize("taken", ["/mnt/data", "/mnt/data/out", "/mnt/config"])
def test_results_do_not_go_where_the_pod_has_something_else(taken: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"output_dir {taken}: in a pod /mnt/"):
        pod.results_dir(spec_with(tmp_path, taken))
