"""optuna-dashboard over a sweep's own study: `python -m orchestrator.sweep.study_dashboard FOLDER PORT`."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.spec import read_spec
from orchestrator.sweep.study_storage import StudyPlace


def serve(folder: Path, host: str, port: int) -> None:
    """Serves until the process is ended.

    Raises:
        UserError: if the sweep has no study.
    """
    import optuna_dashboard

    optuna_dashboard.run_server(StudyPlace(read_spec(folder / "sweep.yaml"), folder).look(), host=host, port=port)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
