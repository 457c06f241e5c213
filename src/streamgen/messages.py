"""Every message that crosses a queue: plain data, one frozen Struct each, one union per inbox.

    host --Submit, Cancel--> tokenizer --Open, Refused--> detokenizer --Event batches--> host
      |                          |  Admit, Cancel             ^  |
      |                          v                     Advance|  |StopFound, Pause, Cancel
      +--Resume, Unpin-----> scheduler ------------------------+  |
                              |    ^  ^---------------------------+
                      StepPlan|    |StepDone, StepFailed
                              v    |
                             executor

`docs/messages.md` tells the life of a request in these words. Token ids, page numbers and slots are plain ints; tensors
never travel. A message is never changed after it was sent.
"""

from __future__ import annotations

from msgspec import Struct

from streamgen.grammar.source import GrammarSource  # noqa: TC001  # decoding needs the type
from streamgen.sampling import ResolvedSampling  # noqa: TC001  # decoding needs the type


class Message(Struct, frozen=True, kw_only=True, tag=True):
    """Base of all that crosses a queue."""


# ---- host -> tokenizer ------------------------------------------------------------------------------------------


class Submit(Message, frozen=True, kw_only=True):
    """Host -> tokenizer: a checked request. Exactly one of `text`, `ids`, `chat` is set.

    text      raw text: special tokens in it are parsed, BOS is added where the checkpoint wants it
    ids       token ids, as they are
    chat      messages as JSON-able dicts, for the checkpoint's chat template
    num_sequences  how many independent continuations (sample index 0..n-1)
    continuation   for scoring: text or ids appended to the prompt, whose log-probabilities are wanted
    known          ids of an earlier turn, prompt and output: if the rendered chat begins with their text, it is
                   encoded as these ids and the rest, so that their pages are found again
    pin            key under which the sequence's pages are kept when it ends, until `Unpin`; "": none
    on_slow        what becomes of it when its reader falls behind: "coalesce" | "pause" | "cancel"
    output         what its output has to obey
    tools          functions that the model may call, as OpenAI writes them
    tool_choice    "auto" | "required" | "none" | a name
    has_processors whether logits processors wait for it in the model's table, under its request id
    arrival        when it was submitted, on the engine's clock
    timeout, queue_timeout, first_token_timeout   seconds from arrival until it ends, has a slot, has a token
    """

    request_id: int
    sampling: ResolvedSampling
    text: str | None = None
    ids: tuple[int, ...] | None = None
    chat: tuple[dict[str, object], ...] | None = None
    continuation: str | tuple[int, ...] | None = None
    num_sequences: int = 1
    scope: str = ""  # prefix-cache scope: requests share pages only within one scope
    tenant: str = ""
    priority: int = 0
    known: tuple[int, ...] = ()
    pin: str = ""
    on_slow: str = "coalesce"
    output: GrammarSource | None = None
    tools: tuple[dict[str, object], ...] = ()
    tool_choice: str = "auto"
    has_processors: bool = False
    arrival: float = 0.0
    timeout: float | None = None
    queue_timeout: float | None = None
    first_token_timeout: float | None = None


class Cancel(Message, frozen=True, kw_only=True):
    """Host -> tokenizer -> scheduler, or detokenizer -> scheduler: end a request; unknown and ended ids are ignored.

    reason   "cancelled" | "deadline" | "queue_deadline" | "first_token_deadline" | "slow_consumer" | "error";
             it comes back as the `finish` of each sequence's last Progress, once slot and pages are free
    message  with "error", for the host
    """

    request_id: int
    reason: str = "cancelled"
    message: str = ""


# ---- tokenizer -> scheduler, tokenizer -> detokenizer --------------------------------------------------------------


class Admit(Message, frozen=True, kw_only=True):
    """Tokenizer -> scheduler: a request is ready to run.

    max_tokens   resolved: what the request asked for, cut to what the context leaves; 0 only scores
    stop_ids     every id that ends a sequence (the checkpoint's own unless ignore_eos, and the request's)
    score_from   prompt position from which each token's log-probability is wanted; None: none
    arrival      when it was submitted, deadline: when it ends by itself, both in seconds on the engine's clock;
                 they order requests of one priority
    pin, has_processors   as in Submit
    grammar      what its output has to obey, ready in the model's table
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    sampling: ResolvedSampling
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    score_from: int | None = None
    num_sequences: int = 1
    scope: str = ""
    tenant: str = ""
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    pin: str = ""
    has_processors: bool = False
    grammar: GrammarUse | None = None


class OutputParts(Struct, frozen=True, kw_only=True):
    """What may be told apart in an output, by the formats of the model.

    reasoning   it may begin with reasoning; `is_reasoning`: it does, since the prompt has opened it
    calls       it may hold calls of tools
    """

    reasoning: bool = False
    is_reasoning: bool = False
    calls: bool = False


class Open(Message, frozen=True, kw_only=True):
    """Tokenizer -> detokenizer: a request was admitted; its `Advance` entries will follow."""

    request_id: int
    prompt_ids: tuple[int, ...]
    sampling: ResolvedSampling
    stop_ids: tuple[int, ...] = ()
    score_from: int | None = None
    num_sequences: int = 1
    on_slow: str = "coalesce"
    parts: OutputParts | None = None


class Refused(Message, frozen=True, kw_only=True):
    """Tokenizer or scheduler -> detokenizer: a request ends before it ran.

    code      an error's `code`, or "cancelled" | "deadline"
    details   the error's extra attributes (prompt_tokens, max_context, param ...)
    """

    request_id: int
    code: str
    message: str = ""
    details: dict[str, str | int | float | None] = {}


# ---- scheduler <-> executor ----------------------------------------------------------------------------------------


class GrammarUse(Struct, frozen=True, kw_only=True):
    """How a sequence uses a grammar.

    key           of the grammar in the model's table
    begins_after  token ids after one of which it holds; text before that is free. (): it holds from the first token
    opens_with    with `begins_after`: the first token is one of these, and then free text follows up to the beginning;
                  or it is the grammar's first. (): free text comes first in any case
    is_forced     the first token is one of `begins_after`: no free text before it
    repeats       once the output is complete, free text follows, in which it may begin again; with `is_forced` it ends,
                  or begins again
    """

    key: str
    begins_after: tuple[int, ...] = ()
    opens_with: tuple[int, ...] = ()
    is_forced: bool = False
    repeats: bool = False


class Begin(Message, frozen=True, kw_only=True):
    """Part of a plan: a sequence takes a slot. Everything the executor needs to know of it until it leaves.

    slot          row of the executor's per-sequence state (tokens, page table); free before this plan
    ids           every known token: the prompt, and after a preemption the output so far
    num_prompt    how many of `ids` are the prompt (penalties tell prompt from output)
    pages         page table so far (shared prefix pages, in order)
    min_length    sequence length (prompt and output) below which `stop_ids` may not be sampled
    sample_index  which continuation of its request this is; with sampling.seed and the position it fixes the draw
    score_from    as in Admit
    processors    request id under which logits processors lie in the model's table; None: none
    grammar       what its output has to obey; the executor brings it up to date with the output in `ids`
    """

    slot: int
    ids: tuple[int, ...]
    num_prompt: int
    sampling: ResolvedSampling
    pages: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_length: int = 0
    sample_index: int = 0
    score_from: int | None = None
    processors: int | None = None
    grammar: GrammarUse | None = None


class StepPlan(Message, frozen=True, kw_only=True):
    """Scheduler -> executor: one forward of the batch. The tuples below are parallel, one entry per sequence.

    begins    sequences that take a slot before this step, in order
    copies    (source page, target page): whole pages copied before the forward (copy on write)
    slots     the sequence's slot
    starts    absolute position of the first row; positions below it are already in its pages
    counts    rows (tokens) of this sequence in this step, >= 1
    samples   how many of its last rows sample a token: 0 inside a prompt, 1 normally, k + 1 to verify k drafts
    pages     pages appended to its page table before the forward
    drafts    token ids to write at positions starts+1 ... before the forward (the tokens to verify, or a correction
              after a rollback); empty for nearly every sequence
    generation  grows whenever plans under way became void because a step failed. A device that failed answers the
              plans of that generation with StepFailed(kind="skipped"), and goes on with the next generation

    The executor holds the ids of each slot: a row's id is `tokens[slot, position]`. A row that samples writes its token
    at `tokens[slot, position + 1]`, so that the next plan need not know it; of rows that verify drafts, the one after
    the last draft that came true does.
    """

    step: int
    begins: tuple[Begin, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    slots: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    samples: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    drafts: tuple[tuple[int, ...], ...] = ()  # () = no sequence has any
    generation: int = 0


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probability of one token under the model's own distribution, its rank, and the likeliest k."""

    logprob: float
    rank: int  # 1 = likeliest
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Fault(Struct, frozen=True, array_like=True):
    """One sequence's part of a step failed while the others went well; its tokens of the step mean nothing.

    index   its place in the plan
    code    an error's `code`: "processor_error" ...
    """

    index: int
    code: str
    message: str = ""


class Turn(Struct, frozen=True, array_like=True):
    """What a sequence's grammar says once the tokens of a step are taken.

    index    its place in the plan
    forced   ids that follow without a choice; the executor has written them, and counts on them as the next ids.
             Never for a sequence that wants log-probabilities
    ends     after those, the output is complete and nothing can follow
    likely   ids that probably follow: the text after this is forced, though not how it is cut into tokens
    """

    index: int
    forced: tuple[int, ...] = ()
    ends: bool = False
    likely: tuple[int, ...] = ()


class StepDone(Message, frozen=True, kw_only=True):
    """Executor -> scheduler: the results of a plan, parallel to its sequences.

    tokens     the sampled ids of each sequence (as many as `samples` said; fewer where drafts go on after the end of
               its grammar)
    logprobs   per sequence one entry per sampled id, where it asked for logprobs; () = nobody did
    scores     per sequence the prompt's TokenLogprobs from this step's rows, in order; () = nobody asked.
               The row at position p scores the token at p + 1
    seconds    wall time of the forward
    faults     sequences that failed alone
    turns      of the sequences whose grammar has something to say
    """

    step: int
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    scores: tuple[tuple[TokenLogprobs, ...], ...] = ()
    seconds: float = 0.0
    faults: tuple[Fault, ...] = ()
    turns: tuple[Turn, ...] = ()


class StepFailed(Message, frozen=True, kw_only=True):
    """Executor -> scheduler: the device could not run a plan.

    kind   "error"    the step raised; the device is well: what ran in it is tried again in parts
           "skipped"  it was not tried, since a step of its generation before it failed
           "lost"     the executor's process died; another takes its place, without any state of slots and pages
           "dead"     there is no device any more: the engine fails with this message
    """

    step: int
    message: str
    kind: str = "error"


# ---- scheduler <-> detokenizer ------------------------------------------------------------------------------------


class Progress(Struct, frozen=True, kw_only=True):
    """What one sequence gained in a step.

    finish   None while it goes on; else "stop" | "complete": its grammar is at its end | "length" | "error", a Cancel's
             `reason`, or "stopped": the answer to a StopFound. Slot and pages are free by then
    ids      new output tokens, a stop id included
    drafts   with a `finish`: (tokens that were drafted, those of them that came true)
    """

    request_id: int
    index: int = 0
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    scores: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None  # set in the sequence's first progress
    finish: str | None = None
    code: str | None = None  # with finish "error": an error's `code`; None is "generation_error"
    message: str = ""  # with finish "error"
    drafts: tuple[int, int] = (0, 0)


class Advance(Message, frozen=True, kw_only=True):
    """Scheduler -> detokenizer: everything that one step, or a cancel, brought."""

    entries: tuple[Progress, ...]


class StopFound(Message, frozen=True, kw_only=True):
    """Detokenizer -> scheduler: a stop string is complete. A Progress with finish "stopped" answers."""

    request_id: int
    index: int = 0


class Pause(Message, frozen=True, kw_only=True):
    """Detokenizer -> scheduler: the reader of this sequence fell behind; it keeps its pages and gets no more rows."""

    request_id: int
    index: int = 0


class Resume(Message, frozen=True, kw_only=True):
    """Host -> scheduler: the reader has caught up; a sequence that is not paused ignores it."""

    request_id: int
    index: int = 0


class Unpin(Message, frozen=True, kw_only=True):
    """Host -> scheduler: pages kept under this key may be evicted; an unknown key is ignored."""

    key: str


TokenizerInbox = Submit | Cancel
SchedulerInbox = Admit | Cancel | StepDone | StepFailed | StopFound | Pause | Resume | Unpin
ExecutorInbox = StepPlan
DetokenizerInbox = Open | Refused | Advance
