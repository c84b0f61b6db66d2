"""acc, acc_norm, perplexity and their standard errors, by lm-eval's definitions.

acc: the largest log-likelihood is the right answer's (the first of equals); with a single choice, whether greedy decoding
says it. acc_norm: the same after dividing by the characters of the choice. Standard error of a mean: the sample's standard
deviation (n - 1) / sqrt(n); of MMLU, the pooled one over the subjects. Perplexity is exp(-mean log-likelihood of a word);
its standard error is the delta method's, where lm-eval draws bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zero_shot.scoring import Likelihood
from zero_shot.tasks import Example


@dataclass(frozen=True)
class Metric:
    """A value, and its standard error (None for a single example)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Result:
    """examples: how many were scored; metrics by name."""

    examples: int
    metrics: dict[str, Metric]


def measure(examples: Sequence[Example], likelihoods: Sequence[Sequence[Likelihood]], names: Sequence[str]) -> Result:
    """The metrics `names` of examples (at least one) and the likelihoods of their requests."""
    per_example = {
        name: [_of_one(name, e, scored) for e, scored in zip(examples, likelihoods, strict=True)] for name in names
    }
    metrics = {name: _mean(values) for name, values in per_example.items()}
    if "perplexity" in metrics:
        mean = metrics["perplexity"]
        value = math.exp(min(700.0, -mean.value))
        metrics["perplexity"] = Metric(value, None if mean.stderr is None else value * mean.stderr)
    return Result(len(examples), metrics)


def pool(results: Mapping[str, Result]) -> Result:
    """One result of several subjects, weighted by their size; pooled standard errors."""
    sizes = [r.examples for r in results.values()]
    total, metrics = sum(sizes), {}
    for name in next(iter(results.values())).metrics:
        parts = [r.metrics[name] for r in results.values()]
        errors = [part.stderr for part in parts]
        stderr = None
        if total > len(sizes) and None not in errors:
            pooled = sum((n - 1) * n * e**2 for n, e in zip(sizes, errors, strict=True) if e) / (total - len(sizes))
            stderr = math.sqrt(pooled / total)
        metrics[name] = Metric(sum(n * p.value for n, p in zip(sizes, parts, strict=True)) / total, stderr)
    return Result(total, metrics)


def _of_one(name: str, example: Example, scored: Sequence[Likelihood]) -> float:
    """One example's contribution to the mean."""
    nats = [likelihood for likelihood, _ in scored]
    if name == "perplexity":
        return nats[0]
    if len(scored) == 1:
        return float(scored[0][1])
    if name == "acc_norm":
        nats = [n / len(c) if c else -math.inf for n, c in zip(nats, example.choices, strict=True)]
    return float(nats.index(max(nats)) == example.gold)


def _mean(values: Sequence[float]) -> Metric:
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Metric(mean, None)
    return Metric(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) / math.sqrt(n))
