"""Short cuts: named, proved beside what they replace, measured, turned off on request, decided once a run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, make_job, prepared_job, rows_of

from tuner.errors import ConfigError
from tuner.levers import FUSED_LORA, FUSED_PROJECTIONS, LEVERS, LIGER, PACKING, RESIDENT_WEIGHTS, parse_disabled
from tuner.pipeline.probe import Pieces, Room, Sample
from tuner.pipeline.startup import StartUp

SHORT = {
    "TrainingArguments": {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
    }
}


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_levers_are_turned_off_by_name() -> None:
    assert parse_disabled(["liger, packing", "liger"]) == (PACKING, LIGER)
    assert parse_disabled(["", " "]) == ()
    with pytest.raises(ConfigError, match="nothing called fused-lore") as raised:
        parse_disabled(["fused-lore"])
    assert raised.value.hint == 'did you mean "fused-lora"?'


def test_a_flag_and_the_annotation_turn_levers_off_and_make_it_another_run(tmp_path: Path) -> None:
    from tuner.request import Request, build_run
    from tuner.workspace import WorkspaceFile, make_workspace

    plain = make_job(tmp_path / "plain", rows_of("messages", 4), smoke=True).spec
    flag = make_job(tmp_path / "flag", rows_of("messages", 4), smoke=True, disable=("liger",)).spec
    assert plain.disabled == ()
    assert flag.disabled == (LIGER,)
    assert flag.digest != plain.digest  # last bits differ, so nobody resumes one with the other

    workspace = make_workspace("phi-3-mini-4k-instruct", [str(tmp_path / "plain/train.parquet")], "x", "qlora", "w")
    annotated = workspace.model_copy(
        update={"metadata": workspace.metadata.model_copy(update={"annotations": {"tuner/disable": "packing"}})}
    )
    request = Request(smoke=True, output=str(tmp_path / "out"), disable=("liger",))
    assert build_run(WorkspaceFile(annotated), request, tmp_path / "work", {}).spec.disabled == (PACKING, LIGER)


# ── proving ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """A trainer as a run makes it, before levers are taken."""
    from tuner.pipeline import train
    from tuner.pipeline.model import pick_device

    job = make_job(tmp_path, rows_of("messages", 24), SHORT)
    prepared = prepared_job(job)[1]
    device = pick_device()
    pieces = Pieces(512, recomputes=False)
    arguments = train.training_arguments(
        job.spec, prepared, device, pieces, tmp_path / "checkpoints", evaluate_first=False
    )
    model, _, exact = train._model(job.spec, prepared, job.work_dir, device, Heard(), StartUp())
    made = train._trainer(model, exact, arguments, pieces, prepared, job.work_dir, [], Heard())
    made.exact = exact
    return made


def chosen(trainer: Any, device: Any = None, bench: Any = None, **options: Any) -> Any:
    from tuner.pipeline.levers import choose
    from tuner.pipeline.model import pick_device

    wanted = {"disabled": (), "estimated": Pieces(512, recomputes=False), "checkpointing": None, "machine": "m"}
    return choose(trainer, trainer.exact, device or pick_device(), bench=bench, **(wanted | options))


@pytest.mark.train
def test_on_a_cpu_what_is_proved_is_on_and_the_rest_says_why_not(trainer: Any) -> None:
    choice = chosen(trainer)
    assert list(choice.on) == ["packing", "learnt-head", "fused-lora", "fused-projections"]
    assert choice.on.keys() | choice.off.keys() == LEVERS.keys()
    assert choice.off[LIGER] == "needs a GPU"
    assert choice.pieces == Pieces(512, recomputes=False)
    without = chosen(trainer, disabled=(FUSED_LORA,)).off
    assert without[FUSED_LORA] == "turned off"
    assert without[FUSED_PROJECTIONS] == "needs fused-lora"


@pytest.mark.train
def test_deciding_leaves_no_trace(trainer: Any) -> None:
    """The steps after it are those of a run that read its decision from a file."""
    import torch

    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.random.get_rng_state()
    chosen(trainer)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not is_on(FUSED_LORA, trainer.base_model)


@pytest.mark.train
def test_a_lever_with_other_gradients_is_off(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.pipeline import kernels

    backward = kernels._FusedLora.backward

    def wrong(ctx: Any, *upstream: Any) -> Any:
        by_x, layer, by_a, by_b, scale = backward(ctx, *upstream)
        return by_x, layer, by_a * 0.9, by_b, scale

    monkeypatch.setattr(kernels._FusedLora, "backward", staticmethod(wrong))
    choice = chosen(trainer)
    assert FUSED_LORA not in choice.on
    assert choice.off[FUSED_LORA].startswith("another gradient")


@pytest.mark.train
def test_a_lever_that_cannot_be_turned_on_is_off_and_the_others_are_tried(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way: what of it is on is taken off again."""
    from tuner.pipeline import phi3

    def fails_half_way(model: Any) -> None:
        take_parts(model)
        raise RuntimeError("no room")

    take_parts = phi3.take_parts
    monkeypatch.setattr(phi3, "take_parts", fails_half_way)
    choice = chosen(trainer)
    assert choice.off[FUSED_PROJECTIONS] == "fails: RuntimeError: no room"
    assert FUSED_LORA in choice.on
    layer = trainer.base_model.model.layers[0]
    assert not {"forward"} & (vars(layer.self_attn).keys() | vars(layer.mlp).keys())


@pytest.mark.train
def test_recomputed_activations_leave_nothing_on_the_embedding(trainer: Any) -> None:
    """Its output would ask for a gradient for ever: products of the first block for nothing."""
    import torch

    base = trainer.base_model
    base.enable_input_require_grads()  # as SFTTrainer does where the estimate recomputes

    def asks() -> bool:
        return bool(base.get_input_embeddings()(torch.tensor([1])).requires_grad)

    for on in (False, True, False, True, True, False):
        trainer.recompute(on)
        assert trainer.recomputes is on
        assert asks() is on


@pytest.mark.train
def test_joined_projections_are_for_phi3_over_fused_lora(trainer: Any) -> None:
    from tuner.pipeline import phi3
    from tuner.pipeline.kernels import fuse_lora

    base = trainer.base_model
    assert phi3.why_not(base) == "needs fused-lora"
    fuse_lora(base)
    assert phi3.why_not(base) is None
    base.config.hidden_act = "gelu"
    assert phi3.why_not(base) == "not for gelu"
    base.config.model_type = "llama"
    assert phi3.why_not(base) == "for Phi-3's architecture"


@pytest.mark.train
def test_joined_projections_leave_no_part_of_a_tensor_in_the_graph(trainer: Any) -> None:
    """A part's backward, be it a row or a slice, fills a tensor of the whole size with zeros."""
    from tuner.pipeline import phi3
    from tuner.pipeline.kernels import fuse_lora

    def parts() -> set[str]:
        seen, waiting = set(), [trainer.one_micro_batch([trainer.train_dataset[0]]).grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [below for below, _ in node.next_functions]
        return {node.name() for node in seen} & {"SelectBackward0", "SliceBackward0"}

    fuse_lora(trainer.base_model)
    assert parts()  # transformers' own
    phi3.take_parts(trainer.base_model)
    assert not parts()


@pytest.mark.train
def test_weights_that_stay_decoded_change_no_bit(trainer: Any) -> None:
    import torch

    from tuner.pipeline.kernels import drop_decoded, fuse_lora, keep_decoded, unfuse_lora
    from tuner.pipeline.levers import Bench, difference
    from tuner.pipeline.model import pick_device

    bench = Bench(trainer, pick_device())
    base = trainer.base_model
    with bench.undisturbed():
        for fused in (False, True):
            if fused:
                fuse_lora(base)
            fresh = bench.gradients()
            assert keep_decoded(base) == 8
            kept = bench.gradients()
            assert kept.loss == fresh.loss
            assert all(torch.equal(kept.by_name[name], value) for name, value in fresh.by_name.items())
            drop_decoded(base)
    unfuse_lora(base)
    assert difference(fresh, kept, torch.float32) is None


@pytest.mark.train
def test_differences_that_rounding_does_not_make_are_told() -> None:
    import torch

    from tuner.pipeline.levers import Gradients, difference

    one = Gradients(2.0, {"a": torch.tensor([3.0, 4.0])})

    def other(loss: float = 2.0, values: tuple[float, float] = (3.0, 4.0), name: str = "a") -> Gradients:
        return Gradients(loss, {name: torch.tensor(values)})

    assert difference(one, other(), torch.float32) is None
    assert difference(one, other(loss=2.001), torch.bfloat16) is None
    assert "another loss" in (difference(one, other(loss=2.001), torch.float32) or "")
    assert "another loss" in (difference(one, other(loss=float("nan")), torch.bfloat16) or "")
    assert "its norm" in (difference(one, other(values=(3.1, 4.1)), torch.bfloat16) or "")
    # two right ways through 32 layers in bf16 were up to 8 % apart on an H200
    assert difference(one, other(values=(3.32, 3.74)), torch.bfloat16) is None
    assert "apart" in (difference(one, other(values=(3.64, 3.43)), torch.bfloat16) or "")
    assert "another gradient" in (difference(one, other(values=(3.32, 3.74)), torch.float32) or "")
    assert "other parameters" in (difference(one, other(name="b"), torch.bfloat16) or "")


# ── on a GPU, told by a bench that pretends to be one ────────────────────────────────────────────────────────────────


@pytest.fixture
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.pipeline import levers

    monkeypatch.setattr(levers, "has_varlen_kernel", lambda _: False)


def pretended(trainer: Any, free_bytes: int, seconds: dict[str, float], per_token: int = 1000) -> tuple[Any, Any]:
    """(bench, device): a GPU with so much memory, on which a lever that is on makes a pass so many times as long."""
    import torch

    from tuner.pipeline.levers import Bench
    from tuner.pipeline.model import Device

    class PretendedGpu(Device):
        is_cuda = True

    class PretendedBench(Bench):
        def sample(self, tokens: int) -> Sample | None:
            documents = self.documents(tokens)
            count = sum(len(document["input_ids"]) for document in documents)
            took = 1.0
            for name, factor in seconds.items():
                took *= factor if is_on(name, trainer.base_model) else 1.0
            each = per_token // 10 if trainer.recomputes else per_token
            return Sample(count, each * count, took) if each * count <= free_bytes else None

        def room(self, optimizer: str, ranks: int) -> Room:
            return Room(free_bytes, 0)

    device = PretendedGpu(torch.device("cpu"), torch.float32, "a pretended GPU")
    return PretendedBench(trainer, device), device


def is_on(name: str, base: Any) -> bool:
    kinds = {FUSED_LORA: "FusedForward", RESIDENT_WEIGHTS: "_ResidentForward"}
    return any(type(vars(module).get("forward")).__name__ == kinds[name] for module in base.modules())


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
def test_what_is_faster_is_on_and_what_loses_is_off(trainer: Any) -> None:
    bench, device = pretended(trainer, 10**12, {FUSED_LORA: 1.1, RESIDENT_WEIGHTS: 0.8})
    choice = chosen(trainer, device, bench)
    assert choice.off[FUSED_LORA] == "not faster: 0.91 times the speed without"
    assert choice.on[RESIDENT_WEIGHTS] == pytest.approx(1.25)
    assert not choice.recomputes
    assert not is_on(RESIDENT_WEIGHTS, trainer.base_model)  # decided, not yet applied


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
@pytest.mark.parametrize(("factor", "told"), [(0.5, "on, ×2.00"), (2.0, "off: not faster: 0.50 times")])
def test_what_does_not_fit_at_once_is_timed_on_fewer_tokens(factor: float, told: str, trainer: Any) -> None:
    """The estimate asked for more than there is room for, and no lever is taken unmeasured."""
    bench, device = pretended(trainer, 300_000, {FUSED_LORA: factor})  # 300 tokens of 512
    assert bench.sample(512) is None
    choice = chosen(trainer, device, bench)
    assert choice.told[FUSED_LORA].startswith(told)


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
@pytest.mark.parametrize(("saves", "told"), [(False, "off: not timed"), (True, "on")])
def test_where_not_even_the_longest_row_fits_a_lever_is_on_that_makes_it_fit(
    saves: bool, told: str, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, device = pretended(trainer, 300_000, {FUSED_LORA: 2.0})
    sample = bench.sample
    monkeypatch.setattr(
        bench, "sample", lambda tokens: sample(tokens) if saves and is_on(FUSED_LORA, trainer.base_model) else None
    )
    choice = chosen(trainer, device, bench, disabled=("memory-probe",))
    assert choice.told[FUSED_LORA].startswith(told)


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
def test_a_lever_is_timed_beside_what_recomputes_as_it_does(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate recomputes, the probe finds room not to: what was timed before is no longer what there is."""
    from tuner.pipeline import levers

    bench, device = pretended(trainer, 10**12, {RESIDENT_WEIGHTS: 1.25})
    sample = bench.sample
    monkeypatch.setattr(
        bench,
        "sample",
        lambda tokens: replace(made := sample(tokens), seconds=made.seconds * (2 if trainer.recomputes else 1)),
    )
    monkeypatch.setattr(levers, "TIMED_TOKENS", 64)
    choice = chosen(trainer, device, bench, estimated=Pieces(512, recomputes=True))
    assert choice.off[RESIDENT_WEIGHTS] == "not faster: 0.80 times the speed without"


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
def test_little_memory_costs_decoded_weights_first_and_kept_activations_next(trainer: Any) -> None:
    from tuner.pipeline.kernels import decoded_bytes

    seconds = {FUSED_LORA: 0.9, RESIDENT_WEIGHTS: 0.8}
    step = 1000 * pretended(trainer, 0, seconds)[0].tokens_of(4)  # what the largest step takes
    decoded = decoded_bytes(trainer.base_model)
    for free, keeps, resident in (
        (2 * (step + decoded), True, True),
        (int(step / 0.85) + 64_000 + decoded // 2, True, False),
        (step // 4, False, False),
    ):
        bench, device = pretended(trainer, free, seconds)
        choice = chosen(trainer, device, bench)
        assert choice.recomputes is not keeps
        assert (RESIDENT_WEIGHTS in choice.on) is resident
        if not resident:
            assert choice.off[RESIDENT_WEIGHTS] == "the memory is needed for activations"


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
def test_a_rank_computes_all_its_documents_at_once_however_many_ranks_there_are(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is a rank's own part of the step."""
    bench, device = pretended(trainer, 10**12, {})
    alone = chosen(trainer, device, bench)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 4)
    assert chosen(trainer, device, bench).tokens == alone.tokens >= bench.tokens_of(4)


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
def test_small_steps_are_tried_beside_larger_ones(trainer: Any) -> None:
    """The bench takes as long for each: four times the documents are four times as fast."""
    bench, device = pretended(trainer, 10**12, {})
    assert chosen(trainer, device, bench).larger_steps_gain == pytest.approx(4, rel=0.2)
    bench, device = pretended(trainer, 1000 * 2 * bench.usual_tokens_of(4), {})
    assert chosen(trainer, device, bench).larger_steps_gain is None  # the larger step does not fit

    from tuner.pipeline.train import small_steps

    assert small_steps(None, 16) is small_steps(1.2, 16) is None
    assert small_steps(2.14, 16).startswith(
        "steps of 16 documents leave the GPU waiting for its CPU: with 64 it trains 2.1 times as many tokens a second"
    )


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.train
def test_without_the_probe_the_estimate_decides(trainer: Any) -> None:
    bench, device = pretended(trainer, 10**12, {FUSED_LORA: 0.9})
    choice = chosen(trainer, device, bench, disabled=("memory-probe",), estimated=Pieces(300, recomputes=True))
    assert choice.pieces == Pieces(300, recomputes=True)
    assert choice.off[RESIDENT_WEIGHTS] == "needs memory-probe"


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.train
def test_a_resumed_run_takes_the_decision_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.pipeline import libraries, train

    job = make_job(tmp_path, rows_of("messages", 24), SHORT)
    prepared = prepared_job(job)[1]

    def run() -> Heard:
        heard = Heard()
        train.optimise(
            job.spec, prepared, job.work_dir, job.work_dir / "a", job.work_dir / "c", train.Stop(print), heard
        )
        return heard

    said = [line for line in run().notes if line.startswith("CPU: on:")]
    assert said
    assert "packing, learnt-head, fused-lora, fused-projections" in said[0]
    monkeypatch.setattr(train, "choose", lambda *_, **__: pytest.fail("decided again"))
    assert said == [line for line in run().notes if line.startswith("CPU: on:")]

    class DecidedAgain(Exception):
        pass

    def decide(*_: Any, **__: Any) -> None:
        raise DecidedAgain

    # with other kernels than it was decided for, or none
    version = libraries.version
    monkeypatch.setattr(libraries, "version", lambda name: "0" if name == "liger-kernel" else version(name))
    monkeypatch.setattr(train, "choose", decide)
    with pytest.raises(DecidedAgain):
        run()


_TWO_RANKS = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
from tuner.pipeline.levers import Choice
from tuner.pipeline.train import _decided, _of_first_rank

rank, directory = int(sys.argv[1]), Path(sys.argv[2])
store = torch.distributed.FileStore(str(directory / "store"), 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
for machine in ("large", "small"):
    one = _of_first_rank(_decided(directory / "levers.json", machine if rank == 0 else "small"))
    print(one.machine if one else "decide again", end=", ")
torch.distributed.destroy_process_group()
"""


@pytest.mark.train
def test_two_kinds_of_gpu_take_what_the_first_decided(tmp_path: Path) -> None:
    """And both decide again where the first one does."""
    from tuner.pipeline.levers import Choice

    Choice(machine="large", on={}, off={}, tokens=64, recomputes=False).save(tmp_path / "levers.json")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _TWO_RANKS, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said == ["large, decide again, "] * 2


@pytest.mark.train
@pytest.mark.parametrize("lever", [PACKING, "learnt-head", FUSED_LORA, FUSED_PROJECTIONS])
def test_each_lever_turned_off_gives_the_same_losses(lever: str, tmp_path: Path) -> None:
    import json

    from tuner.pipeline import train

    losses = []
    for disable in ((), (lever,)):
        place = tmp_path / ("without" if disable else "with")
        job = make_job(place, rows_of("messages", 24), SHORT, disable=disable)
        train.optimise(
            job.spec, prepared_job(job)[1], job.work_dir, place / "a", place / "c", train.Stop(print), Heard()
        )
        lines = [json.loads(line) for line in (place / "a/metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


_LIGER = """
import sys, types
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

class Anything(types.ModuleType):  # triton has no wheel for machines without a GPU; nothing of it runs here
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()

import torch
sys.path.insert(0, "tests")
from test_kernels import tiny_model
from transformers.models.phi3 import modeling_phi3
from tuner.pipeline.levers import Liger
from tuner.pipeline.model import Device

for name in ("triton", "triton.language", "triton.language.math", "triton.language.extra",
             "triton.language.extra.libdevice", "triton.runtime", "triton.runtime.driver", "triton.compiler"):
    sys.modules[name] = Anything(name)
    sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules[name].__path__ = []
    sys.modules[name].__version__ = "3.5.0"

class Gpu(Device):
    is_cuda = True

model = tiny_model("phi-3-mini-4k-instruct", "sdpa")
names = dict(vars(modeling_phi3))
attributes = [dict(vars(module)) for module in model.modules()]
lever = Liger(model, Gpu(torch.device("cpu"), torch.bfloat16, "none"))
assert lever.obstacle() is None, lever.obstacle()
lever.turn_on()
layer = model.model.layers[0]
assert "LigerRMSNorm" in repr(layer.input_layernorm.forward), layer.input_layernorm.forward
assert "SwiGLU" in repr(layer.mlp.forward), layer.mlp.forward
assert modeling_phi3.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
assert modeling_phi3.Phi3RMSNorm is names["Phi3RMSNorm"]  # the next model that is made is plain
assert "forward" not in vars(model)  # head and loss are ours
lever.turn_off()
assert dict(vars(modeling_phi3)) == names
assert [dict(vars(module)) for module in model.modules()] == attributes
lever.turn_on()
model.train()
model.gradient_checkpointing_enable()
lever.turn_off()
assert dict(vars(modeling_phi3)) == names
assert model.is_gradient_checkpointing and model.training  # what is not Liger's stays
assert all("forward" not in vars(module) for module in model.modules())
print("put back")
"""


@pytest.mark.train
def test_ligers_patch_is_on_this_model_only_and_is_put_back() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LIGER], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.stdout.strip().endswith("put back"), found.stderr[-3000:]


# ── on a real GPU ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.train
def test_every_lever_on_this_gpu_has_the_plain_gradients(trainer: Any) -> None:
    """In bf16, beside documents one after the other, PEFT's own LoRA and transformers' own layers."""
    from tuner.pipeline.kernels import fuse_lora, unfuse_lora
    from tuner.pipeline.levers import Bench, difference, levers_of
    from tuner.pipeline.model import pick_device

    device = pick_device()
    bench = Bench(trainer, device)
    tried = []
    with bench.undisturbed():
        for lever in levers_of(trainer, trainer.exact, device):
            over = lever.name == FUSED_PROJECTIONS
            if over:
                fuse_lora(trainer.base_model)
            if lever.obstacle() is None:
                plain = bench.gradients()
                lever.turn_on()
                assert difference(plain, bench.gradients(), device.dtype) is None, lever.name
                lever.turn_off()
                assert difference(plain, bench.gradients(), device.dtype) is None, f"{lever.name} was not put back"
                tried.append(lever.name)
            if over:
                unfuse_lora(trainer.base_model)
    assert {FUSED_LORA, FUSED_PROJECTIONS, RESIDENT_WEIGHTS} <= set(tried)


@pytest.mark.gpu
@pytest.mark.train
def test_the_probe_measures_this_gpu(trainer: Any) -> None:
    from tuner.pipeline.levers import Bench
    from tuner.pipeline.model import pick_device

    bench = Bench(trainer, pick_device())
    with bench.undisturbed():
        small, large = bench.sample(256), bench.sample(2048)
        room = bench.room("adamw_torch_fused", ranks=1)
    assert small is not None
    assert large is not None
    assert 0 < small.peak_bytes < large.peak_bytes
    assert 0 < room.bytes < room.free_bytes
    choice = chosen(trainer)
    assert choice.on["memory-probe"] is None
    assert not choice.recomputes  # a tiny model


@pytest.mark.gpu
@pytest.mark.train
def test_a_process_held_to_little_memory_sees_little_room(trainer: Any) -> None:
    import torch

    from tuner.pipeline.levers import Bench
    from tuner.pipeline.model import pick_device

    bench = Bench(trainer, pick_device())
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        with bench.undisturbed():
            assert bench.room("adamw_torch_fused", ranks=1).free_bytes < 0.1 * torch.cuda.mem_get_info()[1]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.train
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_gpu(trainer: Any) -> None:
    """Whatever reads a value back from the GPU raises here."""
    import torch

    documents = [trainer.train_dataset[number] for number in range(4)]
    model = trainer.accelerator.prepare_model(trainer.model)
    trainer.training_step(model, documents, 100)  # compiles and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(model, documents, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
