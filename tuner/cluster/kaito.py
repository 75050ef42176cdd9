"""What of KAITO's own is in a cluster: its controller acts on every Workspace, whatever ours is told to keep to."""

from collections.abc import Callable
from typing import Any

from tuner.cluster.api import ALL_NAMESPACES, DEPLOYMENT, VALIDATING_WEBHOOK, Api
from tuner.cluster.api_errors import ApiError, ForbiddenError
from tuner.cluster.crd import MADE_BY
from tuner.errors import ConfigError

CONTROLLER = "kaito-workspace"  # the Deployment of its chart, and of the add-on of AKS
WEBHOOK = "validation.workspace.kaito.sh"


def refuse_beside_kaito(api: Api, unseen: Callable[[ApiError], None] = lambda _: None) -> None:
    """ConfigError when KAITO's controller runs here, with what to do instead.

    Who is installed for some namespaces may not see the whole cluster: `unseen` hears of it, and it counts as absent.
    """
    if found := kaitos_controller(api, unseen):
        raise ConfigError(
            f"KAITO's own controller is in this cluster ({found}), and it acts on every Workspace: "
            "two controllers would make one Job",
            hint="use `tuner submit workspace.yaml`, which makes the Job without a Workspace object; or uninstall "
            "KAITO's workspace controller first (helm uninstall kaito-workspace): its CRD and the Workspaces may stay",
        )


def kaitos_controller(api: Api, unseen: Callable[[ApiError], None] = lambda _: None) -> str | None:
    """`Deployment kaito-workspace in namespace kaito-workspace`, or its webhook; None when neither is there."""
    for look in (_deployment, _webhook):
        try:
            if found := look(api):
                return found
        except ForbiddenError as error:
            unseen(error)
    return None


def _deployment(api: Api) -> str | None:
    for found in api.list(DEPLOYMENT, ALL_NAMESPACES, field_selector=f"metadata.name={CONTROLLER}").items:
        if found["spec"].get("replicas", 1):
            return f"Deployment {CONTROLLER} in namespace {found['metadata']['namespace']}"
    return None


def _webhook(api: Api) -> str | None:
    return f"ValidatingWebhookConfiguration {WEBHOOK}" if api.find(VALIDATING_WEBHOOK, WEBHOOK) else None


def is_ours(manifest: dict[str, Any]) -> bool:
    return bool((manifest["metadata"].get("labels") or {}).get(MADE_BY) == "tuner")
