"""CPU kernels of streamgen"""

from collections.abc import Sequence

class TokenTrie:
    """The tokens of a vocabulary as a trie of bytes."""

    def __init__(self, tokens: list[bytes]) -> None:
        """tokens: bytes by id; b"" is never matched."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class MaskCache:
    """
    Rows of any number of tables; those that were not used for longest go first.
    """

    def __init__(self, max_bytes: int) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_rows(self) -> int: ...

class MaskTable:
    """Which tokens an automaton over bytes allows in each of its states."""

    def __init__(
        self,
        trie: TokenTrie,
        classes: int,
        transitions: int,
        accepting: int,
        num_states: int,
        num_classes: int,
        stop_ids: Sequence[int],
        cache: MaskCache,
    ) -> None:
        """
        classes uint8 [256], transitions int32 [num_states, num_classes] (-1: none), accepting uint8 [num_states];
        state 0 is the start, and every state reaches an accepting one.
        """

    @property
    def num_states(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_bytes(self) -> int:
        """Of the table itself, its rows aside."""

    @property
    def is_spellable(self) -> bool:
        """Whether the tokens can spell any whole output."""

    def next_state(self, state: int, token: int) -> int | None:
        """
        The state after a token that is no stop id; None where it is not allowed.
        """

    def next_bytes(self, state: int, text: bytes) -> int | None: ...
    def is_stop(self, token: int) -> bool: ...
    def may_stop(self, state: int) -> bool: ...
    def must_stop(self, state: int) -> bool: ...
    def row_kind(self, state: int) -> str:
        """ "forced" | "sparse" | "dense"; derives the row."""

    def fill_row(self, state: int, words: int) -> None:
        """The row as bits: uint32 [ceil(vocab_size / 32)]."""

    def forced_run(self, state: int, limit: int) -> tuple[int, ...]:
        """The tokens that follow without a choice."""

    def forced_bytes(self, state: int, limit: int) -> bytes:
        """The bytes that follow without a choice."""

    def likely_run(self, state: int, limit: int) -> tuple[int, ...]:
        """Tokens that probably follow: the text does, though not how it is cut."""

class GrammarSlots:
    """
    Where each running sequence is in its grammar; see csrc/grammar/slots.h.
    """

    def __init__(self, num_slots: int) -> None: ...
    def begin(
        self,
        slot: int,
        table: MaskTable,
        num_prompt: int,
        output: Sequence[int],
        begins_after: Sequence[int] = [],
        opens_with: Sequence[int] = [],
        is_forced: bool = False,
        repeats: bool = False,
        held_ids: Sequence[int] = [],
        wants_runs: bool = True,
    ) -> bool:
        """
        A sequence takes the slot, with its output so far; False if that is not allowed, and then it has failed.
        """

    def drop(self, slot: int) -> None:
        """A sequence without a grammar takes the slot."""

    def propose(self, slot: int, position: int, ids: Sequence[int]) -> None:
        """
        Tokens to verify, the first at `position`; those that were taken before are passed over.
        """

    def take(
        self, rows: int, num_rows: int, drawn: int, places: int, tokens: int, stride: int
    ) -> tuple[list[tuple[int, tuple[int, ...], bool, tuple[int, ...]]], tuple[int, ...], list[tuple[int, int]]]:
        """
        Take drawn int32 [num_rows] of SAMPLE_ROW rows; places int32 [num_rows] of each row's sequence in the plan,
        or 0: row by row. Returns turns (place, forced ids, whether it ends, likely ids), the places that failed, and
        cuts (place, how many of its rows count).
        """

    def fill(self, slot: int, position: int, words: int) -> bool:
        """
        What the token after `position` may be, as bits; False where it may be any, and nothing is written.
        """

    def num_known(self, slot: int) -> int:
        """Output tokens that were taken or proposed."""

class Memory:
    """Zeroed memory, aligned to 2 MiB; freed with the object."""

    def __init__(self, bytes: int, huge: bool) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    def drop(self) -> None:
        """Give everything back to the system; it reads as zero afterwards."""

    @property
    def resident(self) -> int:
        """Bytes that are in memory now."""

class Pool:
    """The threads of one engine; the caller of a step is one of them."""

    def __init__(self, threads: int) -> None: ...
    @property
    def size(self) -> int: ...

def pack(
    pool: Pool,
    isa: str,
    src: int,
    src_row_bytes: int,
    src_type: int,
    dst: int,
    dst_type: int,
    n: int,
    k: int,
    first_row: int,
    rope_heads: int,
    group: int,
    symmetric: bool,
) -> None:
    """
    Pack n stored rows of k values as rows first_row ... of a linear's weight: see PackArgs.
    """

def read_bandwidth(threads: int, bytes: int, seconds: float) -> float:
    """
    GB/s at which `threads` read `bytes` of memory: the best pass within `seconds`.
    """

class StepArrays:
    """StepInputs and StepOutputs of backends/base.py, as addresses."""

    def __init__(
        self,
        tokens: int,
        tokens_stride: int,
        page_tables: int,
        page_table_stride: int,
        num_slots: int,
        slots: int,
        starts: int,
        counts: int,
        num_seqs: int,
        samples: int,
        num_samples: int,
        bias_ids: int,
        bias_values: int,
        ban_ids: int,
        masks: int,
        vocab: int,
        token: int,
        logprob: int,
        rank: int,
        top_ids: int,
        top_logprobs: int,
        top_width: int,
        logits: int,
        num_logits: int,
        grammars: GrammarSlots | None = None,
    ) -> None: ...

class Program:
    """A model's ops over buffers; see csrc/cpu/program.h."""

    def __init__(
        self,
        pool: Pool,
        isa: str,
        dtype: int,
        kv_dtype: int,
        max_rows: int,
        head_rows: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        num_pages: int,
        vocab: int,
    ) -> None: ...
    def add_buffer(self, width: int, stream: bool, dense: bool, quantized: bool, head_only: bool) -> int: ...
    def add_rope(self, inv_freq: Sequence[float], scale: float) -> int: ...
    def add_embed(self, out: tuple[int, int, int], weight: tuple[int, int, int], scale: float) -> None: ...
    def add_rms_norm(
        self, x: tuple[int, int, int], out: tuple[int, int, int], weight: int, eps: float, offset: float, groups: int
    ) -> None: ...
    def add_linear(
        self,
        x: tuple[int, int, int],
        out: tuple[int, int, int],
        parts: Sequence[tuple[tuple[int, int, int], int, int]],
        bias: int,
        accumulate: bool,
    ) -> None:
        """
        parts: packed matrices (address, type, group), each with its first column of out and its columns
        """

    def add_rotation(self, x: tuple[int, int, int], num_heads: int, head_dim: int, table: int) -> None: ...
    def add_attend(
        self,
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        out: tuple[int, int, int],
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        scale: float,
        softcap: float,
    ) -> None: ...
    def add_gated_mul(
        self, gate: tuple[int, int, int], up: tuple[int, int, int], out: tuple[int, int, int], activation: int
    ) -> None: ...
    def split(self, selected: tuple[int, int, int], gathered: tuple[int, int, int]) -> None: ...
    def finish(self, logits: tuple[int, int, int]) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...
    def take_op_seconds(self) -> list[float]:
        """
        Seconds in each op since the last call, then the sampler's; the first call begins the measuring.
        """

    def step(self, arrays: StepArrays, wake_fd: int) -> None:
        """One step, see LoadedModel.step in backends/base.py."""

    def sample(self, arrays: StepArrays, changed: int) -> None:
        """Sample the rows whose logits were written out, see LoadedModel.sample."""

    def drop_pages(self) -> None:
        """
        Give the memory of pages and workspace back; they read as zero afterwards.
        """

    def resident_bytes(self) -> int:
        """Bytes of pages and workspace that are in memory."""

    def copy_pages(self, pairs: int, count: int) -> None: ...

def kernel_attend(
    pool: Pool,
    isa: str,
    dtype: int,
    q: int,
    k: int,
    v: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    out: int,
    out_stride: int,
    k_pages: int,
    v_pages: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    window: int,
    scale: float,
    softcap: float,
    num_seqs: int,
    slots: int,
    starts: int,
    counts: int,
    page_tables: int,
    page_table_stride: int,
    kv_dtype: int,
    out_dtype: int,
    cos: int = 0,
    sin: int = 0,
    rotary_dim: int = 0,
    fused: bool = False,
    workers: int = 1,
    shared_tokens: int = 0,
) -> tuple[int, int]:
    """
    Store a batch's keys and values in their pages, then attend: AttendArgs and Batch in csrc/cpu.
    Returns how many tiles there were, and how many pieces of work went ahead of them.
    """

def kernel_sample(
    isa: str,
    rows: int,
    num_rows: int,
    logits: int,
    logits_stride: int,
    tokens: int,
    tokens_stride: int,
    bias_ids: int,
    bias_values: int,
    ban_ids: int,
    masks: int,
    vocab: int,
    token: int,
    logprob: int,
    rank: int,
    top_ids: int,
    top_logprobs: int,
    top_width: int,
    grammars: GrammarSlots | None = None,
) -> None:
    """
    Sample rows, whose logits are overwritten: StepInputs and StepOutputs in backends/base.py.
    """

def philox(key: int, counter: Sequence[int]) -> list[int]:
    """Philox4x32-10."""

def pool_selftest(threads: int, rounds: int) -> int:
    """A checksum that is the same for any number of threads."""

def isa_names() -> list[str]:
    """The instruction sets usable here, the best first."""

def kernel_linear_items(isa: str, rows: int, n: int, k: int, dtype: int, group: int = 0) -> int: ...
def kernel_linear(
    isa: str,
    x: int,
    x_stride: int,
    w: int,
    bias: int,
    out: int,
    out_stride: int,
    rows: int,
    n: int,
    k: int,
    accumulate: bool,
    dtype: int,
    begin: int = -1,
    end: int = -1,
    group: int = 0,
) -> None:
    """Items [begin, end) of a product; all of them by default."""

def kernel_quantize(isa: str, x: int, x_stride: int, out: int, out_stride: int, rows: int, width: int) -> None:
    """
    Rows of floats as activation blocks (ActivationBlock in csrc/cpu/kernels.h).
    """

def packed_panel_bytes(type: int, group: int, k: int) -> int:
    """Bytes of 16 rows of k integer weights in memory."""

def unpack_row(type: int, group: int, w: int, row: int, k: int, out: int) -> None:
    """Row `row` of packed integer weights as k floats."""

def kernel_pack(
    isa: str,
    src: int,
    src_row_bytes: int,
    src_type: int,
    dst: int,
    dst_type: int,
    n: int,
    k: int,
    first_row: int,
    rope_heads: int,
    begin: int = -1,
    end: int = -1,
    group: int = 0,
    symmetric: bool = False,
) -> None:
    """
    Panels [begin, end) of a packing, counted from the one of first_row; all by default.
    """

def dequantize(type: int, src: int, columns: int, dst: int) -> None:
    """One stored row to float32."""

def kernel_rms_norm(
    isa: str,
    x: int,
    x_stride: int,
    weight: int,
    out: int,
    out_stride: int,
    rows: int,
    width: int,
    groups: int,
    eps: float,
    offset: float,
    dtype: int,
) -> None: ...
def kernel_embed(
    isa: str,
    ids: int,
    w: int,
    out: int,
    out_stride: int,
    rows: int,
    width: int,
    scale: float,
    dtype: int,
    group: int = 0,
) -> None: ...
def kernel_rope(
    isa: str, x: int, x_stride: int, cos: int, sin: int, rows: int, num_heads: int, head_dim: int, rotary_dim: int
) -> None: ...
def kernel_gated_mul(
    isa: str,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    out: int,
    out_stride: int,
    rows: int,
    width: int,
    activation: int,
    dtype: int,
) -> None: ...
def kernel_row_max(isa: str, x: int, n: int) -> float: ...
def kernel_row_exp_sum(isa: str, x: int, n: int, max: float) -> float: ...
