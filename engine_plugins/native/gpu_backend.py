"""The engine on one NVIDIA GPU: a decoding slot's whole cycle is one CUDA graph.

What it is: target verify of k + 1 rows, accept or reject, the draft's catch-up rows and k - 1 further ones, with
positions, tokens and counts on the device. The host waits once per cycle, for (count, tokens) of all its slots. Prompts
go through a graph of eight rows. `device="cuda-reference"` is the same program on the ops' CPU references, without
graphs: for tests.
What it refuses to be: batched over slots (each replays its own graph), or silent about what ran: see `counters`.
Run it: `python -m engine_plugins.native.bench --bundle DIR --device cuda`.
Legend: M rows, k drafts, V vocabulary, S = max_seq_len positions; scratch rows lie behind S.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine_plugins.native.backend import Prefill, Result
from engine_plugins.native.bundle import Bundle
from engine_plugins.native.gpu_kernels import plan_rows, settle
from engine_plugins.native.gpu_model import ROWS, Cache, Draft, Rows, Target
from engine_plugins.native.gpu_sampling import GuessBoard, target_probabilities
from engine_plugins.ops import library
from specs.errors import InputError

E4M3 = torch.float8_e4m3fn


@dataclass
class _Slot:
    """What the host knows of a slot; the device has its own position, drafts and tokens."""

    position: int = 0
    drafts: int = 0
    mode: str = "greedy"  # or sampling, top_p, forced: each has a graph of its own
    numbers: np.random.Generator | None = None
    forced_debt: float = 0.0


def open_device(bundle: Bundle, draft_tokens: int, device: str) -> torch.device:
    """The device, with the bundle's kernels loaded; InputError or IntegrityError for what the ops do not take."""
    if draft_tokens >= ROWS:
        raise InputError(f"draft_tokens={draft_tokens} is outside the contract", "verify", f"on a GPU 0..{ROWS - 1}")
    if device == "cuda-reference":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device", "device=cuda", "leave it out to run on the CPU")
    for head_dim in [bundle.config.head_dim] + ([bundle.draft.head_dim] if bundle.draft else []):
        if head_dim & (head_dim - 1):
            raise InputError(f"head_dim {head_dim} is outside the contract", "attention_decode", "2^n, 16..256")
    library.use_kernels(bundle.path / "plugins")
    _check_memory(bundle)
    return torch.device("cuda")


def _check_memory(bundle: Bundle) -> None:
    c, rows = bundle.config, bundle.max_batch_size * (bundle.max_seq_len + ROWS)
    weights = sum(f.stat().st_size for f in bundle.path.glob("*.safetensors"))
    needed = weights + 2 * 2 * rows * c.num_layers * c.num_kv_heads * c.head_dim
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        raise InputError(
            f"weights and KV cache need up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free on the GPU",
            "engine.max_batch_size",
            "lower max_batch_size or max_seq_len, or use a larger GPU",
        )


class GpuBackend:
    """See the module docstring."""

    def __init__(
        self, bundle: Bundle, *, draft_tokens: int, prefill_rows: int, forced_acceptance: float | None, device: str
    ) -> None:
        self._device = open_device(bundle, draft_tokens, device)
        self._on_gpu = self._device.type == "cuda"
        self._bundle, self._k, self._forced = bundle, draft_tokens, forced_acceptance or 0.0
        self._served = library.served.copy()
        self.target = Target(bundle, self._device)
        self.draft = Draft(bundle, bundle.draft, self.target, self._device) if bundle.draft else None
        self._make_caches()
        self._make_state(prefill_rows)
        self._slots = [_Slot() for _ in range(bundle.max_batch_size)]
        self._boards: dict[int, GuessBoard] = {}
        self._graphs: dict[tuple[int, str], Any] = {}
        self._counters = {"cycles": 0, "decode_rows": 0, "prefill_rows": 0, "proposed_cycles": 0, "seconds": 0.0}
        self._accepted, self._device_seconds = [0] * draft_tokens, 0.0
        if self._on_gpu:
            self._pool = torch.cuda.graph_pool_handle()
            self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for slot in range(bundle.max_batch_size):  # now, so that no request waits for a capture
                self._run(slot, "prefill")
                self._run(slot, "forced" if self._forced else "greedy")
            torch.cuda.synchronize()
            self._state.zero_()  # captures ran on it

    # ---- memory
    def _make_caches(self) -> None:
        b, c = self._bundle, self._bundle.config
        rows = b.max_seq_len + ROWS

        def pair(layers: int, kv_heads: int, head_dim: int, fp8: bool) -> list[Tensor]:
            shape = (layers, b.max_batch_size, rows, kv_heads, head_dim)
            dtype = torch.uint8 if fp8 else torch.bfloat16
            made = [torch.zeros(shape, dtype=dtype, device=self._device) for _ in range(2)]
            return [t.view(E4M3) for t in made] if fp8 else made

        self._target_kv = pair(c.num_layers, c.num_kv_heads, c.head_dim, self.target.fp8_cache)
        self._draft_kv = pair(1, b.draft.num_kv_heads, b.draft.head_dim, False) if b.draft else []
        (k, v), slots = self._target_kv, range(b.max_batch_size)
        self._caches = [
            [Cache(k[i, s], v[i, s], layer.k_scale, layer.v_scale) for i, layer in enumerate(self.target.layers)]
            for s in slots
        ]
        self._draft_caches = [Cache(self._draft_kv[0][0, s], self._draft_kv[1][0, s]) for s in slots if self._draft_kv]

    def _make_state(self, prefill_rows: int) -> None:
        """Per slot [position, number of drafts, last token, drafts], what a cycle is given, and what it gives back."""
        slots, k = self._bundle.max_batch_size, self._k

        def both(*shape: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
            host = torch.zeros(shape, dtype=dtype, pin_memory=self._on_gpu)
            return torch.zeros(shape, dtype=dtype, device=self._device), host

        self._state, self._state_host = both(slots, k + 3)
        self._settings, self._settings_host = both(slots, 2, dtype=torch.float32)  # temperature, top_p
        self._uniform, self._uniform_host = both(slots, 2 * k + 1, dtype=torch.float32)
        self._take, self._take_host = both(slots, 1)  # drafts to accept by decree
        self._chunks, self._chunks_host = both(prefill_rows, 4, ROWS)
        self._chunk = torch.zeros((4, ROWS), dtype=torch.int64, device=self._device)
        self._chunk[3] = self._bundle.max_seq_len + torch.arange(ROWS)
        self._result, self._result_host = both(slots, k + 2)
        self._row = torch.arange(k + 1, device=self._device)

    def _copy(self, name: str, index: int | slice) -> None:
        host = getattr(self, f"{name}_host")
        getattr(self, name)[index].copy_(host[index], non_blocking=True)

    # ---- one graph's content
    def _prefill(self, slot: int) -> None:
        token, next_token, position, write = self._chunk
        _, features = self.target.forward(Rows(token, position, write), self._caches[slot])
        if self.draft and self._k and features is not None:
            hidden = self.draft.combine(features)
            self.draft.keys(hidden, Rows(next_token, position, write), self._draft_caches[slot])

    def _decode(self, slot: int, mode: str) -> None:
        state, size = self._state[slot], self._bundle.max_seq_len
        num_drafts, drafts = state[1:2], state[3:]
        hidden, features = self.target.forward(Rows(*plan_rows(state, size)), self._caches[slot])
        logits = self.target.logits(hidden)
        chosen, count = self._verify(slot, mode, logits, drafts, num_drafts)
        s = settle(logits, chosen, count, state, self._result[slot], size)
        if not self._k or self.draft is None or features is None:
            return
        cache, draft = self._draft_caches[slot], self.draft
        hidden, at = draft.combine(features), s.position.index_select(0, s.last)
        q = draft.keys(hidden, Rows(s.next_token, s.position, s.write), cache).index_select(0, s.last)
        hidden = hidden.index_select(0, s.last)
        for step in range(self._k):  # a chain from the last accepted row
            this = slice(step, step + 1)
            if step:
                at = s.chain_position[this]
                q = draft.keys(hidden, Rows(drafts[step - 1 : step], at, s.chain_write[this]), cache)
            logits, hidden = draft.finish(q, hidden, at, cache)
            torch.index_select(draft.to_target, 0, self._guess(slot, mode, logits, step), out=drafts[this])

    def _verify(
        self, slot: int, mode: str, logits: Tensor, drafts: Tensor, num_drafts: Tensor
    ) -> tuple[Tensor, Tensor]:
        row = self._row
        if mode == "greedy":
            return torch.ops.kilotok.verify_greedy(logits, drafts.masked_fill(row[: self._k] >= num_drafts, -1))
        if mode == "forced":
            take = self._take[slot]
            best = logits.argmax(dim=-1).masked_fill(row > take, -1)
            return torch.where(row < take, torch.cat((drafts, best[:1])), best), take + 1
        p_RW = target_probabilities(logits, self._settings[slot], mode == "top_p")
        return self._board(slot).verify(p_RW, drafts, num_drafts, self._uniform[slot, : self._k + 1])

    def _guess(self, slot: int, mode: str, logits: Tensor, step: int) -> Tensor:
        if mode in ("greedy", "forced"):
            return logits.argmax(dim=-1)
        temperature, number = self._settings[slot, :1], self._uniform[slot, self._k + 1 + step :][:1]
        return self._board(slot).draw(logits, temperature, step, number)

    def _board(self, slot: int) -> GuessBoard:
        if slot not in self._boards:
            to_target = self.draft.to_target if self.draft else None
            self._boards[slot] = GuessBoard(self._k, self._bundle.config.vocab_size, to_target, self._device)
        return self._boards[slot]

    # ---- graphs
    @torch.no_grad()
    def _run(self, slot: int, what: str) -> None:
        """Prefill the chunk, or one cycle in this mode: a replay on a GPU."""

        def content() -> None:
            self._prefill(slot) if what == "prefill" else self._decode(slot, what)

        if not self._on_gpu:
            content()
            return
        if (slot, what) not in self._graphs:
            if what in ("sampling", "top_p"):
                self._board(slot)  # what outlives a replay must not come from the graphs' memory
            self._graphs[slot, what] = self._capture(content)
        self._graphs[slot, what].replay()

    def _capture(self, content: Callable[[], None]) -> Any:
        """Run once for Triton and the allocator, with the state put back, then record."""
        kept, side = self._state.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            content()
            self._state.copy_(kept)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            content()
        return graph

    # ---- the engine's calls
    def cycle(self, prefills: Sequence[Prefill], decode_slots: Sequence[int]) -> list[Result]:
        started = time.perf_counter()
        if self._on_gpu:
            self._began.record()
        self._prefill_all(prefills)
        for slot in decode_slots:
            self._give(slot)
            self._run(slot, self._slots[slot].mode)
        self._result_host.copy_(self._result, non_blocking=True)
        if self._on_gpu:
            self._ended.record()
            self._ended.synchronize()  # the one wait
            self._device_seconds += self._began.elapsed_time(self._ended) * 1e-3
        results = [self._took(slot) for slot in decode_slots]
        self._counters["cycles"] += 1
        self._counters["seconds"] += time.perf_counter() - started
        return results

    def _prefill_all(self, prefills: Sequence[Prefill]) -> None:
        plan: list[int] = []
        staged, scratch = self._chunks_host.numpy(), self._bundle.max_seq_len + np.arange(ROWS)
        for slot, first, tokens in prefills:
            ids = np.asarray(tokens)
            for begin in range(0, len(ids) - 1, ROWS):
                size = min(ROWS, len(ids) - 1 - begin)
                row = begin + np.minimum(np.arange(ROWS), size - 1)
                write = np.where(np.arange(ROWS) < size, first + row, scratch)
                staged[len(plan)] = ids[row], ids[row + 1], first + row, write
                plan.append(slot)
            self._counters["prefill_rows"] += len(ids) - 1
        if plan:
            self._copy("_chunks", slice(len(plan)))
        for index, slot in enumerate(plan):
            self._chunk.copy_(self._chunks[index])
            self._run(slot, "prefill")

    def _give(self, slot: int) -> None:
        """What only the host knows about the next cycle of a slot."""
        s = self._slots[slot]
        if s.mode in ("sampling", "top_p") and s.numbers is not None:
            self._uniform_host[slot].numpy()[:] = s.numbers.random(2 * self._k + 1, dtype=np.float32)
            self._copy("_uniform", slot)
        elif s.mode == "forced":
            s.forced_debt += (self._forced - 1.0) * s.drafts / max(1, self._k)
            taken = min(s.drafts, int(s.forced_debt))
            s.forced_debt -= taken
            self._take_host[slot] = taken
            self._copy("_take", slot)

    def _took(self, slot: int) -> Result:
        s, (count, *tokens) = self._slots[slot], self._result_host[slot].tolist()
        proposed, new = s.drafts, tokens[:count]
        self._counters["decode_rows"] += proposed + 1
        self._counters["proposed_cycles"] += proposed > 0
        for i in range(count - 1):
            self._accepted[i] += 1
        s.position += count
        room = max(0, min(self._k, self._bundle.max_seq_len - 1 - s.position))
        s.drafts = room if self.draft and count else 0
        return new, proposed

    def start(self, slot: int, position: int, token: int, temperature: float, top_p: float, seed: int) -> None:
        mode = "forced" if self._forced else "greedy" if temperature <= 0 else "top_p" if top_p < 1 else "sampling"
        self._slots[slot] = _Slot(position, 0, mode, np.random.Generator(np.random.Philox(key=seed)))
        self._state_host[slot] = torch.tensor([position, 0, token] + [0] * self._k)
        self._settings_host[slot] = torch.tensor([temperature, top_p])
        self._copy("_state", slot)
        self._copy("_settings", slot)

    def copy_prefix(self, source: int, slot: int, count: int) -> None:
        for cache in (*self._target_kv, *self._draft_kv):
            codes = cache.view(torch.uint8)
            codes[:, slot, :count] = codes[:, source, :count]

    @torch.no_grad()
    def forced(self, slot: int, token_ids: list[int], what: str) -> np.ndarray:
        if what != "logits" and self.draft is None:
            raise InputError("this bundle has no draft", what, "build it with one")
        ids, parts = torch.tensor(token_ids, device=self._device), list[Tensor]()
        for begin in range(0, len(ids), ROWS):
            position = torch.arange(begin, min(begin + ROWS, len(ids)), device=self._device)
            hidden, features = self.target.forward(Rows(ids[position], position, position), self._caches[slot])
            if what == "logits":
                parts.append(self.target.logits(hidden))
            elif what == "hidden" and features is not None:
                parts.append(features)
            elif features is not None and len(followed := position[: len(ids) - 1 - begin]):
                parts.append(self._forced_draft(slot, features[: len(followed)], followed, ids[followed + 1]))
        width = self._bundle.draft.draft_vocab_size if what == "draft" and self._bundle.draft else 0
        return torch.cat(parts).float().cpu().numpy() if parts else np.zeros((0, width), np.float32)

    def _forced_draft(self, slot: int, features: Tensor, position: Tensor, next_token: Tensor) -> Tensor:
        assert self.draft is not None
        cache, hidden = self._draft_caches[slot], self.draft.combine(features)
        q = self.draft.keys(hidden, Rows(next_token, position, position), cache)
        return self.draft.finish(q, hidden, position, cache)[0]

    def counters(self) -> dict[str, Any]:
        """`served` counts calls by op and implementation; a captured call counts once, however often it is replayed."""
        on_gpu = self._on_gpu
        cycles, seconds = max(1, self._counters["cycles"]), self._counters["seconds"]
        served: dict[str, dict[str, int]] = {}
        for (op, implementation), calls in (library.served - self._served).items():
            served.setdefault(op, {})[implementation] = calls
        by_group = {"device": self._device_seconds, "host": seconds - self._device_seconds} if on_gpu else {}
        return {
            "backend": "cuda" if on_gpu else "cuda-reference",
            "isa": library.architecture_of() if on_gpu else "torch",
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": 1,
            **self._counters,
            "seconds_per_cycle": seconds / cycles,
            "seconds_by_group": by_group,
            "accepted_by_position": list(self._accepted),
            "graphs": len(self._graphs),
            "served": served,
        }

    def close(self) -> None:
        self._graphs.clear()
        self._boards.clear()
        if self._on_gpu:
            torch.cuda.synchronize()
