# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Sampling in Triton: the usual filters, the repetition penalty and the draw, in little more than one pass.

The vocabulary is cut into groups. One pass over the logits finds the largest of each group (`group_maxima_kernel`);
after that, only the groups that can matter are read:

- Top-k: if k groups have a maximum of at least t, so have k tokens, and every token of at least t stands in a group
  whose maximum is. So the k-th largest maximum is a lower bound of the k-th largest logit, and some k groups hold all
  candidates (`draw_bounded_kernel`).
- Without top-k: the Gumbel arg-max of the whole row is tested against the filters that are left. If it fails, only
  tokens more probable than it can pass, and the search goes on among these. The first to pass is the arg-max over all
  that pass, because what passes is closed upwards. So this rejection draws the very token that a search for the
  boundary would have drawn, in O(log 1/p) rounds on average; the idea to reject by a growing threshold is that of
  FlashInfer's sampling without a sort (https://flashinfer.ai/2025/03/10/sampling.html), whose draws are independent
  from round to round. Group maxima bound the nucleus from below in advance (`bounds_kernel`), which for a peaked
  distribution leaves next to nothing to search.

Thresholds are found bit by bit on integers that order like the floats. Tokens are drawn by the arg-min of E_i / p_i
with the variates of `gumbel`, so that the torch code draws the same tokens up to rounding.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.core import outcomes, row_layout

_TEMPERATURE: tl.constexpr = tl.constexpr(row_layout.TEMPERATURE)
_TOP_K: tl.constexpr = tl.constexpr(row_layout.TOP_K)
_TOP_P: tl.constexpr = tl.constexpr(row_layout.TOP_P)
_MIN_P: tl.constexpr = tl.constexpr(row_layout.MIN_P)
_DO_SAMPLE: tl.constexpr = tl.constexpr(row_layout.DO_SAMPLE)
_SEED_LOW: tl.constexpr = tl.constexpr(row_layout.SEED_LOW)
_SEED_HIGH: tl.constexpr = tl.constexpr(row_layout.SEED_HIGH)
_PENALTY: tl.constexpr = tl.constexpr(row_layout.REPETITION_PENALTY)
_UNDRAWABLE: tl.constexpr = tl.constexpr(outcomes.UNDRAWABLE_UNSOUND)
_FIRST_UNSOUND: tl.constexpr = tl.constexpr(outcomes.FIRST_UNSOUND)
_NOBODY: tl.constexpr = tl.constexpr(2**31 - 1)
_ROUNDS: tl.constexpr = tl.constexpr(200)  # more than any draw needs; NaN must not hang the device


@triton.jit
def _float_at(record, column):
    return tl.load(record + column).to(tl.float32, bitcast=True)


@triton.jit
def _ordered(x):
    """uint32 that order like the floats."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _hash(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_keys(record, position):
    key = _hash(tl.load(record + _SEED_LOW).to(tl.uint32, bitcast=True) ^ 0x3C6EF372)
    key = _hash(key ^ tl.load(record + _SEED_HIGH).to(tl.uint32, bitcast=True))
    key = _hash(key ^ position.to(tl.int32).to(tl.uint32, bitcast=True))
    return key, _hash(key + 0x1E3779B9)


@triton.jit
def _exponential(tokens, key, second_key):
    bits = _hash(_hash(tokens.to(tl.uint32) ^ key) + second_key)
    uniform = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    u = tl.minimum(uniform, 0.99999994)
    # Near 0, where 1 - u rounds and an approximate logarithm loses its digits, by the series of -log(1 - u).
    series = 0.2 + u * (0.16666667 + u * (0.14285715 + u * 0.125))
    series = 1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * series)))
    return tl.where(u < 0.125, u * series, -tl.log(1.0 - u))


@triton.jit
def _race(exponential, scaled):
    """E / p; large enough to lose, but finite, where p vanishes."""
    return exponential * tl.exp(tl.minimum(-scaled, 80.0))


@triton.jit
def _log_or_less(x):
    """The logarithm; -inf for 0."""
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), float("-inf"))


@triton.jit
def _load(logits, seen, offsets, mask, penalty, HAS_SEEN: tl.constexpr):
    """Logits in float32 after the repetition penalty; inf for NaN, -inf outside of the mask."""
    x = tl.load(logits + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    if HAS_SEEN:
        occurred = (tl.load(seen + offsets, mask=mask, other=0) & 1) != 0
        x = tl.where(occurred, tl.where(x < 0.0, x * penalty, x / penalty), x)
    # A maximum would pass NaN by.
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _finite(x):
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def group_maxima_kernel(
    logits, logits_stride, seen, seen_stride, rows, records, maxima, sums, vocab, groups,
    PARAMS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_FREE: tl.constexpr,
):  # fmt: skip
    """The largest logit of each of TILE groups; where a nucleus will be searched, also its sum of exponentials."""
    entry = tl.program_id(0).to(tl.int64)
    record = records + entry * PARAMS
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    seen_row = seen
    penalty = 1.0
    if HAS_SEEN:
        seen_row = seen + tl.load(rows + entry).to(tl.int64) * seen_stride
        penalty = _float_at(record, _PENALTY)
    x = _load(logits + entry * logits_stride, seen_row, offsets, offsets < vocab, penalty, HAS_SEEN)
    largest = tl.max(x, axis=1)
    tl.store(maxima + entry * groups + group, largest, mask=group < groups)
    if HAS_FREE:
        wanted = (tl.load(record + _DO_SAMPLE) != 0) & (tl.load(record + _TOP_K) == 0)
        if wanted & (_float_at(record, _TOP_P) < 1.0):
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.sum(tl.exp((x - shift[:, None]) / _float_at(record, _TEMPERATURE)), axis=1)
            tl.store(sums + entry * groups + group, total, mask=group < groups)


@triton.jit
def bounds_kernel(
    logits, logits_stride, seen, seen_stride, rows, records, maxima, sums, lows, totals, tokens, vocab, groups,
    PARAMS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_FREE: tl.constexpr,
):  # fmt: skip
    """The arg-max of rows that draw nothing; of rows without top-k, the least that a drawn logit can be.

    That is written to `lows` as an ordered integer, and the mass of the row, relative to its largest, to `totals`.
    """
    entry = tl.program_id(0).to(tl.int64)
    record = records + entry * PARAMS
    group = tl.arange(0, GROUPS)
    if (tl.load(record + _DO_SAMPLE) == 0) | (tl.load(record + _TOP_K) == 0):
        largest = tl.load(maxima + entry * groups + group, mask=group < groups, other=float("-inf"))
        top = tl.max(largest, axis=0)
        if tl.load(record + _DO_SAMPLE) == 0:
            first = tl.min(tl.where(largest == top, group, groups - 1), axis=0)
            offsets = first * GROUP + tl.arange(0, GROUP)
            seen_row = seen
            penalty = 1.0
            if HAS_SEEN:
                seen_row = seen + tl.load(rows + entry).to(tl.int64) * seen_stride
                penalty = _float_at(record, _PENALTY)
            x = _load(logits + entry * logits_stride, seen_row, offsets, offsets < vocab, penalty, HAS_SEEN)
            token = tl.min(tl.where((x == top) & (offsets < vocab), offsets, vocab - 1), axis=0)
            tl.store(tokens + entry, tl.where(_finite(top), token, _FIRST_UNSOUND - token))
        elif HAS_FREE:
            temperature = _float_at(record, _TEMPERATURE)
            low = _ordered(top + _log_or_less(_float_at(record, _MIN_P)) * temperature)
            top_p = _float_at(record, _TOP_P)
            if top_p < 1.0:
                relative = tl.where(group < groups, tl.exp((largest - top) / temperature), 0.0)
                summed = tl.load(sums + entry * groups + group, mask=group < groups, other=0.0)
                total = tl.sum(relative * summed, axis=0)
                # The largest t for which the maxima of at least t have the mass of the nucleus by themselves.
                keys = _ordered(largest)
                t = tl.zeros([], tl.uint32)
                for i in range(32):
                    candidate = t | (tl.full([], 1, tl.uint32) << (31 - i))
                    mass = tl.sum(tl.where(keys >= candidate, relative, 0.0), axis=0)
                    t = tl.where(mass >= top_p * total, candidate, t)
                low = tl.maximum(low, t)
                tl.store(totals + entry, total)
            tl.store(lows + entry, low.to(tl.int32, bitcast=True))


@triton.jit
def perturbed_kernel(
    logits, logits_stride, seen, seen_stride, rows, records, positions, maxima, lows, best, best_tokens, vocab, groups,
    PARAMS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
    HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """The arg-min of E / p over TILES tiles of a row without top-k, among logits of at least its bound."""
    entry = tl.program_id(0).to(tl.int64)
    record = records + entry * PARAMS
    if (tl.load(record + _DO_SAMPLE) != 0) & (tl.load(record + _TOP_K) == 0):
        group = tl.arange(0, GROUPS)
        largest = tl.load(maxima + entry * groups + group, mask=group < groups, other=float("-inf"))
        top = tl.max(largest, axis=0)
        low = tl.load(lows + entry).to(tl.uint32, bitcast=True)
        smallest, token = _search(
            logits + entry * logits_stride, seen, seen_stride, rows + entry, record, tl.load(positions + entry),
            maxima + entry * groups, top, low, tl.program_id(1) * TILES, TILES, vocab, groups,
            GROUP, TILE, HAS_SEEN,
        )  # fmt: skip
        place = entry * tl.num_programs(1) + tl.program_id(1)
        tl.store(best + place, smallest)
        tl.store(best_tokens + place, token)


@triton.jit
def _search(
    logits, seen, seen_stride, row, record, position, maxima, top, low, first, tiles, vocab, groups,
    GROUP: tl.constexpr, TILE: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """The smallest E / p, and its token, over `tiles` tiles from `first` on, among logits of at least `low`."""
    key, second_key = _row_keys(record, position)
    temperature = _float_at(record, _TEMPERATURE)
    seen_row = seen
    penalty = 1.0
    if HAS_SEEN:
        seen_row = seen + tl.load(row).to(tl.int64) * seen_stride
        penalty = _float_at(record, _PENALTY)
    smallest = tl.full([TILE, GROUP], float("inf"), tl.float32)
    chosen = tl.full([TILE, GROUP], _NOBODY, tl.int32)
    for i in range(tiles):
        group = (first + i) * TILE + tl.arange(0, TILE)
        largest = tl.load(maxima + group, mask=group < groups, other=float("-inf"))
        if tl.max(_ordered(largest), axis=0) >= low:
            offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            mask = offsets < vocab
            x = _load(logits, seen_row, offsets, mask, penalty, HAS_SEEN)
            race = _race(_exponential(offsets, key, second_key), (x - top) / temperature)
            better = mask & (_ordered(x) >= low) & (race < smallest)
            smallest = tl.where(better, race, smallest)
            chosen = tl.where(better, offsets, chosen)
    least = tl.min(tl.min(smallest, axis=1), axis=0)
    token = tl.min(tl.min(tl.where(smallest == least, chosen, _NOBODY), axis=1), axis=0)
    return least, token


@triton.jit
def accept_kernel(
    logits, logits_stride, seen, seen_stride, rows, records, positions, maxima, totals, best, best_tokens, tokens,
    vocab, groups, splits, tiles,
    PARAMS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """The token of a row without top-k: the first in the race that lies in the nucleus."""
    entry = tl.program_id(0).to(tl.int64)
    record = records + entry * PARAMS
    if (tl.load(record + _DO_SAMPLE) != 0) & (tl.load(record + _TOP_K) == 0):
        split = tl.arange(0, SPLITS)
        race = tl.load(best + entry * splits + split, mask=split < splits, other=float("inf"))
        winners = tl.load(best_tokens + entry * splits + split, mask=split < splits, other=_NOBODY)
        least = tl.min(race, axis=0)
        token = tl.min(tl.where(race == least, winners, _NOBODY), axis=0)
        token = tl.minimum(token, vocab - 1)
        group = tl.arange(0, GROUPS)
        largest = tl.load(maxima + entry * groups + group, mask=group < groups, other=float("-inf"))
        top = tl.max(largest, axis=0)
        drawable = _finite(top)
        top_p = _float_at(record, _TOP_P)
        if (top_p < 1.0) & drawable:
            temperature = _float_at(record, _TEMPERATURE)
            line = logits + entry * logits_stride
            seen_row = seen
            penalty = 1.0
            if HAS_SEEN:
                seen_row = seen + tl.load(rows + entry).to(tl.int64) * seen_stride
                penalty = _float_at(record, _PENALTY)
            nucleus = top_p * tl.load(totals + entry)
            searching = 1
            rounds = 0
            while searching != 0:
                x = _load(line, seen_row, token, token < vocab, penalty, HAS_SEEN)
                key = _ordered(x)
                above = tl.zeros([TILE, GROUP], tl.float32)
                for i in range(tiles):
                    some = i * TILE + tl.arange(0, TILE)
                    peaks = tl.load(maxima + entry * groups + some, mask=some < groups, other=float("-inf"))
                    if tl.max(_ordered(peaks), axis=0) > key:
                        offsets = some[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
                        y = _load(line, seen_row, offsets, offsets < vocab, penalty, HAS_SEEN)
                        above += tl.where(_ordered(y) > key, tl.exp((y - top) / temperature), 0.0)
                rounds += 1
                mass = tl.sum(tl.sum(above, axis=1), axis=0)
                if (mass < nucleus) | (rounds == _ROUNDS):
                    searching = 0
                else:
                    _, token = _search(
                        line, seen, seen_stride, rows + entry, record, tl.load(positions + entry),
                        maxima + entry * groups, top, key + 1, 0, tiles, vocab, groups, GROUP, TILE, HAS_SEEN,
                    )  # fmt: skip
                    token = tl.minimum(token, vocab - 1)
        tl.store(tokens + entry, tl.where(drawable, token, _UNDRAWABLE))


@triton.jit
def _compact(
    logits, seen_row, penalty, chosen, count, threshold, values, value_tokens, vocab,
    GROUP: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Write the logits of at least `threshold` in `count` chosen groups side by side; returns how many there are."""
    found = tl.zeros([], tl.int32)
    for i in range(0, count, TILE):
        place = i + tl.arange(0, TILE)
        group = tl.load(chosen + place, mask=place < count, other=0)
        offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        mask = (place < count)[:, None] & (offsets < vocab)
        x = _load(logits, seen_row, offsets, mask, penalty, HAS_SEEN)
        keep = tl.reshape((mask & (_ordered(x) >= threshold)).to(tl.int32), [TILE * GROUP])
        target = found + tl.cumsum(keep, axis=0) - 1
        fits = (keep != 0) & (target < CAPACITY)
        tl.store(values + target, tl.reshape(x, [TILE * GROUP]), mask=fits)
        tl.store(value_tokens + target, tl.reshape(offsets, [TILE * GROUP]), mask=fits)
        found += tl.sum(keep, axis=0)
    return found


@triton.jit
def draw_bounded_kernel(
    logits, logits_stride, seen, seen_stride, rows, records, positions, maxima, chosen, values, value_tokens, tokens,
    vocab, groups,
    PARAMS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, CAPACITY: tl.constexpr,
    HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """The token of a row with top-k."""
    entry = tl.program_id(0).to(tl.int64)
    record = records + entry * PARAMS
    top_k = tl.load(record + _TOP_K)
    if (tl.load(record + _DO_SAMPLE) != 0) & (top_k > 0):
        line = logits + entry * logits_stride
        seen_row = seen
        penalty = 1.0
        if HAS_SEEN:
            seen_row = seen + tl.load(rows + entry).to(tl.int64) * seen_stride
            penalty = _float_at(record, _PENALTY)
        group = tl.arange(0, GROUPS)
        largest = tl.load(maxima + entry * groups + group, mask=group < groups, other=float("-inf"))
        top = tl.max(largest, axis=0)
        keys = _ordered(largest)
        threshold = tl.zeros([], tl.uint32)
        # The leading bits are enough for a lower bound.
        for i in range(20):
            candidate = threshold | (tl.full([], 1, tl.uint32) << (31 - i))
            count = tl.sum(((keys >= candidate) & (group < groups)).to(tl.int32), axis=0)
            threshold = tl.where(count >= top_k, candidate, threshold)
        selected = ((keys >= threshold) & (group < groups)).to(tl.int32)
        count = tl.sum(selected, axis=0)
        own = chosen + entry * groups
        tl.store(own + tl.cumsum(selected, axis=0) - 1, group, mask=selected != 0)
        tl.debug_barrier()
        own_values, own_tokens = values + entry * CAPACITY, value_tokens + entry * CAPACITY
        found = _compact(
            line, seen_row, penalty, own, count, threshold, own_values, own_tokens, vocab,
            GROUP, TILE, CAPACITY, HAS_SEEN,
        )  # fmt: skip
        if found > CAPACITY:
            # Many large logits share these groups: take only those that are as large as the k-th. If still too many
            # are equal, take the first.
            threshold = tl.zeros([], tl.uint32)
            for i in range(32):
                candidate = threshold | (tl.full([], 1, tl.uint32) << (31 - i))
                at_least = tl.zeros([], tl.int32)
                for j in range(0, count, TILE):
                    at = j + tl.arange(0, TILE)
                    some = tl.load(own + at, mask=at < count, other=0)
                    offsets = some[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
                    mask = (at < count)[:, None] & (offsets < vocab)
                    y = _load(line, seen_row, offsets, mask, penalty, HAS_SEEN)
                    at_least += tl.sum(tl.sum((mask & (_ordered(y) >= candidate)).to(tl.int32), axis=1), axis=0)
                threshold = tl.where(at_least >= top_k, candidate, threshold)
            tl.debug_barrier()
            found = _compact(
                line, seen_row, penalty, own, count, threshold, own_values, own_tokens, vocab,
                GROUP, TILE, CAPACITY, HAS_SEEN,
            )  # fmt: skip
        tl.debug_barrier()
        place = tl.arange(0, CAPACITY)
        valid = place < found
        x = tl.load(own_values + place, mask=valid, other=float("-inf"))
        token = tl.load(own_tokens + place, mask=valid, other=_NOBODY)
        keys = tl.where(valid, _ordered(x), 0)
        kth = tl.zeros([], tl.uint32)
        for i in range(32):
            candidate = kth | (tl.full([], 1, tl.uint32) << (31 - i))
            kth = tl.where(tl.sum((keys >= candidate).to(tl.int32), axis=0) >= top_k, candidate, kth)
        keep = valid & (keys >= kth)
        scaled = (x - top) / _float_at(record, _TEMPERATURE)
        top_p = _float_at(record, _TOP_P)
        if top_p < 1.0:
            mass = tl.where(keep, tl.exp(scaled), 0.0)
            nucleus = top_p * tl.sum(mass, axis=0)
            # The largest t with the mass of the nucleus above it: larger logits stay.
            t = tl.zeros([], tl.uint32)
            for i in range(32):
                candidate = t | (tl.full([], 1, tl.uint32) << (31 - i))
                above = tl.sum(tl.where(keys > candidate, mass, 0.0), axis=0)
                t = tl.where(above >= nucleus, candidate, t)
            keep = keep & (keys > t)
        keep = keep & (scaled >= _log_or_less(_float_at(record, _MIN_P)))
        key, second_key = _row_keys(record, tl.load(positions + entry))
        race = tl.where(keep, _race(_exponential(token, key, second_key), scaled), float("inf"))
        least = tl.min(race, axis=0)
        winner = tl.min(tl.where(keep & (race == least), token, _NOBODY), axis=0)
        tl.store(tokens + entry, tl.where(_finite(top), tl.minimum(winner, vocab - 1), _UNDRAWABLE))


@triton.jit
def mark_seen_kernel(rows, token_ids, seen, stride, size, BLOCK: tl.constexpr):
    """Set the bit of each decoding row's input token."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < size
    row = tl.load(rows + entries, mask=mask, other=0)
    place = seen + row.to(tl.int64) * stride + tl.load(token_ids + entries, mask=mask, other=0)
    owned = row != 0
    tl.store(place, tl.load(place, mask=owned, other=0) | 1, mask=owned)
