"""The judge of the paper in this process: Qwen2.5-VL or Qwen3-VL by transformers' `generate`.

This is the readable way. The fast one is a server (judges/served.py): it batches the questions of
all processes as they come, and looks at a picture once for all that is asked about it.
"""

import json
import re
import sys
from pathlib import Path

from rewards import CHAT_MARKERS, Reply, VlmJudge

FRAMES = {  # what the boxes of a judge count in: pixels of the resized picture, or the 0..1000 grid
    "qwen2_5_vl": "pixels",
    "qwen3_vl": "grid",
    "qwen3_vl_moe": "grid",
}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # where a picture stands in a message


class QwenJudge(VlmJudge):
    """A VlmJudge by Qwen2.5-VL (the paper's: 7B) or Qwen3-VL, loaded here.

    name_or_path         folder or hub id; or a loaded (model, tokenizer, image processor)
    batch_size           questions at a time; halved, with a message, when memory runs out. Replies
                         do not depend on it, except for near ties in bfloat16.
    scoring, spatial_as  see VlmJudge

    Raises ValueError for a model of another kind, and for logits that are not finite.
    """

    def __init__(
        self,
        name_or_path,
        device="cpu",
        dtype="auto",
        batch_size=16,
        scoring="reply",
        spatial_as="boxes",
    ):
        from transformers import GenerationConfig

        super().__init__(scoring, spatial_as)
        loaded = name_or_path
        if isinstance(name_or_path, str | Path):
            loaded = load(name_or_path, dtype)
        self.model, self.tokenizer, self.image_processor = loaded
        self.model.to(device).eval().requires_grad_(False)
        kind = self.model.config.model_type
        if kind not in FRAMES:
            raise ValueError(f"no judge of type {kind}: expected one of {', '.join(FRAMES)}")
        self.batch_size = batch_size

        # Qwen ships "right": what it writes would come after the padding (transformers#36100)
        self.tokenizer.padding_side = "left"
        chat_markers = map(re.escape, self.tokenizer.get_added_vocab())
        self.markers = re.compile("|".join([CHAT_MARKERS.pattern, *chat_markers]))
        self.image_marker = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        ends = self.model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        # Not what the checkpoint asks for: Qwen2.5-VL's penalty on repetition, 1.05, would bend the
        # digits of boxes
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def write(self, questions):
        return self._in_batches(self._write_batch, questions)

    def probabilities(self, questions, words):
        """See VlmJudge. A word that is several tokens counts as its first one."""
        first_tokens = [self.tokenizer(word).input_ids[0] for word in words]

        def in_batch(batch):
            inputs, _ = self._inputs(batch)
            output = self._generate(batch, inputs, max_new_tokens=1, output_logits=True)
            chances = output.logits[0].float().softmax(dim=-1)  # (questions, V)
            return chances[:, first_tokens].tolist()

        return self._in_batches(in_batch, questions)

    def _in_batches(self, answer, questions):
        """What `answer` makes of all questions, `batch_size` at a time."""
        import torch

        answers = []
        while len(answers) < len(questions):
            batch = questions[len(answers) : len(answers) + self.batch_size]
            out_of_memory = False
            try:
                answers += answer(batch)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                out_of_memory = True
            if out_of_memory:  # not inside `except`: there the error holds the tensors that failed
                self.batch_size //= 2
                torch.cuda.empty_cache()
                message = f"judge: out of memory, going on with {self.batch_size} questions"
                print(f"{message} at a time", file=sys.stderr)
        return answers

    def _write_batch(self, questions):
        inputs, frames = self._inputs(questions)
        most = questions[0].max_tokens
        written = self._generate(questions, inputs, max_new_tokens=most).sequences
        replies = []
        for tokens, frame in zip(written[:, inputs["input_ids"].shape[1] :], frames, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            has_ended = any(token in self.ends for token in tokens.tolist())
            replies.append(Reply(text if has_ended else text + "…", frame))
        return replies

    def _generate(self, questions, inputs, **settings):
        """transformers' `generate`, greedy, with a look at all logits."""
        import torch

        def check_finite(_, logits):  # (questions, V)
            broken = (~torch.isfinite(logits)).any(dim=-1).nonzero().flatten().tolist()
            if broken:  # greedy decoding would make words of it
                question = questions[broken[0]].text
                raise ValueError(f"the judge's logits are not finite (nan or inf) for {question!r}")
            return logits

        with torch.inference_mode():
            return self.model.generate(
                **inputs,
                **settings,
                logits_processor=[check_finite],
                return_dict_in_generate=True,
            )

    def _inputs(self, questions):
        """Left-padded model inputs of one batch; and per question the frame that boxes count in.

        Either all questions have a picture, or none."""
        pictures = [question.image.convert("RGB") for question in questions if question.image]
        chats = []
        for question in questions:
            # A string, not a list of parts: the template of Qwen2.5-VL's tokenizer takes no lists,
            # and those that do take a string just as well.
            content = PICTURE + question.text if pictures else question.text
            chats.append([{"role": "user", "content": content}])
        chats = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        frames = [(1000, 1000)] * len(questions)
        inputs = {}
        if pictures:
            inputs.update(self.image_processor(pictures, return_tensors="pt"))
            patch = self.image_processor.patch_size  # side of a patch in pixels
            patches_per_token = self.image_processor.merge_size**2
            for i, (_, high, wide) in enumerate(inputs["image_grid_thw"].tolist()):
                # the message has one marker per picture, the model wants one per image token
                markers = self.image_marker * (high * wide // patches_per_token)
                chats[i] = chats[i].replace(self.image_marker, markers)
                if FRAMES[self.model.config.model_type] == "pixels":
                    frames[i] = (wide * patch, high * patch)
        inputs.update(self.tokenizer(chats, padding=True, return_tensors="pt"))
        inputs["mm_token_type_ids"] = (  # 1 where a token is a piece of a picture
            inputs["input_ids"] == self.model.config.image_token_id
        ).int()
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}, frames


def load(name_or_path, dtype):
    """(model, tokenizer, image processor) of a folder or hub id."""
    from transformers import (
        AutoModelForImageTextToText,
        AutoTokenizer,
        Qwen2VLImageProcessorPil,
    )
    from transformers.utils import cached_file

    # Not AutoProcessor, which wants torchvision. It would hold the same tokenizer and the same
    # image processor, for Qwen2.5-VL and for Qwen3-VL.
    model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_path)
    # Of Qwen2.5-VL's two templates the one in this file was made for pictures; it is the
    # processor's, and a server's. The other, the tokenizer's, differs in the system's message.
    template = cached_file(
        name_or_path, "chat_template.json", _raise_exceptions_for_missing_entries=False
    )
    if template:
        tokenizer.chat_template = json.loads(Path(template).read_text("utf-8"))["chat_template"]
    return model, tokenizer, image_processor
