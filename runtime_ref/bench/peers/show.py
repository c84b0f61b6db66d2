"""The comparison as a table in Markdown, ready for a report."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """A line of what was measured on what, the table, and who is missing."""
    machine, product = result["machine"], result["product"]
    ours = [p["name"] for p in result["participants"] if p["name"].startswith("tmexport ")]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; {result['model']} ({result['type']}), "
        f"{result['multiply_adds_per_token'] / 1e6:.0f} M multiply-adds a token; medians of {result['rounds']} rounds that "
        f"alternate, lowest to highest in brackets; product: {product['n']} x {product['k']}, in cache, error against fp64.",
        "",
        f"| test | threads | who | tokens/s | GMAC/s a thread | GB/s a thread | error | {' | '.join(f'{who} is' for who in ours)} |",
        "|---" * (7 + len(ours)) + "|",
    ]
    for row in result["rows"]:
        rate = f"{_number(row['median'])} ({_number(row['lowest'])} to {_number(row['highest'])})"
        error = "" if row["error"] is None else f"{row['error']:.5f}"
        ratios = [f"{row['ratio'][who]:.2f} x" if row["ratio"] else "" for who in ours]
        read = "" if row["gigabytes_per_thread"] is None else f"{row['gigabytes_per_thread']:.1f}"
        cells = [
            row["test"],
            str(row["threads"]),
            row["who"],
            rate,
            f"{row['gmacs_per_thread']:.1f}",
            read,
            error,
            *ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{p['name']} {p['version']}" for p in result["participants"])
    lines += ["", f"Measured {result['measured_at']}: {versions}."]
    lines += [f"Without {missing['name']}: {missing['reason']}." for missing in result["missing"]]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
