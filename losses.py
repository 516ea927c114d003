"""Losses: sums over supervised positions, never means; the caller divides by the count that is right for it.

None of them holds the (tokens, vocabulary) logits, the largest tensor of a small model's training.
"""

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a position that is not supervised


def next_token_loss(model, batch):
    """Returns (summed cross-entropy in nats, {}) of batch["labels"] (B, T), already shifted, -100 = none.

    Where few positions are supervised, batch["where"] (N,) are their places in the flattened rows, and the
    labels are theirs, (N,): the head, the most expensive part of a small model, then works on nothing else.
    """
    hidden, labels = supervised_hidden(model, batch), batch["labels"].flatten()
    return linear_cross_entropy(hidden, model.lm_head.weight, labels), {}


def supervised_hidden(model, batch):
    """Returns the hidden states (N, C) that the labels of a batch belong to (see next_token_loss)."""
    hidden = model.model(batch["ids"], batch.get("positions"), batch.get("documents")).flatten(0, 1)
    return hidden.index_select(0, batch["where"]) if "where" in batch else hidden


def linear_cross_entropy(x, weight, labels):
    """Returns the sum over labels != -100 of -log softmax(x @ weight.T)[label], without the (N, V) logits.

    x (N, C), weight (V, C), labels (N,). Logits are made a few rows at a time and turned, in their own
    buffer, into their gradient, so the backward pass has nothing left to do but scale (the idea of Liger
    kernel's fused linear cross-entropy, 2024). Exact up to the order of sums.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return LinearCrossEntropy.apply(x, weight, labels)
    return token_nats(x, weight, labels).sum()


def token_nats(x, weight, labels):
    """Returns -log p of each label, (N,) float32 nats, 0 where it is -100. Shapes as linear_cross_entropy."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return TokenNats.apply(x, weight, labels)
    weight = weight.to(x.dtype)
    return torch.cat([nats(rows @ weight.T, to) for rows, to in row_groups(x, labels, len(weight))])


def row_groups(x, labels, vocab_size):
    rows = group_rows(vocab_size, x.device.type)
    return zip(x.split(rows), labels.split(rows), strict=True)


def group_rows(vocab_size, device):
    """Returns how many rows' logits stand at once: 2^25 numbers (CPU: caches) or 2^27 (GPU: launches)."""
    return max(1, (1 << (25 if device == "cpu" else 27)) // vocab_size)


def nats(logits, labels):
    """Returns -log softmax(logits (N, V))[label] for labels (N,), float32, 0 where the label is -100."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def nats_and_gradient(logits, labels):
    """As `nats`, and overwrites `logits` with the gradient of their sum: softmax - onehot, 0 where -100."""
    if logits.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _nats_and_gradient_in_place(logits, labels)
    supervised = labels != IGNORE
    target = labels.clamp(min=0)
    top = logits.float()
    log_total = torch.logsumexp(top, dim=-1)
    loss = torch.where(supervised, log_total - top.gather(1, target[:, None])[:, 0], 0.0)
    hit = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    gradient = torch.where(
        supervised[:, None], torch.exp(top - log_total[:, None]) - hit.float(), 0.0
    )
    logits.copy_(gradient)
    return loss


def _nats_and_gradient_in_place(logits, labels):
    """The same for float32 where no compiler fuses: a few passes over the logits instead of a dozen.

    The softmax takes their place; its largest entry, which never underflows, gives the logsumexp.
    """
    target = labels.clamp(min=0)[:, None]
    at_target, top = logits.gather(1, target), logits.amax(dim=-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    log_total = top - logits.amax(dim=-1, keepdim=True).log()
    logits.scatter_add_(1, target, logits.new_full(target.shape, -1.0))
    logits.index_fill_(0, (labels == IGNORE).nonzero()[:, 0], 0.0)
    return torch.where(labels != IGNORE, (log_total - at_target)[:, 0], 0.0)


class LinearCrossEntropy(torch.autograd.Function):
    kernel = staticmethod(
        nats_and_gradient
    )  # world.py puts the compiled one here where it compiles

    @staticmethod
    def forward(ctx, x, weight, labels):
        low = weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight) if weight.requires_grad else None
        groups = row_groups(x, labels, len(weight))
        buffer, start = None, 0
        for rows, to in groups:
            if buffer is None or len(buffer) != len(
                rows
            ):  # one for all groups: fresh ones cost page faults
                buffer = torch.empty(len(rows), len(weight), dtype=x.dtype, device=x.device)
            torch.mm(rows, low.T, out=buffer)
            total += LinearCrossEntropy.kernel(buffer, to).sum()
            torch.mm(buffer, low, out=dx[start : start + len(rows)])
            if dweight is not None and dweight.dtype == x.dtype:
                dweight.addmm_(buffer.T, rows)
            elif dweight is not None:
                dweight += buffer.T @ rows
            start += len(rows)
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        dx, dweight = ctx.saved_tensors
        return dx * upstream, None if dweight is None else dweight * upstream, None


class TokenNats(torch.autograd.Function):
    """As LinearCrossEntropy, but a loss for each row, which later sums may weigh as they like (dpo.py)."""

    @staticmethod
    def forward(ctx, x, weight, labels):
        low, loss, dx = weight.to(x.dtype), [], []
        for rows, to in row_groups(x, labels, len(weight)):
            logits = rows @ low.T
            loss.append(LinearCrossEntropy.kernel(logits, to))
            dx.append(logits @ low)
        ctx.save_for_backward(x, weight, labels, torch.cat(dx))
        return torch.cat(loss)

    @staticmethod
    def backward(ctx, upstream):
        x, weight, labels, dx = ctx.saved_tensors
        dweight, share = None, upstream[:, None].to(x.dtype)
        if ctx.needs_input_grad[
            1
        ]:  # not of a frozen head: the logits are made once more, rather than kept
            low, dweight, start = weight.to(x.dtype), torch.zeros_like(weight), 0
            for rows, to in row_groups(x, labels, len(weight)):
                logits = rows @ low.T
                LinearCrossEntropy.kernel(logits, to)
                dweight += (logits * share[start : start + len(rows)]).T @ rows
                start += len(rows)
        return dx * share, dweight, None
