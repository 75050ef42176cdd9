"""OCI: an image as a value, and how it gets to a registry or a layout on disk and back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.reference import ImageReference
    from tuner.registry.transport import Patience, RegistryClient
    from tuner.runspec import Network, Reporter


def client_for(
    reference: "ImageReference",
    network: "Network",
    docker_configs: Sequence[str],
    *,
    chunk_bytes: int | None = None,
    patience: "Patience | None" = None,
    reporter: "Reporter | None" = None,
) -> "RegistryClient":
    """The client for the repository of `reference`, with every credential of the texts that matches it.

    Blobs go out in one request each, or in pieces of `chunk_bytes`. Also a context manager that closes its
    connections. Raises ConfigError for a malformed text or a CA file that is not there. oras is imported only here:
    `--help` and an image on disk need no HTTP.
    """
    from tuner.registry.transport import connect

    return connect(reference, network, docker_configs, chunk_bytes=chunk_bytes, patience=patience, reporter=reporter)
