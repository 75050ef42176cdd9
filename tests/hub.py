"""A Hugging Face Hub on loopback, as far as a model is fetched from it: HF_ENDPOINT is the server's URL."""

import hashlib
import json
from collections.abc import Mapping

from tests.http_server import Answer, HttpServer


def publish_model(server: HttpServer, content: Mapping[str, bytes], model_id: str, commit: str) -> None:
    """Put a model on the Hub at this commit and at main, its weights as LFS objects."""
    siblings, tree = [], []
    for name, data in content.items():
        digest = hashlib.sha256(data).hexdigest()
        is_lfs = name.endswith((".safetensors", ".bin"))
        siblings.append({"rfilename": name, "size": len(data), "blobId": digest[:40]})
        lfs = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if is_lfs else {}
        tree.append({"type": "file", "path": name, "size": len(data), "oid": digest[:40], **lfs})
        etag = f'"{digest}"' if is_lfs else f'"{digest[:40]}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag}
        server.serve(f"/{model_id}/resolve/{commit}/{name}", Answer(body=data, headers=headers))
    info = {"id": model_id, "modelId": model_id, "sha": commit, "siblings": siblings}
    for revision in ("main", commit):
        server.serve(f"/api/models/{model_id}/revision/{revision}", _json(info))
    server.serve(f"/api/models/{model_id}/tree/{commit}", _json(tree))
    server.serve(f"/api/models/{model_id}/auth-check", _json({}))


def _json(value: object) -> Answer:
    return Answer(body=json.dumps(value).encode(), headers={"Content-Type": "application/json"})
