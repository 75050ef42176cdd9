"""The application, and the options that several commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tuner",
    help="Run the tuning section of a KAITO Workspace: data in, 4-bit QLoRA, a pushed adapter image out.",
    epilog="Example: tuner run workspace.yaml",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Look at data before it is trained on.",
    epilog="Example: tuner data preview train.parquet",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")

WorkspaceArgument = Annotated[Path | None, typer.Argument(metavar="WORKSPACE", help="a Workspace YAML file")]
Model = Annotated[str | None, typer.Option("--model", help="preset, Hugging Face id or directory, instead of a file")]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help="URL, file or directory instead of the file's; repeatable"),
]
Output = Annotated[
    str | None, typer.Option("--output", metavar="DIR|REF", help="directory, registry/name:tag or oci:DIR:TAG")
]
Method = Annotated[str | None, typer.Option("--method", help="qlora or lora, with --model [qlora]")]
Smoke = Annotated[bool, typer.Option("--smoke", help="a tiny random model of the same architecture, a few steps")]
BaseModel = Annotated[
    Path | None, typer.Option("--base-model", metavar="DIR", help="the base model's files, instead of a download")
]
Config = Annotated[Path | None, typer.Option("--config", metavar="F", help="training_config.yaml")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="LoraConfig.r=32; repeatable")]
WorkDir = Annotated[
    Path | None, typer.Option("--work-dir", metavar="D", help="data, checkpoints, adapter [tuner-work/NAME]")
]
DockerConfig = Annotated[
    Path | None, typer.Option("--docker-config", metavar="F", help="docker config.json with the push credential")
]
SourceHeaders = Annotated[
    Path | None, typer.Option("--source-headers", metavar="F", help="JSON: which URLs get which headers or token")
]
PlainHttp = Annotated[bool, typer.Option("--plain-http", help="speak http to the registry")]
Ca = Annotated[Path | None, typer.Option("--ca", metavar="F", help="CA certificates to trust, PEM")]
AllowPrivate = Annotated[
    bool, typer.Option("--allow-private-urls", help="fetch from loopback and private addresses too")
]
AllowCidr = Annotated[
    list[str] | None, typer.Option("--allow-cidr", metavar="NET", help="fetch from this range too; repeatable")
]
NoOverwrite = Annotated[bool, typer.Option("--no-overwrite", help="stop at once when the tag is there already")]
NoPreflight = Annotated[bool, typer.Option("--no-preflight", help="do not ask the registry for push permission first")]
Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="GATE", help="push only if, e.g. 'eval_loss <= 0.98 * base'; repeatable"),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run Python from the model's repository")]
Disable = Annotated[
    list[str] | None, typer.Option("--disable", metavar="LEVER", help="turn a short cut off: liger; repeatable")
]
DigestFile = Annotated[
    Path | None, typer.Option("--digest-file", metavar="F", help="write the pushed digest to this file")
]
Compression = Annotated[
    str, typer.Option("--compression", metavar="C", help="of the image's layers: none, zstd or gzip")
]
ChunkSize = Annotated[
    int | None, typer.Option("--chunk-size", metavar="BYTES", min=1, help="upload blobs in pieces [whole]")
]
PushDeadline = Annotated[
    float, typer.Option("--push-deadline", metavar="S", min=1, help="seconds after which a push gives up")
]
ModelPack = Annotated[bool, typer.Option("--modelpack", help="a ModelPack manifest beside the image, at TAG-modelpack")]
Provenance = Annotated[bool, typer.Option("--provenance", help="an unsigned in-toto statement as a referrer")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
