"""`tuner status`, `logs`, `events`, `cancel`, `delete` and `retry-push`: what follows a run in a cluster."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import completion
from tuner.cli.cluster_options import ClusterFlags, RunName, open_api
from tuner.cli.common import open_talk, say
from tuner.cli.flags import command, other
from tuner.cli.options import AsJson, Wait
from tuner.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from tuner.cluster.api import Api
    from tuner.cluster.follow import Status

_COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan", "waiting": "yellow", "queued": "yellow"}
_COLOURS |= {"suspended": "yellow", "stopping": "yellow"}


# ── status ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@command("status", example="tuner status workspace-tuning-phi-3")
def status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="one run; without it all are listed", autocompletion=completion.runs),
    ],
    place: ClusterFlags,
    wait: Wait,
    as_json: AsJson,
) -> None:
    """Show where a run in the cluster stands, why it waits, and what helps."""
    import json
    from datetime import UTC, datetime

    from tuner.cluster.follow import describe, load_run, load_runs

    if wait and not name:
        raise UsageError("--wait for which run?", hint="tuner status NAME --wait")
    api = open_api(place.context, place.namespace)
    if name and wait:
        load_run(api, name)  # a server that was never there is not waited for, as one that goes away is
        follow_to_end(api, name, as_json=as_json)
        return
    now = datetime.now(UTC)
    if name:
        found = describe(load_run(api, name, or_check=True), now)
        if as_json:
            print(json.dumps(found.as_json()))
        else:
            _print_one(found)
        return
    all_found = [describe(each, now) for each in load_runs(api)]
    if as_json:
        print(json.dumps([each.as_json() for each in all_found]))
        return
    if not all_found:
        say(f"no runs in namespace {api.namespace}")
        return
    _print_table(all_found)


def _print_one(found: "Status") -> None:
    """A few lines, the words that matter in colour."""
    from rich.text import Text

    from tuner.cluster.follow import duration, progress_text

    head = Text()
    head.append(found.name, "bold").append("  ").append(progress_text(found), _COLOURS.get(found.phase, ""))
    if found.done and found.total:
        head.append(f"  {100 * found.done / found.total:.0f} %", "cyan")
    if found.attempt > 1:
        head.append(f"  attempt {found.attempt} of {found.attempts}", "yellow")
    rows: list[tuple[str, str]] = []
    if found.loss is not None:
        speed = f", {found.tokens_per_s:,.0f} tokens/s" if found.tokens_per_s else ""
        rows.append(("loss", f"{found.loss:.4g}{speed}"))
    if found.eta_s is not None:
        rows.append(("left", duration(found.eta_s)))
    if found.waiting_for:
        rows.append(("waiting", found.waiting_for))
    if found.last:
        rows.append(("last", found.last))
    if found.error:
        rows.append(("error", found.error))
    if found.image:
        rows.append(("pushed", found.image))
    if found.eval_loss is not None:
        rows.append(("held out", f"loss {found.eval_loss:.4g}"))
    if found.hint:
        rows.append(("hint", found.hint))
    where = found.namespace + (f", pod {found.pod}" if found.pod else "") + (f" on {found.node}" if found.node else "")
    rows += [("where", where), ("age", duration(found.age_s))]
    _print(head)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        line = Text().append(f"  {label:<{width}}  ", "dim")
        line.append(text, "red" if label == "error" else "bold" if label in ("hint", "pushed") else "")
        _print(line)
    for note in found.notes:
        say(f"note: {note}")


def _print_table(all_found: "list[Status]") -> None:
    from rich.text import Text

    from tuner.cluster.follow import duration, progress_text

    headings = ("NAME", "STATUS", "LOSS", "LEFT", "ATTEMPT", "AGE", "")
    rows = [
        (
            each.name,
            progress_text(each),
            f"{each.loss:.4g}" if each.loss is not None else "–",
            duration(each.eta_s),
            f"{each.attempt}/{each.attempts}",
            duration(each.age_s),
            each.error or each.waiting_for or each.image or "",
        )
        for each in all_found
    ]
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings) - 1)]
    _print(Text("  ".join(f"{text:<{width}}" for text, width in zip(headings, widths, strict=False)).rstrip(), "bold"))
    room = _columns() - sum(widths) - 2 * len(widths) if sys.stdout.isatty() else None
    for each, row in zip(all_found, rows, strict=True):
        line = Text()
        for column, (text, width) in enumerate(zip(row, widths, strict=False)):
            line.append(f"{text:<{width}}  ", _COLOURS.get(each.phase, "") if column == 1 else "")
        last = row[-1] if room is None or len(row[-1]) <= room else row[-1][: max(0, room - 1)] + "…"
        line.append(last, "red" if each.error else "")
        line.rstrip()
        _print(line)


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def _print(line: "Text") -> None:
    """On a terminal in colour and wrapped by it; else as it is."""
    if not sys.stdout.isatty():
        print(line.plain)
        return
    from rich.console import Console

    Console(highlight=False).print(line, soft_wrap=True)


def follow_to_end(api: "Api", name: str, *, as_json: bool) -> None:
    """Follow a run to its end; stdout gets the pushed image, or the Status as JSON."""
    import json

    from tuner.cluster.follow import POLL_S, follow_run

    say(f"following {name}; Ctrl-C leaves it running")
    with open_talk() as talk:
        found = follow_run(api, name, talk, begin_stage=talk.stage, poll_s=POLL_S)
    if as_json:
        print(json.dumps(found.as_json()))
    elif found.image:
        print(found.image)
    say(f"{name} has succeeded" + (f", held-out loss {found.eval_loss:.4g}" if found.eval_loss is not None else ""))


# ── logs and events ──────────────────────────────────────────────────────────────────────────────────────────────────


@command("logs", example="tuner logs workspace-tuning-phi-3 -f")
def logs(
    name: RunName,
    follow: Annotated[bool, other("--follow", "-f", help="go on, from one stage to the next")],
    stage: Annotated[
        str | None,
        other(
            "--stage",
            metavar="S",
            help="of preflight, fetch, prepare, train or push",
            autocompletion=completion.stages,
        ),
    ],
    place: ClusterFlags,
) -> None:
    """Print what a run says: of the stage that failed or runs, or of one of its stages."""
    from tuner.cluster.follow import read_logs
    from tuner.redaction import redact
    from tuner.runspec import STAGES

    known = next((known for known in STAGES if known == stage), None)
    if stage and known is None:
        raise UsageError(f"{stage!r} is no stage", hint=f"one of {', '.join(STAGES)}")
    for line in read_logs(open_api(place.context, place.namespace), name, known, follows=follow):
        print(redact(line), flush=follow)


@command("events", example="tuner events workspace-tuning-phi-3")
def events(name: RunName, place: ClusterFlags, as_json: AsJson) -> None:
    """Print what the cluster has said of a run, its Jobs and its pods, oldest first."""
    import json
    from datetime import UTC, datetime

    from rich.text import Text

    from tuner.cluster.follow import duration, read_events
    from tuner.redaction import redact

    api = open_api(place.context, place.namespace)
    found = read_events(api, name)
    now = datetime.now(UTC)
    if as_json:
        print(json.dumps([{**vars(each), "at": each.at.isoformat() if each.at else None} for each in found]))
        return
    if not found:
        say(f"no events of {name} in namespace {api.namespace}; a cluster keeps them for an hour or so")
        return
    rows: list[tuple[Any, ...]] = [
        (
            duration((now - each.at).total_seconds() if each.at else None)
            + (f" ×{each.count}" if each.count > 1 else ""),
            each.reason,
            each.about,
            redact(each.message),
        )
        for each in found
    ]
    headings = ("AGE", "REASON", "OBJECT", "MESSAGE")
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(3)]
    _print(Text("  ".join(f"{text:<{width}}" for text, width in zip(headings, (*widths, 0), strict=True)), "bold"))
    for each, row in zip(found, rows, strict=True):
        text = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True))
        _print(Text(text, "yellow" if each.type == "Warning" else ""))


# ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@command("cancel", example="tuner cancel workspace-tuning-phi-3")
def cancel(name: RunName, place: ClusterFlags) -> None:
    """Stop a run after a checkpoint: suspended where a volume keeps it, else deleted."""
    from tuner.cluster.follow import POLL_S
    from tuner.cluster.submit import cancel as cancel_run

    with open_talk() as talk:
        sentence = cancel_run(open_api(place.context, place.namespace), name, talk, poll_s=POLL_S)
    say(sentence)


@command("delete", example="tuner delete workspace-tuning-phi-3")
def delete(name: RunName, place: ClusterFlags) -> None:
    """Delete a run's Jobs, ConfigMap and own Secrets; volumes, images and your Secrets stay."""
    from tuner.cluster.submit import delete_run

    api = open_api(place.context, place.namespace)
    for line in delete_run(api, name):
        say(f"deleted {line}" if not line.startswith("not ") else line)


@command(
    "retry-push",
    example="tuner retry-push workspace-tuning-phi-3 --wait",
)
def retry_push(name: RunName, place: ClusterFlags, wait: Wait, as_json: AsJson) -> None:
    """Push what a run has trained and could not push, from its results volume and without training."""
    from tuner.cluster.follow import POLL_S
    from tuner.cluster.submit import retry_push as retry

    api = open_api(place.context, place.namespace)
    job, is_new = retry(api, name, poll_s=POLL_S)
    say(f"{'created' if is_new else 'there already'}: Job {job}")
    if wait:
        follow_to_end(api, job, as_json=as_json)
    else:
        print(f"job/{job}")
        say(f"next: tuner status {job} -n {api.namespace}")
