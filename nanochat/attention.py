"""Causal attention within a window: torch's own kernel or, to train on a CPU, block by block of queries.

Shapes: B batch, H heads, K key/value heads, T time, D head dim. Of a block: R = B·K, G = H/K heads that share keys, n queries, c keys.
"""
import torch
import torch.nn.functional as F

BLOCKS = 8           # blocks of queries in a long sequence: more skip more of the keys that none of them sees
SMALLEST = 64        # queries in a block, for efficient products
SHORT = 512          # up to this length blocks are faster than torch's kernel without a window too (dev/LOG.md)
LARGEST = 512        # head dim whose highest score, scale · D = 36, is far from float32's limits when exp is taken of it


def window_mask(T: int, window: int, device):
    """(T, T) bool, True where query i may see key j: i - window < j <= i."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


def attention(q, k, v, scale: float, window: int | None, mask=None):
    """q: (B, H, T, D), k and v: (B, K, S, D) -> (B, T, H·D). |q|² and |k|² are D (QK norm).

    window: query i sees keys i - window < j <= i; None where keys come from a cache. mask: the same as a bool tensor, or what else
    queries see; None: all keys up to the query's own.
    """
    if window is not None and torch.is_grad_enabled() and q.device.type == "cpu" and by_blocks(q.size(2), window, q.size(3)):
        return BlockAttention.apply(q, k, v, scale, window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) == k.size(2), scale=scale,
                                       enable_gqa=k.size(1) < q.size(1))
    return y.transpose(1, 2).flatten(2)


def by_blocks(T: int, window: int, D: int) -> bool:
    """Whether to go block by block in training on a CPU: where torch's kernel computes much that is then hidden."""
    return (window < T or T <= SHORT) and D <= LARGEST


def block_size(T: int) -> int:
    return max(SMALLEST, -(-T // BLOCKS) // SMALLEST * SMALLEST)


def blocks(T: int, window: int):
    """(queries, keys), two slices, of each block; its keys begin where another block does."""
    n = block_size(T)
    for start in range(0, T, n):
        yield slice(start, min(T, start + n)), slice(max(0, start - window + 1) // n * n, min(T, start + n))


def hidden(queries: slice, keys: slice, window: int, G: int, like):
    """(G·n, c), to be added to scores: 0 where a query sees a key, -inf elsewhere."""
    n, c = queries.stop - queries.start, keys.stop - keys.start
    seen = window_mask(c, min(window, c), like.device)[-n:]  # counted from the first key: blocks of one shape are one code when compiled
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf).repeat(G, 1)


def part(x, queries: slice):
    """(R, G, T, …) -> (R, G·n, …), whole in memory: a product would copy a mere slice, each time."""
    return x[:, :, queries].flatten(1, 2).contiguous()


class BlockAttention(torch.autograd.Function):
    """The weights of one block at a time, once for the result and again for the gradients, so that memory grows with T and not T².

    exp(scores) needs no maximum taken off first: with QK norm no score exceeds scale · D.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, window):
        (B, H, T, D), K = q.shape, k.size(1)
        q, k, v = q.reshape(B * K, H // K, T, D), k.reshape(B * K, T, D), v.reshape(B * K, T, D)
        wide, ys, totals = torch.promote_types(q.dtype, torch.float32), [], []
        for queries, keys in blocks(T, window):
            p = torch.bmm(q[:, :, queries].flatten(1, 2), k[:, keys].transpose(1, 2)).to(wide).mul_(scale)   # (R, G·n, c)
            p = p.add_(hidden(queries, keys, window, H // K, p)).exp_()
            totals.append(p.sum(dim=-1, keepdim=True))
            ys.append((torch.bmm(p.to(v.dtype), v[:, keys]) / totals[-1].to(v.dtype)).view(B, H, -1, D))
        y = torch.cat(ys, dim=2).transpose(1, 2).flatten(2)
        ctx.save_for_backward(q, k, v, y, *totals)
        ctx.scale, ctx.window = scale, window
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, y, *totals = ctx.saved_tensors
        (R, G, T, D), shape = q.shape, (len(grad), -1, q.size(2), q.size(3))
        along = (grad.to(totals[0].dtype) * y).unflatten(2, (-1, D)).sum(-1).transpose(1, 2).reshape(R, G, T)
        grad = grad.unflatten(2, (-1, D)).transpose(1, 2).reshape(R, G, T, D)
        grads_q, grads_k, grads_v = [], {}, {}
        for (queries, keys), total in zip(blocks(T, ctx.window), totals):
            of_q, of_k, of_v = part(q, queries), k[:, keys].contiguous(), v[:, keys].contiguous()
            of_y, of_total = part(grad, queries) / total.to(grad.dtype), part(along, queries).unsqueeze(1) / total.transpose(1, 2)
            # all (R, c, G·n), so that of the products below but one takes them as they are
            p = torch.bmm(of_k, of_q.transpose(1, 2)).to(total.dtype).mul_(ctx.scale)
            p = p.add_(hidden(queries, keys, ctx.window, G, p).T).exp_()
            of_scores = torch.bmm(of_v, of_y.transpose(1, 2)).to(total.dtype).sub_(of_total).mul_(p).mul_(ctx.scale).to(q.dtype)
            grads_q.append(torch.bmm(of_scores.transpose(1, 2), of_k).view(R, G, -1, D))
            add_by_block(grads_k, keys.start, torch.bmm(of_scores, of_q), block_size(T))
            add_by_block(grads_v, keys.start, torch.bmm(p.to(v.dtype), of_y), block_size(T))
        grad_q, grad_k, grad_v = torch.cat(grads_q, dim=2), *(torch.cat(list(sums.values()), dim=1).to(k.dtype) for sums in (grads_k, grads_v))
        return grad_q.view(shape), grad_k.view(shape), grad_v.view(shape), None, None


def add_by_block(sums: dict, start: int, value, n: int):
    """Add value, (R, c, D), to the sums of the blocks of n keys from `start` on, in float32 or wider."""
    for i, part in enumerate(value.split(n, dim=1)):
        sums[start + i * n] = sums[start + i * n] + part if start + i * n in sums else part.to(torch.promote_types(part.dtype, torch.float32))
