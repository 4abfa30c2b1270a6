"""The in-process engine: any Hugging Face causal LM of plain attention, sampled with one prefill a problem.

How rows are decoded together is in `decode`. Left out on purpose: beams, top-k and top-p (training needs the model's
own distribution).

Axes: P prompts, G responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfroute.device.base import DeviceConfig, Sampling
from selfroute.device.decode import Decoder, steps_for
from selfroute.device.load import check_layers, load_model
from selfroute.errors import ContextError, DeviceError, RejectedError
from selfroute.protocol import DecisionPoint, decision_points, find_decision, in_thoughts
from selfroute.types import Message, Response

SAME_DAY = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Set before a chat template that tells the date (Llama 3.2, SmolLM3), so that a run that goes on tomorrow has the same
prompts. The day is Llama 3.2's own for want of a clock."""


class HFEngine:
    """A model and its tokenizer; `generate` samples, `model` is what training updates."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        thinking: bool = False,
        graphs: bool = True,
    ) -> None:
        check_layers(model.config)
        self.model, self.tokenizer, self.thinking = model, tokenizer, thinking
        self.context = _context(model)
        self.steps = steps_for(model, graphs=graphs)
        if tokenizer.chat_template is None:
            raise DeviceError("the model's tokenizer has no chat template: use an instruction-tuned checkpoint")
        self.end_tokens = end_tokens(model, tokenizer)
        if not self.end_tokens:
            raise DeviceError("the model names no end token: set eos_token_id in its generation_config.json")
        for token in (tokenizer.added_tokens_decoder.get(end) for end in self.end_tokens):
            if token is not None and not token.special:
                # Some fine-tunes end with a token that is not marked, so that it would stay in every text.
                tokenizer.add_tokens([AddedToken(str(token), special=True, normalized=False)], special_tokens=True)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.end_tokens)
        self.points: tuple[DecisionPoint, ...] = decision_points(tokenizer)

    @classmethod
    def load(cls, config: DeviceConfig) -> HFEngine:
        """Load a shipped model, a local folder or a hub id; a folder may hold an adapter, which names its base.

        Raises:
            DeviceError: as `load_model`.
        """
        model, tokenizer = load_model(config)
        return cls(model, tokenizer, thinking=config.thinking, graphs=config.graphs)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids, up to where the response begins.

        Raises:
            RejectedError: the chat template refuses the messages, or the model lacks a token of theirs.
        """
        template = self.tokenizer.get_chat_template()
        text = self.tokenizer.apply_chat_template(
            accepted(self.tokenizer, messages),
            tokenize=False,
            add_generation_prompt=True,
            # Templates of models that do not think leave it unread.
            enable_thinking=self.thinking,
            chat_template=SAME_DAY + template if "strftime_now" in template else template,
        )
        token_ids = list(self.tokenizer.encode(str(text), add_special_tokens=False))
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(token_ids, default=0) >= rows:
            # Some tokenizers have tokens for parts that the model lacks; only one that is used does harm.
            token = self.tokenizer.convert_ids_to_tokens(max(token_ids))
            raise RejectedError(
                f"the prompt has the token {token!r}, for which the model has no row ({rows} in all): "
                "`model.resize_token_embeddings(len(tokenizer))`, or the tokenizer that it was trained with"
            )
        return token_ids

    def in_thoughts(self, token_ids: Sequence[int]) -> bool:
        """Whether a response so far ends in the model's own thinking."""
        return in_thoughts(str(self.tokenizer.decode(list(token_ids))))

    def decode(self, token_ids: Sequence[int]) -> str:
        """A response's text, without its end token."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def check_context(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """Refuse prompts that leave no room for so many tokens of a response.

        Raises:
            ContextError: naming the longest.
        """
        longest = max(map(len, prompts), default=0)
        if self.context is not None and longest + max_tokens > self.context:
            raise ContextError(
                f"a prompt of {longest} tokens, with up to {max_tokens} of the response (max_tokens), does not fit the "
                f"model's context of {self.context}"
            )

    def before_the_call(self, response: Response, *, early_exit: bool) -> tuple[int, ...]:
        """A help call's tokens up to the choice between the tags, or with `early_exit` up to its tag."""
        found = find_decision(response.token_ids, self.points, self.tokenizer)
        if found is None:
            return ()
        index, point = found
        return response.token_ids[: index - len(point.prefix) if early_exit else index]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        streams: Sequence[Sequence[str]],
        sampling: Sampling,
        *,
        starts: Sequence[Sequence[int]] | None = None,
        limits: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """Sample `len(streams[p])` responses for each prompt; a stream's name fixes that response's randomness.

        Args:
            prompts: token ids of P prompts.
            streams: for each prompt, a name for each response.
            sampling: temperature, limits, and what may be decided.
            starts: for each prompt, tokens that its responses begin with (they count towards `max_tokens`).
            limits: for each prompt, a token limit of each response, up to `max_tokens`.
            progress: called with the number of responses that finished since the last call.

        Returns:
            P lists of responses, in order.

        Raises:
            ContextError: a prompt and its response are more than the model's context.
            DivergenceError: the model's logits are not finite.
        """
        self.check_context(prompts, sampling.max_tokens)
        was_training = self.model.training
        self.model.eval()
        try:
            flat: list[Response] = []
            counts = [len(s) for s in streams]
            names = [name for group in streams for name in group]
            owners = [p for p, count in enumerate(counts) for _ in range(count)]
            most = [n for group in limits for n in group] if limits else [sampling.max_tokens] * len(names)
            for begin in range(0, len(names), sampling.batch_size):
                part = slice(begin, begin + sampling.batch_size)
                first = owners[part][0]
                used = prompts[first : owners[part][-1] + 1]
                begins = [list(starts[p]) if starts else [] for p in owners[part]]
                local = [p - first for p in owners[part]]
                flat += Decoder(self, used, local, begins, names[part], most[part], sampling).run(progress)
        finally:
            self.model.train(was_training)
        groups, position = [], 0
        for count in counts:
            groups.append(flat[position : position + count])
            position += count
        return groups


def _context(model: PreTrainedModel) -> int | None:
    """Most tokens of prompt and response; None: no limit is known."""
    shape = model.config.get_text_config()
    context: int | None = getattr(shape, "max_position_embeddings", None)
    rope = getattr(shape, "rope_parameters", None) or {}
    # YaRN and the like: some configs tell the stretched length, some the one before.
    before, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return max(context, int(before * factor)) if context and before and factor else context


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a response: the model's end tokens and the tokenizer's own, which some models' lists leave out."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    ends = [listed] if isinstance(listed, int) else list(listed or [])
    return frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None)


def accepted(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as a chat template takes them: where it refuses or drops a system message, that heads the user's.

    Raises:
        RejectedError: the chat template refuses them all the same.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    instructed = plain[0]["role"] == "system"
    try:
        text = str(tokenizer.apply_chat_template(plain, tokenize=False))
        if not instructed or plain[0]["content"].strip() in text:
            return plain
        why = "it leaves out the system message"
    except TemplateError as error:
        why = str(error)
    if not instructed or [m["role"] for m in plain[1:2]] != ["user"]:
        raise RejectedError(f"the model's chat template refuses the prompt: {why}")
    merged = {"role": "user", "content": f"{plain[0]['content']}\n\n{plain[1]['content']}"}
    return accepted(tokenizer, [merged, *plain[2:]])
