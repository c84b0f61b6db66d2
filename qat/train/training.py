"""A training put together: models, tokens and batches of a recipe; what is left of it is written to a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator

from qat.convert.fitting import fit_layers
from qat.data import Batches, tokenize_files
from qat.evaluate import documents_in, end_of_text_id, find_tokenizer
from qat.memory import keep_freed_memory
from qat.model import LanguageModel, load_model
from qat.plan import config_of
from qat.quantizer import make_low_bit, model_tensors
from qat.recipe import Recipe
from qat.tokenizer import train_tokenizer
from qat.train.curves import draw_curves
from qat.train.hooks import Hook
from qat.train.loop import fit
from qat.train.run import Run
from qat.train.teacher import Teacher, teacher_folder
from qat.train.teacher_cache import open_teacher_cache
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.documents import END_OF_TEXT, Document
from tmexport.errors import CheckpointError, UsageError
from tmexport.model import Model
from tmexport.threads import default_threads


def train(
    recipe: Recipe,
    data: list[Path],
    out: Path,
    teacher: Path | None = None,
    held_out: list[Path] | None = None,
    tokenizer: Path | None = None,
    resume: bool = False,
    cache: Path | None = None,
    hooks: Sequence[Hook] = (),
    student: Path | None = None,
    table: str | None = None,
    shape: Model | None = None,
) -> dict[str, Any]:
    """Run a recipe; returns a summary. Without a teacher, a full-precision model is trained from nothing.

    `hooks` are called after every step, besides those of every run (qat/train/hooks.py). `student`: the full-precision checkpoint
    that is trained, if it is not the teacher's own. `table`: of recipe.toml. A teacher may be a llama GGUF. `shape`: what a model
    trained from nothing is made of, in place of the recipe's Mamba-2; its vocabulary is the tokenizer's.

    Raises:
        TmexportError: the data, the teacher or a setting cannot be used, or the loss is not finite.
        KeyboardInterrupt: after saving; `resume` goes on from there.
    """
    keep_freed_memory()
    # Several processes without a GPU must ask for the CPU: accelerate takes each for a run of its own otherwise.
    accelerator = Accelerator(cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(recipe.threads or max(1, default_threads() // local))
    torch.manual_seed(recipe.seed)
    if (out / "checkpoints" / "latest.pt").is_file() and not resume:
        raise UsageError(f"{out}: already holds a run; continue it with --resume, or choose another --out")
    if teacher is not None and out.resolve() == teacher.resolve():
        raise UsageError(f"{out}: is the teacher's folder, which would be overwritten; choose another --out")
    cache = cache or out / "cache"
    if teacher is not None:
        teacher = teacher_folder(teacher, cache)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made: {error.strerror}; choose another --out") from None
    with accelerator.main_process_first():  # the first makes the tokenizer and the token files, the others find them
        run = _prepare(recipe, data, out, teacher, held_out or [], tokenizer, accelerator, cache, student, shape)
    run.table = table or ("teacher" if teacher is None else "student")
    try:
        summary = fit(run, resume, hooks)
    finally:
        if accelerator.is_main_process and run.metrics.is_file() and run.metrics.stat().st_size:
            draw_curves(run.metrics, out / "curves.png")
    if accelerator.is_main_process:
        if recipe.refit_tokens:
            assert teacher is not None
            run.teacher = None  # makes room for the one in fp32
            _refit(run, load_model(teacher))
        write_checkpoint(out, run.student.config, model_tensors(run.student), run.tokenizer)
    accelerator.wait_for_everyone()
    return {"out": str(out), **summary}


def _prepare(
    recipe: Recipe,
    data: list[Path],
    out: Path,
    teacher: Path | None,
    held_out: list[Path],
    tokenizer: Path | None,
    accelerator: Accelerator,
    cache: Path,
    student: Path | None,
    shape: Model | None,
) -> Run:
    """Models, tokens and batches of a run."""
    teacher_model = None
    if teacher is None:
        for name, used in (
            ("align_steps", recipe.align_steps),
            ("objective", recipe.objective != "predict"),
            ("refit_tokens", recipe.refit_tokens),
        ):
            if used:
                raise UsageError(f"{name} needs a teacher; remove it, or give --teacher")
        tokenizer = _own_tokenizer(data, recipe, out, tokenizer)
        config = _with_vocabulary(shape or config_of(recipe), tokenizer, recipe.end_token)
    else:
        if recipe.end_token != END_OF_TEXT:
            raise UsageError("end_token is for a model from scratch; a teacher brings its own, leave it out")
        config, tokenizer = _full_precision(teacher, "teacher"), find_tokenizer(teacher, tokenizer)
        teacher_model = load_model(teacher).requires_grad_(False).eval()
        if recipe.dtype == "bfloat16":
            _halve_matrices(teacher_model)
    eos = end_of_text_id(config, tokenizer)
    stream = tokenize_files(data, tokenizer, config.vocab_size, eos, cache, recipe.data_tokens)
    batches = Batches(stream.tokens, recipe.seq_len, recipe.batch_size, recipe.seed)
    model = LanguageModel(config) if teacher is None else load_model(teacher if student is None else student)
    if teacher is not None:
        _check_pair(config, config if student is None else _full_precision(student, "student"), recipe)
        learned, embedding = recipe.learned_scale, recipe.ternary_embedding
        make_low_bit(model, recipe.weights, recipe.group_size, learned, embedding, recipe.projections, recipe.rest)
    run = Run(
        recipe, model, teacher_model, batches, stream.bytes_per_token, out, eos, tokenizer, accelerator=accelerator
    )
    run.inputs = {"tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16], "data": stream.digest}
    if teacher_model is not None:
        run.inputs["teacher"] = _digest_of_vectors(teacher_model)
    if student is not None:
        run.inputs["student"] = _digest_of_vectors(model)
    if teacher_model is not None and recipe.teacher_top_k and recipe.kd_weight > 0:
        teacher_model.to(accelerator.device)
        run.teacher_cache = open_teacher_cache(recipe, teacher_model, batches, stream.key, cache)
    if held_out:
        run.held_out = first_tokens(documents_in(held_out, tokenizer, config), recipe.eval_tokens, tokenizer)
    return run


def _full_precision(folder: Path, what: str) -> Model:
    """The dimensions of a checkpoint that has no codes."""
    checkpoint = open_checkpoint(folder)
    if kinds := {form.kind for form in checkpoint.coded.values()}:
        raise CheckpointError(f"{folder}: is already {' and '.join(sorted(kinds))}; expected a full-precision {what}")
    return checkpoint.config


def _check_pair(teacher: Model, student: Model, recipe: Recipe) -> None:
    """Whether one can imitate the other: the vocabulary, and for layer by layer the layers."""
    if recipe.refit_tokens and (kinds := {recipe.weights, recipe.rest} - {"dense"}):
        raise UsageError(
            f"refit_tokens fits full-precision weights, not {' and '.join(sorted(kinds))} ones; use --weights dense --rest dense"
        )
    pairs = [("vocab_size", teacher.vocab_size, student.vocab_size)]
    if recipe.objective != "predict" or recipe.align_steps or recipe.refit_tokens:
        pairs += [("d_model", teacher.d_model, student.d_model), ("blocks", teacher.n_layer, student.n_layer)]
    for name, wanted, found in pairs:
        if wanted != found:
            raise UsageError(f"the student's {name} is {found}, the teacher's {wanted}; expected the same")


def _refit(run: Run, teacher: LanguageModel) -> None:
    """Fit out_proj of the student's mixers to the teacher's layers, on the first batches of the run.

    In fp32 whatever the run computes in, and so is `teacher`: what a layer is to add is a small difference of two large
    residual streams.
    """
    recipe = run.recipe
    count = max(1, recipe.refit_tokens // recipe.tokens_per_step)
    ids = torch.cat([torch.from_numpy(run.batches(step)[:, :-1]) for step in range(count)])
    device = run.accelerator.device
    with torch.compiler.set_stance("force_eager"):  # compiled layers do not see the hook that reads their features
        fit_layers(teacher.to(device), run.student, ids.to(device))


def _digest_of_vectors(teacher: Teacher) -> str:
    """Tells one teacher from another by its norms, biases, A and D, which are quickly read."""
    digest = hashlib.sha256()
    for parameter in teacher.state_dict().values():
        if parameter.ndim == 1:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _halve_matrices(model: LanguageModel) -> None:
    """Keep matrices in bf16, which autocast would make of them anyway; what is computed in fp32 stays fp32."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.bfloat16)


def _own_tokenizer(data: list[Path], recipe: Recipe, out: Path, given: Path | None) -> Path:
    """OUT/tokenizer.json: the one given, the one of the run that is resumed, or one trained on the data."""
    path = out / "tokenizer.json"
    if given is not None:
        find_tokenizer(out, given)
        if (out / "checkpoints" / "latest.pt").is_file() and given.read_bytes() != path.read_bytes():
            raise UsageError(
                f"{given}: is not the tokenizer of the run in {out}; leave it out, or choose another --out"
            )
        shutil.copyfile(given, path)
    elif not (out / "checkpoints" / "latest.pt").is_file():
        click.echo(f"training a tokenizer of {recipe.vocab_size} tokens", err=True)
        limit = 4 * recipe.data_tokens  # about 4 characters a token
        train_tokenizer(data, recipe.vocab_size, path, limit, recipe.end_token)
    return path


def _with_vocabulary(shape: Model, tokenizer: Path, end_token: str) -> Model:
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(tokenizer))
    eos = known.token_to_id(end_token)
    if eos is None:
        raise UsageError(f"{tokenizer}: has no token {end_token!r}; name the one that ends a text with --end-token")
    return replace(shape, vocab_size=known.get_vocab_size(), bos_token_id=eos, eos_token_id=eos)


def first_tokens(documents: Sequence[Document], count: int, tokenizer: Path) -> list[Document]:
    """About `count` tokens, an equal share from the beginning of every document, and the bytes of their text."""
    from tokenizers import Tokenizer

    if sum(document.scored for document in documents) <= count:
        return list(documents)
    share, known = max(2, count // len(documents)), Tokenizer.from_file(str(tokenizer))

    def cut(ids: np.ndarray) -> Document:
        # A cut may fall inside a UTF-8 character, which decodes as U+FFFD (3 bytes for 1 to 3): a few bytes of many thousands.
        text = known.decode(ids[1:].tolist(), skip_special_tokens=False)  # a marker inside the text is text
        return Document(ids, len(text.encode()))

    return [cut(document.ids[:share]) for document in documents]
