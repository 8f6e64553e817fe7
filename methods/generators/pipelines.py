"""Makers on a text-to-image model from the hub or a folder, by diffusers: inpainting, image to image, IP-Adapter.

None of these is the paper's generator. They take its place in DIGG: guided by a downstream image, without a label.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from methods.generators.makers import UpstreamMaker, kept_rows, top_mask

Task = Literal["inpaint", "image"]


@dataclass
class PipelinePackage:
    """Which pipeline, and how it is loaded: what `given.upstream("pipeline")` is. Nothing is loaded before it is used.

    One prompt serves all images. It must not name an image's class: what is generated carries no label, and a prompt
    made from the label would smuggle one in.

    Attributes:
        model: a repository of the hub, or a folder that `save_pretrained` wrote.
        size: side of the images that it works on, in pixels; a multiple of 8.
        dtype: of its weights.
        prompt, negative_prompt: the text; often empty, or what all images have in common ("clip art").
        ip_adapter: a repository or folder with an IP-Adapter; None where there is none.
        ip_adapter_subfolder, ip_adapter_weights, image_encoder: where in it the adapter and its image encoder lie. The
            defaults are those of `h94/IP-Adapter` for Stable Diffusion 1.5 [memory].
        options: further arguments of diffusers' `from_pretrained`: `variant`, `revision`, `local_files_only`,
            `safety_checker: None` (where a pipeline has one, what it flags comes out black).
    """

    model: str
    size: int = 512
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    prompt: str = ""
    negative_prompt: str = ""
    ip_adapter: str | None = None
    ip_adapter_subfolder: str = "models"
    ip_adapter_weights: str = "ip-adapter_sd15.bin"
    image_encoder: str = "image_encoder"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size is {self.size}; a pipeline's images have a side that is a multiple of 8.")
        self._loaded: dict[tuple[Task, bool], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}  # another process loads its own

    def pipeline(self, task: Task, adapter: bool, device: torch.device) -> Any:
        """The pipeline for a task, on `device`, with the IP-Adapter loaded or without; loaded at the first call.

        Raises:
            ValueError: if the adapter is asked for and the package names none.
        """
        if adapter and self.ip_adapter is None:
            raise ValueError(f"The pipeline {self.model!r} has no `ip_adapter`; name its repository or folder.")
        if (task, adapter) not in self._loaded:
            self._loaded[task, adapter] = self._load(task, adapter)
        return self._loaded[task, adapter].to(device)

    def _load(self, task: Task, adapter: bool) -> Any:
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        auto = AutoPipelineForInpainting if task == "inpaint" else AutoPipelineForImage2Image
        pipeline = auto.from_pretrained(self.model, dtype=getattr(torch, self.dtype), **self.options)
        pipeline.set_progress_bar_config(disable=True)
        if adapter:
            pipeline.load_ip_adapter(
                self.ip_adapter,
                subfolder=self.ip_adapter_subfolder,
                weight_name=self.ip_adapter_weights,
                image_encoder_folder=self.image_encoder,
            )
        return pipeline


class PipelineMaker(UpstreamMaker):
    """What the three have in common. Each image's noise comes from its own seed, drawn on the CPU.

    So an image does not depend on which others are in its batch, up to the rounding of batched arithmetic.
    """

    upstream = "pipeline"
    package: PipelinePackage

    def run(self, pipeline: Any, sources: Tensor, seeds: Sequence[int], **arguments: Any) -> Tensor:
        """Calls the pipeline on sources [B, 3, S, S] in [-1, 1]; the same shape and range comes back."""
        known = inspect.signature(pipeline.__call__).parameters
        if "height" in known:  # where it is not, the source's own size is kept
            arguments.update(height=self.package.size, width=self.package.size)
        if self.package.negative_prompt:
            arguments["negative_prompt"] = [self.package.negative_prompt] * len(seeds)
        made = pipeline(
            prompt=[self.package.prompt] * len(seeds),
            image=(sources + 1) / 2,
            guidance_scale=self.params["guidance"],
            num_inference_steps=self.params["steps"],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="pt",
            **arguments,
        ).images
        return made.to(sources) * 2 - 1


class Inpaint(PipelineMaker):
    """The rows below the cut are painted anew, from noise alone: what is hidden does not show through.

    What is kept is put back exactly.

    Params:
        keep: as in `Completion`.
        guidance: classifier-free guidance scale; 1 for none.
        steps: denoising steps.
    """

    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        size = sources.shape[-1]
        kept = top_mask(kept_rows(self.params["keep"], size, seeds), size).to(sources.device)
        pipeline = self.package.pipeline("inpaint", False, sources.device)
        made = self.run(pipeline, sources, seeds, mask_image=1 - kept, strength=1.0)
        return torch.where(kept.bool(), sources, made)


class ImageToImage(PipelineMaker):
    """SDEdit in the latent space of a pipeline.

    Params:
        strength: share of the noise schedule that is gone through, in (0, 1].
        guidance: classifier-free guidance scale; 1 for none.
        steps: of a whole denoising; `int(steps · strength)` are made, and one must be.
    """

    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        pipeline = self.package.pipeline("image", False, sources.device)
        return self.run(pipeline, sources, seeds, strength=self.params["strength"])


class IPAdapter(PipelineMaker):
    """`ImageToImage` whose source is its image prompt as well.

    At strength 1 little but the image prompt is left of the source.

    Params:
        strength, guidance, steps: as in `ImageToImage`.
        ip_scale: weight of the image prompt, in [0, 1].
    """

    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        pipeline = self.package.pipeline("image", True, sources.device)
        pipeline.set_ip_adapter_scale(self.params["ip_scale"])
        # One at a time: of a batch, diffusers gives every image the prompts of all (0.42, `ip_adapter_image` as well as
        # `ip_adapter_image_embeds`).
        made = [
            self.run(pipeline, source, [seed], strength=self.params["strength"], ip_adapter_image=[_to_pil(source[0])])
            for source, seed in zip(sources.split(1), seeds, strict=True)
        ]
        return torch.cat(made)


def _to_pil(image: Tensor) -> Any:
    from PIL import Image

    pixels = ((image.float() + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
