"""Restatements of every selection rule as a token mask in plain NumPy, one head, loops where loops are clearest."""

import numpy as np


def softmax(x):
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q, k, v, mask):
    """Masked softmax attention."""
    scores = np.where(mask, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    return softmax(scores) @ v


def filled(mask, block):
    """The lists of keys before each block of queries filled up to whole blocks by the first keys that are not on them."""
    mask = mask.copy()
    for begin in range(0, len(mask), block):
        rows = mask[begin : begin + block, :begin]
        free = np.flatnonzero(~rows[0])
        rows[:, free[: -rows[0].sum() % block]] = True
    return mask


def causal(n):
    """Lower triangle."""
    return np.tril(np.ones((n, n), bool))


def means(x, block):
    """Of consecutive blocks."""
    return np.stack([x[i : i + block].mean(0) for i in range(0, len(x), block)])


def cover(mass, share, first=()):
    """Indices, largest first after `first`, until the sum of those before reaches share * total."""
    order = [*first, *(i for i in np.argsort(-mass, kind="stable") if i not in first)]
    kept, total = list(first), 0.0
    for i in order:
        if total >= share * mass.sum():
            break
        kept.append(i)
        total += mass[i]
    return sorted(set(kept))


def blocks_to_tokens(kept, n, block):
    """{block of queries: key blocks} as a causal token mask; the own block is always kept."""
    mask = np.zeros((n, n), bool)
    for x in range(-(-n // block)):
        for y in {*kept[x], x}:
            mask[x * block : (x + 1) * block, y * block : (y + 1) * block] = True
    return mask & causal(n)


def pooled(q, k, block):
    """Rows of softmax over visible pooled blocks."""
    qm, km = means(q, block), means(k, block)
    return [softmax(qm[x] @ km[: x + 1].T / np.sqrt(q.shape[1])) for x in range(len(qm))]


def mean_pool(q, k, share, block):
    kept = [[*cover(p, share), 0] for p in pooled(q, k, block)]
    return blocks_to_tokens(kept, len(q), block)


def xattention(q, k, share, block, stride):
    n, d = q.shape
    cells = n // stride
    score = np.full((cells, cells), -np.inf)
    for i in range(cells):
        for j in range(i + 1):
            score[i, j] = sum(q[i * stride + stride - 1 - t] @ k[j * stride + t] for t in range(stride))
    share_of = softmax(score / (stride * np.sqrt(d)))
    per, kept = block // stride, []
    for x in range(n // block):
        mass = np.array([share_of[x * per : (x + 1) * per, y * per : (y + 1) * per].sum() for y in range(x + 1)])
        kept.append(cover(mass, share, first=sorted({0, x})))
    return blocks_to_tokens(kept, n, block)


def pbs(q, k, share, segment, block):
    n, d = q.shape
    score = softmax(q[-block:] @ k.T / np.sqrt(d)).mean(0)
    order = np.concatenate([s + np.argsort(-score[s : s + segment], kind="stable") for s in range(0, n, segment)])
    qm, km, mask = means(q, block), means(k[order], block), np.zeros((n, n), bool)
    sink_block = list(order).index(0) // block
    for x in range(n // block):
        begin = x * block // segment * segment
        earlier = begin // block
        kept = {sink_block}
        if earlier:
            kept |= set(cover(softmax(qm[x] @ km[:earlier].T / np.sqrt(d)), share))
        rows = slice(x * block, (x + 1) * block)
        mask[rows, begin:] = True
        for y in kept:
            mask[rows, order[y * block : (y + 1) * block]] = True
    return mask & causal(n)


def vertical_slash(q, k, columns, diagonals, block, last=64, sinks=30, recent=100):
    n, d = q.shape
    rows = np.arange(n - last, n)
    a = softmax(np.where(np.arange(n)[None] <= rows[:, None], q[-last:] @ k.T / np.sqrt(d), -np.inf))
    vertical, slash = a.sum(0), np.zeros(n)
    for row, i in zip(a, rows, strict=True):
        for o in range(i + 1):
            slash[o] += row[i - o]
    vertical[:sinks], slash[:recent] = np.inf, np.inf
    top_v = np.argsort(-vertical, kind="stable")[: max(columns, sinks)]
    top_s = np.argsort(-slash, kind="stable")[: max(diagonals, recent // 2)]
    mask = np.zeros((n, n), bool)
    for begin in range(0, n, block):
        rows, end = slice(begin, begin + block), begin + block
        mask[rows, top_v] = True
        mask[rows, begin:end] = True
        for o in top_s:
            mask[rows, max(end - o - block, 0) : max(end - o, 0)] = True
    return mask & causal(n)


def flex_prefill(q, k, gamma, tau, min_budget, block):
    n, d = q.shape
    count = n // block
    rows = np.arange(n - block, n)
    a = softmax(np.where(np.arange(n)[None] <= rows[:, None], q[-block:] @ k.T / np.sqrt(d), -np.inf))
    vertical, slash = (
        a.mean(0),
        np.array([np.mean([a[r, i - o] if i >= o else 0 for r, i in enumerate(rows)]) for o in range(n)]),
    )
    picks = []
    for line in (vertical, slash):
        wanted = max(len(cover(line, gamma)) // block + 1, min_budget // block)
        mass = line.reshape(count, block).sum(1)
        mass[0] = np.inf
        picks.append(np.argsort(-mass, kind="stable")[:wanted])
    kept = [{y for y in picks[0]} | {x - o for o in picks[1] if o <= x} for x in range(count)]
    estimate, true = softmax(q[-block:].mean(0) @ means(k, block).T / np.sqrt(d)), vertical.reshape(count, block).sum(1)
    middle = (estimate + true) / 2
    kl = lambda p: sum(p[i] * np.log(p[i] / middle[i]) for i in range(count) if p[i] > 0)
    flat = np.concatenate([np.pad(p, (0, count - len(p))) for p in pooled(q, k, block)])
    aware = np.sqrt(max((kl(estimate) + kl(true)) / 2, 0)) < tau
    chosen = cover(flat, gamma) if aware else np.argsort(-flat, kind="stable")[: max(min_budget // block, 1)]
    for i in chosen:
        kept[i // count].add(i % count)
    return blocks_to_tokens([[y for y in row if y <= x] for x, row in enumerate(kept)], n, block), aware


def anchor(q, k, threshold, group, block):
    n, d = q.shape
    scores, width = q @ k.T / np.sqrt(d), group * block
    seen = np.zeros((n, n), bool)
    for i in range(n):
        seen[i, :block], seen[i, i // width * width : i + 1] = True, True
    seen &= causal(n)
    top = np.where(seen, scores, -np.inf).max(1).reshape(-1, block).mean(1)
    qm = means(q, block)
    for x in range(n // block):
        first = x // group * group
        for y in range(first, min(first + group, n // block)):
            seen[x * block : (x + 1) * block] |= (qm[y] @ k.T / np.sqrt(d) + threshold >= top[y])[None]
    return seen & causal(n)


def sparge(q, k, share, similarity, block_q, block_k):
    n, d = q.shape
    k = k - k.mean(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    alike = lambda x, b: np.array([(unit(x)[i : i + b] @ unit(x)[i : i + b].T).mean() for i in range(0, n, b)])
    sim_q, sim_k = alike(q, block_q), alike(k, block_k)
    mask = np.zeros((n, n), bool)
    for x in range(n // block_q):
        columns = range(-(-(x + 1) * block_q // block_k))
        good = np.array([y for y in columns if sim_k[y] > similarity], int)
        kept = {y for y in columns if sim_k[y] <= similarity} | {x * block_q // block_k}
        if sim_q[x] <= similarity:
            kept = set(columns)
        elif len(good):
            mass = softmax(means(q, block_q)[x] @ means(k, block_k)[good].T / np.sqrt(d))
            kept |= {good[i] for i in cover(mass, share)}
        for y in kept | {y for y in columns if (y + 1) * block_k > x * block_q}:
            mask[x * block_q : (x + 1) * block_q, y * block_k : (y + 1) * block_k] = True
    return mask & causal(n)


def oracle_blocks(q, k, share, block):
    n = len(q)
    p = softmax(np.where(causal(n), q @ k.T / np.sqrt(q.shape[1]), -np.inf))
    mass = p.reshape(n // block, block, n // block, block).sum((1, 3))
    return blocks_to_tokens([cover(row, share) for row in mass], n, block)


def blasst(q, k, v, threshold, block):
    """(output, blocks of the history whose values count): blocks in natural order against the running maximum."""
    n, d = q.shape
    scores, used, out = np.where(causal(n), q @ k.T / np.sqrt(d), -np.inf), 0, np.empty_like(v)
    for x in range(n // block):
        rows, top, seen = slice(x * block, (x + 1) * block), np.full(block, -np.inf), np.zeros((block, n), bool)
        for y in range(x + 1):
            local = scores[rows, y * block : (y + 1) * block].max(1)
            if y == x or (local >= top + np.log(threshold)).any():
                seen[:, y * block : (y + 1) * block] = True
                used += y < x
                top = np.maximum(top, local)
        out[rows] = softmax(np.where(seen, scores[rows], -np.inf)) @ v
    return out, used
