"""What serves an adapter: KAITO's inference Workspace, vLLM's Deployment."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from test_cluster_job import CLAIM, NAME, config_with, workspace

from tuner.cluster.checks import quantity, restricted_problems
from tuner.cluster.job_options import JobOptions
from tuner.cluster.serving import LORA_RANKS, Server, Serving, ServingOptions, render_serving, service_name
from tuner.cluster.templates import container, containers, has_volume, pod_spec, volume
from tuner.errors import ConfigError
from tuner.reference import parse_reference
from tuner.registry.credentials import parse_credentials
from tuner.request import Request, build_run, docker_configs_for
from tuner.workspace import parse_objects

BY_DIGEST = "contoso.azurecr.io/adapters/tickets@sha256:" + "0" * 64


def serve(
    server: Server,
    document: dict[str, Any] | None = None,
    config: str | None = None,
    *,
    job: dict[str, Any] | None = None,
    **options: Any,
) -> Serving:
    others = [config_with(config)] if config else []
    if config:
        document = workspace(tuning={"config": "mine"})
    file = parse_objects(document or workspace(), *others)
    if "adapter" in options:
        options["adapter"] = parse_reference(options["adapter"])
    run = build_run(file, Request(place="pod"), Path("nowhere"), {})
    return render_serving(
        server, file, run, JobOptions("reg.example/tuner:1", **(job or {})), ServingOptions(**options)
    )


def arguments(serving: Serving) -> list[str]:
    args: list[str] = container(serving.objects[0], "vllm")["args"]
    return args


def after(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_vllm_serves_the_pinned_base_model_and_the_adapter_under_the_workspaces_name() -> None:
    args = arguments(serve("vllm", adapter=BY_DIGEST))
    assert args[0] == "microsoft/Phi-3-mini-4k-instruct"
    assert after(args, "--revision") == "0a67737cc96d2554230f90338b163bc6380a2a85"
    assert "--enable-lora" in args
    assert after(args, "--lora-modules") == f"{NAME}=/adapter/files"
    assert after(args, "--chat-template") == "/adapter/files/chat_template.jinja"


@pytest.mark.parametrize(("rank", "flag"), [(1, 8), (8, 8), (9, 16), (48, 64), (300, 320), (512, 512)])
def test_the_rank_is_rounded_up_to_one_that_vllm_takes(rank: int, flag: int) -> None:
    args = arguments(serve("vllm", config=f"training_config: {{LoraConfig: {{r: {rank}}}}}"))
    assert after(args, "--max-lora-rank") == str(flag)
    assert flag in LORA_RANKS


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("LoraConfig: {r: 600}", "vLLM takes ranks up to 512, and this is 600"),
        ("LoraConfig: {use_dora: true}", "vLLM loads no adapter with use_dora"),
        ("LoraConfig: {modules_to_save: [lm_head]}", "vLLM loads no adapter with modules_to_save"),
        ("LoraConfig: {bias: lora_only}", "vLLM loads no adapter with bias"),
        ("LoraConfig: {rank_pattern: {o_proj: 4}}", "vLLM ignores it, and would scale those layers wrongly"),
    ],
)
def test_an_adapter_that_vllm_does_not_load_is_refused(config: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        serve("vllm", config=f"training_config: {{{config}}}")
    assert serve("kaito", config=f"training_config: {{{config}}}").objects


def test_tuner_unpacks_the_adapter_with_the_push_secret_that_only_it_has() -> None:
    deployment = serve("vllm", adapter=BY_DIGEST).objects[0]
    puller = container(deployment, "adapter")
    assert puller["image"] == "reg.example/tuner:1"
    assert puller["args"] == ["pull", BY_DIGEST, "/adapter/files", "--docker-config", "/run/secrets/registry"]
    # Whole: which key it has depends on its type, and an item that is not there keeps the pod from starting.
    assert volume(deployment, "docker-config")["secret"] == {"secretName": "push", "defaultMode": 0o440}
    paths = {each["name"]: {mount["mountPath"] for mount in each["volumeMounts"]} for each in containers(deployment)}
    assert "/run/secrets/registry" in paths["adapter"]
    assert "/run/secrets/registry" not in paths["vllm"]


@pytest.mark.parametrize("key", [".dockerconfigjson", ".dockercfg", "config.json"])
def test_the_secret_that_is_mounted_is_read_whatever_its_type(key: str, tmp_path: Path) -> None:
    auths = {"contoso.azurecr.io": {"auth": base64.b64encode(b"tuner:secret").decode()}}
    (tmp_path / key).write_text(json.dumps(auths if key == ".dockercfg" else {"auths": auths}))
    store = parse_credentials(docker_configs_for(tmp_path, {}))
    assert store.find(parse_reference(BY_DIGEST))


def test_an_adapter_on_a_volume_is_mounted_and_nothing_is_pulled() -> None:
    deployment = serve("vllm", workspace(tuning={"output": {"volumeSource": CLAIM}})).objects[0]
    assert [each["name"] for each in containers(deployment)] == ["vllm"]
    assert volume(deployment, "adapter") == {"name": "adapter", **CLAIM}
    assert not has_volume(deployment, "docker-config")


def test_every_gpu_of_the_machine_is_used() -> None:
    serving = serve("vllm", job={"instance_type": "Standard_NC48ads_A100_v4"})
    assert after(arguments(serving), "--tensor-parallel-size") == "2"
    resources = container(serving.objects[0], "vllm")["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "2"
    assert quantity(resources["requests"]["memory"]) <= quantity(resources["limits"]["memory"])  # type: ignore[operator]


def test_a_gated_models_token_is_in_the_server_which_downloads_it() -> None:
    preset = {"name": "llama-3.1-8b-instruct", "presetOptions": {"modelAccessSecret": "hub"}}
    vllm = container(serve("vllm", workspace(tuning={"preset": preset})).objects[0], "vllm")
    (token,) = [each for each in vllm["env"] if each["name"] == "HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"]["name"] == "hub"


def test_the_service_finds_the_pods_and_a_restricted_namespace_takes_them() -> None:
    deployment, service = serve("vllm", job={"namespace": "serving"}).objects
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {each["metadata"]["namespace"] for each in (deployment, service)} == {"serving"}
    assert restricted_problems(pod_spec(deployment)) == []


def test_a_services_name_begins_with_a_letter_and_is_never_too_long() -> None:
    assert service_name("tickets") == "tickets-vllm"
    assert service_name("7b") == "tuner-7b-vllm"
    assert len(service_name("7" * 63)) <= 63


def test_a_base_model_without_a_known_template_keeps_its_own() -> None:
    serving = serve("vllm", workspace(tuning={"preset": {"name": "someone/model"}}))
    assert "--chat-template" not in arguments(serving)
    assert "no chat template is known for someone/model: vLLM takes the base model's own" in serving.notes


# ── KAITO ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_kaito_gets_the_adapter_by_digest_and_a_strength_with_the_runtime_that_knows_it() -> None:
    plain = serve("kaito", adapter=BY_DIGEST).objects[0]
    assert plain["inference"]["adapters"] == [
        {"source": {"name": NAME, "image": BY_DIGEST, "imagePullSecrets": ["push"]}}
    ]
    assert "annotations" not in plain["metadata"]
    strong = serve("kaito", adapter=BY_DIGEST, strength=0.5).objects[0]
    assert strong["inference"]["adapters"][0]["strength"] == "0.5"
    assert strong["metadata"]["annotations"] == {"kaito.sh/runtime": "transformers"}


def test_a_tag_may_move_and_that_is_said() -> None:
    assert any("is a tag, which another push may move" in note for note in serve("kaito").notes)
    assert not any("is a tag" in note for note in serve("kaito", adapter=BY_DIGEST).notes)


@pytest.mark.parametrize(
    ("server", "options", "sentence"),
    [
        ("kaito", {"strength": 1.5}, "--strength: must be 0 to 1, not 1.5"),
        ("vllm", {"strength": 0.5}, "--strength: is KAITO's"),
        ("kaito", {"adapter": "mine"}, "--adapter: 'mine' names no registry"),
    ],
)
def test_an_option_that_means_nothing_is_refused(server: Server, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        serve(server, **options)


def test_kaito_takes_no_adapter_from_a_volume() -> None:
    on_volume = workspace(tuning={"output": {"volumeSource": CLAIM}})
    with pytest.raises(ConfigError, match=r"KAITO's inference\.adapters takes an image"):
        serve("kaito", on_volume)
    assert serve("kaito", on_volume, adapter=BY_DIGEST).objects
