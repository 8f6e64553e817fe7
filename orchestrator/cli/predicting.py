"""`predict`: asking a student about images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.face import JsonFlag, app, err, print_table
from orchestrator.errors import UserError
from orchestrator.process import settle


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="An export's folder, a sweep's (its best student), or SWEEP_DIR:TRIAL."),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Files, and folders of images.")],
    trial: Annotated[str | None, typer.Option(help="Of a sweep: which trial; the best one if not given.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes told of each image.")] = 5,
    masks: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Segmentation: a new folder for a mask an image.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Run in onnxruntime instead of torch.")] = False,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Vision-language students: classes of your own; once for each."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="'... {} ...'", help="With --class: sentences that a name is put into."),
    ] = None,
    texts: Annotated[
        str | None, typer.Option(metavar="MODEL", help="With --class: the dual encoder whose text tower is asked.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask a student about images: its classes with probabilities, or masks.

    An image that cannot be used is told and passed over, and the exit code is then 2.
    """
    from orchestrator.select.predict import ask

    settle()
    answer = ask(model, images, trial, top, masks, onnx, classes or (), prompts or (), texts)
    if as_json:
        print(json.dumps(answer))
    else:
        word = "share" if answer["kind"] == "segmentation" else "probability"
        rows = [
            [told["image"], ", ".join(f"{c['label']} {c[word]:.4f}" for c in told["classes"]), told.get("mask", "")]
            for told in answer["images"]
        ]
        columns = ["image", f"classes by {word}", *(["mask"] if masks is not None else [])]
        if rows:
            print_table(columns, [row[: len(columns)] for row in rows])
    for told in answer["skipped"]:
        err.print(f"Skipped {told['image']}: {told['reason']}.", markup=False)
    if answer["skipped"]:
        count = len(answer["skipped"])
        asked = count + len(answer["images"])
        raise UserError(f"{count} of {asked} image{'s' if asked > 1 else ''} cannot be used; see above.")
