"""The metrics of a trial: names, units, and what is better."""

from __future__ import annotations

from typing import Literal

METRICS: dict[str, Literal["max", "min"]] = {
    "val_metric": "max",
    "params_total": "min",
    "params_trained": "min",
    "flops": "min",
    "latency_ms": "min",
    "memory_mb": "min",
    "model_mb": "min",
    "device_seconds": "min",
}
UNITS: dict[str, str] = {
    "flops": "",
    "latency_ms": " ms",
    "memory_mb": " MB",
    "model_mb": " MB",
    "device_seconds": " s",
}
LATENCY = "latency_ms"  # on the first profile; on another one `latency_ms_NAME`


def is_metric(name: str) -> bool:
    """Whether a sweep may have such a metric."""
    return name in METRICS or name.startswith(f"{LATENCY}_")


def better(metric: str) -> Literal["max", "min"]:
    """What is better for a metric."""
    return METRICS[LATENCY if metric.startswith(LATENCY) else metric]


def latency_column(metric: str, what: Literal["iqr", "low", "high", "setup"]) -> str:
    """The column beside a latency: `latency_iqr_ms_edge` of `latency_ms_edge`."""
    return metric.replace(LATENCY, "latency_setup" if what == "setup" else f"latency_{what}_ms", 1)


def shown(metric: str, value: float) -> str:
    """A metric's value with its unit: `1,234,567`, `4.56 ms`."""
    text = f"{value:,.0f}" if value.is_integer() or abs(value) >= 1e4 else f"{value:.4g}"
    return text + UNITS.get(LATENCY if metric.startswith(LATENCY) else metric, "")
