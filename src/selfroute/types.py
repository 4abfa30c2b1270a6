"""The vocabulary: small frozen values that every room shares, and the protocols that cross rooms.

Left out on purpose: behaviour. What a value means is said here; what is done with it is said where it is done.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

Message = Mapping[str, Any]
"""One chat message: `{"role": "system" | "user" | "assistant", "content": text}`.

On the way from a client of the gateway to the cloud it holds whatever the client wrote, such as parts and tool calls.
"""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to solve: the user's text and what the task's verifier needs to judge an answer."""

    id: str
    question: str
    reference: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class About:
    """A task, or one data set of a task, for people: its name, where its problems come from, how many, and whose."""

    name: str
    source: str
    size: str
    licence: str


VERDICT_CHARS = 500
"""What a verdict keeps of an extracted answer, and of a reason: either may quote a megabyte."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one answer; `reason` is for people and is never parsed.

    `grade` is how good the answer is, in [0, 1], from a task that is graded; `correct` is then a grade of the task's
    `pass_score` or more. `extracted` is what the verifier took for the answer, such as what stands in the last box, an
    option's letter, or a program without the words around it; "" where it found none. Both texts are cut at
    `VERDICT_CHARS`. An answer to a question that has no reference is not `judged`, and not correct either.
    """

    correct: bool
    reason: str
    grade: float | None = None
    extracted: str = field(default="", kw_only=True)
    judged: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.grade is not None and not 0 <= self.grade <= 1:
            raise ValueError(f"a grade is between 0 and 1, not {self.grade}")
        for name in ("reason", "extracted"):
            text = getattr(self, name)
            if len(text) > VERDICT_CHARS:
                object.__setattr__(self, name, text[: VERDICT_CHARS - 1] + "…")

    @property
    def score(self) -> float:
        """What the answer is worth, in [0, 1]: its grade, or where there is none 1 if it is correct and else 0."""
        return float(self.correct) if self.grade is None else self.grade


@dataclass(frozen=True, slots=True)
class Solved:
    """What an exact solver makes of a question: a key of its own, a right answer if there is one, and a wrong one."""

    key: str
    right: Callable[[], str | None]
    wrong: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The device answered; `well_formed` means one closed answer tag, and nothing after it."""

    text: str
    well_formed: bool


@dataclass(frozen=True, slots=True)
class HelpCall:
    """The device asked the cloud."""


@dataclass(frozen=True, slots=True)
class Undecided:
    """Nothing readable, or cut at the token limit."""


Decision = Answer | HelpCall | Undecided


@dataclass(frozen=True, slots=True)
class Response:
    """What the device generated for one problem.

    `token_ids` holds the generated tokens, the end token included when `finished`; a response that is not
    `finished` was cut at the token limit. `score` is l, the log-odds of the help call against the answer at the
    decision point (nats; None when no decision point was met), and `decision_index` that point's position in
    `token_ids`. Under `Sampling.early_exit`, `score` is the highest of all points on the way, against all else
    that could have come there.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    score: float | None = None
    decision_index: int | None = None


@dataclass(frozen=True, slots=True)
class CloudRequest:
    """One question to the cloud; everything that affects the answer is in here, so its hash is the cache's key.

    `extra` holds further fields of the API's request, such as `tools`, as a client of the gateway sent them; its limits
    of tokens count where they are lower, its temperature where `temperature` is None.
    """

    messages: tuple[Message, ...]
    max_tokens: int = 2048
    temperature: float | None = 0.0
    sample_index: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Bill:
    """What one request costs, as far as is known: its answer, and attempts that broke off and may have been charged.

    The client adds to `usd` as soon as an attempt has ended, and makes no further one that could pass the limit.

    Args:
        worst_usd: the most that an attempt may cost, as `CloudClient.worst_usd` says of the request.
        attempts: of how many the worst is the limit.
        called: whether the provider took an attempt on, which may cost nothing.
    """

    worst_usd: float
    attempts: int = 1
    usd: float = 0.0
    called: bool = False

    @property
    def limit_usd(self) -> float:
        """The most that all attempts may cost."""
        return self.attempts * self.worst_usd


@dataclass(frozen=True, slots=True)
class CloudAnswer:
    """A complete answer of the cloud. `cost_usd` is its price when it was bought; a cache hit keeps it.

    An answer that is not `finished` was cut at its token limit. `cached_tokens` of the prompt's and `reasoning_tokens`
    of the completion's are those that the provider tells of.
    """

    text: str
    reasoning: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    latency_s: float
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CloudChunk:
    """A piece of a streamed answer; the last one carries the whole `CloudAnswer` in `final`, and its finish reason.

    `other` is what else the provider says in the API's choice, such as `{"delta": {"tool_calls": [...]}}`.
    """

    text: str = ""
    reasoning: str = ""
    other: Mapping[str, Any] = field(default_factory=dict)
    final: CloudAnswer | None = None
    finish_reason: str = ""


@runtime_checkable
class CloudClient(Protocol):
    """A provider of the cloud LLM.

    Failures are raised as `errors.CloudError`; a caller that stops listening cancels the work. A class that can answer
    some questions alone may have a static `check_question(question)`, which raises for any other and is called before
    anything is spent.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """What, beside the request, affects an answer (URL, model, settings): part of the cache's key."""
        ...

    @property
    def concurrency(self) -> int:
        """Requests that it takes at a time."""
        ...

    def carry(self, spent_usd: float) -> None:
        """Count what was spent before, by the ledger, towards a limit of its own."""
        ...

    def abandoned_usd(self) -> float:
        """What attempts that broke off since this was last asked may have cost, in USD."""
        ...

    async def complete(self, request: CloudRequest) -> CloudAnswer:
        """The whole answer. Cancelling the task cancels the request."""
        ...

    def stream(
        self, request: CloudRequest, bill: Bill | None = None, *, whole: bool = False
    ) -> AsyncGenerator[CloudChunk]:
        """The answer as it comes, or, where nobody reads it in pieces, `whole`: in one, which costs a provider that can
        do so less. Closing the generator (`aclose`) cancels the request, and settles its `bill`."""
        ...

    def worst_usd(self, request: CloudRequest) -> float:
        """The most that one attempt may cost."""
        ...

    async def aclose(self) -> None:
        """Let go of what is held open, such as connections."""
        ...


AskJudge = Callable[[Sequence[tuple[str, CloudRequest]]], Awaitable[list[CloudAnswer]]]
"""Answers to (problem id, request) pairs, in order, each bought once: what a task that needs a judge is handed."""


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """One generation on the device, for a client that waits for it.

    A client's own stop sequences are not in here: they are meant for the answer, and would cut the reasoning.

    Args:
        messages: the conversation; the system prompt holds the help instruction already.
        max_tokens: limit of the response, `prefix` not counted.
        temperature: as the client asks; 0 is greedy.
        seed: names the random stream; the same name, messages and engine give the same response.
        decide: at the decision point, draw from the model's odds, or ask exactly when l + `bias` > 0.
        bias: the dial, in nats.
        prefix: the response so far; the generation goes on after it, and its chunks do not repeat it.
        forbid_help: the help call has probability 0 at the decision point.
        extra: the client's other sampling fields, and those that selfroute does not know: for an engine that passes
            them on. Of the first it gets only what it `honours`.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 1.0
    seed: str = ""
    decide: Literal["sample", "threshold"] = "sample"
    bias: float = 0.0
    prefix: str = ""
    forbid_help: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceChunk:
    """A piece of a response as it is generated; the last one, and no other, has a `finish`.

    `text` is what the model writes, tags included, in pieces of any size. `reasoning` is thinking that the engine
    tells apart itself. `score` is l at the decision point, None where the engine cannot tell. The last chunk counts
    the prompt's tokens (`prefix` included) and those that were generated.
    """

    text: str = ""
    reasoning: str = ""
    finish: Literal["", "stop", "length"] = ""
    score: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class DeviceEngine(Protocol):
    """A device model that answers many clients at a time, piece by piece."""

    @property
    def honours(self) -> frozenset[str]:
        """Sampling fields of the API that it takes beside those of `DeviceRequest`, such as `top_p`."""
        ...

    def stream(self, request: DeviceRequest) -> AsyncGenerator[DeviceChunk]:
        """The response as it comes; closing the generator (`aclose`) stops the generation at once.

        Raises:
            ContextError: the conversation and `max_tokens` do not fit the model; before the first chunk.
            DeviceError: the engine failed; the message names the cause.
        """
        ...

    async def ready(self) -> None:
        """Return once it can serve.

        Raises:
            DeviceError: it cannot; the message names the cause and the way out.
        """
        ...

    async def aclose(self) -> None:
        """Stop what is under way, and let go of the model or its connections."""
        ...


Split = Literal["train", "calibration", "test"]
"""What a problem is for: it belongs to one of them for ever."""

Route = Literal["device", "cloud", "undecided"]
"""Where an answer came from. An undecided response was never sent anywhere and is wrong."""

Handoff = Literal["problem", "reasoning"]
"""What the cloud is given of a problem that the device asks about: the problem alone, or the device's reasoning too."""

Policy = Literal["auto", "device-only", "cloud-only"]
"""Who may answer a gateway's request: the device, and the cloud if it asks; the device alone; the cloud alone."""
POLICIES: Mapping[str, Policy] = {policy: policy for policy in get_args(Policy)}

Redact = Literal["never", "asked", "always"]
"""When personal data leaves as placeholders: never, where a request says so, or always."""

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how many responses are done, and of how many."""
