"""SFTTrainer whose optimizer step is a number of documents, in as many packed micro-batches as memory asks for.

A batch is what the optimizer sees: `per_device_train_batch_size × gradient_accumulation_steps` documents, as the user
wrote them. How they are computed is decided inside the step: packed into rows of at most `micro_batch_tokens` tokens,
fewer when the GPU's memory does not hold them. The loss is the sum over learnt tokens divided by their number in the
whole step, on all ranks, so that no way of splitting the documents changes a gradient.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer

from tuner.pipeline.kernels import Exact, summed_nll
from tuner.pipeline.labels import IGNORED
from tuner.pipeline.packing import divide, pack
from tuner.runspec import perplexity

_EVALUATED_AT_ONCE = 64  # documents of each rank, so that packing finds what fits together

Document = dict[str, npt.NDArray[np.int64]]  # input_ids and labels (n,)


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on rows {input_ids, labels}. `exact` are the short cuts that were proved on this model; `say` hears when a
    step had to be made smaller to fit the memory."""

    def __init__(self, *, micro_batch_tokens: int, exact: Exact, say: Callable[[str], None], **arguments: Any) -> None:
        super().__init__(data_collator=list, **arguments)
        self.micro_batch_tokens = micro_batch_tokens if exact.packs else 1
        self.packs = exact.packs
        self._say = say
        self._boundary = longrope_boundary(self.base_model)
        answer_targets(self.base_model, summed_nll if exact.learnt_head else whole_nll)

    @property
    def base_model(self) -> Any:
        """transformers' model, below PEFT's."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    # ── which documents ──────────────────────────────────────────────────────────────────────────────────────────────

    def get_train_dataloader(self) -> DataLoader[Document]:
        """Every rank goes through the same whole steps, in an order that seed and epoch alone decide; `_share` divides
        each. So no row is seen twice or padded in, however many ranks there are."""
        documents = self.args.per_device_train_batch_size * self.accelerator.num_processes
        sampler: Sampler[int] = SequentialSampler(self.train_dataset)
        if self.args.train_sampling_strategy != "sequential":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            shuffled = EpochSampler(len(self.train_dataset), seed)
            self.add_callback(_NewOrder(shuffled))
            sampler = shuffled
        return DataLoader(self.train_dataset, batch_size=documents, sampler=sampler, collate_fn=list)

    def _share(self, documents: Sequence[Document]) -> list[Document]:
        """This rank's documents of a step: about as many tokens as every other rank's."""
        shares = divide([len(document["input_ids"]) for document in documents], self.accelerator.num_processes)
        mine = [documents[index] for index in shares[self.accelerator.process_index]]
        return mine or [_nothing_of(documents[0])]

    # ── one optimizer step ───────────────────────────────────────────────────────────────────────────────────────────

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], int]:
        """The documents of a step, of all ranks, and how many of their tokens are learnt: a number of the CPU's, as one
        on the GPU would have to wait for it."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        return batches, sum(_learnt(document) for batch in batches for document in batch)

    def training_step(self, model: Any, inputs: list[Document], num_items_in_batch: int) -> torch.Tensor:
        """The mean loss of the step's documents; their gradients are accumulated."""
        model.train()
        documents = self._share(inputs)
        while True:
            try:
                return self._accumulate(model, documents, num_items_in_batch)
            except torch.cuda.OutOfMemoryError:
                if not self._give_way(documents):
                    raise
            model.zero_grad()
            gc.collect()  # what the failed step still holds in cycles
            torch.cuda.empty_cache()

    def one_micro_batch(self, documents: Sequence[Document]) -> torch.Tensor:
        """The summed loss of documents computed together, with a gradient, as in a step. For measurements."""
        with self.accelerator.autocast():
            nll: torch.Tensor = self.model(**micro_batch(documents, self.args.device, packed=self.packs))
        return nll

    def _accumulate(self, model: Any, documents: list[Document], count: float) -> torch.Tensor:
        micro_batches = self._micro_batches(documents)
        # Gradients are averaged over the ranks, and each rank divides by the tokens of all.
        scale = self.accelerator.num_processes / max(1, count)
        total = torch.zeros((), device=self.args.device)
        # Ranks meet once, at the end of the step: one that runs out of memory can try again while the others wait.
        with self.accelerator.no_sync(model):
            for bin_ in micro_batches:
                with self.compute_loss_context_manager():
                    loss = model(**micro_batch(bin_, self.args.device, packed=self.packs)) * scale
                self.accelerator.backward(loss)
                total += loss.detach()
        if self.accelerator.num_processes > 1:
            average_gradients(model, self.accelerator.num_processes)
        return total

    def _micro_batches(self, documents: Sequence[Document]) -> list[list[Document]]:
        lengths = [len(document["input_ids"]) for document in documents]
        bins = pack(lengths, self.micro_batch_tokens, boundary=self._boundary)
        return [[documents[index] for index in bin_] for bin_ in bins]

    def _give_way(self, documents: Sequence[Document]) -> bool:
        """Make the next try smaller: half the tokens at once, then recomputed activations. False: nothing is left."""
        longest = max(len(document["input_ids"]) for document in documents)
        if self.micro_batch_tokens > longest:
            self.micro_batch_tokens = max(longest, self.micro_batch_tokens // 2)
            self._say(f"out of memory: going on with {self.micro_batch_tokens:,} tokens at once, the same step")
            return True
        if not self.recomputes and self.base_model.supports_gradient_checkpointing:
            self.recompute(True)
            self._say("out of memory: going on with recomputed activations, the same step")
            return True
        return False

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again backward."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base_model.modules())

    def recompute(self, on: bool) -> None:
        """Compute activations again backward, or keep them: now, and when train() begins."""
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # the first since transformers 5.20
            if hasattr(self.args, name):
                setattr(self.args, name, on)
        base = self.base_model
        if on and not self.recomputes:
            base.disable_input_require_grads()  # each enabling forgets the hooks of the one before, and they stay
            base.gradient_checkpointing_enable()  # enables the hooks, too, in some versions
            base.disable_input_require_grads()
            base.enable_input_require_grads()
        elif not on:
            if self.recomputes:
                base.gradient_checkpointing_disable()
            base.disable_input_require_grads()

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss over the held-out rows' learnt tokens: not a mean of batch means."""
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            at_once = _EVALUATED_AT_ONCE * self.accelerator.num_processes
            for documents in DataLoader(rows, batch_size=at_once, collate_fn=list):
                for bin_ in self._micro_batches(self._share(documents)):
                    if self.is_stopping():
                        break  # this rank alone: what it says to the others comes with the end of the batch
                    sums += torch.tensor([self._summed_loss(bin_), sum(map(_learnt, bin_))], dtype=torch.float64)
                self.after_evaluation_batch()
        total, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        loss = total / max(count, 1)
        figures = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity(loss)}
        self.log(dict(figures))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        self.model.train(training)
        return figures

    def is_stopping(self) -> bool:
        """Whether an evaluation is of no use any more: asked before each micro-batch."""
        return False

    def after_evaluation_batch(self) -> None:
        """Called as often on every rank, and may raise to leave an evaluation."""

    def _summed_loss(self, documents: Sequence[Document]) -> float:
        """Their loss without a gradient, one after the other where the memory does not hold them together."""
        try:
            with self.compute_loss_context_manager():
                nll: torch.Tensor = self.model(**micro_batch(documents, self.args.device, packed=self.packs))
            return float(nll)
        except torch.OutOfMemoryError:
            if len(documents) == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        return sum(self._summed_loss([document]) for document in documents)

    # ── what SFTTrainer and Trainer do about padded batches ──────────────────────────────────────────────────────────

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _track_num_input_tokens(self, inputs: list[Document]) -> None:
        self.state.num_input_tokens_seen += sum(len(document["input_ids"]) for document in inputs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # counted from padded inputs; tokens per second say more

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: adapter.py writes the card, once, with what the run really did."""


class EpochSampler(Sampler[int]):  # type: ignore[misc]
    """Row numbers in an order of `seed` and `epoch`: a resumed epoch is in the order that it began with."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        yield from torch.randperm(self._count, generator=generator).tolist()


class _NewOrder(TrainerCallback):  # type: ignore[misc]
    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._sampler.epoch = int(state.epoch or 0)


def _learnt(document: Document) -> int:
    """Tokens of a document that are predicted and learnt; the first is never predicted."""
    return int(np.count_nonzero(document["labels"][1:] != IGNORED))


def _nothing_of(document: Document) -> Document:
    """A token that teaches nothing, for a rank without documents: it must still meet the others."""
    token = document["input_ids"][:1]
    return {"input_ids": token, "labels": np.full_like(token, IGNORED)}


def micro_batch(documents: Sequence[Document], device: torch.device, *, packed: bool = True) -> dict[str, Any]:
    """Documents in one row (1, T): ids, positions that restart, boundaries, and where what is learnt.

    `learnt` (n,) are the positions whose next token is learnt and `targets` (n,) those tokens. Not `packed`: a single
    document for a model that knows nothing of boundaries.
    """
    lengths = [len(document["input_ids"]) for document in documents]
    # The last position of a document predicts nothing: the next token is another document's.
    following = np.concatenate([np.append(document["labels"][1:], IGNORED) for document in documents])
    learnt = np.flatnonzero(following != IGNORED)
    arrays = {
        "input_ids": np.concatenate([document["input_ids"] for document in documents])[None],
        "learnt": learnt,
        "targets": following[learnt],
    }
    if packed:
        edges = np.cumsum([0, *lengths], dtype=np.int32)
        arrays["position_ids"] = np.concatenate([np.arange(length) for length in lengths])[None]
        arrays |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    batch: dict[str, Any] = {name: _on_device(array, device) for name, array in arrays.items()}
    if packed:  # what attention must know before it can queue its kernels: reading it from the GPU would wait
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths), "document_edges": tuple(edges.tolist())}
    return batch


def _on_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """On a GPU through pinned memory: only from there is a copy queued behind the work that is already there."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def average_gradients(model: torch.nn.Module, ranks: int) -> None:
    """Give every rank the mean of all ranks' gradients, in one message: adapters are small."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    together = torch.cat([parameter.grad.reshape(-1) for parameter in trained]) / ranks
    torch.distributed.all_reduce(together)
    parts = together.split([parameter.numel() for parameter in trained])
    for parameter, part in zip(trained, parts, strict=True):
        parameter.grad.copy_(part.view_as(parameter.grad))


def longrope_boundary(model: PreTrainedModel) -> int | None:
    """The length above which longrope takes its other frequencies, for the whole row; None without longrope."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None


def answer_targets(model: PreTrainedModel, nll: Callable[[Any, dict[str, Any]], torch.Tensor]) -> None:
    """Let the model's forward answer `targets` with `nll`: DDP must see a forward of its own module."""
    original = model.forward

    def forward(*args: Any, targets: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        return nll(model, {**kwargs, "targets": targets})

    model.forward = forward


def whole_nll(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """summed_nll through the model's own logits, for a model whose head is more than a matrix."""
    inputs = {key: value for key, value in batch.items() if key not in ("learnt", "targets")}
    logits = model(**inputs, use_cache=False).logits[0, batch["learnt"]].float()
    return torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
