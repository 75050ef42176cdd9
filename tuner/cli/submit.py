"""`tuner submit`: a Workspace as a Job in a cluster, checked beforehand, followed where asked for."""

from typing import TYPE_CHECKING, Annotated

from tuner.cli.cluster_options import JobFlags, open_api, read_cluster_run
from tuner.cli.common import open_talk, say
from tuner.cli.flags import cluster, command
from tuner.cli.options import AsJson, Context, Wait, WorkspaceArgument
from tuner.errors import UsageError

if TYPE_CHECKING:
    from tuner.cluster.api import Api
    from tuner.cluster.follow import Status
    from tuner.cluster.job_options import JobOptions
    from tuner.workspace import WorkspaceFile


@command(
    "submit",
    example="tuner submit workspace.yaml --set-image reg.example/tuner:0.1.0 --wait",
)
def submit(
    workspace: WorkspaceArgument,
    context: Context,
    wait: Wait,
    dry_run: Annotated[bool, cluster("--dry-run", help="let the server check every object, create none")],
    check_job: Annotated[
        bool | None,
        cluster(
            "--check-job/--no-check-job",
            help="look at secrets, data and rows on a CPU first [where a node would have to boot for the Job]",
            show_default=False,
        ),
    ],
    flags: JobFlags,
    as_json: AsJson,
) -> None:
    """Run a Workspace as a Job in the cluster of your kubeconfig. A second submit of the same does nothing."""
    from dataclasses import replace

    from tuner.cluster import submit as submission
    from tuner.cluster.follow import POLL_S
    from tuner.cluster.job import render_job
    from tuner.cluster.job_options import written_instance_type
    from tuner.cluster.nodes import prefers_labels

    if wait and dry_run:
        raise UsageError("--wait and --dry-run are both given", hint="choose one")
    found: list[Api] = []
    nodes = submission.Nodes()

    def ask_cluster(file: "WorkspaceFile", options: "JobOptions") -> "tuple[WorkspaceFile, JobOptions]":
        nonlocal nodes
        api = open_api(context, flags.namespace or file.workspace.metadata.namespace)
        found.append(api)
        if not flags.config:
            file = submission.with_config_map(api, file)
        nodes = submission.read_nodes(api) if not flags.smoke else nodes
        if nodes.unread is None:
            options = replace(options, labels_preferred=prefers_labels(file.workspace, options, nodes.items))
        return file, replace(options, namespace=api.namespace)

    file, run, options = read_cluster_run(workspace, flags, decide=ask_cluster)
    (api,) = found
    objects = render_job(file, run, options)
    for line in (*run.notes, *objects.notes, *([nodes.unread] if nodes.unread else ())):
        say(f"note: {line}")
    asks_type = not flags.smoke and written_instance_type(file.workspace, options) is not None
    checks = submission.needs_check(objects.job, nodes, instance_type=asks_type) if check_job is None else check_job
    if checks and check_job is None:
        say("note: no ready node fits, so a check Job runs on a CPU before one boots; --no-check-job leaves it out")
    with open_talk() as talk:
        done = submission.submit(api, objects, talk, check=checks, dry_run=dry_run, poll_s=POLL_S)
    name, where = done.name, f"in namespace {done.namespace}" + (f" of {api.context}" if api.context else "")
    if as_json and not wait:
        import json

        print(json.dumps({"job": name, "namespace": done.namespace, "outcome": done.outcome}))
    if done.outcome == "dry run":
        say(f"dry run: the server would take {_kinds(objects.objects)} for {name} {where}")
        return
    if done.outcome == "created":
        say(f"created Job {name} {where}")
    elif done.status is not None:
        _say_there_already(done.status, follows=wait)
    if wait:
        from tuner.cli.follow import follow_to_end

        follow_to_end(api, name, as_json=as_json)
    elif done.outcome == "created":
        if not as_json:
            print(f"job/{name}")
        say(f"next: tuner status {name} -n {done.namespace}")


def _kinds(manifests: "tuple[dict[str, object], ...]") -> str:
    return ", ".join(str(each["kind"]) for each in manifests)


def _say_there_already(status: "Status", *, follows: bool) -> None:
    """A second submit of the same: what the first has come to. One that failed is no success."""
    from tuner.cluster.follow import JobFailedError, progress_text

    if status.phase == "failed":
        raise JobFailedError(
            f"Job {status.name} of the same run has failed: {status.error}",
            status.exit_code,
            hint=f"tuner delete {status.name}, then submit again; what is on a results volume is used again",
        )
    if status.phase == "succeeded":
        pushed = f": {status.image}" if status.image else ""
        say(f"Job {status.name} of the same run has succeeded{pushed}; to run it again: tuner delete {status.name}")
        return
    say(f"Job {status.name} of the same run is there already: {progress_text(status)}")
    if not follows:
        say(f"next: tuner status {status.name} -n {status.namespace}")
