"""The main job end to end, with nothing from a hub: make a tiny Phi-3 and some data, tune, push, pull, measure.

./scripts/demo runs it. The adapter goes to an OCI image layout in tuner-demo/, or to `--output registry/name:tag`.
"""

import argparse
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

DEMO = Path("tuner-demo")
ANIMALS = ("cat", "dog", "fox", "owl", "bee", "cow", "hen", "pig", "rat", "yak")
PLACES = ("barn", "field", "forest", "garden", "house", "lake", "meadow", "river", "stable", "tree")
HELD_OUT = 60

WORKSPACE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: demo
resource:
  labelSelector:
    matchLabels:
      app: demo
tuning:
  preset:
    name: phi-3-mini-4k-instruct
  method: qlora
  config: demo-config
  input:
    urls:
      - {url}/train.parquet
  output:
    image: {image}
    imagePushSecret: registry-secret
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: demo-config
data:
  training_config.yaml: |
    training_config:
      TrainingArguments:
        learning_rate: 1e-2
        num_train_epochs: 4
        per_device_train_batch_size: 8
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=f"oci:{DEMO}/image:demo", help="registry/name:tag or oci:DIR:TAG")
    parser.add_argument("--plain-http", action="store_true", help="speak http to the registry")
    options = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()

    say("1. a tiny random model of Phi-3's architecture, and a small dataset in parquet")
    rows = make_rows()
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(train), DEMO / "train.parquet")
    make_model(DEMO / "model", train)
    print(f"   {sum(f.stat().st_size for f in (DEMO / 'model').iterdir()) / 1e6:.1f} MB of model, {len(train)} rows")

    transport = ["--plain-http"] if options.plain_http else []
    with serving(DEMO) as url:
        workspace = DEMO / "workspace.yaml"
        workspace.write_text(WORKSPACE.format(url=url, image="demo.azurecr.io/demo:1"), encoding="utf-8")
        say("2. tuner run: download, 4-bit QLoRA, package, push")
        flags = ["--base-model", f"{DEMO}/model", "--allow-private-urls", "--output", options.output]
        image = tuner("run", str(workspace), *flags, "--work-dir", f"{DEMO}/work", *transport)

    say("3. tuner pull: the image back, every digest checked")
    tuner("pull", options.output, f"{DEMO}/pulled", *transport)
    print("   " + "  ".join(sorted(path.name for path in (DEMO / "pulled").iterdir())))

    say(f"4. PEFT loads the pulled adapter on the base; loss on {HELD_OUT} rows that were never trained on")
    base, tuned = losses(DEMO / "model", DEMO / "pulled", held_out)
    print(f"   base {base:.3f} → tuned {tuned:.3f}")
    if tuned > 0.9 * base:
        sys.exit("error: the held-out loss did not fall")
    say(f"done in {time.monotonic() - started:.0f} s: {image}")


def say(line: str) -> None:
    print(f"\n{line}", flush=True)


def tuner(*arguments: str) -> str:
    """The last line that `tuner …` prints on stdout."""
    print(f"   $ tuner {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "tuner", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print(f"   {done.stdout.strip()}", flush=True)
    return done.stdout.strip().splitlines()[-1]


def make_rows() -> list[dict[str, Any]]:
    """One question for each animal, place and number, in an order that mixes them."""
    questions = [(animal, place, count) for animal in ANIMALS for place in PLACES for count in (2, 3, 4, 5, 6)]
    mixed = [questions[(index * 271) % len(questions)] for index in range(len(questions))]  # 271 is prime to 500
    return [
        {
            "messages": [
                {"role": "user", "content": f"In the {place} there is one {animal}. What if there are {count}?"},
                {"role": "assistant", "content": f"Then {count} {animal}s are in the {place}."},
            ]
        }
        for animal, place, count in mixed
    ]


def make_model(directory: Path, rows: list[dict[str, Any]]) -> None:
    from tuner.pipeline.libraries import quiet

    quiet()
    from tuner.pipeline.tiny_model import make_tiny_model
    from tuner.presets import find_preset

    texts = [message["content"] for row in rows for message in row["messages"]]
    make_tiny_model(find_preset("phi-3-mini-4k-instruct"), texts, directory, hidden_size=128)


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """The URL under which the directory's files are on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002  # the base class's name

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def losses(model: Path, adapter: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean loss of the answers' tokens: the base alone, and with the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(model)

    def mean_loss(network: Any) -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for row in rows:
                prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
                answer = row["messages"][1]["content"] + "<|end|>"
                prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
                ids = torch.tensor([prompt_ids + answer_ids])
                labels = torch.tensor([[-100] * len(prompt_ids) + answer_ids])
                total += float(network(input_ids=ids, labels=labels).loss) * len(answer_ids)
                count += len(answer_ids)
        return total / count

    before = mean_loss(base)
    tuned = PeftModel.from_pretrained(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    print(f"   adapter_config.json: base {config['base_model_name_or_path']}, r {config['r']}")
    return before, mean_loss(tuned)


if __name__ == "__main__":
    main()
