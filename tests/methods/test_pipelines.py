"""Makers on diffusers pipelines: tiny ones with random weights, saved to a folder and loaded as any other."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, make_case, make_images, run_chain

from methods.contract import Given
from methods.generators.pipelines import ImageToImage, Inpaint, IPAdapter, PipelinePackage
from methods.ota import GENERATE, OTA, OTAConfig

SIZE = 32
KNOBS = {"keep": 0.5, "strength": 0.6, "guidance": 2.0, "steps": 4, "ip_scale": 0.8}


def tokenizer():
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def parts(channels: int) -> dict:
    """Of a pipeline whose U-Net takes that many channels: 4 latent ones, or 9 with a mask and the masked image."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
    )
    return {
        "unet": unet,
        "vae": vae,
        "scheduler": DDIMScheduler(clip_sample=False),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": words,
        "safety_checker": None,
        "feature_extractor": None,
    }


def save_adapter(folder: Path, unet) -> None:
    """An IP-Adapter for `unet` with its image encoder, laid out as those of the hub are."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "models" / "image_encoder")
    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, 16),
        "image_proj.proj.bias": torch.zeros(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    number = 1  # every second attention is the one that crosses over to the prompt
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{number}.{key}.weight"] = torch.randn(attention.inner_dim, width)
            number += 2
    save_file(tensors, folder / "models" / "adapter.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    root = tmp_path_factory.mktemp("pipelines")
    plain = parts(4)
    StableDiffusionImg2ImgPipeline(**plain, requires_safety_checker=False).save_pretrained(root / "image")
    StableDiffusionInpaintPipeline(**parts(9), requires_safety_checker=False).save_pretrained(root / "inpaint")
    save_adapter(root / "adapter", plain["unet"])
    return root


@pytest.fixture(scope="module")
def packages(folders):
    image = {
        "size": SIZE,
        "prompt": "clip art",
        "ip_adapter": str(folders / "adapter"),
        "ip_adapter_weights": "adapter.safetensors",
        "options": {"local_files_only": True, "safety_checker": None},
    }
    return {
        ImageToImage: PipelinePackage(str(folders / "image"), **image),
        IPAdapter: PipelinePackage(str(folders / "image"), **image),
        Inpaint: PipelinePackage(str(folders / "inpaint"), size=SIZE, negative_prompt="text"),
    }


def maker_of(packages, maker, **params):
    return maker(KNOBS | params, Given(values={"pipeline": packages[maker]}, num_classes=CLASSES))


def sources(n=3, size=SIZE, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("maker", [ImageToImage, IPAdapter, Inpaint])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_depends_on_its_source_and_seed_and_not_on_its_batch(packages, maker, guidance):
    make = maker_of(packages, maker, guidance=guidance)
    x, seeds = sources(), [5, 1, 5]
    together = make(x, seeds)
    assert together.shape == x.shape
    assert together.dtype == torch.float32
    assert together.abs().max() <= 1
    assert together.std() > 0.02  # not black, as what a safety checker withholds is
    alone = torch.cat([make(x[i : i + 1], [seeds[i]]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)
    torch.testing.assert_close(make(x.flip(0), seeds[::-1]).flip(0), together, rtol=0, atol=1e-3)
    assert not torch.allclose(make(x, [6, 2, 6]), together, atol=1e-2)
    assert not torch.allclose(make(sources(seed=1), seeds), together, atol=1e-2)


def test_inpainting_keeps_what_is_kept_and_hides_the_rest(packages):
    make = maker_of(packages, Inpaint)
    x = sources()
    made = make(x, [0, 1, 2])
    assert torch.equal(made[:, :, : SIZE // 2], x[:, :, : SIZE // 2])
    other = torch.cat([x[:, :, : SIZE // 2], sources(seed=9)[:, :, SIZE // 2 :]], dim=2)
    torch.testing.assert_close(make(other, [0, 1, 2]), made, rtol=0, atol=1e-4)  # what was hidden had no part in it
    assert torch.equal(maker_of(packages, Inpaint, keep=1.0)(x, [0, 1, 2]), x)


def test_a_source_of_another_size_comes_back_at_its_own(packages):
    x = sources(2, size=48)
    made = maker_of(packages, ImageToImage)(x, [0, 1])
    assert made.shape == x.shape
    assert made.abs().max() <= 1


def test_the_image_prompt_is_each_source_s_own(packages):
    """With a scale of 0 the adapter has no part; with more, each image is drawn to its own source."""
    x = sources()
    without, little, more = (maker_of(packages, IPAdapter, ip_scale=s)(x, [0, 0, 0]) for s in (0.0, 0.1, 1.0))
    torch.testing.assert_close(without, maker_of(packages, ImageToImage)(x, [0, 0, 0]), rtol=0, atol=1e-4)
    assert (more - without).abs().mean() > (little - without).abs().mean() > 0
    alone = maker_of(packages, IPAdapter, ip_scale=1.0)(x[1:2], [0])
    torch.testing.assert_close(more[1:2], alone, rtol=0, atol=1e-5)  # of a batch, only its own


def test_a_package_loads_nothing_until_it_is_used_and_travels_without_what_it_loaded(packages):
    package = PipelinePackage("no/such-pipeline", options={"local_files_only": True})
    assert not package._loaded
    with pytest.raises(OSError, match=r"no/such-pipeline|local"):
        package.pipeline("image", False, torch.device("cpu"))
    used = packages[ImageToImage]
    maker_of(packages, ImageToImage)(sources(1), [0])
    assert used._loaded
    copy = pickle.loads(pickle.dumps(used))
    assert copy == used
    assert not copy._loaded


def test_wrong_packages_are_refused(packages):
    with pytest.raises(ValueError, match="multiple of 8"):
        PipelinePackage("some/model", size=100)
    with pytest.raises(ValueError, match="has no `ip_adapter`"):
        packages[Inpaint].pipeline("image", True, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "maker"), [("img2img", ImageToImage), ("inpaint", Inpaint), ("ip_adapter", IPAdapter)]
)
def test_a_pipeline_generates_for_ota(packages, name, maker):
    case = make_case(labelled=4, unlabelled=4)
    task = case.setting.task
    object.__setattr__(task, "upstream", ("pipeline",))
    object.__setattr__(case, "upstream", {"pipeline": packages[maker]})
    config = OTAConfig(generator=name, irf="ft", completions=2, steps=2, strength=1.0)
    assert OTA.invalid(config, case.setting) is None
    chain = run_chain(OTA, config, case, *make_images(8), steps=2, batch=4)
    assert chain.pools[GENERATE].shape == (8, 3, 32, 32)
    assert chain.parts[-1]["kd"] > 0
