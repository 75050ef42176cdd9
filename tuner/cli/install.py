"""`tuner install` and `tuner uninstall`: the controller into a cluster, and out of it."""

from typing import Annotated

import typer

from tuner.cli.cluster_options import Context, open_api
from tuner.cli.common import say
from tuner.cli.options import AllowCidr, app

Namespace = Annotated[str, typer.Option("--namespace", "-n", metavar="N", help="where the controller runs")]


@app.command(epilog="Example: tuner install --image reg.example/tuner:0.1.0 --dry-run")
def install(
    image: Annotated[
        str | None, typer.Option("--image", metavar="I", envvar="TUNER_IMAGE", help="the image of tuner that trains")
    ] = None,
    controller_image: Annotated[
        str | None, typer.Option("--controller-image", metavar="I", help="a slim image for the controller [--image]")
    ] = None,
    namespace: Namespace = "tuner-system",
    watch_namespace: Annotated[
        list[str] | None,
        typer.Option(
            "--watch-namespace", metavar="N", help="only Workspaces there, with a Role in it; repeatable [all]"
        ),
    ] = None,
    allow_cidr: AllowCidr = None,
    context: Context = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the objects and ask no cluster")] = False,
) -> None:
    """Install the controller: then `kubectl apply` of a Workspace runs it, and `kubectl get workspace` follows."""
    from tuner.cluster.install import InstallOptions, installation
    from tuner.cluster.install import install as install_into

    options = InstallOptions(
        namespace=namespace,
        image=image,
        controller_image=controller_image,
        allow_cidrs=tuple(allow_cidr or ()),
        watch_namespaces=tuple(watch_namespace or ()),
    )
    if dry_run:
        from tuner.cluster.templates import dump_manifests

        print(dump_manifests(installation(options)), end="")
        return
    install_into(open_api(context, namespace), options, say)
    say(f"next: kubectl -n {namespace} rollout status deployment tuner-controller")


@app.command(epilog="Example: tuner uninstall --dry-run")
def uninstall(
    namespace: Namespace = "tuner-system",
    context: Context = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be deleted")] = False,
) -> None:
    """Take the controller away. Workspaces, their Jobs and the CRD stay."""
    from tuner.cluster.install import uninstall as uninstall_from

    uninstall_from(open_api(context, namespace), namespace, say, dry_run=dry_run)
