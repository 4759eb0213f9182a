"""Compares logits and tokens with transformers at full width, on a photo. Needs 12 GB of memory and of disk.

    python tests/full_size.py photo.jpg

The checkpoint has random weights and the shape of LLaVA-1.5-7B (CLIP ViT-L/14 at 336 pixels, hidden size 4096), except
that the decoder has 2 layers instead of 32. It is written to a temporary folder, which is deleted.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from random_checkpoint import make_checkpoint
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from extras.images import load_image
from llava import LlamaConfig, LlavaForConditionalGeneration, LlavaProcessor
from vision import CLIPVisionConfig


@torch.no_grad()
def compare(photo: str, tokens: int = 64) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vision = CLIPVisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
        make_checkpoint(folder, vision, LlamaConfig(vocab_size=32064, num_hidden_layers=2, rms_norm_eps=1e-5))
        processor = LlavaProcessor.from_pretrained(folder)
        inputs = processor(images=load_image(photo), text="USER: <image>\nWhat is shown here? ASSISTANT:")
        pixels = CLIPImageProcessorPil.from_pretrained(folder)(transformers_load_image(photo), return_tensors="pt")
        print(f"{photo}: {inputs.input_ids.shape[1]} tokens in the prompt")
        print(f"pixels: largest difference {(inputs.pixel_values - pixels.pixel_values).abs().max():.1e}")

        results = {}
        for kind in (LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration):
            model = kind.from_pretrained(folder, dtype=torch.float32)
            start = time.perf_counter()
            logits = model(**inputs).logits
            prompt_seconds = time.perf_counter() - start
            start = time.perf_counter()
            ids = model.generate(**inputs, max_new_tokens=tokens)
            seconds = time.perf_counter() - start
            print(f"{kind.__module__}: prompt {prompt_seconds:.1f} s, prompt and {tokens} tokens {seconds:.1f} s")
            results[kind] = logits, ids
            del model
        (ours, our_ids), (theirs, their_ids) = results.values()
        print(f"logits: relative error {(ours - theirs).norm() / theirs.norm():.1e}")
        print(f"tokens: {(our_ids == their_ids).sum() - inputs.input_ids.shape[1]} of {tokens} equal")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/full_size.py PHOTO")
    compare(sys.argv[1])
