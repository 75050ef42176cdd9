"""What an API server refuses, as a sentence with what to do about it.

    ApiError
    ├── BadRequestError  78  400: unknown fields, a malformed request
    ├── UnauthorizedError  77  401
    ├── ForbiddenError  77  403: RBAC; the hint is the rule that is missing
    ├── RefusedError  78  403, 422, 400 by an admission: quota, Pod Security, a webhook, a namespace that goes
    ├── NotFoundError  66  404
    ├── AlreadyExistsError  78  409
    ├── ConflictError  69  409: somebody was quicker, or it is another object by now
    ├── GoneError  69  410: list again
    ├── InvalidError  78  422
    ├── ThrottledError  69  429
    └── UnavailableError     69  no answer, or 5xx

The wording that is looked for is that of kube-apiserver 1.29 to 1.37 (staging/src/k8s.io/apimachinery/pkg/api/errors).
"""

import re
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.cluster.server_text import shown
from tuner.errors import ConfigError, TunerError, cut
from tuner.retry import retry_after_s

_LONGEST_WAIT_S = 300.0


@dataclass(frozen=True)
class Asked:
    """What was asked of which server: for the sentence. `name` and `namespace` are empty where there is none."""

    verb: str
    resource: str  # jobs.batch
    server: str
    group: str = ""
    plural: str = ""  # with the subresource: pods/log
    namespace: str = ""
    name: str = ""
    kind: str = ""

    @property
    def thing(self) -> str:
        """`Job tune-phi3 in namespace ml`."""
        named = f"{self.kind} {self.name}" if self.name else self.resource
        return f"{named} in namespace {self.namespace}" if self.namespace else named

    @property
    def rule(self) -> str:
        """The RBAC rule that would allow it, as a line of YAML."""
        group = f"[{self.group}]" if self.group else '[""]'
        return f"- {{apiGroups: {group}, resources: [{self.plural}], verbs: [{self.verb}]}}"


class ApiError(TunerError):
    """`status` is the HTTP status, 0 without an answer; `server_message` what the server said, as far as it is shown.

    `not_sent`: the connection was never made, so nothing has happened. `is_final`: another try would end the same.
    """

    exit_code = 78

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int = 0,
        server_message: str = "",
        retry_after_s: float | None = None,
        not_sent: bool = False,
        is_final: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status, self.server_message = status, server_message
        self.retry_after_s, self.not_sent, self.is_final = retry_after_s, not_sent, is_final


class BadRequestError(ApiError): ...


class UnauthorizedError(ApiError):
    exit_code = 77


class ForbiddenError(ApiError):
    exit_code = 77


class RefusedError(ApiError): ...


class NotFoundError(ApiError):
    exit_code = 66


class AlreadyExistsError(ApiError): ...


class ConflictError(ApiError):
    exit_code = 69


class GoneError(ApiError):
    exit_code = 69


class InvalidError(ApiError): ...


class ThrottledError(ApiError):
    exit_code = 69


class UnavailableError(ApiError):
    exit_code = 69


def error_of_response(
    asked: Asked,
    status: int,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    secrets: Collection[str] = (),
) -> ApiError:
    """The error for an answer of 300 or more, from its Status object.

    What the server quotes is not passed on (see server_text); `secrets` are what we know to be one of what was sent.
    """
    said = shown(str(body.get("message") or ""), secrets)
    body = {**body, "details": _shown_details(body.get("details") or {}, secrets)}
    reason = str(body.get("reason") or "")
    kind, message, hint = _sentence(asked, status, reason, said, body)
    return kind(message, hint=hint, status=status, server_message=said, retry_after_s=_asked_s(headers, body))


def _shown_details(details: Mapping[str, Any], secrets: Collection[str]) -> Mapping[str, Any]:
    causes = [{key: shown(str(text), secrets) for key, text in cause.items()} for cause in details.get("causes") or ()]
    return {**details, "causes": causes}


_Sentence = tuple[type[ApiError], str, str | None]


def _sentence(asked: Asked, status: int, reason: str, said: str, body: Mapping[str, Any]) -> _Sentence:
    if status == 401:
        return UnauthorizedError, f"{asked.server}: not signed in, or the token has expired", _SIGN_IN
    if status in (400, 403, 422) and (denied := _denial(asked, said, body)):
        return denied
    if status == 403:
        return ForbiddenError, _forbidden(asked, said), f"it needs the RBAC rule  {asked.rule}"
    if status == 404:
        return _not_found(asked, said, body)
    if status == 409 and reason == "AlreadyExists":
        if "object is being deleted" in said:
            return AlreadyExistsError, f"{asked.thing} is still being deleted", "wait until it is gone, then try again"
        return AlreadyExistsError, f"{asked.thing} is there already", None
    if status == 409:
        return ConflictError, f"{asked.thing} was changed by somebody else meanwhile: {said}", "try again"
    if status == 410 or reason in ("Expired", "Gone"):
        return GoneError, f"{asked.resource}: the server no longer knows that version: {said}", None
    if status == 422:
        return InvalidError, f"{asked.thing} is refused: {_invalid(said, body)}", None
    if status == 429:
        return ThrottledError, f"{asked.server} asks to wait: {said or 'too many requests'}", None
    if status >= 500:
        if webhook := re.search(r'failed calling webhook "([^"]+)": (.*)', said, re.DOTALL):
            return (
                UnavailableError,
                f"{asked.thing}: the admission webhook {webhook[1]} does not answer: {_one_line(webhook[2])}",
                "its service must run, or its webhook configuration go",
            )
        return (
            UnavailableError,
            f"{asked.server}: status {status} on {asked.verb} {asked.thing}: {_one_line(said)}",
            None,
        )
    if unknown := re.findall(r'unknown field "([^"]+)"', said):
        fields = ", ".join(unknown)
        plural = "these fields" if len(unknown) > 1 else "this field"
        return (
            BadRequestError,
            f"{asked.thing}: the cluster does not know {plural}: {fields}",
            "a typo, or newer than the cluster",
        )
    if status == 400:
        return BadRequestError, f"{asked.thing}: {_one_line(said) or 'the server calls it a bad request'}", None
    return (
        BadRequestError,
        f"{asked.server}: unexpected status {status} on {asked.verb} {asked.thing}: {_one_line(said)}",
        None,
    )


_SIGN_IN = "sign in again (az login, aws sso login, gcloud auth login), or fetch a new kubeconfig"


def _denial(asked: Asked, said: str, body: Mapping[str, Any]) -> _Sentence | None:
    """What an admission plugin refuses comes as 403, 400 or 422 and is no matter of RBAC."""
    if quota := re.search(r"exceeded quota: (.*)", said, re.DOTALL):
        return RefusedError, f"{asked.thing}: exceeded quota: {_one_line(quota[1])}", _QUOTA
    if re.search(r"failed quota: ", said):
        return RefusedError, f"{asked.thing}: {_one_line(said)}", "the namespace's ResourceQuota wants it to be set"
    if pod_security := re.search(r'violates PodSecurity "([^"]+)": (.*)', said, re.DOTALL):
        return (
            RefusedError,
            f"{asked.thing}: refused by Pod Security {pod_security[1]}: {_one_line(pod_security[2])}",
            "the Job as rendered is clean under restricted: look at what --patch or a webhook added",
        )
    if "is being terminated" in said or any(
        cause.get("reason") == "NamespaceTerminating" for cause in (body.get("details") or {}).get("causes") or ()
    ):
        return RefusedError, f"namespace {asked.namespace} is being deleted", "use another one (--namespace)"
    if webhook := re.search(r'admission webhook "([^"]+)" denied the request:? ?(.*)', said, re.DOTALL):
        return (
            RefusedError,
            f"{asked.thing}: refused by the admission webhook {webhook[1]}: {_one_line(webhook[2])}",
            None,
        )
    if policy := re.search(r"ValidatingAdmissionPolicy '([^']+)' .*denied request: (.*)", said, re.DOTALL):
        return RefusedError, f"{asked.thing}: refused by the admission policy {policy[1]}: {_one_line(policy[2])}", None
    if limit := re.search(r"is forbidden: \[?((?:minimum|maximum) .* usage per .*?)\]?$", said):
        return RefusedError, f"{asked.thing}: refused by the namespace's LimitRange: {limit[1]}", None
    if "error looking up service account" in said:
        found = re.search(r'serviceaccount "([^"]+)" not found', said)
        return (
            RefusedError,
            f"there is no ServiceAccount {found[1] if found else ''} in namespace {asked.namespace}",
            "create it, or leave --service-account out",
        )
    if priority := re.search(r"no PriorityClass with name (\S+) was found", said):
        return (
            RefusedError,
            f"there is no PriorityClass {priority[1]}",
            "kubectl get priorityclasses shows those there are",
        )
    return None


_QUOTA = "free some, ask for a higher quota, or use another namespace"


def _forbidden(asked: Asked, said: str) -> str:
    user = re.search(r'User "([^"]+)"', said)
    who = user[1] if user else "this identity"
    where = f" in namespace {asked.namespace}" if asked.namespace else ""
    group = f" of {asked.group}" if asked.group else ""
    return f"{who} may not {asked.verb} {asked.plural}{group}{where}"


def _not_found(asked: Asked, said: str, body: Mapping[str, Any]) -> _Sentence:
    details = body.get("details") or {}
    if details.get("kind") == "namespaces" or re.match(r'namespaces "[^"]*" not found', said):
        missing = details.get("name") or asked.namespace
        return NotFoundError, f"there is no namespace {missing}", f"kubectl create namespace {missing}, or --namespace"
    if asked.name and details.get("name"):
        return NotFoundError, f"there is no {asked.thing}", None
    if asked.kind:
        install = "tuner install" if asked.group == "kaito.sh" else None
        return NotFoundError, f"{asked.server} does not know {asked.resource}", install
    return NotFoundError, f"{asked.server}: {asked.verb} {asked.resource}: not found", None


def _invalid(said: str, body: Mapping[str, Any]) -> str:
    """`spec.template: field is immutable; …`: the causes, which name each field, rather than Go's dump of the value."""
    causes = (body.get("details") or {}).get("causes") or ()
    faults = [f"{cause.get('field')}: {_one_line(str(cause.get('message')))}" for cause in causes if cause.get("field")]
    return "; ".join(faults) or _one_line(said)


def _asked_s(headers: Mapping[str, str], body: Mapping[str, Any]) -> float | None:
    """How long the server asks to be left alone, in its header or its Status; never for long, as a watch must go on."""
    asked_s = retry_after_s(headers)
    if asked_s is None:
        asked_s = retry_after_s({"Retry-After": str((body.get("details") or {}).get("retryAfterSeconds"))})
    return None if asked_s is None else min(asked_s, _LONGEST_WAIT_S)


def _one_line(text: str, most: int = 600) -> str:
    return cut(" ".join(text.split()), most)


# ── without an answer ────────────────────────────────────────────────────────────────────────────────────────────────


def error_of_transport(server: str, error: BaseException) -> ApiError:
    """The error for a connection that was not made, or broke."""
    import urllib3

    chain = list(_chain(error))
    certificate = next((one for one in chain if isinstance(one, ssl.SSLCertVerificationError)), None)
    if certificate:
        return UnavailableError(
            f"{server}: its certificate is not trusted: {certificate.verify_message or certificate}",
            hint="the kubeconfig's certificate-authority is of another cluster, or a proxy is in between",
            is_final=True,
        )
    if any(isinstance(one, ssl.SSLError | urllib3.exceptions.SSLError) for one in chain):
        return UnavailableError(
            f"{server}: TLS failed: {chain[-1]}", hint="does the kubeconfig say https for a plain port?"
        )
    not_sent = any(
        isinstance(one, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError) for one in chain
    )
    if any(isinstance(one, urllib3.exceptions.NameResolutionError) for one in chain):
        return UnavailableError(
            f"{server}: there is no such host name",
            hint="VPN or private cluster? is the kubeconfig up to date?",
            not_sent=True,
        )
    # urllib3's NewConnectionError is a TimeoutError too
    if any(isinstance(one, ConnectionRefusedError) for one in chain):
        hint = "is the cluster running, and the kubeconfig for it?"
        return UnavailableError(f"{server}: connection refused", hint=hint, not_sent=True)
    if any(isinstance(one, urllib3.exceptions.NewConnectionError) for one in chain):
        hint = "VPN, or a cluster that is gone?"
        return UnavailableError(f"{server}: {_one_line(str(chain[-1]))}", hint=hint, not_sent=True)
    if any(isinstance(one, urllib3.exceptions.TimeoutError) for one in chain):
        hint = "VPN, firewall or a stopped cluster?"
        return UnavailableError(f"{server}: no answer in time", hint=hint, not_sent=not_sent)
    return UnavailableError(f"{server}: the connection broke: {_one_line(str(error)) or type(error).__name__}")


def _chain(error: BaseException | None) -> "list[BaseException]":
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        reason = getattr(error, "reason", None)
        error = error.__cause__ or error.__context__ or (reason if isinstance(reason, BaseException) else None)
    return found


def error_of_config(error: Exception, source: str) -> ConfigError:
    """For what the client raises about a kubeconfig: never its content."""
    said = f"{type(error).__name__}: {error}"
    if type(error).__name__ in ("ConfigException", "ValueError"):
        said = str(error)
    elif isinstance(error, OSError) and error.strerror:
        said = error.strerror
    return ConfigError(f"{source}: {_one_line(said)}", hint="kubectl config view shows what is in a kubeconfig")
