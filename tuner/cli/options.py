"""The options that several commands have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from tuner.cli import completion
from tuner.cli.flags import cluster, data, network, other, output, registry, scheduling, training

# ── alone ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_workspace = typer.Argument(metavar="WORKSPACE", help="a Workspace YAML file")
WorkspaceArgument = Annotated[Path, _workspace]
OptionalWorkspace = Annotated[Path | None, _workspace]
BaseModel = Annotated[
    Path | None, training("--base-model", metavar="DIR", help="the base model's files, instead of a download")
]
NoOverwrite = Annotated[bool, registry("--no-overwrite", help="stop at once when the tag is there already")]
RegistryCheckpoints = Annotated[
    bool,
    registry(
        "--registry-checkpoints",
        help="keep the last checkpoint in the output's repository: another machine goes on from it",
    ),
]
AllowCidr = Annotated[
    tuple[str, ...], network("--allow-cidr", metavar="NET", help="fetch from this range too; repeatable")
]
InstanceType = Annotated[
    str | None,
    scheduling(
        "--instance-type",
        metavar="T",
        help="as Standard_NC24ads_A100_v4 [the Workspace's instanceType]",
        autocompletion=completion.instance_types,
    ),
]
Context = Annotated[str | None, cluster("--context", metavar="C", help="of the kubeconfig [the current one]")]
Wait = Annotated[bool, cluster("--wait", help="follow it; end with the failing stage's own exit code")]
AsJson = Annotated[bool, other("--json", help="print the result as JSON on stdout")]

# ── together ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class SettingFlags:
    """What is set beside the Workspace's own configuration."""

    config: Annotated[Path | None, training("--config", metavar="F", help="training_config.yaml")]
    overrides: Annotated[
        tuple[str, ...],
        training("--set", metavar="K=V", help="LoraConfig.r=32; repeatable", autocompletion=completion.settings),
    ]


@dataclass(frozen=True, kw_only=True)
class RegistryFlags:
    """How a registry is spoken to."""

    plain_http: Annotated[bool, registry("--plain-http", help="speak http to the registry")]
    ca: Annotated[Path | None, network("--ca", metavar="F", help="CA certificates to trust, PEM")]


@dataclass(frozen=True, kw_only=True)
class LoginFlags(RegistryFlags):
    """How a registry is spoken to from this machine."""

    docker_config: Annotated[
        Path | None, registry("--docker-config", metavar="F", help="docker config.json with the push credential")
    ]


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """What is trained, how, and what it must reach."""

    smoke: Annotated[bool, training("--smoke", help="a tiny random model of the same architecture, a few steps")]
    require: Annotated[
        tuple[str, ...],
        training("--require", metavar="GATE", help="push only if, e.g. 'eval_loss <= 0.98 * base'; repeatable"),
    ]
    disable: Annotated[
        tuple[str, ...],
        training(
            "--disable",
            metavar="LEVER",
            help="turn a short cut off: liger; repeatable",
            autocompletion=completion.levers,
        ),
    ]
    no_canary: Annotated[
        bool, training("--no-canary", help="do not measure the adapter on the base in 16 bits, as others serve it")
    ]
    trust_remote_code: Annotated[bool, training("--trust-remote-code", help="run Python from the model's repository")]


@dataclass(frozen=True, kw_only=True)
class RequestFlags(SettingFlags, TrainingFlags, RegistryFlags):
    """What decides a run, wherever it takes place."""

    source_headers: Annotated[
        Path | None, data("--source-headers", metavar="F", help="JSON: which URLs get which headers or token")
    ]
    no_overwrite: NoOverwrite
    no_preflight: Annotated[bool, registry("--no-preflight", help="do not ask the registry for push permission first")]
    allow_private_urls: Annotated[
        bool, network("--allow-private-urls", help="fetch from loopback and private addresses too")
    ]
    allow_cidr: AllowCidr


@dataclass(frozen=True, kw_only=True)
class PushFlags:
    """What is pushed, and how."""

    digest_file: Annotated[
        Path | None, output("--digest-file", metavar="F", help="write the pushed digest to this file")
    ]
    compression: Annotated[
        Literal["none", "zstd", "gzip"],
        registry("--compression", metavar="C", help="of the image's layers: none, zstd or gzip"),
    ] = "none"
    chunk_size: Annotated[
        int | None, registry("--chunk-size", metavar="BYTES", min=1, help="upload blobs in pieces [whole]")
    ]
    push_deadline: Annotated[
        float, registry("--push-deadline", metavar="S", min=1, help="seconds after which a push gives up")
    ] = 1800
    modelpack: Annotated[bool, registry("--modelpack", help="a ModelPack manifest beside the image, at TAG-modelpack")]
    provenance: Annotated[bool, registry("--provenance", help="an unsigned in-toto statement as a referrer")]
