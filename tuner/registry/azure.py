"""An Azure workload identity → a refresh token for an Azure container registry, by two POSTs and without an SDK.

    federated token (a file that Kubernetes renews)
      → Entra ID            {authority}/{tenant}/oauth2/v2.0/token        an access token for container registries
      → the registry        https://{registry}/oauth2/exchange            a refresh token of the registry
      → its token server    /oauth2/token, as with any other identity token

https://azure.github.io/azure-workload-identity/docs/topics/self-managed-clusters/service-account-key-generation.html
https://github.com/Azure/acr/blob/main/docs/AAD-OAuth.md
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tuner.errors import ConfigError, InputMissingError, ServiceError
from tuner.redaction import hide

_SCOPE = "https://containerregistry.azure.net/.default"
_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_DEFAULT_AUTHORITY = "https://login.microsoftonline.com"
_REGISTRY_SUFFIXES = (".azurecr.io", ".azurecr.cn", ".azurecr.us", ".azurecr.de")


@dataclass(frozen=True)
class WorkloadIdentity:
    """What the workload identity webhook puts into a pod. None of it is a secret; what is in `token_file` is."""

    client_id: str
    tenant_id: str
    token_file: Path
    authority: str = _DEFAULT_AUTHORITY

    def token_url(self) -> str:
        return f"{self.authority.rstrip('/')}/{self.tenant_id}/oauth2/v2.0/token"

    def token_form(self) -> dict[str, str]:
        """The form that asks Entra ID. Reads the token file each time: it is renewed about every hour."""
        try:
            assertion = self.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputMissingError(
                f"{self.token_file}: the federated token of the workload identity can not be read",
                hint="is the pod's label azure.workload.identity/use set, and its service account annotated?",
            ) from error
        hide(assertion)
        return {
            "grant_type": "client_credentials",
            "client_id": self.client_id,
            "client_assertion_type": _ASSERTION_TYPE,
            "client_assertion": assertion,
            "scope": _SCOPE,
        }

    def exchange_form(self, service: str, access_token: str) -> dict[str, str]:
        """The form that trades Entra ID's access token at the registry's `/oauth2/exchange`."""
        return {
            "grant_type": "access_token",
            "service": service,
            "tenant": self.tenant_id,
            "access_token": access_token,
        }


def workload_identity(env: Mapping[str, str]) -> WorkloadIdentity | None:
    """The identity that the environment gives, or None. Raises ConfigError for an authority that is not https."""
    client_id, tenant_id = env.get("AZURE_CLIENT_ID"), env.get("AZURE_TENANT_ID")
    token_file = env.get("AZURE_FEDERATED_TOKEN_FILE")
    if not (client_id and tenant_id and token_file):
        return None
    authority = env.get("AZURE_AUTHORITY_HOST") or _DEFAULT_AUTHORITY
    if urlsplit(authority).scheme != "https":
        raise ConfigError(f"AZURE_AUTHORITY_HOST={authority!r}: the authority must be an https URL")
    return WorkloadIdentity(client_id, tenant_id, Path(token_file), authority)


def is_azure_registry(host: str) -> bool:
    """Only there is the identity shown to anybody."""
    return host.lower().partition(":")[0].endswith(_REGISTRY_SUFFIXES)


def parse_reply(body: bytes, name: str, host: str) -> str:
    """The token called `name` in a reply. Raises ServiceError without a word of the reply."""
    try:
        token = json.loads(body)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise ServiceError(f"{host}: its reply has no {name} in it")
    hide(token)
    return token


def refusal(body: bytes) -> str:
    """Entra ID's code and the first sentence of its description, which has no secret in it."""
    try:
        reply = json.loads(body)
        description = str(reply.get("error_description", "")).partition("\r\n")[0].partition(" Trace ID")[0]
        return f"{reply['error']}: {description}" if description else str(reply["error"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
