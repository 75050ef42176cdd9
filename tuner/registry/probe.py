"""May we push there? Asked in seconds, before anything is downloaded or trained."""

from dataclasses import dataclass
from datetime import datetime

from tuner.errors import ConfigError
from tuner.reference import ImageReference
from tuner.registry.credentials import expires_at
from tuner.registry.transport import RegistryClient


@dataclass(frozen=True)
class Probe:
    """The registry lets `credential` (described, no secret) push; `existing_digest` is the tag's, if there is one.

    `expires_at` is when the credential ends, where it says so itself.
    """

    existing_digest: str | None
    credential: str
    expires_at: datetime | None = None


def probe_push(reference: ImageReference, client: RegistryClient) -> Probe:
    """Begins an upload and takes it back: the only question that every registry answers truly.

    Raises DeniedError, ServiceError or InputMissingError with what the registry said. It can not see immutable tags,
    quotas, or a credential that ends before the push.
    """
    if reference.tag is None:
        raise ConfigError(f"{reference}: can not push to a digest", hint="name a tag")
    client.for_push()
    client.cancel_upload(client.start_upload())
    credential = client.credential
    return Probe(client.manifest_digest(reference.tag), credential.describe(), expires_at(credential))
