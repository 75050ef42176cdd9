"""What a fetched file's bytes say: its digest, its kind, whether it is whole."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuner.errors import ConfigError, DataError, InputMissingError

WEB_PAGE_HINT = (
    "this is often a sign-in page or a file viewer: use the address of the file itself "
    "(/resolve/ rather than /blob/ on Hugging Face, raw on GitHub, ?download=true on SharePoint)"
)
# What of a model directory is read when it is loaded; weights in one piece beside their shards are left out.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt")
MODEL_CODE = "*.py"  # which --trust-remote-code runs
DUPLICATE_WEIGHTS = "consolidated*"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def hash_file(path: Path) -> str:
    """The file's sha256 in hexadecimal digits; remembered in this process while the file's size and time stay."""
    status = path.stat()
    return _hash_unchanged(path.absolute(), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _hash_unchanged(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── data files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_readable(path: Path, name: str, source: str, *, may_be_empty: bool = False) -> None:
    """DataError when the file's content is not what its name says, or no data at all. `source` is for messages."""
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, path.stat().st_size - 4))
        tail = file.read()
    if not head and may_be_empty:
        return
    if not head:
        raise DataError(f"{source}: the file is empty")
    refuse_foreign(head, source)
    if _text_of(head).lower().startswith((b"<!doctype", b"<html")):
        raise DataError(f"{source}: it is a web page", hint=WEB_PAGE_HINT)
    kind = _kind_of(head)
    lower = name.lower()
    if kind == "parquet":
        _check_parquet(path, tail, source)
    elif lower.endswith(".parquet"):
        raise DataError(f"{source}: not a parquet file; it looks like {kind}")
    elif lower.endswith((".json", ".jsonl", ".ndjson")) and kind not in ("JSON", "gzip", "zstandard"):
        raise DataError(f"{source}: not JSON; it looks like {kind}")


def _text_of(head: bytes) -> bytes:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


_UNPACK = "unpack it, and name the data files in it"
_AGAIN = "unpack it; .gz and .zst are read as they are"
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, and not the file it stands for",
        "git lfs pull fetches the file; of a URL use the one that downloads it (/resolve/ on Hugging Face)",
    ),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"\xfd7zXZ\x00", "compressed by xz", _AGAIN),
    (b"BZh", "compressed by bzip2", _AGAIN),
    (b"\x04\x22\x4d\x18", "compressed by lz4", _AGAIN),
    (b"%PDF-", "a PDF document", "take its text out first"),
    (b"SQLite format 3", "an SQLite database", "export its table as parquet or CSV"),
    (b"\x89HDF", "an HDF5 file", "save its rows as parquet"),
    (b"Obj\x01", "an Avro file", "save its rows as parquet"),
    (b"ORC", "an ORC file", "save its rows as parquet"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save the sheet as CSV"),
    (b"\x80\x04\x95", "a Python pickle, which can run code when it is read", "save its rows as parquet"),
)


def refuse_foreign(head: bytes, source: str) -> None:
    """DataError for what begins as an archive or a kind of file that is not read: in words, and what to do."""
    for magic, what, hint in _FOREIGN:
        if head.startswith(magic):
            if b"xl/" in head or b"[Content_Types].xml" in head:
                what, hint = "an Excel workbook", "save the sheet as CSV (UTF-8)"
            raise DataError(f"{source}: {what}", hint=hint)
    if head[257:262] == b"ustar":
        raise DataError(f"{source}: a tar archive", hint=_UNPACK)


def _kind_of(head: bytes) -> str:
    for magic, kind in ((b"PAR1", "parquet"), (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstandard")):
        if head.startswith(magic):
            return kind
    text = _text_of(head)
    if text.startswith((b"{", b"[")):
        return "JSON"
    if text.startswith(b"<"):
        return "XML"
    return "binary data" if b"\0" in head else "text"


def _check_parquet(path: Path, tail: bytes, source: str) -> None:
    import pyarrow
    import pyarrow.parquet

    if tail == b"PARE":
        raise DataError(f"{source}: an encrypted parquet file, which tuner does not read")
    if tail != b"PAR1":
        raise DataError(f"{source}: the parquet file is cut short: it has no footer")
    try:
        pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: the parquet file's footer cannot be read") from error


# ── model directories ────────────────────────────────────────────────────────────────────────────────────────────────


def model_files(directory: Path, *, with_code: bool = False) -> list[Path]:
    """The files that decide what the model is, sorted by name. Raises InputMissingError for no directory."""
    patterns = (*MODEL_FILES, MODEL_CODE) if with_code else MODEL_FILES
    if not directory.is_dir():
        raise InputMissingError(f"{directory}: there is no such model directory")
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and any(fnmatch(path.name, pattern) for pattern in patterns)
        and not fnmatch(path.name, DUPLICATE_WEIGHTS)
    )


def model_digest(directory: Path, *, with_code: bool = False) -> str:
    """`sha256:…` over the names and contents of a model directory's weights, configuration and tokenizer.

    `with_code` where the repository's own code is run: it decides both. Raises InputMissingError for no directory.
    """
    lines = "".join(f"{path.name} {_known_hash(path)}\n" for path in model_files(directory, with_code=with_code))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _known_hash(path: Path) -> str:
    """Of a weight file in the Hugging Face cache the sha256 is its name there, so gigabytes need not be read again."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and len(blob.name) == 64:
        return blob.name
    return hash_file(path)


def check_model_directory(directory: Path, shown: str, *, trust_remote_code: bool) -> None:
    """Raise unless the directory holds a whole model that loads without code of its own. `shown` is for messages."""
    if not directory.is_dir():
        raise InputMissingError(f"{shown}: no such directory")
    config = _read_json(directory / "config.json", shown)
    weights = sorted(path for path in directory.glob("*.safetensors") if not fnmatch(path.name, DUPLICATE_WEIGHTS))
    check_has_safetensors([path.name for path in directory.iterdir()], shown)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise InputMissingError(f"{shown}: it has no tokenizer", hint=f"one of {', '.join(_TOKENIZER_FILES)}")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(_read_json(index, shown)["weight_map"].values())
        if missing := sorted(shards - {path.name for path in weights}):
            raise InputMissingError(
                f"{shown}: {len(missing)} of {len(shards)} weight files are not there: {missing[0]}"
            )
    for path in weights:
        _check_safetensors(path)
    if not trust_remote_code and _needs_own_code(config):
        raise ConfigError(
            f"{shown}: this model runs Python code of its own, which is not trusted",
            hint="read that code first; --trust-remote-code runs it",
        )


def check_has_safetensors(names: Sequence[str], shown: str) -> None:
    """ConfigError for a model with pickled weights only, which can run code when they are loaded."""
    if not any(name.endswith(".safetensors") and not fnmatch(name, DUPLICATE_WEIGHTS) for name in names):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        what = "its weights are pickled (*.bin)" if pickled else "it has no weights"
        raise ConfigError(
            f"{shown}: {what}; only safetensors are loaded",
            hint="convert them: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)" if pickled else None,
        )


def _read_json(path: Path, shown: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputMissingError(f"{shown}: it has no {path.name}, so it is no model") from error
    except ValueError as error:
        raise DataError(f"{shown}: its {path.name} is not JSON") from error
    if not isinstance(content, dict):
        raise DataError(f"{shown}: its {path.name} is no JSON object")
    return content


def _check_safetensors(path: Path) -> None:
    """DataError for a file that is not as long as its header says.

    8 bytes header length, the header as JSON, the tensors: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 2 <= header_size <= size - 8:
            raise DataError(f"{path}: not a whole safetensors file")
        try:
            header = json.loads(file.read(header_size))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: its safetensors header cannot be read") from error
    if size != 8 + header_size + end:
        raise DataError(f"{path}: cut short: {size} bytes of {8 + header_size + end}")


def _needs_own_code(config: dict[str, Any]) -> bool:
    """Whether transformers has no class of its own for the model.

    Many configs name remote code (`auto_map`) for releases older than the class: Phi-3's do. That code is not needed.
    """
    if "auto_map" not in config:
        return False
    transformers = importlib.util.find_spec("transformers")
    if transformers is None or transformers.origin is None:
        return False  # nothing is loaded here; the training image decides
    module = str(config.get("model_type", "")).replace("-", "_")
    return not module or not (Path(transformers.origin).parent / "models" / module).is_dir()
