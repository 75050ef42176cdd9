"""Where things lie in the pods of a run: volumes, mounts, files, and what to call them.

Whoever renders a Job and whoever runs in it both look here, so neither can mean another place.

    preflight ──► data-downloader | puller ──► trainer (named as the Workspace)
                                 pusher   a sidecar beside it, waiting for the adapter; they meet in /run/tuner
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.runspec import RunSpec
    from tuner.training_settings import TrainingConfig

# ── containers ───────────────────────────────────────────────────────────────────────────────────────────────────────

PREFLIGHT, DATA_DOWNLOADER, PULLER, PUSHER, CHECK = "preflight", "data-downloader", "puller", "pusher", "check"
CONTAINERS = frozenset({PREFLIGHT, DATA_DOWNLOADER, PULLER, PUSHER, CHECK})  # no Workspace can be called so
CHECK_JOB, PUSH_JOB = "--check", "--push"  # how the Jobs beside a run's end; no Workspace's name can
PUSH_HOLD_S = 3600  # how long the pusher keeps trying where the adapter would not survive the pod
PUSHER_AWAY_S = 900  # how long the trainer waits for a pusher to be started again; kubelets wait up to five minutes

# ── volumes, by KAITO's names where it has one ───────────────────────────────────────────────────────────────────────

CONFIG_VOLUME, CONFIG_DIR = "config-volume", Path("/mnt/config")
DATA_VOLUME, DATA_DIR = "data-volume", Path("/mnt/data")
WEIGHTS_VOLUME, WEIGHTS_DIR = "model-weights-volume", Path("/workspace/weights")
RESULTS_VOLUME, RESULTS_DIR = "results-volume", Path("/mnt/results")  # the mount follows output_dir: results_dir()
RUN_VOLUME, RUN_DIR = "run", Path("/run/tuner")
PUSH_SECRET_VOLUME, PUSH_SECRET_DIR = "docker-config", Path("/run/secrets/registry")
PULL_SECRETS_DIR = Path("/run/secrets/pull")  # one below it for each, called as the Secret
SOURCES_VOLUME, SOURCES_DIR = "source-secrets", Path("/run/secrets/sources")
HEADERS_VOLUME, HEADERS_DIR = "source-headers", Path("/run/secrets/headers")
TMP_VOLUME, TMP_DIR = "tmp", Path("/tmp")
SHM_VOLUME = "dshm"

# ── files in them ────────────────────────────────────────────────────────────────────────────────────────────────────

RUN_JSON, TRAINING_CONFIG, CA_CRT = "run.json", "training_config.yaml", "ca.crt"  # keys of the ConfigMap
SPEC_FILE, CA_FILE = CONFIG_DIR / RUN_JSON, CONFIG_DIR / CA_CRT
QUERIES_JSON, SOURCES_JSON = "queries.json", "sources.json"  # keys of our Secret; the user's has the second one
DOCKER_CONFIG_KEYS = (".dockerconfigjson", "config.json", ".dockercfg")  # of a Secret to push or pull with
PUSHER_LOCK, PUSH_STARTS, TRAINED, PUSHED = "pusher", "starts", "trained", "pushed"  # in RUN_DIR: pipeline/turns.py
TERMINATION_LOG = Path("/dev/termination-log")
SENTINEL = "fine_tuning_completed.txt"  # KAITO's, beside the adapter on an output volume

# ── environment ──────────────────────────────────────────────────────────────────────────────────────────────────────

# Names for errors to speak of; what they hold is mounted.
PUSH_SECRET_ENV, HUB_SECRET_ENV = "TUNER_PUSH_SECRET", "TUNER_HUB_SECRET"


def results_dir(spec: "RunSpec") -> Path:
    """Where the results volume is mounted."""
    return results_dir_of(spec.training)


def results_dir_of(training: "TrainingConfig") -> Path:
    """output_dir as the user wrote it, else /mnt/results. Raises ConfigError where the pod has something else there."""
    if training.arguments.output_dir is None:
        return RESULTS_DIR
    directory = Path(training.arguments.output_dir)
    for taken in (CONFIG_DIR, DATA_DIR):
        if directory.is_relative_to(taken):
            raise ConfigError(
                f"TrainingArguments.output_dir {directory}: in a pod {taken} holds "
                f"{'the configuration' if taken == CONFIG_DIR else 'the data'}",
                hint=f"write {RESULTS_DIR}, or leave the key out",
            )
    return directory


def work_dir(spec: "RunSpec") -> Path:
    """A folder of this very run on the results volume: another digest starts afresh, a replaced pod goes on."""
    return results_dir(spec) / ".tuner" / f"{spec.name}-{spec.digest.removeprefix('sha256:')[:12]}"


def check_dir() -> Path:
    """Where the check Job works: it mounts no results volume, which could tie the run to the zone of a CPU node."""
    return TMP_DIR / "check"
