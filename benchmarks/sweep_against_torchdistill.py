"""Eight KD trials here, against the same trials through torchdistill driven by Optuna.

    pip install -e '.[bench]'
    python -m benchmarks.sweep_against_torchdistill   # 8 minutes; writes results/ and docs/performance.md

Everything is as in `sweep_against_plain`, with `peers/torchdistill_optuna.py` on the other side.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.record import command_of, machine, markdown, publish, versions
from benchmarks.sweep_against_plain import DEFAULTS, PROCESSES, arguments, check_ratio, compared, spec_of, trials_of

MARK = "sweep_against_torchdistill"


def main() -> None:
    """Runs the rounds, prints the table, writes it."""
    parser = arguments(__doc__, 12)
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in DEFAULTS}
    methods = trials_of(8, options.factor, ("kd",))
    result: dict[str, Any] = {
        "setting": setting,
        "command": command_of(MARK, parser, options),
        "machine": machine(PROCESSES),
        "versions": versions("torch", "timm", "torchdistill", "ray", "optuna"),
        "mflop": check_ratio(spec_of(setting, methods, Path("runs")), options.factor),
        "rounds": compared("torchdistill_optuna", setting, methods, options.rounds, "8 KD trials"),
    }
    print(text := table(result))
    if not options.dry:
        publish(MARK, result, text)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    setting, rounds = result["setting"], result["rounds"]
    sides = {
        "torchdistill and Optuna, live teacher": "peer_s",
        "here, empty store": "ours_s",
        "here, the same file again": "again_s",
    }
    rows = [
        [
            label,
            f"{statistics.median(one[name] for one in rounds):.0f}",
            f"{statistics.median(one['peer_s'] / one[name] for one in rounds):.2f} x",
        ]
        for label, name in sides.items()
    ]
    cpu = [statistics.median(one[name] for one in rounds) for name in ("peer_cpu_s", "ours_cpu_s")]
    text = (
        f"`{result['command']}`: 8 KD trials of {setting['steps']} steps x {setting['batch']} images, "
        f"{setting['data']}, "
        f"{setting['teacher']} at {setting['teacher_size']} px into {setting['student']} at {setting['student_size']} "
        f"px, rounds: {len(rounds)}; {result['machine']}; {result['versions']}."
    )
    spent = f"CPU seconds of all processes: {cpu[0]:.0f} there, {cpu[1]:.0f} here, {cpu[0] / cpu[1]:.2f} x less."
    return f"{text}\n\n{markdown(['', 'wall seconds', 'faster'], rows)}\n\n{spent}"


if __name__ == "__main__":
    main()
