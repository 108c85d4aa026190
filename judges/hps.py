"""The preference score: HPS v2.1 (CLIP-H, fine-tuned on human choices)."""

import re
from pathlib import Path

# open_clip's names of weights -> transformers': regular expressions, applied in this order
CLIP_NAMES = {
    "^(token_|positional_)": r"text_model.embeddings.\1",
    "positional_embedding": "position_embedding.weight",
    r"^visual\.transformer.resblocks": "vision_model.encoder.layers",
    r"^visual\.conv1": "visual.patch_embedding",
    r"^visual\.ln_pre": "vision_model.pre_layrnorm",
    r"^visual\.ln_post": "vision_model.post_layernorm",
    r"^visual\.proj": "visual_projection.weight",
    r"^visual\.": "vision_model.embeddings.",
    "attn": "self_attn",
    "^transformer.resblocks": "text_model.encoder.layers",
    "^ln_final": "text_model.final_layer_norm",
    "c_fc": "fc1",
    "^text_projection": "text_projection.weight",
    "ln_": "layer_norm",
    "c_proj": "fc2",
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_from_open_clip(weights: dict) -> dict:
    """The weights of an open_clip checkpoint under the names of transformers' CLIPModel."""
    renamed = {}
    for name, tensor in weights.items():
        for old, new in CLIP_NAMES.items():
            name = re.sub(old, new, name)
        if "in_proj_" in name:  # query, key and value are one matrix in open_clip
            query, key, value = tensor.chunk(3)
            renamed[name.replace("in_proj_", "q_proj.")] = query
            renamed[name.replace("in_proj_", "k_proj.")] = key
            renamed[name.replace("in_proj_", "v_proj.")] = value
        elif "_projection" in name:  # open_clip multiplies from the other side
            renamed[name] = tensor.T
        else:
            renamed[name] = tensor
    return renamed


class HPS:
    """HPS v2.1: hps(prompts, images) -> the cosine of each picture with its prompt, not times 100.

    path_or_id  the published file, or the hub id that has it (xswu/HPSv2)
    antialias   of the resizing. With and without it are two different measures: today's hpsv2
                package has it, published tables seem to be without (HPSv2 issue 43).
    base        the CLIP that HPS was trained from; only its sizes and its tokenizer are taken

    Raises FileNotFoundError when there is no such checkpoint, ValueError when it cannot be read as
    weights alone: nothing is ever unpickled.
    """

    FILE = "HPS_v2.1_compressed.pt"
    BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, path_or_id, device="cpu", dtype=None, antialias=True, base=BASE):
        import torch
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        weights = self._read(self._find(path_or_id))
        config = CLIPConfig.from_pretrained(base)
        with torch.device(device):
            self.model = CLIPModel(config).to(dtype).eval().requires_grad_(False)
        # strict: every weight is there, and no other
        self.model.load_state_dict(clip_from_open_clip(weights))
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.antialias = antialias

    def _find(self, path_or_id):
        from huggingface_hub import hf_hub_download

        try:
            if Path(path_or_id).is_file():
                return path_or_id
            return hf_hub_download(str(path_or_id), self.FILE)
        except (OSError, ValueError) as error:
            source = f"fetch {self.FILE} from huggingface.co/xswu/HPSv2"
            raise FileNotFoundError(
                f"no HPS v2.1 checkpoint at {path_or_id}: {source}, or leave hps out of --rewards"
            ) from error

    def _read(self, path):
        """The checkpoint's weights, by open_clip's names."""
        import pickle

        import torch

        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return checkpoint["state_dict"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            source = f"fetch {self.FILE} anew from huggingface.co/xswu/HPSv2"
            alone = "torch.save({'state_dict': weights}, file)"
            raise ValueError(
                f"{path} is cut off or holds more than weights, which would run as code: "
                f"{source}, or where you trust it save its weights alone, {alone}"
            ) from error

    def __call__(self, prompts, images):
        import torch

        unique = list(dict.fromkeys(prompts))  # the samples of a group share their prompt
        tokens = self.tokenizer(
            unique, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.model.device)
        pixels = torch.stack([self.pixels(image) for image in images])
        with torch.inference_mode():
            text = self.model.get_text_features(**tokens).pooler_output  # (unique prompts, D)
            image = self.model.get_image_features(pixels).pooler_output  # (samples, D)
        text = text[[unique.index(prompt) for prompt in prompts]]  # (samples, D)
        return torch.cosine_similarity(image.float(), text.float()).tolist()

    def pixels(self, image):
        """(3, 224, 224) network input of one picture, prepared as HPS was trained.

        The longest side becomes 224, bicubic on the float tensor; zeros fill up the square.
        """
        import numpy as np
        import torch

        rgb = torch.from_numpy(np.array(image.convert("RGB"))).to(self.model.device)
        rgb = rgb.permute(2, 0, 1) / 255  # (3, height, width)
        high = round(image.height * 224 / max(image.size))
        wide = round(image.width * 224 / max(image.size))
        resized = torch.nn.functional.interpolate(
            rgb[None], (high, wide), mode="bicubic", antialias=self.antialias
        )[0]
        top = (224 - high) // 2
        left = (224 - wide) // 2
        margins = (left, 224 - wide - left, top, 224 - high - top)
        square = torch.nn.functional.pad(resized, margins)
        mean = square.new_tensor(CLIP_MEAN)[:, None, None]
        std = square.new_tensor(CLIP_STD)[:, None, None]
        return ((square - mean) / std).to(self.model.dtype)
