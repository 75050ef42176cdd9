"""A Workspace and its ConfigMap, as the API server has them → the objects of one revision. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.cluster.beside import CHECK_DATA_BYTES, render_check_job
from tuner.cluster.job import render_job
from tuner.cluster.job_options import JobOptions, count_gpus
from tuner.cluster.nodes import prefers_labels
from tuner.cluster.observe import QUEUE_LABEL, Object
from tuner.cluster.reconcile import Rendered, owner_reference
from tuner.request import Request, build_run
from tuner.urls import Allowed
from tuner.workspace import parse_objects, require_tuning

PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"


@dataclass(frozen=True)
class RevisionRenderer:
    """Renders revisions the same way `tuner submit` would: `options` and `request` are the controller's own flags."""

    request: Request
    options: JobOptions
    max_check_bytes: int = CHECK_DATA_BYTES

    def __call__(
        self, workspace: Object, config_map: Object | None, revision: int, nodes: Sequence[Object] = ()
    ) -> Rendered:
        """Raises TunerError with all that is wrong with the Workspace, its ConfigMap and their URLs."""
        network = self.request.network
        allowed = Allowed.of(network.allow_cidrs, network.allow_private_urls)
        workspace = _naming(workspace, config_map)
        file = parse_objects(workspace, *([config_map] if config_map else []), allowed=allowed)
        require_tuning(file)
        labels = workspace["metadata"].get("labels") or {}
        options = replace(
            self.options,
            namespace=workspace["metadata"].get("namespace"),
            queue=labels.get(QUEUE_LABEL) or self.options.queue,
            queue_priority=labels.get(PRIORITY_LABEL) or self.options.queue_priority,
            labels_preferred=prefers_labels(file.workspace, self.options, nodes),
            revision=revision,
            owner=owner_reference(workspace),
        )
        request = replace(self.request, place="pod", world_size=max(1, count_gpus(file.workspace, options)))
        run = build_run(file, request, Path("/"), {})
        made = render_job(file, run, options)
        check = render_check_job(made.job, max_data_bytes=self.max_check_bytes)
        return Rendered((made.config_map, *made.secrets), made.job, check, (*run.notes, *made.notes))


def _naming(workspace: Object, config_map: Object | None) -> Mapping[str, Any]:
    """The Workspace with the name of the ConfigMap that holds for it: a default's, where it names none."""
    tuning = workspace.get("tuning")
    if config_map is None or not isinstance(tuning, Mapping) or tuning.get("config"):
        return workspace
    return {**workspace, "tuning": {**tuning, "config": config_map["metadata"]["name"]}}
