import base64
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.errors import ConfigError, InputMissingError, Problem, TunerError
from tuner.urls import Allowed
from tuner.workspace import (
    SEVERAL_PLACEHOLDERS,
    TEMPLATE_EXPRESSION,
    ImageInput,
    ImageOutput,
    Secret,
    Tuning,
    UrlInput,
    VolumeInput,
    VolumeOutput,
    WorkspaceFile,
    cluster_problems,
    is_local_file,
    load_workspace_file,
    make_workspace,
    parse_objects,
    parse_workspace_text,
    require_tuning,
    several_placeholders,
    template_expression,
    template_workspace,
)

WORKSPACES = Path(__file__).parent / "workspaces"


def good() -> dict[str, Any]:
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "tickets"},
        "resource": {"instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"app": "tickets"}}},
        "tuning": {
            "preset": {"name": "phi-4-mini-instruct"},
            "method": "qlora",
            "input": {"urls": ["https://data.contoso.com/train.parquet"]},
            "output": {"image": "contoso.azurecr.io/adapters/tickets:1", "imagePushSecret": "contoso-registry"},
        },
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    """`good()` with one value set, or taken out when it is Ellipsis."""
    workspace = good()
    *parents, last = path.split(".")
    at = workspace
    for parent in parents:
        at = at.setdefault(parent, {})
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return workspace


def parse(workspace: dict[str, Any], **options: Any) -> WorkspaceFile:
    return parse_workspace_text(yaml.safe_dump(workspace, sort_keys=False), "w.yaml", **options)


def tuning_of(workspace: dict[str, Any], **options: Any) -> Tuning:
    return require_tuning(parse(workspace, **options))


def problems_of(text: str, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_workspace_text(text, "w.yaml", **options)
    return caught.value.problems


def the_problem(workspace: dict[str, Any], **options: Any) -> Problem:
    (problem,) = problems_of(yaml.safe_dump(workspace, sort_keys=False), **options)
    return problem


def load(name: str, **options: Any) -> WorkspaceFile:
    return load_workspace_file(WORKSPACES / name, **options)


# ── files as users have them ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_workspace_file_is_tested_here() -> None:
    names = {path.name for path in WORKSPACES.iterdir()}
    assert names == {
        "from_cluster.yaml",
        "image_input.yaml",
        "inference.yaml",
        "outdated_falcon.yaml",
        "quick_start.yaml",
        "quick_start_filled.yaml",
        "several_documents.yaml",
        "v1alpha1.yaml",
        "volumes.yaml",
    }


def test_the_quick_starts_placeholders_are_called_placeholders() -> None:
    with pytest.raises(ConfigError) as caught:
        load("quick_start.yaml")
    image, secret = caught.value.problems
    assert image.line == 19
    assert image.path == "tuning.output.image"
    assert image.message.startswith("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE has placeholders")
    assert (secret.line, secret.path) == (20, "tuning.output.imagePushSecret")
    assert secret.message.startswith("ACR_REGISTRY_SECRET_HERE is a placeholder")


def test_the_quick_start_parses_as_it_is_when_the_command_line_names_the_destination() -> None:
    tuning = require_tuning(load("quick_start.yaml", output_given=True))
    assert tuning.output is None
    assert tuning.preset.name == "phi-3-mini-128k-instruct"
    assert isinstance(tuning.input, UrlInput)
    assert tuning.input.urls[0].endswith("?download=true")


def test_the_filled_quick_start_parses_with_its_config_map() -> None:
    file = load("quick_start_filled.yaml")
    assert file.notes == ()
    tuning = require_tuning(file)
    assert tuning.output == ImageOutput(
        image="contoso.azurecr.io/adapters/phi-3:0.0.1", imagePushSecret="contoso-registry"
    )
    assert tuning.config == "optimized-phi3-tuning"
    text, name, first_line = file.config_maps["optimized-phi3-tuning"].training_config()
    assert yaml.safe_load(text)["training_config"]["LoraConfig"]["r"] == 8
    assert Path(name).read_text(encoding="utf-8").splitlines()[first_line - 1].strip() == text.splitlines()[0]


def test_image_input() -> None:
    tuning = require_tuning(load("image_input.yaml"))
    assert tuning.method == "lora"
    assert tuning.input == ImageInput(
        name="support-tickets",
        image="contoso.azurecr.io/datasets/support:2025-11",
        imagePullSecrets=("contoso-pull",),
    )


def test_volumes_in_and_out_and_the_claims_beside_are_passed_over() -> None:
    file = load("volumes.yaml")
    tuning = require_tuning(file)
    assert isinstance(tuning.input, VolumeInput)
    assert tuning.input.volume_source == {"persistentVolumeClaim": {"claimName": "pvc-input"}}
    assert isinstance(tuning.output, VolumeOutput)
    assert tuning.output.volume_source == {"persistentVolumeClaim": {"claimName": "pvc-output"}}
    assert file.other_kinds == ("PersistentVolumeClaim/pvc-input", "PersistentVolumeClaim/pvc-output")


def test_v1alpha1_parses_and_its_deprecated_fields_are_named_with_their_lines() -> None:
    file = load("v1alpha1.yaml")
    assert file.workspace.api_version == "kaito.sh/v1alpha1"
    assert [note.removeprefix(str(WORKSPACES)) for note in file.notes] == [
        "/v1alpha1.yaml:7 resource.count: deprecated by KAITO; tuning always runs on one node",
        "/v1alpha1.yaml:11 resource.preferredNodes: deprecated by KAITO; only a preference here, use labelSelector",
    ]


def test_fault_21_the_method_is_read_in_any_case() -> None:
    assert require_tuning(load("v1alpha1.yaml")).method == "qlora"
    for method in ("qlora", "QLoRA", "QLORA", "LoRA", "lora"):
        assert tuning_of(changed("tuning.method", method)).method == method.lower()


def test_an_inference_workspace_parses_and_is_told_that_this_runs_tuning() -> None:
    file = load("inference.yaml")
    assert file.workspace.tuning is None
    assert file.workspace.inference is not None
    with pytest.raises(ConfigError, match="has an inference section; this command runs tuning"):
        require_tuning(file)
    assert cluster_problems(file.workspace) == []


def test_outdated_parts_of_the_falcon_example_are_named_precisely() -> None:
    file = load("outdated_falcon.yaml")
    notes = {note.split(" ")[1].rstrip(":"): note for note in file.notes}
    assert list(notes) == [
        "resource.instanceType",
        "tuning.preset.name",
        "tuning.preset.accessMode",
        "tuning.preset.presetOptions.image",
    ]
    assert "Azure no longer offers Standard_NC12s_v3" in notes["resource.instanceType"]
    assert "tiiuae/falcon-7b" in notes["tuning.preset.name"]
    options = require_tuning(file).preset.preset_options
    assert str(options.image) == "contoso.azurecr.io/kaito-falcon-7b:0.0.4"
    assert options.image_pull_secrets == ("contoso-pull",)


def test_several_documents_are_told_apart() -> None:
    file = load("several_documents.yaml")
    assert file.workspace.metadata.namespace == "tuning"
    assert list(file.config_maps) == ["qlora-short"]
    assert list(file.secrets) == ["contoso-registry"]
    assert file.other_kinds == ("Namespace/tuning",)
    auths = json.loads(file.secrets["contoso-registry"].docker_config())["auths"]
    assert auths["contoso.azurecr.io"]["password"] == "open-sesame"
    assert require_tuning(file).preset.preset_options.model_access_secret == "hugging-face"
    assert "open-sesame" not in repr(file)
    assert "eyJhdXRocyI6" not in repr(file)


def test_what_the_server_filled_in_is_nobodys_mistake() -> None:
    written = changed("resource.count", 1)
    written["tuning"]["preset"]["accessMode"] = "public"
    assert parse_objects(written).notes == ()
    assert len(parse(written).notes) == 2
    written["tuning"]["preset"]["accessMode"] = "private"
    assert len(parse_objects(written).notes) == 1


def test_what_kubectl_get_writes_parses() -> None:
    file = load("from_cluster.yaml")
    assert file.workspace.metadata.annotations == {"workspace.kaito.io/revision": "1"}
    assert require_tuning(file).preset.access_mode == "public"


# ── the rules, row by row ────────────────────────────────────────────────────────────────────────────────────────────

URL = "https://data.contoso.com/a.parquet"
IMAGE = "contoso.azurecr.io/a:1"
CLAIM = {"persistentVolumeClaim": {"claimName": "c"}}


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        ("tuning", ..., "", "either inference or tuning must be specified, not neither"),
        ("inference", {"preset": {"name": "phi-4"}}, "inference", "must be specified, but not both"),
        ("apiVersion", "kaito.sh/v1", "apiVersion", "must be kaito.sh/v1beta1 or kaito.sh/v1alpha1, not 'kaito.sh/v1'"),
        ("apiVersion", ..., "apiVersion", "is required"),
        ("metadata", ..., "metadata", "is required"),
        ("metadata.name", ..., "metadata.name", "is required: the run, its Job and its adapter are named after it"),
        ("metadata.name", "Tickets_1", "metadata.name", "'Tickets_1' must be a DNS-1123 label"),
        ("metadata.name", "a.b", "metadata.name", "must be a DNS-1123 label"),
        ("metadata.name", "a" * 64, "metadata.name", "is too long; at most 63 characters"),
        ("metadata.name", 7, "metadata.name", "must be text, not a number"),
        ("metadata.labels", {"on": True}, "metadata.labels.on", "must be text, not true or false"),
        ("tuning.method", "dora", "tuning.method", "must be lora or qlora, not 'dora'"),
        ("tuning.method", ..., "tuning.method", "is required: lora or qlora"),
        ("tuning.method", 4, "tuning.method", "must be lora or qlora, not a number"),
        ("tuning.input", ..., "tuning.input", "is required: the data to tune on"),
        ("tuning.output", ..., "tuning.output", "is required: where the adapter goes"),
        ("tuning.preset", ..., "tuning.preset", "is required: the model to tune"),
        ("tuning.preset.name", ..., "tuning.preset.name", "is required: the model to tune"),
        ("tuning.preset.name", "", "tuning.preset.name", "is empty"),
        ("tuning.preset", "phi-4", "tuning.preset", "must be a mapping, not text"),
        ("tuning.preset.accessMode", "secret", "tuning.preset.accessMode", "must be public or private, not 'secret'"),
        ("tuning.config", "My_Config", "tuning.config", "must be the name of a Kubernetes object"),
        ("tuning.input", {}, "tuning.input", "exactly one of urls, image or volumeSource must be specified"),
        ("tuning.input", {"urls": []}, "tuning.input", "exactly one of urls, image or volumeSource"),
        ("tuning.input", {"name": "x", "image": ""}, "tuning.input", "exactly one of urls, image or volumeSource"),
        ("tuning.input", {"urls": [URL], "image": IMAGE}, "tuning.input.image", "exactly one of urls, image or"),
        ("tuning.input", {"urls": [URL], "volumeSource": CLAIM}, "tuning.input.volumeSource", "exactly one of urls"),
        ("tuning.input", {"image": IMAGE, "volumeSource": CLAIM}, "tuning.input.volumeSource", "exactly one of urls"),
        ("tuning.input", URL, "tuning.input", "must be a mapping, not text"),
        ("tuning.input.urls", URL, "tuning.input.urls", "must be a list, not text"),
        ("tuning.input.urls", [None], "tuning.input.urls[0]", "must be text, not nothing"),
        ("tuning.input.urls", [URL, ""], "tuning.input.urls[1]", "is empty"),
        ("tuning.input.urls", ["https://"], "tuning.input.urls[0]", "invalid data source URL"),
        ("tuning.input.urls", ["ftp://contoso.com/a"], "tuning.input.urls[0]", "must use HTTP or HTTPS"),
        ("tuning.input", {"image": "a//b"}, "tuning.input.image", "an empty part between slashes"),
        (
            "tuning.input",
            {"image": IMAGE, "imagePullSecrets": [{"name": "x"}]},
            "tuning.input.imagePullSecrets[0]",
            "text",
        ),
        (
            "tuning.input",
            {"volumeSource": {}},
            "tuning.input.volumeSource",
            "exactly one kind of volume; it names none",
        ),
        ("tuning.input", {"volumeSource": {"pvc": {}}}, "tuning.input.volumeSource", "'pvc' is no kind of Kubernetes"),
        (
            "tuning.input",
            {"volumeSource": {"persistentVolumeClaim": {"name": "c"}}},
            "tuning.input.volumeSource",
            "persistentVolumeClaim has no claimName",
        ),
        ("tuning.output", {}, "tuning.output", "exactly one of image or volumeSource must be specified"),
        (
            "tuning.output",
            {"image": IMAGE, "volumeSource": CLAIM},
            "tuning.output.volumeSource",
            "exactly one of image",
        ),
        ("tuning.output", {"image": "contoso.azurecr.io/Big:1"}, "tuning.output.image", "has upper-case letters"),
        ("tuning.output", {"image": f"a.io/b@sha256:{'0' * 64}"}, "tuning.output.image", "names a digest"),
        ("tuning.output", {"volumeSource": {"configMap": {"name": "x"}}}, "tuning.output.volumeSource", "read-only"),
        ("resource.count", 2, "resource.count", "tuning does not support multi-node configurations"),
        ("resource.count", 0, "resource.count", "greater than or equal to 1"),
        ("resource.count", "1", "resource.count", "must be a whole number, not text"),
        ("resource.partition", {"mode": "mig"}, "resource.partition", "GPU partitioning is not supported for tuning"),
    ],
)
def test_one_wrong_value_is_one_problem_at_its_place(path: str, value: Any, where: str, message: str) -> None:
    problem = the_problem(changed(path, value))
    assert problem.path == where
    assert message in problem.message


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "files.localhost",
        "metadata.google.internal",
        "metadata.google",
        "instance-data.ec2.internal",
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.7",
        "169.254.169.254",
        "168.63.129.16",
        "[::1]",
        "[fe80::1]",
    ],
)
def test_urls_of_local_metadata_and_private_addresses_are_refused_without_showing_their_query(host: str) -> None:
    problem = the_problem(changed("tuning.input.urls", [f"http://{host}/a?sig=open-sesame"]))
    assert problem.path == "tuning.input.urls[0]"
    assert "open-sesame" not in f"{problem} {problem.hint}"


def test_allowed_addresses_are_allowed() -> None:
    workspace = changed("tuning.input.urls", ["http://127.0.0.1:8000/a.parquet"])
    assert tuning_of(workspace, allowed=Allowed.of(["127.0.0.1/32"], private=False)).input == UrlInput.model_construct(
        urls=("http://127.0.0.1:8000/a.parquet",), name=None
    )


def test_fault_23_urls_and_exactly_one_source_are_checked_on_every_parse() -> None:
    """KAITO checks them on create only; here one function reads every version of a Workspace."""
    first = good()
    tuning_of(first)
    for update in ({"urls": ["http://169.254.169.254/latest"]}, {"urls": [URL], "image": IMAGE}, {}):
        first["tuning"]["input"] = update
        the_problem(first)


def test_node_provisioning_rules_do_not_apply() -> None:
    for instance_type in (..., "", "anything-at-all"):
        parse(changed("resource.instanceType", instance_type))
    parse(changed("resource", ...))


def test_empty_fields_count_as_not_written_as_in_kaito() -> None:
    tuning = tuning_of(changed("tuning.input", {"urls": [], "image": IMAGE, "volumeSource": None}))
    assert tuning.input == ImageInput(image=IMAGE)
    assert tuning_of(changed("tuning.config", "")).config is None


def test_secrets_that_no_image_needs_are_harmless_and_noted() -> None:
    workspace = changed("tuning.input.imagePullSecrets", ["x"])
    workspace["tuning"]["output"] = {"volumeSource": CLAIM, "imagePushSecret": "x"}
    notes = parse(workspace).notes
    assert len(notes) == 2
    assert all("has no effect without an image" in note for note in notes)


# ── local files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url", ["data/train.parquet", "/data/train.parquet", "file:///data/a.parquet", "C:\\a.parquet"]
)
def test_local_files_are_for_a_box(url: str) -> None:
    assert is_local_file(url)
    workspace = changed("tuning.input.urls", [url])
    file = parse(workspace)
    assert [problem.path for problem in cluster_problems(file.workspace)] == ["tuning.input.urls[0]"]
    assert "a pod cannot read" in the_problem(workspace, local_files=False).message


def test_urls_are_not_local_files() -> None:
    assert not any(map(is_local_file, ["https://contoso.com/a", "HTTP://contoso.com/a", "s3://bucket/a", "https:/a"]))


# ── the cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_image_without_push_secret_is_a_problem_of_the_cluster_only() -> None:
    workspace = parse(changed("tuning.output.imagePushSecret", ...)).workspace
    (problem,) = cluster_problems(workspace)
    assert problem.path == "tuning.output.imagePushSecret"
    assert "must specify imagePushSecret with destination image" in problem.message
    assert cluster_problems(parse(good()).workspace) == []


# ── all problems at once ─────────────────────────────────────────────────────────────────────────────────────────────

MANY_FAULTS = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: my adapter
resource:
  count: 2
tuning:
  preset:
    nam: phi-4
  methd: qlora
  input:
    urls:
      - https://data.contoso.com/a.parquet
      - http://localhost/b.parquet
    image: contoso.azurecr.io/x:1
  output:
    volume: {}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: c
data:
  training_config.yaml:
    training_config: {}
"""


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    problems = problems_of(MANY_FAULTS)
    assert [(problem.line, problem.path) for problem in problems] == [
        (4, "metadata.name"),
        (6, "resource.count"),
        (7, "tuning.method"),
        (8, "tuning.preset.name"),
        (9, "tuning.preset.nam"),
        (10, "tuning.methd"),
        (14, "tuning.input.urls[1]"),
        (15, "tuning.input.image"),
        (17, "tuning.output.volume"),
        (24, "data[training_config.yaml]"),
    ]
    assert all(problem.file == "w.yaml" for problem in problems)


@pytest.mark.parametrize(
    ("path", "key", "hint"),
    [
        ("tuning", "methd", 'did you mean "method"?'),
        ("tuning.input", "url", 'did you mean "urls"?'),
        ("tuning.output", "imagepushsecret", 'did you mean "imagePushSecret"?'),
        ("tuning.preset", "presetOption", 'did you mean "presetOptions"?'),
        ("resource", "instancetype", 'did you mean "instanceType"?'),
        ("metadata", "lables", 'did you mean "labels"?'),
        ("", "preset", "it belongs under tuning"),
        ("", "instanceType", "it belongs under resource"),
        ("tuning.output", "volume", 'KAITO calls it "volumeSource"'),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(path: str, key: str, hint: str) -> None:
    problem = the_problem(changed(f"{path}.{key}".lstrip("."), "x"))
    assert problem.path == f"{path}.{key}".lstrip(".")
    assert problem.message == "unknown key"
    assert problem.hint == hint


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("tuning.preset", "phi-4", "did you mean preset: {name: phi-4}?"),
        ("tuning.preset", "a: b\n", "preset: {name: NAME}"),
        ("tuning.input", URL, "input: {urls: [URL]}, {image: REFERENCE} or {volumeSource: VOLUME}"),
        ("tuning.input", [URL], "input: {urls: [URL]}, {image: REFERENCE} or {volumeSource: VOLUME}"),
        ("tuning.output", IMAGE, "output: {image: REFERENCE, imagePushSecret: NAME} or {volumeSource: VOLUME}"),
        ("resource", "Standard_NC6s_v3", "resource: {instanceType: TYPE}"),
        ("tuning.preset", 4, None),
        ("tuning.method", "full", "qlora: 4-bit base model, lora: 16 bit; a model is not trained whole here"),
        (
            "tuning.config",
            {"LoraConfig": {"r": 8}},
            "write a ConfigMap's name; the settings stand in it, under the key training_config.yaml",
        ),
        ("tuning.input.urls", [{"url": URL}], "write the address alone"),
        ("tuning.output.imagePushSecret", ["a"], "write one alone, without [ ] or -"),
        ("resource.labelSelector", {"app": "x"}, "labels stand below matchLabels: {KEY: VALUE}"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_the_right_one(path: str, value: Any, hint: str | None) -> None:
    assert the_problem(changed(path, value)).hint == hint


def test_a_signed_url_as_a_name_is_shown_without_its_query() -> None:
    problem = the_problem(changed("metadata.name", "https://h/a?sig=open-sesame"))
    assert problem.hint == 'for example "https-h-a"'


def test_python_spelling_is_no_kaito_spelling() -> None:
    assert the_problem(changed("tuning.output.image_push_secret", "x")).hint == 'did you mean "imagePushSecret"?'


def test_a_volume_instead_of_volume_source_is_one_problem() -> None:
    problem = the_problem(changed("tuning.input", {"volume": CLAIM}))
    assert problem.path == "tuning.input.volume"
    assert problem.hint == 'KAITO calls it "volumeSource"'


def test_a_spec_level_is_told_to_move_up() -> None:
    workspace = good()
    workspace["spec"] = {"tuning": workspace.pop("tuning")}
    problem = the_problem(workspace)
    assert problem.path == "spec"
    assert "move the keys in it up" in str(problem.hint)


def test_a_misspelt_tuning_is_not_also_called_missing() -> None:
    workspace = good()
    workspace["tunning"] = workspace.pop("tuning")
    assert the_problem(workspace).hint == 'did you mean "tuning"?'


def test_weights_on_a_claim_are_for_inference() -> None:
    problem = the_problem(changed("tuning.preset.presetOptions", {"modelWeightsPVC": "weights"}))
    assert "it is for inference" in str(problem.hint)


# ── nobody filled it in ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "image",
    ["{{ .Values.image }}", '"{{ .Values.registry }}/x:1"', "${REGISTRY}/adapters/x:1", "$REGISTRY/adapters/x:1"],
)
def test_template_expressions_are_called_unfilled(image: str) -> None:
    text = yaml.safe_dump(good()).replace("contoso.azurecr.io/adapters/tickets:1", image)
    (problem,) = problems_of(text)
    assert problem.path == "tuning.output.image"
    assert "an unfilled template expression" in problem.message


def test_a_template_that_is_no_yaml_is_told_to_be_rendered() -> None:
    text = yaml.safe_dump(good()).replace("contoso.azurecr.io/adapters/tickets:1", "{{ .registry }}/x:{{ .tag }}")
    (problem,) = problems_of(text)
    assert "not YAML" in problem.message
    assert "render it first" in str(problem.hint)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["{{", "}}", "{%", "%}", "${", "}", "$A", "{", "a", "\n"]), max_size=12).map("".join))
def test_an_expression_is_found_where_the_pattern_of_the_crd_finds_it(text: str) -> None:
    found = TEMPLATE_EXPRESSION.search(text)
    assert template_expression(text) == (found and found[0])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["YOUR-", "A", "_HERE", "<b>", "<", ">", "-", " ", "a", "\n"]), max_size=10).map("".join)
)
def test_several_placeholders_are_found_where_the_pattern_of_the_crd_finds_them(text: str) -> None:
    found, several = SEVERAL_PLACEHOLDERS.search(text), several_placeholders(text)
    assert bool(several) == bool(found)
    assert not (several and found) or several.startswith(found[0])


def test_to_look_for_an_expression_takes_no_time() -> None:
    began = time.process_time()
    assert template_expression("{{" * 250_000 + "${" * 250_000) is None
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("tuning.config", "{{" * 500_000, "is too long; at most 512 characters"),
        ("tuning.preset.name", "phi-3-mini-" * 90_000, "is too long; at most 512 characters"),
        ("tuning.output.image", "a.b/" + "a/" * 450_000, "is too long; at most 512 characters"),
        ("tuning.input.urls", ["https://a.b/" + "{{" * 5_000] * 100, "is too long; at most 8192 characters"),
        ("tuning.input.urls", ["https://a" + "\u0301\u0323" * 2_000 + "/b"] * 100, "its host is too long"),
        ("tuning.input.urls", ["https://a.b/" + "YOUR-" + "A-" * 4_000] * 100, "YOUR-A-A-A"),
        ("tuning.input.urls", [f"https://a.b/x?sig={n:020}" for n in range(15_000)], "at most 2000"),
        ("resource.preferredNodes", ["n"] * 19_000, "has too many entries; at most 16"),
        ("tuning.input", {"image": IMAGE, "imagePullSecrets": ["s"] * 9_000}, "has too many entries; at most 16"),
    ],
)
def test_what_is_longer_than_any_real_value_is_refused_before_it_takes_time(
    path: str, value: Any, sentence: str
) -> None:
    workspace = changed(path, value)
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_objects(workspace)
    assert time.process_time() - began < 3
    assert all(sentence in problem.message for problem in caught.value.problems)


@pytest.mark.parametrize(
    "value", ["<your-registry>.azurecr.io/x:1", "YOUR_REGISTRY/x:1", "PULLREGISTRY/DATA_NAME_HERE:1"]
)
def test_placeholders_of_other_examples_are_known_too(value: str) -> None:
    assert "placeholder" in the_problem(changed("tuning.output.image", value)).message


def test_a_volume_of_a_driver_may_have_dollars() -> None:
    csi = {"csi": {"driver": "nfs.csi.k8s.io", "volumeAttributes": {"subDir": "${pvc.metadata.name}"}}}
    tuning_of(changed("tuning.input", {"volumeSource": csi}))


def test_a_given_output_forgives_a_missing_one_but_no_wrong_key_in_it() -> None:
    assert tuning_of(changed("tuning.output", ...), output_given=True).output is None
    assert the_problem(changed("tuning.output.imag", "x"), output_given=True).path == "tuning.output.imag"
    assert isinstance(tuning_of(good(), output_given=True).output, ImageOutput)


# ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("", None, "the file is empty", "tuner init"),
        ("# only a comment\n---\n", None, "the file is empty", "tuner init"),
        ("kind: Workspace\nmetadata:\n\tname: a\n", 3, "cannot start any token", "there is a tab"),
        ("kind: Workspace\nmetadata: {name: a\n", 3, "not YAML", None),
        ("kind: Workspace\n a: b: c\n", 2, "not YAML", None),
        ("- kind: Workspace\n", 1, "a list, not a Kubernetes object", None),
        ("just words\n", 1, "text, not a Kubernetes object", None),
        ("kind: Workspac\nmetadata: {name: a}\n", 1, "no Workspace in it", 'did you mean "Workspace"?'),
        ("kind: workspace\nmetadata: {name: a}\n", 1, "no Workspace in it", 'did you mean "Workspace"?'),
        ("kind: Pod\nmetadata: {name: a}\n", 1, "no Workspace in it; it has Pod/a", "tuner init"),
        ("tuning: {}\n", 1, "no Workspace in it", "kind: Workspace at the top"),
        ("training_config: {}\n", 1, "no Workspace in it", "--config FILE"),
        ("kind: Workspace\x07\n", 1, "U+0007 cannot be in YAML", None),
        ("[" * 5000, 1, "nested too deeply", None),
        ('kind: "\\ud800"\n', 1, "not YAML: found invalid Unicode character", None),
    ],
)
def test_a_text_that_is_no_workspace(text: str, line: int | None, message: str, hint: str | None) -> None:
    (problem,) = problems_of(text)
    assert problem.line == line
    assert message in problem.message
    assert (hint or "") in (problem.hint or "")


def test_two_workspaces_are_one_too_many() -> None:
    one = yaml.safe_dump(good())
    (problem,) = problems_of(f"{one}---\n{one.replace('name: tickets', 'name: calls')}")
    assert problem.message.startswith("2 Workspaces in one file: Workspace/tickets (line 1), Workspace/calls (line ")


def test_a_key_written_twice_is_refused_with_both_lines() -> None:
    text = yaml.safe_dump(good()) + "tuning: {}\n"
    assert problems_of(text)[0].message.startswith("written twice, on lines 10 and 20")


def test_an_anchor_and_a_merge_key_mean_what_yaml_says() -> None:
    text = yaml.safe_dump(good())
    text = text.replace("metadata:\n", "status:\n  phi: &phi {name: phi-4, accessMode: public}\nmetadata:\n")
    text = text.replace("    name: phi-4-mini-instruct\n", "    <<: *phi\n    accessMode: private\n")
    preset = require_tuning(parse_workspace_text(text, "w.yaml")).preset
    assert (preset.name, preset.access_mode) == ("phi-4", "private")


def test_an_alias_in_a_circle_and_a_flood_of_aliases_end_in_a_sentence() -> None:
    circle = yaml.safe_dump(good()) + "x: &x\n  y: *x\n"
    flood = (
        yaml.safe_dump(good())
        + "a0: &a0 [x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    )
    assert [str(problem) for problem in problems_of(circle)] == [
        "w.yaml:21: *x stands in what it stands for: an alias in a circle"
    ]
    assert [str(problem) for problem in problems_of(flood)] == [
        "w.yaml:24: more than 20,000 values, counting what aliases stand for"
    ]


@pytest.mark.parametrize("value", ["!!binary aGk=", "!env NAME", "!!python/name:os.system", "!!int x", ".nan", "1e400"])
def test_yaml_that_means_nothing_here_is_a_problem_where_it_stands(value: str) -> None:
    problems = problems_of(yaml.safe_dump(good()).replace("name: phi-4-mini-instruct", f"name: {value}"))
    assert [problem.path for problem in problems] == ["tuning.preset.name"]


def test_a_key_that_is_not_text_is_a_problem() -> None:
    problems = problems_of(yaml.safe_dump(good()).replace("  method:", "  on: x\n  method:"))
    assert [(problem.line, problem.path, problem.message) for problem in problems] == [
        (14, "tuning", "the key on is true or false, not text")
    ]


def test_yaml_numbers_where_text_belongs_are_told_to_be_quoted() -> None:
    assert the_problem(changed("resource.labelSelector.matchLabels", {"gpu": 1})).hint == "put it in quotes"


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_file_is_input_missing_with_the_near_name(tmp_path: Path) -> None:
    (tmp_path / "workspace.yaml").write_text("", encoding="utf-8")
    with pytest.raises(InputMissingError, match="there is no such file") as caught:
        load_workspace_file(tmp_path / "workspace.yml")
    assert caught.value.hint == 'did you mean "workspace.yaml"?'


def test_a_directory_is_no_file_and_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a directory") as caught:
        load_workspace_file(tmp_path)
    assert caught.value.hint == "in it: a.yaml"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"kind: Workspace\nmetadata: {name: caf\xe9}\n", 2, "not UTF-8 text"),
        ("kind: Workspace\n".encode("utf-16"), 1, "not UTF-8 text but UTF-16"),
    ],
)
def test_a_file_in_another_encoding(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_workspace_file(path)
    (problem,) = caught.value.problems
    assert (problem.line, problem.message) == (line, message)


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(yaml.safe_dump(good()), encoding="utf-8-sig")
    assert load_workspace_file(path).workspace.metadata.name == "tickets"


def test_a_parquet_file_in_place_of_the_workspace_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    with path.open("wb") as file:
        file.truncate(5_000_000)
    with pytest.raises(ConfigError, match="5,000,000 bytes are too many"):
        load_workspace_file(path)


# ── Secrets and ConfigMaps ───────────────────────────────────────────────────────────────────────────────────────────

DOCKER_CONFIG = {"auths": {"contoso.azurecr.io": {"auth": "b3Blbi1zZXNhbWU="}}}


def secret(**fields: Any) -> Secret:
    document = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "registry"}, **fields}
    text = yaml.safe_dump(good()) + "---\n" + yaml.safe_dump(document)
    return parse_workspace_text(text, "w.yaml").secrets["registry"]


def in_base64(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": in_base64(DOCKER_CONFIG)}},
        {"type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": json.dumps(DOCKER_CONFIG)}},
        {"type": "kubernetes.io/dockercfg", "data": {".dockercfg": in_base64(DOCKER_CONFIG["auths"])}},
        {"type": "Opaque", "data": {"config.json": in_base64(DOCKER_CONFIG)}},
        {"stringData": {"config.json": json.dumps(DOCKER_CONFIG)}, "data": {"config.json": "overridden"}},
    ],
)
def test_a_docker_config_is_found_however_it_is_kept(fields: dict[str, Any]) -> None:
    assert json.loads(secret(**fields).docker_config()) == DOCKER_CONFIG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "holds no registry credentials: it has none"),
        ({"data": {"password": in_base64("open-sesame")}}, "holds no registry credentials: it has password"),
        ({"data": {"config.json": "{open-sesame}"}}, "config.json] is not text in base64"),
        ({"stringData": {"config.json": "open-sesame"}}, "config.json is not JSON"),
        ({"stringData": {"config.json": '["open-sesame"]'}}, "config.json is a list, not a JSON object"),
        ({"stringData": {"config.json": '{"auth": "open-sesame"}'}}, "a docker config without auths"),
        ({"stringData": {".dockerconfigjson": '{"auths": ["open-sesame"]}'}}, "a docker config without auths"),
        ({"data": {"config.json": base64.b64encode(b"\xffopen-sesame").decode()}}, "is not text in base64"),
        ({"stringData": {"config.json": "[" * 100_000}}, "config.json is not JSON"),
    ],
)
def test_a_malformed_secret_is_named_but_never_shown(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        secret(**fields).docker_config()
    assert "Secret 'registry'" in caught.value.message
    assert message in caught.value.message
    assert caught.value.__cause__ is None
    assert "open-sesame" not in f"{caught.value.message} {caught.value.hint}"


def test_a_malformed_secret_document_never_shows_a_value() -> None:
    document = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s"},
        "data": {"a": ["open-sesame"], "b": 7331},
    }
    problems = problems_of(yaml.safe_dump(good()) + "---\n" + yaml.safe_dump(document))
    assert [problem.path for problem in problems] == ["data.a", "data.b"]
    shown = " ".join(f"{problem} {problem.hint}" for problem in problems)
    assert "open-sesame" not in shown
    assert "7331" not in shown


def test_a_secrets_value_where_its_name_belongs_is_not_shown() -> None:
    problem = the_problem(changed("tuning.output.imagePushSecret", "Open-Sesame!"))
    assert "Sesame" not in f"{problem} {problem.hint}"


@pytest.mark.parametrize("key", ["https://h/a?sig=open-sesame", "x?open-sesame"])
def test_a_signed_url_in_a_wrong_place_is_not_shown(key: str) -> None:
    workspace = changed("tuning.input.image", "https://h/a?sig=open-sesame")
    workspace["tuning"]["input"][key] = {"a": "b"}
    for problem in problems_of(yaml.safe_dump(workspace)):
        assert "open-sesame" not in f"{problem} {problem.hint}"


def test_the_repr_of_a_workspace_has_no_urls() -> None:
    file = parse(changed("tuning.input.urls", ["https://h.contoso.com/a?sig=open-sesame"]))
    assert "open-sesame" not in repr(file)


def test_other_values_of_a_secret_can_be_read_and_a_missing_one_lists_the_keys() -> None:
    kept = secret(stringData={"HF_TOKEN": "open-sesame"})
    assert kept.value("HF_TOKEN") == "open-sesame"
    with pytest.raises(ConfigError, match="has no key TOKEN; it has HF_TOKEN"):
        kept.value("TOKEN")


CONFIG_MAP = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n"


def test_a_config_map_without_kaitos_key_says_which_keys_it_has() -> None:
    text = yaml.safe_dump(good()) + CONFIG_MAP + "data: {training-config.yaml: x}\n"
    config_map = parse_workspace_text(text, "w.yaml").config_maps["c"]
    with pytest.raises(ConfigError, match=r"has no key training_config\.yaml; it has training-config\.yaml") as caught:
        config_map.training_config()
    assert caught.value.hint == "KAITO reads this key only: name the text training_config.yaml"


def test_a_config_map_with_a_mapping_for_text_is_told_about_the_bar() -> None:
    text = yaml.safe_dump(good()) + CONFIG_MAP + "data:\n  training_config.yaml:\n    training_config: {}\n"
    (problem,) = problems_of(text)
    assert problem.message == "must be text, not a mapping"
    assert "write a | after the key" in str(problem.hint)


def test_two_config_maps_of_one_name_are_a_problem() -> None:
    (problem,) = problems_of(yaml.safe_dump(good()) + CONFIG_MAP + CONFIG_MAP)
    assert problem.message == "a second ConfigMap/c; the file has one already"


# ── what we write ourselves ──────────────────────────────────────────────────────────────────────────────────────────


def test_flags_make_a_workspace() -> None:
    workspace = make_workspace("microsoft/Phi-3.5-mini_instruct", ["a.parquet", URL], "contoso.azurecr.io/a:1", "QLoRA")
    assert workspace.metadata.name == "phi-3-5-mini-instruct"
    assert workspace.tuning is not None
    assert workspace.tuning.preset.name == "microsoft/Phi-3.5-mini_instruct"
    assert workspace.tuning.method == "qlora"
    assert workspace.tuning.input == UrlInput.model_construct(urls=("a.parquet", URL), name=None)
    assert workspace.tuning.output == ImageOutput(image="contoso.azurecr.io/a:1")


@pytest.mark.parametrize("output", ["out", "./out", "/tmp/out/adapter", "../x.y/out"])
def test_an_output_that_names_no_registry_is_a_directory(output: str) -> None:
    workspace = make_workspace("phi-4", ["a.parquet"], output)
    assert workspace.tuning is not None
    assert workspace.tuning.output == VolumeOutput(volumeSource={"hostPath": {"path": output}})


@pytest.mark.parametrize("output", [None, "oci:out:v1"])
def test_an_output_that_no_workspace_can_say_is_left_to_the_command_line(output: str | None) -> None:
    workspace = make_workspace("/models/Phi 4/", ["a.parquet"], output, name="mine")
    assert workspace.metadata.name == "mine"
    assert workspace.tuning is not None
    assert workspace.tuning.output is None


def test_wrong_flags_are_named_as_flags_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_workspace("", ["http://127.0.0.1/a"], "contoso.azurecr.io/A:1", "dora", "Mine")
    assert [problem.path for problem in caught.value.problems] == [
        "--name",
        "--model",
        "--method",
        "--data",
        "--output",
    ]


def test_the_template_parses_with_this_parser_and_says_what_to_replace() -> None:
    file = parse_workspace_text(template_workspace(), "workspace.yaml", local_files=False)
    tuning = require_tuning(file)
    assert tuning.preset.name == "phi-3-mini-4k-instruct"
    assert tuning.config in file.config_maps
    assert yaml.safe_load(file.config_maps[tuning.config].training_config().text)["training_config"]["LoraConfig"]
    assert cluster_problems(file.workspace) == []
    assert [note.split(" ")[1] for note in file.notes] == ["tuning.input.urls[0]:", "tuning.output.image:"]
    filled = parse_workspace_text(template_workspace().replace("example.com", "contoso.com"), "workspace.yaml")
    assert filled.notes == ()


def test_the_template_takes_any_preset() -> None:
    file = parse_workspace_text(template_workspace("Qwen/Qwen3-8B"), "workspace.yaml")
    assert require_tuning(file).preset.name == "Qwen/Qwen3-8B"


# ── anything at all ──────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = (
    "apiVersion kind metadata name labels resource count instanceType labelSelector matchLabels partition tuning "
    "preset presetOptions accessMode method config input urls image imagePullSecrets volumeSource output "
    "imagePushSecret spec inference data stringData type volume persistentVolumeClaim status"
)
KEYS = st.sampled_from(WORDS.split()) | st.text(max_size=6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["Workspace", "ConfigMap", "Secret", "qlora", "v1", "kaito.sh/v1beta1", URL, IMAGE, "{{ x }}"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


def only_tuner_errors(text: str) -> None:
    with suppress(TunerError):
        file = parse_workspace_text(text, "w.yaml", local_files=False)
        cluster_problems(file.workspace)
        for kept in file.secrets.values():
            kept.docker_config()
        for config_map in file.config_maps.values():
            config_map.training_config()


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=3))
def test_nested_values_never_raise_anything_but_tuner_errors(documents: list[Any]) -> None:
    only_tuner_errors(yaml.safe_dump_all(documents))


@settings(max_examples=150, deadline=None)
@given(path=st.lists(KEYS, max_size=4), value=VALUES, kind=st.sampled_from(["Workspace", "Secret", "ConfigMap"]))
def test_a_good_file_with_anything_put_anywhere_never_raises_anything_else(
    path: list[str], value: Any, kind: str
) -> None:
    documents = [good(), {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}]
    documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}})
    at = next(document for document in documents if document["kind"] == kind)
    for key in path[:-1]:
        at = at[key] if isinstance(at.get(key), dict) else at.setdefault(key + "_", {})
    at[path[-1] if path else "tuning"] = value
    only_tuner_errors(yaml.safe_dump_all(documents))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:- \n\t{}[]&*!|>'\"%#,?<~=0.1\u00e9"), max_size=40))
def test_any_text_never_raises_anything_but_tuner_errors(text: str) -> None:
    only_tuner_errors(text)
    only_tuner_errors(f"kind: Workspace\ntuning: {text}")


# ── from the API server ──────────────────────────────────────────────────────────────────────────────────────────────


def test_objects_of_the_api_server_give_what_their_file_gives() -> None:
    text = (WORKSPACES / "quick_start_filled.yaml").read_text()
    config_map, workspace = yaml.safe_load_all(text)
    from_api = parse_objects({**workspace, "status": {"state": "Running"}, "inference": None}, config_map)
    from_file = parse_workspace_text(text, "w.yaml")
    assert from_api.workspace == from_file.workspace
    (there,) = from_api.config_maps.values()
    assert there.data == from_file.config_maps[there.name].data
    assert there.training_config().file == "configmap/optimized-phi3-tuning"


def test_a_problem_in_an_object_has_its_field_and_no_line() -> None:
    workspace = yaml.safe_load((WORKSPACES / "volumes.yaml").read_text().rpartition("---")[2])
    workspace["tuning"]["methd"] = workspace["tuning"].pop("method")
    with pytest.raises(ConfigError) as caught:
        parse_objects(workspace)
    assert [str(problem) for problem in caught.value.problems] == [
        "tuning.method: is required: lora or qlora",
        "tuning.methd: unknown key",
    ]
