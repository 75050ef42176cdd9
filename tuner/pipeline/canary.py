"""What base and adapter answer to the canary's sentences, measured on the files that are pushed.

    trained   the base as it was quantized in training    likelihoods, and the tokens that each goes on with
    served    the base in 16 bits                          likelihoods; --no-canary leaves them out

Not the model that was trained but the base loaded anew, with the adapter as PEFT reads it from its directory: what is
served is rounded, and is without levers. A server that gives a sentence another likelihood than was measured here does
not serve this adapter (docs/artifact.md).
"""

import math
import time
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from tuner.errors import GateError, TunerError
from tuner.pipeline.model import (
    Device,
    count_weights,
    free_gpu_memory,
    load_base_model,
    load_sixteen_bit_base,
    pick_device,
    put_adapter,
)
from tuner.pipeline.sentences import main_format
from tuner.records import Canary, CanarySentence, Continuation, Means, Quantization, TokenByToken
from tuner.runspec import Prepared, Reporter, RunSpec

CONTINUED_TOKENS = 16
LEAST_DISTANCE = 0.1  # nats a token; in bf16 rounding alone is worth as much (SmolLM2-135M: 0.08)
_DIGITS = 4  # of a log-likelihood; the next ones are the machine's


def measure(
    spec: RunSpec,
    prepared: Prepared,
    work_dir: Path,
    adapter_dir: Path,
    tensors_sha256: str,
    quantization: Quantization,
    reporter: Reporter,
) -> Canary:
    """canary.json of the adapter in the directory. Equal adapters give equal ones on one machine.

    Raises GateError when PEFT cannot load what was saved, as nobody else could. What the memory does not hold, or an
    architecture cannot be asked in 16 bits, is a warning: a trained adapter is not lost to it.
    """
    began = time.monotonic()
    device = pick_device()
    base_dir, trusts = work_dir / prepared.base_model_dir, spec.trust_remote_code
    asked = [list(sentence.token_ids) for sentence in prepared.sentences]
    prompts = [list(sentence.token_ids[: sentence.prompt_tokens]) for sentence in prepared.sentences]
    measured: dict[str, list[TokenByToken]] = {}
    compute_dtypes: dict[str, str] = {}
    continuations: list[Continuation | None] = [None] * len(asked)

    def as_trained() -> None:
        model = load_base_model(base_dir, spec.training, device, trust_remote_code=trusts, attention=None)
        base, base_goes_on = log_likelihoods(model, asked, device), go_on(model, prompts, device)
        adapted = _adapted(model, adapter_dir)
        measured[quantization.precision] = _pairs(base, log_likelihoods(adapted, asked, device))
        compute_dtypes[quantization.precision] = quantization.compute_dtype
        tuned_goes_on = go_on(adapted.get_base_model(), prompts, device)
        continuations[:] = [
            Continuation(base=one, tuned=other) for one, other in zip(base_goes_on, tuned_goes_on, strict=True)
        ]

    def as_served() -> None:
        model = load_sixteen_bit_base(base_dir, device, trust_remote_code=trusts)
        counted = count_weights(model)
        if counted.precision in measured:  # a checkpoint that is quantized itself: so it is served
            return
        base = log_likelihoods(model, asked, device)
        measured[counted.precision] = _pairs(base, log_likelihoods(_adapted(model, adapter_dir), asked, device))
        compute_dtypes[counted.precision] = counted.compute_dtype

    try:
        free_gpu_memory()  # of the model that was trained
        as_trained()
    except TunerError as error:
        raise GateError(f"the adapter was saved, and cannot be used: {error.message}", hint=error.hint) from error
    except (torch.OutOfMemoryError, ArithmeticError) as error:
        reporter.warn(f"the canary is without the precision of the training: {_words(error)}")
    if spec.canary and quantization.quant_type:
        try:
            free_gpu_memory()
            as_served()
        except Exception as error:  # whatever an architecture's own code, or a full memory, raises
            reporter.warn(f"the canary is without 16 bits: {_words(error)}")
    canary = Canary(
        run_digest=spec.digest,
        tensors_sha256=tensors_sha256,
        row_format=main_format(prepared.row_formats),
        trained_in=quantization.precision,
        compute_dtypes=compute_dtypes,
        sentences=tuple(
            CanarySentence(
                **sentence.model_dump(),
                log_likelihood={precision: _means(found[number]) for precision, found in measured.items()},
                token_log_likelihoods={precision: found[number] for precision, found in measured.items()},
                greedy_token_ids=continuations[number],
            )
            for number, sentence in enumerate(prepared.sentences)
        ),
    )
    alike = [precision for precision in measured if canary.distance(precision) < LEAST_DISTANCE]
    if alike and not spec.smoke:
        reporter.warn(
            f"the canary's sentences hardly tell the adapter from its base on {' and '.join(alike)}, so they will not "
            "tell a server that leaves it out"
        )
    reporter.note(f"canary: {canary}; {time.monotonic() - began:.1f} s")
    return canary


def _adapted(base: PreTrainedModel, adapter_dir: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say of the configuration it has said in training
        return put_adapter(base, adapter_dir, "its base")


def _pairs(base: Sequence[Sequence[float]], tuned: Sequence[Sequence[float]]) -> list[TokenByToken]:
    """Raises FloatingPointError for what is no number, as fp16 may give."""
    if not all(map(math.isfinite, chain(*base, *tuned))):
        raise FloatingPointError("a likelihood is not finite")
    return [TokenByToken(base=_rounded(one), tuned=_rounded(other)) for one, other in zip(base, tuned, strict=True)]


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, _DIGITS) for value in values)


def _means(tokens: TokenByToken) -> Means:
    return Means(base=round(fmean(tokens.base), _DIGITS), tuned=round(fmean(tokens.tuned), _DIGITS))


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def log_likelihoods(model: PreTrainedModel, rows: Sequence[Sequence[int]], device: Device) -> list[list[float]]:
    """The log-likelihood in nats of each token of each row but its first."""
    longest = max(map(len, rows))
    # The shorter rows go on with a token that nothing before it sees, as attention is causal.
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        found = []
        for row, of_row in zip(rows, logits, strict=True):
            scores = torch.log_softmax(of_row[: len(row) - 1].float(), dim=-1)
            following = torch.tensor(row[1:], device=scores.device)
            found.append(scores.gather(1, following[:, None])[:, 0].tolist())
    return found


def go_on(model: PreTrainedModel, prompts: Sequence[Sequence[int]], device: Device) -> list[tuple[int, ...]]:
    """The CONTINUED_TOKENS tokens that each prompt is most likely gone on with, whatever the model's own configuration
    says of generating, and whether or not one of them is EOS."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts], device=device.device)
    seen = torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]).to(ids.device)
    model.generation_config = GenerationConfig(max_new_tokens=CONTINUED_TOKENS, do_sample=False, pad_token_id=0)
    answers = model.generate(input_ids=ids, attention_mask=seen)
    return [tuple(answer) for answer in answers[:, longest:].tolist()]
