import base64
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_files import message_rows, write_data
from registries import make_certificate

from tuner.content import hash_file
from tuner.errors import ConfigError, DataError, InputMissingError
from tuner.presets import find_preset
from tuner.request import Credentials, Request, Run, build_run, is_weights_of, parse_output, with_data
from tuner.runspec import (
    DirectoryDestination,
    FileSource,
    HubModel,
    ImageDestination,
    ImageModel,
    ImageSource,
    LayoutDestination,
    LocalModel,
    Network,
    Secrets,
    SmokeModel,
    UrlSource,
    VolumeSource,
)
from tuner.urls import Allowed
from tuner.workspace import WorkspaceFile, make_workspace, parse_objects, parse_workspace_text

PRESET = "phi-3-mini-4k-instruct"
URL = "https://data.example.org/train.parquet"


def docker_config(password: str) -> str:
    auth = base64.b64encode(f"me:{password}".encode()).decode()
    return json.dumps({"auths": {"reg.azurecr.io": {"auth": auth}}})


def password_in(text: str) -> str:
    (entry,) = json.loads(text)["auths"].values()
    return base64.b64decode(entry["auth"]).decode().partition(":")[2]


def secret(name: str, **values: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values}


def push_secret(password: str, name: str = "push") -> dict[str, Any]:
    return secret(name, **{".dockerconfigjson": docker_config(password)})


def config_map(sections: Mapping[str, Any], name: str = "config") -> dict[str, Any]:
    text = yaml.safe_dump({"training_config": dict(sections)})
    data = {"training_config.yaml": text}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


Build = Callable[..., Run]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """The run of a Workspace with these documents beside it, this tuning section and these flags."""
    monkeypatch.chdir(tmp_path)

    def run(
        *others: dict[str, Any],
        tuning: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        name: str = "my-run",
        annotations: Mapping[str, str] | None = None,
        **flags: Any,
    ) -> Run:
        document = {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": name, "annotations": dict(annotations or {})},
            "resource": {"labelSelector": {"matchLabels": {"app": "x"}}},
            "tuning": {
                "preset": {"name": PRESET},
                "method": "qlora",
                "input": {"urls": [URL]},
                "output": {"image": "reg.azurecr.io/x:1"},
                **(tuning or {}),
            },
        }
        text = yaml.safe_dump_all([document, *others])
        file = parse_workspace_text(text, str(tmp_path / "w.yaml"), output_given=bool(flags.get("output")))
        return build_run(file, Request(**flags), tmp_path / "work", env or {})

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "d.parquet", message_rows(5))


def model_directory(path: Path, **changed: Any) -> Path:
    """A directory with the preset's config.json and some weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**find_preset(PRESET).config, **changed}))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


# ── credentials ──────────────────────────────────────────────────────────────────────────────────────────────────────

WITH_SECRET = {"output": {"image": "reg.azurecr.io/x:1", "imagePushSecret": "push"}}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home/.docker").mkdir(parents=True)
    (tmp_path / "home/.docker/config.json").write_text(docker_config("of ~/.docker"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"flag", "secret", "env", "home"}, "of the flag"),
        ({"secret", "env", "home"}, "of the secret"),
        ({"env", "home"}, "of DOCKER_CONFIG"),
        ({"home"}, "of ~/.docker"),
    ],
)
def test_a_push_credential_is_the_flags_the_files_then_the_users(
    build: Build, tmp_path: Path, home: Path, given: set[str], expected: str
) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env/config.json").write_text(docker_config("of DOCKER_CONFIG"))
    (tmp_path / "flag.json").write_text(docker_config("of the flag"))
    env = {"HOME": str(home)} | ({"DOCKER_CONFIG": str(tmp_path / "env")} if "env" in given else {})
    documents = [push_secret("of the secret")] if "secret" in given else []
    flag = tmp_path / "flag.json" if "flag" in given else None
    run = build(*documents, tuning=WITH_SECRET, env=env, docker_config=flag)
    assert [password_in(text) for text in run.secrets.docker_configs] == [expected]
    assert run.credentials.push != "none needed"


def test_a_named_secret_that_is_nowhere_is_missing(build: Build) -> None:
    with pytest.raises(InputMissingError, match="imagePushSecret: Secret 'push' is not in the Workspace's file"):
        build(tuning=WITH_SECRET)


@pytest.mark.parametrize(
    ("request_", "hint"),
    [
        ({}, "--output DIR keeps the adapter here, tuner submit runs where the cluster has the Secret"),
        (
            {"preflight": False},
            "--output DIR keeps the adapter here, tuner submit runs where the cluster has the Secret",
        ),
        ({"smoke": True}, "--no-preflight leaves the registry out"),
        (
            {"only_checks": True},
            "--no-preflight checks the rest, tuner submit --dry-run asks the cluster for the Secret",
        ),
    ],
)
def test_the_hint_for_a_missing_secret_fits_the_command(build: Build, request_: dict[str, bool], hint: str) -> None:
    with pytest.raises(InputMissingError) as caught:
        build(tuning=WITH_SECRET, **request_)
    assert str(caught.value.hint).endswith(f"; {hint}")
    assert "run docker login reg.azurecr.io, or" in str(caught.value.hint)


def test_a_check_without_a_probe_needs_no_secret_that_is_in_a_cluster(build: Build) -> None:
    source = {"image": "reg.azurecr.io/data:1", "imagePullSecrets": ["pull"]}
    build_check = partial(build, tuning={**WITH_SECRET, **GATED, "input": source}, only_checks=True, preflight=False)
    run = build_check(fetches=False)
    assert run.credentials == Credentials(
        push="Secret 'push', which is not here",
        pull="Secret 'pull', which is not here",
        hub="Secret 'hub', which is not here",
    )
    assert run.secrets == Secrets()
    with pytest.raises(ConfigError, match="2 problems") as caught:
        build_check(fetches=True)
    assert [str(problem).partition(": ")[0] for problem in caught.value.problems] == [
        "imagePullSecrets",
        "tuning.preset.presetOptions.modelAccessSecret",
    ]


def test_it_is_said_where_a_docker_config_was_looked_for(build: Build) -> None:
    for env, place in (
        ({"HOME": "/home/me"}, "/home/me/.docker/config.json"),
        ({"HOME": "/home/me", "DOCKER_CONFIG": "/ci"}, "/ci/config.json"),
        ({}, "docker config"),
    ):
        with pytest.raises(InputMissingError, match=f"and there is no {place}$"):
            build(tuning=WITH_SECRET, env=env)


def test_no_secret_and_no_docker_config_pushes_as_nobody(build: Build) -> None:
    run = build()
    assert run.secrets.docker_configs == ()
    assert run.credentials.push == "anonymous"


@pytest.mark.parametrize("output", ["oci:layout:v1", "adapter"])
def test_what_is_written_to_disk_needs_no_credential(build: Build, output: str) -> None:
    run = build(tuning=WITH_SECRET, output=output)
    assert run.secrets.docker_configs == ()
    assert run.credentials.push == "none needed"


@pytest.mark.parametrize("content", ["not JSON hunter2", "[]", b"\xff\xfe"])
def test_a_docker_config_that_is_none_is_named_without_its_content(
    build: Build, tmp_path: Path, content: str | bytes
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ConfigError, InputMissingError), match=f"docker config {path}") as raised:
        build(docker_config=path)
    assert "hunter2" not in f"{raised.value} {raised.value.__cause__}"


def test_every_pull_credential_is_kept_in_order(build: Build, tmp_path: Path, home: Path) -> None:
    (tmp_path / "flag.json").write_text(docker_config("of the flag"))
    source = {"image": "reg.azurecr.io/data:1", "imagePullSecrets": ["pull"]}
    run = build(
        push_secret("of the secret", "pull"),
        tuning={"input": source},
        env={"HOME": str(home)},
        docker_config=tmp_path / "flag.json",
    )
    assert [password_in(text) for text in run.secrets.pull_docker_configs] == [
        "of the flag",
        "of the secret",
        "of ~/.docker",
    ]
    assert run.spec.sources == (ImageSource(reference="reg.azurecr.io/data:1"),)


def test_a_pull_secret_that_is_nowhere_is_missing(build: Build) -> None:
    with pytest.raises(InputMissingError, match="imagePullSecrets: Secret 'pull'"):
        build(tuning={"input": {"image": "reg.azurecr.io/data:1", "imagePullSecrets": ["pull"]}})


GATED = {"preset": {"name": PRESET, "presetOptions": {"modelAccessSecret": "hub"}}}


def test_the_hub_token_is_the_files_secret_then_the_environments(build: Build) -> None:
    in_file = build(secret("hub", HF_TOKEN="hf_file\n"), tuning=GATED, env={"HF_TOKEN": "hf_env"})
    in_env = build(tuning=GATED, env={"HF_TOKEN": "hf_env"})
    assert in_file.secrets.hf_token == "hf_file"
    assert in_env.secrets.hf_token == "hf_env"
    assert build().secrets.hf_token is None


def test_a_model_access_secret_that_is_nowhere_is_missing(build: Build) -> None:
    with pytest.raises(InputMissingError, match="modelAccessSecret: Secret 'hub'"):
        build(tuning=GATED)


def test_a_model_access_secret_without_its_key_is_told_the_keys(build: Build) -> None:
    with pytest.raises(ConfigError, match="no key HF_TOKEN; it has token"):
        build(secret("hub", token="hf_file"), tuning=GATED)


def test_a_token_that_is_none_is_not_shown(build: Build) -> None:
    with pytest.raises(ConfigError, match="HF_TOKEN") as raised:
        build(env={"HF_TOKEN": "hunter2\nhunter3"})
    assert "hunter" not in str(raised.value)


def test_a_smoke_run_asks_for_no_hub_token(build: Build) -> None:
    run = build(tuning=GATED, smoke=True, env={"HF_TOKEN": "hf_env"})
    assert run.secrets.hf_token is None


def test_no_repr_has_a_secret(build: Build) -> None:
    run = build(
        push_secret("hunter2"),
        tuning={**WITH_SECRET, "input": {"urls": [f"{URL}?sig=hunter3"]}},
        env={"HF_TOKEN": "hf_hunter4"},
    )
    assert "hunter" not in repr(run)
    assert "hunter" not in run.spec.model_dump_json()
    assert list(run.secrets.queries.values()) == ["sig=hunter3"]


# ── the configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def test_config_flag_wins_over_the_config_map_and_set_over_both(build: Build, tmp_path: Path) -> None:
    written = config_map({"LoraConfig": {"r": 8, "lora_alpha": 8}})
    path = tmp_path / "c.yaml"
    path.write_text("training_config: {LoraConfig: {r: 4}}")
    in_file = build(written, tuning={"config": "config"})
    flag = build(written, tuning={"config": "config"}, config=path)
    typed = build(written, tuning={"config": "config"}, config=path, overrides=("LoraConfig.r=2",))
    assert in_file.spec.training.lora.r == 8
    assert flag.spec.training.lora.r == 4
    assert flag.spec.training.lora.lora_alpha == 32  # the flag's file stands for all of it
    assert typed.spec.training.lora.r == 2


def test_a_config_map_that_is_not_there_is_told_which_are(build: Build) -> None:
    with pytest.raises(ConfigError, match="ConfigMap 'other' is not in the Workspace's file; there is config"):
        build(config_map({}), tuning={"config": "other"})


def test_remote_code_needs_the_flag(build: Build) -> None:
    written = config_map({"ModelConfig": {"trust_remote_code": True}})
    with pytest.raises(ConfigError, match="trust_remote_code") as raised:
        build(written, tuning={"config": "config"})
    assert "--trust-remote-code" in str(raised.value.hint)
    assert build(written, tuning={"config": "config"}, trust_remote_code=True).spec.trust_remote_code


@pytest.mark.parametrize(
    ("written", "place"),
    [("t.jinja", "t.jinja"), ("/mnt/t.jinja", "work/t.jinja"), ("{{ messages }}", None)],
)
def test_a_chat_template_is_a_text_or_a_path_beside_the_config(
    build: Build, tmp_path: Path, written: str, place: str | None
) -> None:
    text = "{{ messages }}"
    if place:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    run = build(config_map({"ModelConfig": {"chat_template": written}}), tuning={"config": "config"})
    assert run.spec.training.model.chat_template == text


def test_a_typed_chat_template_path_is_relative_to_where_it_was_typed(build: Build, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/c.yaml").write_text("training_config: {}")
    (tmp_path / "t.jinja").write_text("{{ here }}")
    run = build(config=tmp_path / "configs/c.yaml", overrides=("ModelConfig.chat_template=t.jinja",))
    assert run.spec.training.model.chat_template == "{{ here }}"


def test_gpus_share_the_sixteen_documents_of_a_step(build: Build) -> None:
    steps = [build(world_size=gpus).spec.training.arguments.gradient_accumulation_steps for gpus in (1, 2, 8)]
    assert steps == [16, 8, 2]


def test_a_written_output_dir_is_told_where_things_are(build: Build, tmp_path: Path) -> None:
    written = config_map({"TrainingArguments": {"output_dir": "/mnt/results"}})
    run = build(written, tuning={"config": "config"})
    assert any("/mnt/results" in note and str(tmp_path / "work") in note for note in run.notes)
    assert not any("TrainingArguments.output_dir" in note for note in build().notes)


def test_all_problems_come_at_once_each_once(build: Build) -> None:
    with pytest.raises(ConfigError) as raised:
        build(
            config_map({"LoraConfig": {"rr": 1}, "Nonsense": {}}),
            tuning={
                **WITH_SECRET,
                "config": "config",
                "preset": {"name": "phi-3-mini-4"},
                "input": {"urls": ["nope.parquet", "nix.parquet"]},
            },
        )
    assert raised.value.exit_code == 78
    said = "\n".join(map(str, raised.value.problems))
    for each in ("LoraConfig.rr", "Nonsense", "'phi-3-mini-4'", "nope.parquet:", "nix.parquet:", "Secret 'push'"):
        assert said.count(each) == 1


# ── gates ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gates_are_the_flags_or_else_the_annotations(build: Build) -> None:
    annotated = {"tuner/require": "eval_loss <= base;\n steps > 1"}
    assert build(annotations=annotated).spec.require == ("eval_loss <= base", "steps > 1")
    assert build(annotations=annotated, require=("steps > 2",)).spec.require == ("steps > 2",)
    assert build().spec.require == ()


def test_a_gate_does_not_count_for_the_digest(build: Build) -> None:
    assert build(require=("steps > 2",)).spec.digest == build().spec.digest


def test_a_gate_that_is_none_is_a_problem_beside_the_others(build: Build) -> None:
    with pytest.raises(ConfigError) as caught:
        build(require=("eval_los <= base",), overrides=("LoraConfig.rr=1",))
    said = "\n".join(map(str, caught.value.problems))
    assert 'did you mean "eval_loss"?' in said
    assert "--require" in said
    assert "LoraConfig.rr" in said


@pytest.mark.parametrize(
    ("gate", "override", "said"),
    [
        ("steps >= 100", "max_steps=50", "no run can pass it, as TrainingArguments.max_steps is 50"),
        ("steps <= 50", "max_steps=50", "it holds whatever the run does, as TrainingArguments.max_steps is 50"),
        ("epochs > 3", "num_train_epochs=3", "no run can pass it, as TrainingArguments.num_train_epochs is 3"),
        ("eval_loss > 2 * epochs / 0", "num_train_epochs=3", "divides by zero"),
    ],
)
def test_a_gate_that_the_runs_length_decides_is_refused(build: Build, gate: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--require: .*{said}"):
        build(require=(gate,), overrides=(f"TrainingArguments.{override}",))


def test_what_the_runs_length_does_not_decide_is_a_gate(build: Build) -> None:
    gates = ("steps >= 50", "epochs > 3", "eval_loss < base")
    assert build(require=gates, overrides=("TrainingArguments.max_steps=50",)).spec.require == gates
    assert build(require=("steps >= 100",), smoke=True).spec.require == ("steps >= 100",)


def test_a_rank_beyond_the_models_width_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"LoraConfig\.r \(--set\): 3,073 is more than the model is wide, 3,072"):
        build(overrides=("LoraConfig.r=3073",))
    assert build(overrides=("LoraConfig.r=3072",)).spec.training.lora.r == 3072


def test_a_misspelt_annotation_of_ours_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"metadata\.annotations\[tuner/requre\]: unknown annotation") as caught:
        build(annotations={"tuner/requre": "eval_loss < 3", "other.io/x": "y"})
    assert caught.value.hint == 'did you mean "tuner/require"?'
    known = {"tuner/require": "eval_loss < 3", "tuner/retry": "2", "tuner/job-patch": "a/b"}
    assert build(annotations=known).spec.require == ("eval_loss < 3",)


def test_a_place_that_keeps_no_checkpoints_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"metadata\.annotations\[tuner/checkpoints\]: 'disk' keeps no") as caught:
        build(annotations={"tuner/checkpoints": "disk"})
    assert caught.value.hint == "registry, or leave it out"
    build(annotations={"tuner/checkpoints": "registry"})


@pytest.mark.parametrize("smoke", [False, True])
def test_an_image_without_a_registry_is_refused_as_docker_hubs_own(build: Build, smoke: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"'support-answers:1' names no registry, which means docker\.io/library"
    ) as it:
        build(tuning={"output": {"image": "support-answers:1"}}, smoke=smoke)
    assert str(it.value.hint).startswith("write yours in front: myregistry.azurecr.io/support-answers:1; ")
    build(tuning={"output": {"image": "me/support-answers:1"}}, smoke=smoke)  # an account of Docker Hub


def test_an_image_without_a_tag_is_said_to_be_latest(build: Build) -> None:
    said = "tuning.output.image localhost:5000/x: has no tag, so it is pushed as latest"
    assert said in build(tuning={"output": {"image": "localhost:5000/x"}}).notes
    assert not any("latest" in note for note in build(tuning={"output": {"image": "localhost:5000/x:1"}}).notes)


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("www.contoso.com/train.parquet", "for a URL write https://www.contoso.com/train.parquet"),
        ("www.contoso.com/a?sig=hunter2", "for a URL write https://www.contoso.com/a"),
        ("tatsu-lab/alpaca", "for a data set of the Hugging Face Hub write hf://datasets/tatsu-lab/alpaca"),
        ("data/train.parquet", "a path begins where the command is run"),
    ],
)
def test_a_path_that_is_not_there_is_told_what_else_it_may_mean(build: Build, written: str, hint: str) -> None:
    with pytest.raises(InputMissingError, match="there is no such file") as caught:
        build(tuning={"input": {"urls": [written]}})
    assert caught.value.hint == hint
    assert "hunter2" not in str(caught.value)


def test_a_gate_on_held_out_rows_needs_some(build: Build) -> None:
    none_held_out = {"overrides": ("DatasetConfig.train_test_split=1",)}
    with pytest.raises(ConfigError, match=r"--require: 'eval_loss < base' needs held-out rows"):
        build(require=("eval_loss < base",), **none_held_out)
    assert build(require=("train_loss < 3",), **none_held_out).spec.require == ("train_loss < 3",)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_url_is_kept_without_its_query(build: Build) -> None:
    run = build(tuning={"input": {"urls": [f"{URL}?version=2&sig=hunter2#sha256={'a' * 64}"]}})
    (source,) = run.spec.sources
    assert isinstance(source, UrlSource)
    assert (source.url, source.sha256) == (URL, "a" * 64)
    assert run.secrets.queries == {source.name: "version=2&sig=hunter2"}


def test_paths_and_file_urls_are_known_by_content_and_a_directory_stands_for_its_files(
    build: Build, data: Path
) -> None:
    sources = build(tuning={"input": {"urls": ["d.parquet", f"file://{data}", str(data.parent)]}}).spec.sources
    digest = hash_file(data)
    assert sources == (
        FileSource(name="0000-d.parquet", path=str(data), sha256=digest),
        FileSource(name="0001-d.parquet", path=str(data), sha256=digest),
        VolumeSource(path=str(data.parent)),
    )


def test_what_stands_after_a_source_is_how_much_of_it_is_taken_and_what_for(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "d").mkdir()
    urls = [f"{URL}#rows=10", "a.jsonl#weight=2", "d#use=validation&rows=5", "hf://datasets/a/b#use=validation"]
    sources = build(tuning={"input": {"urls": urls}}).spec.sources
    assert [(source.kind, source.use, source.rows, source.weight) for source in sources] == [
        ("url", "training", 10, None),
        ("file", "training", None, 2.0),
        ("volume", "validation", 5, None),
        ("url", "validation", None, None),
    ]
    assert [getattr(source, "path", "") for source in sources[1:3]] == [str(tmp_path / "a.jsonl"), str(tmp_path / "d")]


def test_what_the_workspace_has_for_validation_is_evaluated(build: Build) -> None:
    sources = build(tuning={"input": {"urls": [URL], "validation": [f"{URL}?sig=SECRET#rows=5"]}}).spec.sources
    assert [(source.use, source.rows) for source in sources] == [("training", None), ("validation", 5)]


def test_a_run_with_nothing_to_train_on_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="every source is for validation, and none is trained on"):
        build(tuning={"input": {"urls": [f"{URL}#use=validation"]}})


def test_data_to_evaluate_on_stand_beside_the_workspaces_own(build: Build, tmp_path: Path) -> None:
    file = WorkspaceFile(make_workspace("phi-3-mini-4k-instruct", [URL], "out"))
    beside = with_data(file, [f"{URL}#use=validation"], Allowed())
    assert beside.workspace.tuning.input.urls == (URL, f"{URL}#use=validation")  # type: ignore[union-attr]
    instead = with_data(file, ["x.jsonl", f"{URL}#use=validation"], Allowed())
    assert instead.workspace.tuning.input.urls == ("x.jsonl", f"{URL}#use=validation")  # type: ignore[union-attr]


def test_a_file_that_is_not_what_was_pinned_is_refused(build: Build, data: Path) -> None:
    right = f"file://{data}#sha256={hash_file(data)}"
    wrong = f"file://{data}#sha256={'0' * 64}"
    assert build(tuning={"input": {"urls": [right]}}).spec.sources
    with pytest.raises(DataError, match="as pinned"):
        build(tuning={"input": {"urls": [wrong]}})


def test_missing_files_are_said_together(build: Build) -> None:
    with pytest.raises(InputMissingError, match=r"a\.parquet: .*b\.parquet: there is no such file"):
        build(tuning={"input": {"urls": ["a.parquet", "b.parquet"]}})


def test_a_host_path_is_a_directory_of_this_machine_and_other_volumes_are_not(build: Build, tmp_path: Path) -> None:
    volume = {"hostPath": {"path": str(tmp_path)}}
    run = build(tuning={"input": {"volumeSource": volume}, "output": {"volumeSource": volume}})
    assert run.spec.sources == (VolumeSource(path=str(tmp_path), source=volume),)
    assert run.spec.destination == DirectoryDestination(path=str(tmp_path))
    with pytest.raises(ConfigError, match="a persistentVolumeClaim is there in a cluster only") as raised:
        build(tuning={"input": {"volumeSource": {"persistentVolumeClaim": {"claimName": "c"}}}})
    assert "--data DIR" in str(raised.value.hint)


def test_data_replaces_the_input_of_a_workspace(data: Path, tmp_path: Path) -> None:
    from tuner.workspace import WorkspaceFile

    file = WorkspaceFile(make_workspace(PRESET, [URL], None))
    run = build_run(with_data(file, [str(data)], Allowed()), Request(output="out"), tmp_path, {})
    assert [source.kind for source in run.spec.sources] == ["file"]
    with pytest.raises(ConfigError, match="--data: "):
        with_data(file, ["http://127.0.0.1/x"], Allowed())


# ── base model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hub_model_has_the_presets_commit_unless_another_is_written(build: Build) -> None:
    preset = find_preset(PRESET)
    assert build().spec.base_model == HubModel(id=preset.model_id, revision=preset.hub_revision)
    typed = build(overrides=("ModelConfig.revision=abc",)).spec.base_model
    assert typed == HubModel(id=preset.model_id, revision="abc")
    unknown = build(tuning={"preset": {"name": "some/model"}}).spec.base_model
    assert unknown == HubModel(id="some/model", revision="main")


def test_a_directory_with_the_presets_sizes_keeps_its_hub_id(build: Build, tmp_path: Path) -> None:
    preset = find_preset(PRESET)
    whole = build(base_model=model_directory(tmp_path / "whole")).spec.base_model
    tiny = build(base_model=model_directory(tmp_path / "tiny", hidden_size=8)).spec.base_model
    assert isinstance(whole, LocalModel)
    assert (whole.id, whole.revision) == (preset.model_id, preset.revision)
    assert isinstance(tiny, LocalModel)
    assert (tiny.id, tiny.revision) == (None, None)


def test_sizes_one_level_down_are_compared_too(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    nested = {"model_type": "seer", "text_config": {"hidden_size": 8, "vocab_size": 9}}
    (directory / "config.json").write_text(json.dumps(nested))
    preset = find_preset(PRESET).model_copy(update={"config": nested})
    other = preset.model_copy(update={"config": {**nested, "text_config": {"hidden_size": 16, "vocab_size": 9}}})
    assert is_weights_of(preset, directory)
    assert not is_weights_of(other, directory)


def test_a_preset_that_is_a_path_is_its_own_base_and_claims_no_hub_id(build: Build, tmp_path: Path) -> None:
    first, second = model_directory(tmp_path / "first"), model_directory(tmp_path / "second")
    tuning = {"preset": {"name": str(first)}}
    alone = build(tuning=tuning).spec.base_model
    given = build(tuning=tuning, base_model=second).spec.base_model
    assert isinstance(alone, LocalModel)
    assert isinstance(given, LocalModel)
    assert (alone.path, alone.id) == (str(first), None)
    assert (given.path, given.id) == (str(second), None)


def test_a_directory_without_a_slash_is_told_how_to_write_it(build: Build, tmp_path: Path) -> None:
    model_directory(tmp_path / "mymodel")
    with pytest.raises(ConfigError, match=r"tuning\.preset\.name: no preset 'mymodel'") as raised:
        build(tuning={"preset": {"name": "mymodel"}})
    assert "./mymodel" in str(raised.value.hint)


def test_a_preset_with_a_name_longer_than_any_files_is_no_preset(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"tuning\.preset\.name: no preset 'aaa"):
        build(tuning={"preset": {"name": "a" * 400}})


def test_weights_in_an_image_are_kaitos_preset_option(build: Build) -> None:
    options = {"image": "reg.azurecr.io/weights:1"}
    model = build(tuning={"preset": {"name": PRESET, "presetOptions": options}}).spec.base_model
    assert isinstance(model, ImageModel)
    assert (str(model.reference), model.id) == ("reg.azurecr.io/weights:1", find_preset(PRESET).model_id)


# ── destinations and smoke runs ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reg.azurecr.io/x:1", ImageDestination(reference="reg.azurecr.io/x:1")),
        ("localhost:5000/x", ImageDestination(reference="localhost:5000/x:latest")),
        ("oci:/a/b:v1", LayoutDestination(path="/a/b", tag="v1")),
        ("oci:/a/b", LayoutDestination(path="/a/b", tag="latest")),
        ("/a/b", DirectoryDestination(path="/a/b")),
    ],
)
def test_an_output_with_a_registry_host_is_an_image(text: str, expected: object) -> None:
    assert parse_output(text) == expected


@pytest.mark.parametrize("text", ["", f"reg.io/x@sha256:{'a' * 64}", "s3://bucket/x", "reg.io/UP"])
def test_an_output_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_output(text)


def test_a_smoke_run_pushes_beside_its_work_and_asks_the_real_destination(build: Build, tmp_path: Path) -> None:
    spec = build(smoke=True).spec
    assert spec.base_model == SmokeModel()
    assert spec.destination == LayoutDestination(path=str(tmp_path / "work/image"), tag="smoke")
    assert spec.probe == ImageDestination(reference="reg.azurecr.io/x:1")
    assert build(smoke=True, preflight=False).spec.probe is None
    elsewhere = build(smoke=True, output="oci:/a:b").spec
    assert (elsewhere.probe, elsewhere.destination) == (None, LayoutDestination(path="/a", tag="b"))


def test_a_smoke_run_is_short_unless_another_length_was_typed(build: Build) -> None:
    written = config_map({"TrainingArguments": {"max_steps": 900}})
    short = build(written, tuning={"config": "config"}, smoke=True).spec.training
    typed = build(smoke=True, overrides=("TrainingArguments.max_steps=2",)).spec.training
    steps = [(each.arguments.max_steps, each.origin("TrainingArguments.max_steps")) for each in (short, typed)]
    assert steps == [(4, "--smoke"), (2, "--set")]


def test_a_smoke_run_of_a_model_nobody_knows_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="--smoke cannot make its architecture small"):
        build(tuning={"preset": {"name": "some/model"}}, smoke=True)


# ── the digest ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def digest(build: Build, data: Path) -> Callable[..., str]:
    def of(tuning: Mapping[str, Any] | None = None, *others: dict[str, Any], **flags: Any) -> str:
        return build(*others, tuning={"input": {"urls": ["d.parquet", URL]}, **(tuning or {})}, **flags).spec.digest

    return of


def urls(*urls: str) -> dict[str, Any]:
    return {"input": {"urls": list(urls)}}


@pytest.mark.parametrize(
    "same",
    [
        {"tuning": {"output": {"image": "elsewhere.io/y:2"}}},
        {"tuning": {"method": "QLoRA"}},
        {"tuning": urls("other/d.parquet", URL)},
        {"tuning": urls("d.parquet", f"{URL}?sv=1&sig=abc")},
        {"overrides": ("LoraConfig.r=16",)},
        {"overrides": ("TrainingArguments.learning_rate=0.0002",)},
        {"overrides": ("TrainingArguments.max_length=null",)},
        {"output": "adapter"},
        {"network": Network(allow_cidrs=("10.0.0.0/8",), plain_http=True)},
        {"preflight": False},
        {"overrides": ("TrainingArguments.watchdog=false",)},  # a run that it stopped goes on
        {"overwrite": False},
        {"env": {"HF_TOKEN": "hf_x"}},
    ],
    ids=str,
)
def test_equal_runs_have_one_digest_wherever_and_however_written(
    digest: Callable[..., str], tmp_path: Path, data: Path, same: dict[str, Any]
) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(data, tmp_path / "other")
    assert digest(**same) == digest()


@pytest.mark.parametrize(
    "different",
    [
        {"tuning": {"preset": {"name": "phi-4"}}},
        {"tuning": {"method": "lora"}},
        {"tuning": urls(URL, "d.parquet")},
        {"tuning": urls("d.parquet")},
        {"tuning": urls("changed/d.parquet", URL)},
        {"tuning": urls("d.parquet", f"{URL}2")},
        {"tuning": urls("d.parquet", f"{URL}?version=2")},
        {"tuning": urls("d.parquet", f"{URL}#sha256={'a' * 64}")},
        {"overrides": ("LoraConfig.r=32",)},
        {"overrides": ("TrainingArguments.seed=1",)},
        {"overrides": ("ModelConfig.revision=abc",)},
        {"overrides": ("ModelConfig.chat_template='{{ x }}'",)},
        {"overrides": ("DatasetConfig.shuffle_seed=1",)},
        {"smoke": True},
        {"trust_remote_code": True},
        {"world_size": 2},
    ],
    ids=str,
)
def test_a_run_with_another_input_has_another_digest(
    digest: Callable[..., str], tmp_path: Path, different: dict[str, Any]
) -> None:
    (tmp_path / "changed").mkdir()
    write_data(tmp_path / "changed/d.parquet", message_rows(5, first=1))
    assert digest(**different) != digest()


def test_a_base_model_counts_by_content_not_by_place(digest: Callable[..., str], tmp_path: Path) -> None:
    one, same = model_directory(tmp_path / "a/model"), model_directory(tmp_path / "b/model")
    other = model_directory(tmp_path / "c/model")
    (other / "model.safetensors").write_bytes(b"other weights")
    assert digest(base_model=one) == digest(base_model=same)
    assert digest(base_model=one) != digest(base_model=other)


def test_a_base_models_own_code_counts_where_it_is_run(digest: Callable[..., str], tmp_path: Path) -> None:
    one, other = model_directory(tmp_path / "a/model"), model_directory(tmp_path / "b/model")
    (one / "tokenization_own.py").write_text("LOWER = True")
    (other / "tokenization_own.py").write_text("LOWER = False")
    assert digest(base_model=one) == digest(base_model=other)
    trusted = {"trust_remote_code": True}
    assert digest(base_model=one, **trusted) != digest(base_model=other, **trusted)


def test_where_a_setting_is_written_does_not_count(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# a comment\ntraining_config:\n  LoraConfig: {r: 8}\n")
    runs = [
        build(config_map({"LoraConfig": {"r": 8}}), tuning={"config": "config"}),
        build(config=path),
        build(overrides=("LoraConfig.r=8",)),
    ]
    assert len({run.spec.digest for run in runs}) == 1
    assert len({run.spec.training.origin("LoraConfig.r") for run in runs}) == 3


# ── private sources ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_headers_for_private_sources_come_from_the_flag_and_from_the_secret_that_an_annotation_names(
    tmp_path: Path,
) -> None:
    from tuner.request import SOURCES_ANNOTATION

    flagged = tmp_path / "headers.json"
    flagged.write_text('{"https://a.example.org": {"bearer": "flag-token"}}', encoding="utf-8")
    text = f"""\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: private
  annotations: {{{SOURCES_ANNOTATION}: data-access}}
resource: {{labelSelector: {{matchLabels: {{app: x}}}}}}
tuning:
  preset: {{name: phi-4}}
  method: qlora
  input: {{urls: ["https://a.example.org/train.parquet"]}}
---
apiVersion: v1
kind: Secret
metadata: {{name: data-access}}
stringData:
  sources.json: '{{"https://a.example.org": {{"bearer": "secret-token"}}}}'
"""
    file = parse_workspace_text(text, "w.yaml", output_given=True)
    run = build_run(file, Request(source_headers=flagged, output=str(tmp_path / "out")), tmp_path, {})
    assert [json.loads(each)["https://a.example.org"]["bearer"] for each in run.secrets.source_headers] == [
        "flag-token",
        "secret-token",
    ]
    said = repr(run.secrets) + run.spec.model_dump_json()
    assert not any(secret in said for secret in ("flag-token", "secret-token"))


def test_a_malformed_header_file_is_said_without_a_word_of_it(tmp_path: Path) -> None:
    flagged = tmp_path / "headers.json"
    flagged.write_text('{"https://a.example.org": {"bearer": ["hunter2"]}}', encoding="utf-8")
    file = WorkspaceFile(workspace=make_workspace("phi-4", ["https://a.example.org/x.parquet"], str(tmp_path / "o")))
    with pytest.raises(ConfigError) as caught:
        build_run(file, Request(source_headers=flagged, output=str(tmp_path / "out")), tmp_path, {})
    assert "hunter2" not in str(caught.value)
    assert "https://a.example.org" in str(caught.value)


def test_a_smoke_run_never_takes_the_workspaces_own_tag(tmp_path: Path) -> None:
    workspace = make_workspace("phi-4", ["https://a.example.org/x.parquet"], "reg.azurecr.io/team/adapter:1")
    request = Request(smoke=True, output="reg.azurecr.io/team/adapter:1")
    with pytest.raises(ConfigError, match="the Workspace's own image"):
        build_run(WorkspaceFile(workspace=workspace), request, tmp_path, {})


# ── a pod ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TO_IMAGE = {"output": {"image": "reg.azurecr.io/x:1", "imagePushSecret": "push"}}


def test_in_a_pod_no_credential_is_read_and_those_of_the_cluster_are_named(build: Build, home: Path) -> None:
    env = {"HOME": str(home), "HF_TOKEN": "hf_mine"}
    preset = {"name": PRESET, "presetOptions": {"modelAccessSecret": "hub"}}
    run = build(place="pod", tuning={**TO_IMAGE, "preset": preset}, env=env)
    assert run.secrets.docker_configs == ()
    assert run.secrets.hf_token is None
    assert run.credentials.push == "Secret 'push' of the cluster"
    assert run.credentials.hub == "Secret 'hub' of the cluster"


def test_a_secret_in_the_file_is_checked_and_not_carried_in_the_run(build: Build) -> None:
    assert build(push_secret("open-sesame"), place="pod", tuning=TO_IMAGE).secrets.docker_configs == ()
    with pytest.raises(ConfigError, match="holds no registry credentials"):
        build(secret("push", password="open-sesame"), place="pod", tuning=TO_IMAGE)


def test_queries_of_urls_stay_in_the_secrets(build: Build) -> None:
    run = build(place="pod", tuning={**TO_IMAGE, "input": {"urls": [f"{URL}?sig=SIGNATURE"]}})
    assert list(run.secrets.queries.values()) == ["sig=SIGNATURE"]
    assert "SIGNATURE" not in run.spec.model_dump_json()


def test_volumes_are_where_the_pod_mounts_them(build: Build) -> None:
    claim = {"persistentVolumeClaim": {"claimName": "data"}}
    tuning = {"input": {"volumeSource": claim}, "output": {"volumeSource": claim}, "config": "config"}
    spec = build(
        config_map({"TrainingArguments": {"output_dir": "/mnt/out"}}), place="pod", name="v", tuning=tuning
    ).spec
    assert spec.sources == (VolumeSource(path="/mnt/data", source=claim),)
    assert spec.destination == DirectoryDestination(path="/mnt/out")


def test_an_image_volume_has_the_files_below_data(build: Build) -> None:
    tuning = {**TO_IMAGE, "input": {"image": "reg.azurecr.io/data:1"}}
    assert build(place="pod", tuning=tuning).spec.sources == (ImageSource(reference="reg.azurecr.io/data:1"),)
    (source,) = build(place="pod", tuning=tuning, image_volume=True).spec.sources
    assert source == VolumeSource(path="/mnt/data/data", source={"image": {"reference": "reg.azurecr.io/data:1"}})


def test_a_smoke_run_in_a_pod_leaves_its_image_on_the_results_volume(build: Build) -> None:
    spec = build(place="pod", tuning=TO_IMAGE, smoke=True).spec
    assert spec.destination == LayoutDestination(path="/mnt/results/.tuner/image", tag="smoke")
    assert spec.probe == ImageDestination(reference="reg.azurecr.io/x:1")
    spec = build(place="pod", tuning=TO_IMAGE, smoke=True, output="reg.azurecr.io/x:smoke").spec
    assert spec.destination == ImageDestination(reference="reg.azurecr.io/x:smoke")


def test_the_ca_certificate_is_in_the_pods_config_map(build: Build, tmp_path: Path) -> None:
    shutil.copy(make_certificate(tmp_path).certificate, tmp_path / "ca.pem")
    network = Network(ca_file=str(tmp_path / "ca.pem"))
    assert build(place="pod", tuning=TO_IMAGE, network=network).spec.network.ca_file == "/mnt/config/ca.crt"


def test_what_only_a_box_has_is_refused_for_a_pod_all_at_once(build: Build, data: Path) -> None:
    tuning = {**TO_IMAGE, "input": {"urls": [str(data)]}, "preset": {"name": "./model"}}
    with pytest.raises(ConfigError) as caught:
        build(place="pod", name="pusher", tuning=tuning, docker_config=data, output="adapter")
    text = "\n".join(str(problem) for problem in caught.value.problems)
    assert "metadata.name: 'pusher' is the name of one of the pod's own containers" in text
    assert "tuning.input.urls[0]: names a file of one machine, which a pod cannot read" in text
    assert "--docker-config: names something of this machine" in text
    assert "--output adapter: a pod pushes to a registry" in text
    assert "./model is a directory of one machine, which a pod cannot read" in text


def test_a_config_map_cannot_name_a_file_of_whoever_renders(build: Build, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    named = config_map({"ModelConfig": {"chat_template": "template.jinja"}})
    with pytest.raises(ConfigError, match="names a file, which is not in the pod"):
        build(named, place="pod", tuning={**TO_IMAGE, "config": "config"})
    typed = build(place="pod", tuning=TO_IMAGE, overrides=("ModelConfig.chat_template=template.jinja",))
    assert typed.spec.training.model.chat_template == "{{ messages }}"


def test_a_push_without_a_secret_must_be_meant(build: Build) -> None:
    with pytest.raises(ConfigError, match="must specify imagePushSecret"):
        build(place="pod")
    assert build(place="pod", pushes_without_secret=True).credentials.push == "anonymous"


@pytest.mark.parametrize(
    ("selector", "problem"),
    [
        ({"matchLabels": {"app": "two words"}}, "matchLabels[app]: 'two words' is no value that a label can have"),
        ({"matchLabels": {"app": "x" * 64}}, "is no value that a label can have: at most 63"),
        ({"matchLabels": {"a/b/c": "x"}}, "matchLabels[a/b/c]: is no key that a label can have"),
        ({"matchExpressions": [{"key": "app", "operator": "In"}]}, "the operator In needs values"),
        (
            {"matchExpressions": [{"key": "app", "operator": "Exists", "values": ["x"]}]},
            "the operator Exists takes no values",
        ),
    ],
)
def test_labels_that_no_node_can_have_are_refused(selector: dict[str, Any], problem: str, tmp_path: Path) -> None:
    document = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "labels"},
        "resource": {"labelSelector": selector},
        "tuning": {"preset": {"name": PRESET}, "method": "qlora", "input": {"urls": [URL]}, **TO_IMAGE},
    }
    with pytest.raises(ConfigError) as caught:
        build_run(parse_objects(document), Request(place="pod"), tmp_path, {})
    assert problem in caught.value.message
