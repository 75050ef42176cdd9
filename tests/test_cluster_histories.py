"""Random histories: events heard in any order, twice or not at all, controllers ended between two actions, two of them
at once, people who edit and delete. Whatever happens, each revision gets one Job, and the end is the same."""

import copy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster_objects import make_config_map, make_workspace
from tests.simulated_cluster import WORKSPACE, Cluster, Controller, make_cluster
from tuner.cluster.reconcile import Settings

HISTORIES = 1000

leaders = st.integers(0, 1)
jobs = st.sampled_from(["phi-3", "phi-3--check"])
outcomes = st.sampled_from(["starts", "starts", "fails", "succeeds", "succeeds", "gives-up", "is-gone", "is-gone"])
moment = st.none() | st.integers(0, 6)  # after how many actions a process ends

steps = st.one_of(
    st.tuples(st.just("hear"), leaders, st.integers(0, 20)),
    st.tuples(st.just("list"), leaders),
    st.tuples(st.just("reconcile"), leaders, moment),
    st.tuples(st.just("reconcile"), leaders, moment),
    st.tuples(st.just("list and reconcile"), leaders, moment),
    st.tuples(st.just("both at once"), leaders, st.integers(0, 4)),
    st.tuples(st.just("restart"), leaders),
    # Longer ways at once: chance alone seldom gets to the end of a run.
    st.tuples(st.just("goes well"), leaders, st.integers(1, 4)),
    st.tuples(st.just("goes well"), leaders, st.integers(1, 4)),
    st.tuples(st.just("expires"), jobs),
    st.tuples(st.just("job"), jobs, outcomes),
    st.tuples(st.just("job"), jobs, outcomes),
    st.tuples(st.just("edit output"), st.integers(1, 3)),
    st.tuples(st.just("edit config"), st.integers(1, 3)),
    st.tuples(st.just("edit wrongly")),
    st.tuples(st.just("delete config")),
    st.tuples(st.just("replace")),
    st.tuples(st.just("lose status")),
    st.tuples(st.just("delete job"), jobs),
    st.tuples(st.just("node"), st.booleans()),
    st.tuples(st.just("delete and apply again")),
)


class History:
    def __init__(self) -> None:
        self.cluster: Cluster = make_cluster(config="config", instance_type="gpu-box", node=False)
        self.controllers = [self.new_controller(), self.new_controller()]
        self.generations = 0
        self.contents = [self.content()]

    def content(self) -> Any:
        """What a revision is about."""
        workspace, config = self.cluster.store[WORKSPACE], self.cluster.store.get(("ConfigMap", "config"))
        return copy.deepcopy((workspace["tuning"], config and config["data"]))

    def new_controller(self) -> Controller:
        controller = Controller(self.cluster)
        controller.look()
        return controller

    def do(self, step: tuple[Any, ...]) -> None:
        cluster = self.cluster
        match step:
            case ("hear", leader, number):
                controller = self.controllers[leader]
                keys = sorted(controller.picture.keys() | cluster.store.keys())
                if keys:
                    controller.look(keys[number % len(keys)])
            case ("list", leader):
                self.controllers[leader].look()
            case ("reconcile", leader, dies_after):
                self.controllers[leader].reconcile(dies_after=dies_after)
            case ("list and reconcile", leader, dies_after):
                self.controllers[leader].look()
                self.controllers[leader].reconcile(dies_after=dies_after)
            case ("both at once", leader, turn):
                turns = iter(range(100))

                def other() -> None:
                    if next(turns) == turn:
                        self.controllers[1 - leader].reconcile()

                self.controllers[leader].reconcile(before_each=other)
            case ("restart", leader):
                self.controllers[leader] = self.new_controller()
            case ("job", name, outcome):
                cluster.step_job(name, outcome)
            case ("edit output", number):
                cluster.edit_workspace(lambda it: it["tuning"]["output"].update(image=f"example.com/a:{number}"))
            case ("edit config", number):
                cluster.put(make_config_map(text=f"training_config: {{}} # {number}\n"))
            case ("edit wrongly",):
                cluster.edit_workspace(lambda it: it["tuning"]["preset"].update(name="no-such-preset"))
            case ("delete config",):
                cluster.remove(("ConfigMap", "config"))
            case ("replace",):  # kubectl replace: what others have annotated is gone
                cluster.change(WORKSPACE, lambda it: it["metadata"].update(annotations={}))
            case ("lose status",):  # a backup has neither it nor finished Jobs
                cluster.change(WORKSPACE, lambda it: it.pop("status", None))
                cluster.lose_recorded_jobs()
            case ("delete job", name):
                cluster.delete_job_by_hand(name)
            case ("goes well", leader, rounds):
                for _ in range(rounds):
                    self.controllers[leader].look()
                    self.controllers[leader].reconcile()
                    for name in ("phi-3--check", "phi-3"):
                        cluster.step_job(name, "starts")
                        cluster.step_job(name, "succeeds")
            case ("expires", name):
                cluster.expire_job(name)
            case ("node", True):
                cluster.put({"kind": "Node", **_node()})
            case ("node", False):
                cluster.remove(("Node", "gpu-1"))
            case ("delete and apply again",):
                self.generations += 1
                workspace = make_workspace(config="config", instance_type="gpu-box")
                workspace["metadata"]["uid"] = f"uid-workspace-{self.generations}"
                cluster.remove(WORKSPACE)
                cluster.put(workspace)
                self.contents = []
        if self.content() not in self.contents[-1:]:
            self.contents.append(self.content())
        revisions = [it["revision"] for (kind, _), it in cluster.store.items() if kind == "ControllerRevision"]
        assert max(revisions, default=0) <= len(self.contents), "a revision for something that nobody wrote"
        for made, times in cluster.created.items():
            assert times <= 1 + cluster.deleted_by_hand[made], f"{made} was created {times} times, after {step}"

    def to_the_end(self) -> None:
        """Everything is put right, one controller hears all, and the Jobs do their work."""
        cluster, controller = self.cluster, self.controllers[0]
        if ("ConfigMap", "config") not in cluster.store:
            cluster.put(make_config_map())
        if cluster.store[WORKSPACE]["tuning"]["preset"]["name"] == "no-such-preset":
            cluster.edit_workspace(lambda it: it["tuning"]["preset"].update(name="phi-3-mini-4k-instruct"))
        for _ in range(12):
            controller.settle()
            for name in ("phi-3--check", "phi-3"):
                for outcome in ("is-gone", "starts", "succeeds"):
                    if outcome != "is-gone" or _is_going(cluster, name):
                        cluster.step_job(name, outcome)
        controller.settle()


def _node() -> dict[str, Any]:
    from tests.cluster_objects import make_node

    return make_node(labels={"apps": "phi-3", "node.kubernetes.io/instance-type": "gpu-box"})


def _is_going(cluster: Cluster, name: str) -> bool:
    return "deletionTimestamp" in cluster.store.get(("Job", name), {"metadata": {}})["metadata"]


@settings(max_examples=HISTORIES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, min_size=15, max_size=50))
def test_every_history_ends_with_one_job_for_each_revision_and_the_wanted_run_finished(history: list[Any]) -> None:
    told = History()
    for step in history:
        told.do(step)
    told.to_the_end()

    cluster = told.cluster
    workspace = cluster.store[WORKSPACE]
    status, annotations = workspace["status"], workspace["metadata"]["annotations"]
    assert status["state"] in ("Succeeded", "Failed")
    if status["state"] == "Succeeded":
        assert status["tuning"]["artifact"]["digest"] == "sha256:1"
    assert str(status["tuning"]["revision"]) == annotations["workspace.kaito.io/revision"]
    newest = max(
        (it for (kind, _), it in cluster.store.items() if kind == "ControllerRevision"),
        key=lambda it: it["revision"],
    )
    assert newest["metadata"]["annotations"]["workspace.kaito.io/hash"] == annotations["workspace.kaito.io/hash"]
    text = cluster.store["ConfigMap", "config"]["data"]["training_config.yaml"]
    assert status["tuning"]["runDigest"] == f"{text} {workspace['tuning']['output']['image']}"
    for name in ("phi-3", "phi-3--check"):
        job = cluster.store.get(("Job", name))
        assert job is None or job["metadata"]["annotations"]["workspace.kaito.io/revision"] == str(newest["revision"])

    # Another controller, or this one after a restart, has nothing to add.
    before = copy.deepcopy(cluster.store)
    other = Controller(cluster, Settings(told.controllers[0].settings.render))
    other.look()
    planned = other.reconcile()
    assert planned is not None
    assert planned.actions == ()
    assert cluster.store == before
