"""`tuner install` and `tuner uninstall`: the controller into a cluster, and out of it."""

from dataclasses import dataclass
from typing import Annotated

from tuner.cli.cluster_options import IMAGE_VARIABLE, open_api
from tuner.cli.common import say
from tuner.cli.flags import cluster, command
from tuner.cli.options import AllowCidr, Context


@dataclass(frozen=True, kw_only=True)
class ControllerPlace:
    """Where the controller is, or is to be."""

    namespace: Annotated[str, cluster("--namespace", "-n", metavar="N", help="where the controller runs")] = (
        "tuner-system"
    )
    context: Context


@command(
    "install",
    example="tuner install --image reg.example/tuner:0.1.0 --dry-run",
)
def install(
    image: Annotated[
        str | None,
        cluster("--image", metavar="I", envvar=IMAGE_VARIABLE, help="the image of tuner that trains"),
    ],
    controller_image: Annotated[
        str | None, cluster("--controller-image", metavar="I", help="a slim image for the controller [--image]")
    ],
    place: ControllerPlace,
    watch_namespace: Annotated[
        tuple[str, ...],
        cluster("--watch-namespace", metavar="N", help="only Workspaces there, with a Role in it; repeatable [all]"),
    ],
    allow_cidr: AllowCidr,
    dry_run: Annotated[bool, cluster("--dry-run", help="print the objects and ask no cluster")],
) -> None:
    """Install the controller: then `kubectl apply` of a Workspace runs it, and `kubectl get workspace` follows."""
    from tuner.cluster.install import InstallOptions, installation
    from tuner.cluster.install import install as install_into

    options = InstallOptions(
        namespace=place.namespace,
        image=image,
        controller_image=controller_image,
        allow_cidrs=allow_cidr,
        watch_namespaces=watch_namespace,
    )
    if dry_run:
        from tuner.cluster.templates import dump_manifests

        print(dump_manifests(installation(options)), end="")
        return
    install_into(open_api(place.context, place.namespace), options, say)
    say(f"next: kubectl -n {place.namespace} rollout status deployment tuner-controller")


@command("uninstall", example="tuner uninstall --dry-run")
def uninstall(
    place: ControllerPlace,
    dry_run: Annotated[bool, cluster("--dry-run", help="say what would be deleted")],
) -> None:
    """Take the controller away. Workspaces, their Jobs and the CRD stay."""
    from tuner.cluster.install import uninstall as uninstall_from

    uninstall_from(open_api(place.context, place.namespace), place.namespace, say, dry_run=dry_run)
