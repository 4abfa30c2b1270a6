"""Requests from outside as tokens, and tokens as pieces of text.

What a stranger writes is text, whatever it looks like: no token that structures the conversation can be written in it.
Left out on purpose: threads, and the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfroute.device.hf import HFEngine
from selfroute.errors import ContextError
from selfroute.protocol import HELP_CALL
from selfroute.types import DeviceRequest, Message


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request in tokens.

    Args:
        token_ids: of the conversation, up to where the response begins.
        start: those of the response so far.
        rest: what of its text they leave out, since the model may write it in one token with what follows.
        next_tokens: where there is such a rest, the tokens that begin with it.
    """

    token_ids: list[int]
    start: list[int]
    rest: str = ""
    next_tokens: frozenset[int] = frozenset()


class Wording:
    """Reads requests for one model.

    Args:
        engine: the model; its tokenizer is used by no other thread meanwhile.
        context: most tokens of prompt and response; None: no limit.
        merges: whether a response's start leaves out what the model may merge with a help call's tag.
    """

    def __init__(self, engine: HFEngine, context: int | None, *, merges: bool) -> None:
        self._engine, self.context, self._merges = engine, context, merges
        self._longest = max(map(len, engine.tokenizer.get_vocab()))
        added = engine.tokenizer.added_tokens_decoder.values()
        special = sorted((str(token) for token in added if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._texts: list[str] = []

    def read(self, request: DeviceRequest) -> Prompt:
        """A request in tokens.

        Raises:
            ContextError: it is too long.
            RejectedError: the model's chat template refuses its messages.
        """
        length = len(request.prefix) + sum(len(m["content"]) for m in request.messages)
        if self.context is not None and length > self._longest * self.context:
            # Even of the longest tokens it would be too many, and to read them takes time.
            raise ContextError(
                f"the conversation of {length} characters does not fit the model's context of {self.context} tokens"
            )
        prompt = self._resume(self._engine.encode([self._harmless(m) for m in request.messages]), request.prefix)
        count = len(prompt.token_ids) + len(prompt.start)
        if self.context is not None and count + request.max_tokens > self.context:
            raise ContextError(
                f"the conversation of {count} tokens, with up to {request.max_tokens} of the response, does not fit "
                f"the model's context of {self.context}"
            )
        return prompt

    def _harmless(self, message: Message) -> Message:
        """A message in which nothing reads as a special token, such as the end of a turn."""
        content = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", message["content"])
        return {**message, "content": content}

    def _resume(self, token_ids: list[int], prefix: str) -> Prompt:
        """A prompt whose response goes on after `prefix`.

        Where a help call was taken off its end, the model may have written the text's last characters in one token
        with the tag's first, such as `.<`. It goes on from before that token, with any that begins with those
        characters; from the characters alone it would never have gone on.
        """
        plain = self._encode(prefix)
        if not prefix or not self._merges or self._engine.decode(plain) != prefix:
            return Prompt(token_ids, plain)
        start = self._encode(prefix + HELP_CALL)
        while not prefix.startswith(self._engine.decode(start)):
            start.pop()
        rest = prefix[len(self._engine.decode(start)) :]
        if not rest:
            return Prompt(token_ids, start)
        self._texts = self._texts or [self._engine.decode([n]) for n in range(len(self._engine.tokenizer))]
        found = frozenset(n for n, text in enumerate(self._texts) if text.startswith(rest))
        return Prompt(token_ids, start, rest, found) if found else Prompt(token_ids, plain)

    def _encode(self, text: str) -> list[int]:
        return list(self._engine.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


class Deltas:
    """A response's text in pieces, as its tokens come.

    No piece ends within a character, and together they are the text of all tokens. A few tokens are decoded at a time,
    with those before them, since some tokenizers write a token otherwise at the beginning of a text.

    Args:
        decode: the text of some tokens.
        start: tokens of the response whose text is known already.
        rest: what is known of the text behind them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], start: Sequence[int], rest: str) -> None:
        self._decode, self._known, self._rest = decode, decode(start) + rest, rest
        self._said: list[str] = []
        # From which token on they are decoded, and what of that is known.
        self._at, self._before = 0, ""
        self._look_back(start)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that is new and certain, of all the response's tokens so far."""
        text = self._decode(token_ids[self._at :])
        new = text[len(self._before) :]
        if len(new) <= len(self._rest) or new.endswith("\ufffd"):
            return ""
        new, self._rest = new[len(self._rest) :], ""
        self._said.append(new)
        self._before = text
        if len(token_ids) - self._at > _MOST:
            self._look_back(token_ids)
        return new

    def end(self, token_ids: Sequence[int]) -> str:
        """What is left of the whole text, half characters included."""
        said, text = self._known + "".join(self._said), self._decode(token_ids)
        if text.startswith(said):
            return text[len(said) :]
        # A tokenizer whose text is not that of its pieces.
        return self._decode(token_ids[self._at :])[len(self._before) + len(self._rest) :]

    def _look_back(self, token_ids: Sequence[int]) -> None:
        self._at = max(0, len(token_ids) - _LEAST)
        self._before = self._decode(token_ids[self._at :])


_LEAST, _MOST = 4, 16
"""Tokens whose text is known already that are decoded with new ones."""
