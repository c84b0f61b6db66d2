"""Whether a GPU computes what the CPU does, and how many tokens a second a recipe trains at."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat.model import LanguageModel
from qat.model.mamba2 import Mamba2Mixer, default_chunk
from qat.model.ssd import chunked_scan, fused_kernel, fused_scan
from qat.plan import config_of, make_plan
from qat.quantizer import make_low_bit
from qat.recipe import Recipe
from qat.train.step import Step, freeze, make_optimizer
from qat.train.teacher import Teacher
from tmexport.model import mamba2_model


def synchronise(device: torch.device) -> None:
    """Wait for what the device was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def scan_inputs(time_steps: int, heads: int, width: int, groups: int, states: int) -> list[Tensor]:
    """x, dt, A, B, C, D of a scan of two sequences, drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = torch.rand(2, time_steps, heads, generator=generator) * 0.1
    a = -torch.rand(heads, generator=generator) * 8 - 1
    b, c = draw(2, time_steps, groups, states), draw(2, time_steps, groups, states)
    return [draw(2, time_steps, heads, width), dt, a, b, c, draw(heads)]


def scan_errors(
    device: torch.device, time_steps: int = 512, heads: int = 18, width: int = 64
) -> dict[str, float | str]:
    """The relative error of every scan that this machine has, forward and of the gradient of x, against fp64 on the CPU; or
    why it does not run.
    """
    inputs = scan_inputs(time_steps, heads, width, heads // 2, 64)
    exact = _scanned(chunked_scan, [tensor.double() for tensor in inputs], default_chunk(torch.device("cpu")))
    here = [tensor.to(device) for tensor in inputs]
    low = [tensor.bfloat16() if place in (0, 3, 4) else tensor for place, tensor in enumerate(here)]
    chunk = default_chunk(device)
    scans = {"chunked fp32": (chunked_scan, here), "chunked bf16": (chunked_scan, low)}
    if device.type == "cuda":
        scans["compiled bf16"] = (torch.compile(chunked_scan), low)
        if fused_kernel() is not None:
            scans["mamba_ssm bf16"] = (fused_scan, low)
    errors: dict[str, float | str] = {}
    for name, (scan, given) in scans.items():
        try:
            found = _scanned(scan, given, chunk)
        except Exception as error:  # what torch's or Triton's compiler raises where it cannot: the next scan is tried
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        for part, value, wanted in zip(("forward", "gradient"), found, exact, strict=True):
            errors[f"{name}, {part}"] = ((value.double().cpu() - wanted).norm() / wanted.norm()).item()
    return errors


def _scanned(scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    x = inputs[0].clone().requires_grad_(True)
    y, _ = scan(x, *inputs[1:], chunk)
    y.double().square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def model_error(device: torch.device) -> float:
    """The relative error of a small model's logits against the same weights on the CPU, fp32."""
    torch.manual_seed(0)
    model = LanguageModel(mamba2_model(d_model=128, n_layer=3, vocab_size=512, d_state=32, headdim=32, n_groups=2))
    ids = torch.arange(192)[None] * 7 % 512
    with torch.no_grad():
        wanted = model(ids)
        found = model.to(device)(ids.to(device)).cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


def speed_of_recipe(recipe: Recipe, device: torch.device, seconds: float, kind: str) -> dict[str, Any]:
    """Tokens a second and memory of a recipe's own step with random weights, beside what its plan said."""
    config = config_of(recipe)
    torch.manual_seed(0)
    with device:
        teacher, student = LanguageModel(config).requires_grad_(False), LanguageModel(config)
    student.load_state_dict(teacher.state_dict())
    plan = make_plan(recipe, config, "h100", config)
    planned = {"planned_memory": plan.memory_total, "planned_tokens_per_second": plan.tokens / (3600 * plan.hours)}
    return speed(student, teacher, recipe, device, seconds, kind) | planned


def speed(
    student: LanguageModel, teacher: Teacher, recipe: Recipe, device: torch.device, seconds: float, kind: str = ""
) -> dict[str, Any]:
    """Tokens a second of whole optimiser steps of `recipe` for about so long, after two that are not counted.

    kind: a key of `variants`; "" takes the scan that training takes.
    """
    make_low_bit(student, recipe.weights, recipe.group_size, projections=recipe.projections)
    freeze(student, recipe)
    if kind in ("chunked", "compiled"):
        for module in student.modules():
            if isinstance(module, Mamba2Mixer):
                module.scan = chunked_scan
    student.backbone.checkpoint_activations = recipe.checkpoint_activations
    if recipe.compile:
        for layer in student.backbone.layers:
            layer.compile()
    step, optimizer = Step(student, teacher, recipe), make_optimizer(student, recipe)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, student.vocab_size, (recipe.batch_size, recipe.seq_len + 1), device=device)
    started = began = time.monotonic()
    first = 0.0
    for count in itertools.count():
        for part in ids.chunk(recipe.accumulate):
            (step(part)[0] / recipe.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)
        now = time.monotonic()
        if count == 0:
            first = now - started
        if count <= 1:
            began = now
        elif now - began > seconds:
            break
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    rate = (count - 1) * recipe.tokens_per_step / (now - began)
    return {"tokens_per_second": rate, "memory": memory, "steps": count - 1, "first_step_seconds": first}


def variants(recipe: Recipe, device: torch.device) -> dict[str, Recipe]:
    """What of this machine is compared: the scan as it is, and compiled."""
    found = {"chunked": replace(recipe, compile=False)}
    if device.type == "cuda":
        found["compiled"] = replace(recipe, compile=True)
        if fused_kernel() is not None:
            found["mamba_ssm"] = replace(recipe, compile=False)
    return found
