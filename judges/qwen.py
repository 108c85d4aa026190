"""The judge of the paper in this process: Qwen2.5-VL or Qwen3-VL."""

import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from rewards import BEGUN, CHAT_MARKERS, Question, Reply, VlmJudge, check_finite

FRAMES = {  # what the boxes of a judge count in: pixels of the resized picture, or the 0..1000 grid
    "qwen2_5_vl": "pixels",
    "qwen3_vl": "grid",
    "qwen3_vl_moe": "grid",
}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # where a picture stands in a message


class Seen(NamedTuple):
    """One picture after the vision tower: tensors on the model's device."""

    grid: tuple[int, int, int]  # frames (1), height and width, in patches
    pixels: object  # (patches, values of one): what the tower was given
    features: object  # (image tokens, D)
    deep: list  # of Qwen3-VL: more of that shape, which its first layers add; else empty


class Row(NamedTuple):
    question: Question
    seen: Seen | None  # its picture


class QwenJudge(VlmJudge):
    """A VlmJudge by Qwen2.5-VL (the paper's: 7B) or Qwen3-VL, loaded here.

    name_or_path        folder or hub id; or a loaded (model, tokenizer, image processor)
    batch_size          rows at a time; halved, with a message, when memory runs out. Replies do not
                        depend on it, except for near ties in bfloat16.
    scoring, spatial_as, semantic_as: see VlmJudge

    Each distinct picture goes through the vision tower once for all that is asked about it.
    """

    def __init__(
        self,
        name_or_path,
        device="cpu",
        dtype="auto",
        batch_size=16,
        scoring="reply",
        spatial_as="boxes",
        semantic_as="four",
    ):
        super().__init__(scoring, spatial_as, semantic_as)
        loaded = name_or_path
        if isinstance(name_or_path, str | Path):
            loaded = self._load(name_or_path, dtype)
        self.model, self.tokenizer, self.image_processor = loaded
        self.model.to(device).eval().requires_grad_(False)
        kind = self.model.config.model_type
        if kind not in FRAMES:
            raise ValueError(f"no judge of type {kind}: expected one of {', '.join(FRAMES)}")
        self.batch_size = batch_size
        self.seen = {}  # the pictures of the last call: pixels -> Seen
        # transformers before 5.20 takes no features: each row's picture goes through the tower
        # again
        forward = inspect.signature(self.model.model.forward)
        self.takes_features = "mm_encoder_outputs" in forward.parameters

        # Qwen ships "right": what it writes would come after the padding (transformers#36100)
        self.tokenizer.padding_side = "left"
        chat_markers = map(re.escape, self.tokenizer.get_added_vocab())
        self.markers = re.compile("|".join([CHAT_MARKERS.pattern, *chat_markers]))
        self.image_marker = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        self.digit_ids = self.tokenizer.convert_tokens_to_ids(list("0123456789"))
        begun = BEGUN % "score"
        begun_ids = self.tokenizer(begun).input_ids
        if self.tokenizer(begun + "1").input_ids != [*begun_ids, self.digit_ids[1]]:
            raise ValueError("this judge's tokenizer does not write numbers digit by digit")
        ends = self.model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    @staticmethod
    def _load(name_or_path, dtype):
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

    def write(self, questions):
        return self._answer(self._write_batch, questions)

    def digits(self, questions):
        return self._answer(self._digits_batch, questions)

    def _answer(self, answer_batch, questions):
        """The answers to the questions of a call, rows of about one length together."""
        rows = self._look(questions)

        def length(i):  # in characters, of which a token has about four
            question, seen = rows[i]
            return len(question.text) + 4 * (len(seen.features) if seen else 0)

        # the longest first: when memory is short, that shows at once
        order = sorted(range(len(rows)), key=length, reverse=True)
        in_order = self._in_batches(answer_batch, [rows[i] for i in order])
        answer_to = dict(zip(order, in_order, strict=True))
        return [answer_to[i] for i in range(len(rows))]

    def _look(self, questions):
        """The rows of a call. Each distinct picture goes through the vision tower, unless the last
        call saw it too: alignment and grounding follow each other and ask about the same ones."""
        keys = {}  # id of a picture -> its pixels
        pictures = {}
        for question in questions:
            image = question.image
            if image is not None and id(image) not in keys:
                keys[id(image)] = (image.mode, image.size, image.tobytes())
                pictures[keys[id(image)]] = image
        new = [key for key in pictures if key not in self.seen]
        seen = self._in_batches(self._see_batch, [pictures[key] for key in new])
        known = {key: self.seen[key] for key in pictures if key in self.seen}
        self.seen = known | dict(zip(new, seen, strict=True))
        rows = []
        for question in questions:
            has_picture = question.image is not None
            rows.append(Row(question, self.seen[keys[id(question.image)]] if has_picture else None))
        return rows

    def _in_batches(self, work, items):
        """What `work` makes of all items, `batch_size` at a time."""
        import torch

        results = []
        while len(results) < len(items):
            batch = items[len(results) : len(results) + self.batch_size]
            out_of_memory = False
            try:
                results += work(batch)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                out_of_memory = True
            if out_of_memory:  # not inside `except`: there the error holds the tensors that failed
                self._halve_batch()
        return results

    def _halve_batch(self):
        import torch

        self.batch_size //= 2
        torch.cuda.empty_cache()
        message = f"judge: out of memory, going on with {self.batch_size} rows at a time"
        print(message, file=sys.stderr)

    def _see_batch(self, images):
        """Pictures, of any sizes, through the vision tower."""
        import torch

        rgb = [image.convert("RGB") for image in images]
        inputs = self.image_processor(rgb, return_tensors="pt").to(self.model.device)
        grids = inputs["image_grid_thw"]
        with torch.inference_mode():
            tower = self.model.model.get_image_features(
                inputs["pixel_values"], grids, return_dict=True
            )
        sizes = grids.prod(dim=1).tolist()
        pixels = inputs["pixel_values"].split(sizes)
        batch = []
        for i, grid in enumerate(grids.tolist()):
            deep = [layer[i].clone() for layer in getattr(tower, "deepstack_features", [])]
            # a copy: a slice would keep the features of the whole batch alive
            features = tower.pooler_output[i].clone()
            batch.append(Seen(tuple(grid), pixels[i].clone(), features, deep))
        return batch

    def _inputs(self, rows, written=""):
        """Left-padded model inputs of one batch; and per row the frame that its boxes count in.

        Either all rows have a picture, or none. `written` follows what the reply begins with.
        """
        import torch

        chats = []
        for question, seen in rows:
            # A string, not a list of parts: the template of Qwen2.5-VL's tokenizer takes no lists,
            # and those that do take a string just as well.
            marker = PICTURE if seen else ""
            chats.append([{"role": "user", "content": marker + question.text}])
        chats = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        patch = self.image_processor.patch_size  # side of a patch in pixels
        frames = [(1000, 1000)] * len(rows)
        for i, (question, seen) in enumerate(rows):
            if seen:
                # the message has one marker per picture, the model wants one per image token
                markers = self.image_marker * len(seen.features)
                chats[i] = chats[i].replace(self.image_marker, markers)
                if FRAMES[self.model.config.model_type] == "pixels":
                    frames[i] = (seen.grid[2] * patch, seen.grid[1] * patch)
            chats[i] += question.begun + written
        encoded = self.tokenizer(chats, padding=True, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        pictures = [seen for _, seen in rows if seen]
        if pictures:
            is_image = inputs["input_ids"] == self.model.config.image_token_id
            inputs["position_ids"], _ = self.model.model.get_rope_index(
                inputs["input_ids"],
                is_image.int(),
                image_grid_thw=torch.tensor([seen.grid for seen in pictures]),
                attention_mask=inputs["attention_mask"],
            )
        else:
            counted = inputs["attention_mask"].cumsum(dim=1) - 1
            inputs["position_ids"] = counted.clamp(min=0).expand(3, -1, -1)
        for name, tensor in inputs.items():
            inputs[name] = tensor.to(self.model.device)
        if pictures and not self.takes_features:
            grids = torch.tensor([seen.grid for seen in pictures])
            inputs["image_grid_thw"] = grids.to(self.model.device)
            inputs["pixel_values"] = torch.cat([seen.pixels for seen in pictures])
        elif pictures:
            deep = list(zip(*[seen.deep for seen in pictures], strict=True))
            tower = SimpleNamespace(
                pooler_output=[seen.features for seen in pictures], deepstack_features=deep
            )
            inputs["mm_encoder_outputs"] = {"image": tower}
        return inputs, frames

    def _write_batch(self, rows):
        """Greedy decoding. Rows that have ended leave the batch.

        Not `generate`, which sees each row to the end of the longest, and which does what the
        checkpoint asks for: Qwen's repetition penalty would bend the digits of boxes."""
        import torch

        inputs, frames = self._inputs(rows)
        limit = rows[0].question.max_tokens
        tokens = [[] for _ in rows]  # of each reply
        going = list(range(len(rows)))  # the rows that are still in the batch
        mask = inputs["attention_mask"]
        position = inputs["position_ids"].amax(dim=(0, 2)) + 1  # of the next token
        with torch.inference_mode():
            output = self.model(**inputs, logits_to_keep=1, use_cache=True)
            cache = output.past_key_values
            while True:
                check_finite([rows[k].question.text for k in going], output.logits[:, -1])
                next_tokens = output.logits[:, -1].argmax(dim=-1)
                stays = []  # places in the batch
                for k, token in enumerate(next_tokens.tolist()):
                    reply = tokens[going[k]]
                    reply.append(token)
                    if token not in self.ends and len(reply) < limit:
                        stays.append(k)
                if not stays:
                    break
                if len(stays) < len(going):
                    going = [going[k] for k in stays]
                    places = torch.tensor(stays, device=mask.device)
                    cache.batch_select_indices(places)
                    mask = mask[places]
                    position = position[places]
                    next_tokens = next_tokens[places]
                mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
                output = self.model(
                    input_ids=next_tokens[:, None],
                    attention_mask=mask,
                    position_ids=position.expand(3, -1)[..., None],
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                position = position + 1
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        replies = []
        for text, reply, frame in zip(texts, tokens, frames, strict=True):
            replies.append(Reply(text if reply[-1] in self.ends else text + "…", frame))
        return replies

    def _digits_batch(self, rows):
        """The mark 10 is two tokens, so rows are fed with a 1 already written. One pass then gives
        the probabilities of the first digit (position -2) and of a digit after a 1 (position -1).
        """
        import torch

        inputs, _ = self._inputs(rows, written="1")
        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=2, use_cache=False).logits
            check_finite([row.question.text for row in rows], logits[:, -1])
            digits = logits.float().softmax(dim=-1)[..., self.digit_ids]  # (rows, 2, 10)
        return [(first, after_one) for first, after_one in digits.tolist()]
