"""What of KAITO's own is in a cluster: its controller acts on every Workspace, whatever ours is told to keep to."""

from typing import Any

from tuner.cluster.api import ALL_NAMESPACES, CUSTOM_RESOURCE_DEFINITION, DEPLOYMENT, VALIDATING_WEBHOOK, Api
from tuner.cluster.api_errors import ForbiddenError
from tuner.cluster.crd import MADE_BY, NAME
from tuner.errors import ConfigError

CONTROLLER = "kaito-workspace"  # the Deployment of its chart, and of the add-on of AKS
WEBHOOK = "validation.workspace.kaito.sh"


def refuse_beside_kaito(api: Api) -> None:
    """ConfigError when KAITO's controller runs here, with what to do instead. What may not be read counts as absent."""
    if running := kaitos_controller(api):
        raise ConfigError(
            f"KAITO's own controller runs in this cluster ({running}); both would act on every Workspace",
            hint="beside KAITO use `tuner submit`, which makes a Job and no Workspace object; or uninstall KAITO's "
            "workspace controller first (helm uninstall kaito-workspace); its CRD and the Workspaces may stay",
        )


def kaitos_controller(api: Api) -> str | None:
    """`Deployment kaito-workspace in namespace kaito-workspace`, or its webhook; None when neither is there."""
    for deployment in _deployments(api):
        if deployment["spec"].get("replicas", 1):
            return f"Deployment {CONTROLLER} in namespace {deployment['metadata']['namespace']}"
    try:
        webhook = api.find(VALIDATING_WEBHOOK, WEBHOOK)
    except ForbiddenError:
        return None
    return f"ValidatingWebhookConfiguration {WEBHOOK}" if webhook else None


def _deployments(api: Api) -> tuple[dict[str, Any], ...]:
    try:
        return api.list(DEPLOYMENT, ALL_NAMESPACES, field_selector=f"metadata.name={CONTROLLER}").items
    except ForbiddenError:
        return ()


def has_kaitos_crd(api: Api) -> bool:
    """Whether the CRD is there and not ours; its status has no room for `tuning`."""
    try:
        crd = api.find(CUSTOM_RESOURCE_DEFINITION, NAME)
    except ForbiddenError:
        return False
    return crd is not None and not is_ours(crd)


def is_ours(manifest: dict[str, Any]) -> bool:
    return bool((manifest["metadata"].get("labels") or {}).get(MADE_BY) == "tuner")
