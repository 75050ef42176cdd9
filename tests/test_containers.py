"""What a container of a pod looks at, and what it leaves alone."""

from pathlib import Path

from test_cluster_job import CLAIM, workspace

from tuner import pod
from tuner.pipeline.containers import Container
from tuner.request import Request, build_run
from tuner.runspec import DirectoryDestination, RunSpec, Silent
from tuner.workspace import parse_objects


def test_where_the_results_volume_is_not_mounted_an_output_volume_is_not_looked_at() -> None:
    """The check Job: its root is read-only, and a look would end in "cannot be written"."""
    file = parse_objects(workspace(tuning={"output": {"volumeSource": CLAIM}}))
    request = Request(place="pod", smoke=True, preflight=False)
    spec = build_run(file, request, Path("nowhere"), {}).spec
    assert not pod.RESULTS_DIR.exists()
    for destination in (spec.destination, DirectoryDestination(path=str(pod.RESULTS_DIR))):
        looked: RunSpec = spec.model_copy(update={"destination": destination})
        Container(looked, {}, Silent(), lambda stage: None).preflight()
    assert not pod.RESULTS_DIR.exists()
