"""ConEF as a communication hook of PyTorch's DistributedDataParallel, without the rest of HLAT.

```python
from hlat.reduce import ConEFState, conef_hook

state = ConEFState(model.module, ratio=0.1, size=0.2)
model.register_comm_hook(state, conef_hook)
```
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hlat.backend.groups import Group
from hlat.reduce.choice import Choice
from hlat.reduce.compressors import Exchange
from hlat.reduce.feedback import Memory, make_memory
from hlat.reduce.grid import ROW


class ConEFState:
    """What the hook remembers.

    Args:
        module: the module that DDP wraps; buckets are known by the names of its parameters.
        process_group: the replicas; the default group if None.
        ratio: share of each bucket's matrices that is sent.
        error, size, beta: the error store, as the options of the reducer `conef`.
        start_step: steps that are reduced densely first; at least 2, because DDP makes its buckets anew
            after the first.

    Vectors (parameters of one dimension) travel whole, in the same message. A step whose averaged gradient is
    not finite leaves every error as it was; a rank whose own gradient is not finite keeps its own.

    With gradient accumulation, call all but the last backward under `no_sync()`.
    """

    def __init__(
        self,
        module: nn.Module,
        process_group: dist.ProcessGroup | None = None,
        *,
        ratio: float = 0.1,
        error: str = "sketch",
        size: float = 0.2,
        beta: float | None = None,
        start_step: int = 10,
    ) -> None:
        if start_step < 2:
            raise ValueError("start_step must be at least 2: DDP makes its buckets anew after the first step")
        handle = process_group or dist.group.WORLD
        self.group = Group(dist.get_process_group_ranks(handle), dist.get_rank(), handle)
        self.choice, self.start_step = Choice(ratio=ratio, error=error, size=size, beta=beta), start_step
        self.choice.check(self.group.size)
        self.names = {id(p): (i, name) for i, (name, p) in enumerate(module.named_parameters())}
        self.step, self.wire_bytes = 0, 0
        self.count = torch.zeros((), dtype=torch.int64)
        self.memories: dict[str, Memory] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0

    def error_bytes(self) -> int:
        """Bytes of this rank's error."""
        return sum(memory.error_bytes() for memory in self.memories.values())

    def error_norm(self) -> Tensor:
        """Norm of this rank's error (of its sketch), fp32 ()."""
        squares = [memory.store.squared_norm() for memory in self.memories.values()]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """This rank's state; each rank saves its own."""
        errors = {key: memory.tensors() for key, memory in self.memories.items()}
        return {"step": self.step, "count": self.count, "errors": errors}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same rank in a group of the same size. An error whose bucket
        DDP no longer makes is dropped.
        """
        self.step, self.count = int(saved["step"]), saved["count"].clone()
        self._loaded, self.memories = dict(saved["errors"]), {}

    def memory(self, names: list[str], parameters: list[Tensor], device: torch.device) -> Memory:
        """The memory of the bucket that holds these matrices."""
        key = " ".join(names)
        if key not in self.memories:
            matrices, offset = [], 0
            for parameter in parameters:
                rows = parameter.shape[0]
                matrices.append((offset, rows, parameter.numel() // rows))
                offset += parameter.numel()
            length, makers = (
                -(-offset // ROW) * ROW,
                (self.choice.compressor_maker(), self.choice.store_maker()),
            )
            memory = make_memory(
                length, matrices, names[0], device, self.group.size, *makers, self.choice.ratio
            )
            for name, tensor in self._loaded.pop(key, {}).items():
                memory.tensors()[name].copy_(tensor)
            self.memories[key] = memory
            self.count = self.count.to(device)
        return self.memories[key]

    def sent(self, nbytes: int, last: bool) -> None:
        """Count a message; `last`: of the step."""
        self._bytes += nbytes
        if last:
            self.wire_bytes, self._bytes = self._bytes, 0
            if self.step >= self.start_step:
                self.count = self.count + 1  # feeds under way keep the old one
            self.step += 1


def conef_hook(state: ConEFState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduce one of DDP's buckets; the future holds the averaged gradients, laid out like the bucket."""
    buffer, size, last = bucket.buffer(), state.group.size, bucket.is_last()
    order = sorted(
        zip(bucket.parameters(), bucket.gradients(), strict=True), key=lambda x: state.names[id(x[0])]
    )
    matrices = [(p, g) for p, g in order if p.dim() > 1]
    if state.step < state.start_step or not matrices:
        message = buffer.div(size)
        state.sent(message.nbytes, last)
        return _all_reduce(message, state.group).then(lambda done: done.value()[0])
    names = [state.names[id(p)][1] for p, _ in matrices]
    memory = state.memory(names, [p for p, _ in matrices], buffer.device)
    flat = torch.zeros(memory.grid.length, device=buffer.device)
    for (at, n, m), (_, grad) in zip(memory.matrices, matrices, strict=True):
        torch.div(grad.reshape(-1), size, out=flat[at : at + n * m])
    feed = memory.feed(flat, state.count, torch.float32)
    exchange = memory.compressor.exchange(feed)
    ask = next(exchange)
    vectors = [grad.reshape(-1).float() / size for p, grad in order if p.dim() < 2]
    message = torch.cat([ask.tensor.reshape(-1), *vectors])
    state.sent(message.nbytes, last)
    future = _all_reduce(message, state.group)
    assert ask.sent is not None, "a compressor of one round knows what it sends"
    health = memory.store.stage(feed.grad, ask.sent)  # while the message is under way

    def finish(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        with torch.no_grad():
            total = done.value()[0]
            memory.store.commit((total.sum() + health).isfinite())
            block = total[: ask.tensor.numel()].view(ask.tensor.shape)
            reduced = memory.grid.flat(_result(exchange, block))
            return _laid_out(buffer, order, reduced, total[block.numel() :])

    return future.then(finish)


conef_hook.__annotations__ = {}  # DDP compares them with types; postponed ones are texts


def _all_reduce(message: Tensor, group: Group) -> torch.futures.Future[list[Tensor]]:
    work = dist.all_reduce(message, group=group.handle, async_op=True)
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future


def _result(exchange: Exchange, total: Tensor) -> Tensor:
    """What an exchange returns after its last round."""
    try:
        exchange.send(total)
    except StopIteration as done:
        parts: Tensor = done.value[0]
        return parts
    raise AssertionError("a compressor of one round asked for a second")


def _laid_out(
    buffer: Tensor, order: list[tuple[Tensor, Tensor]], matrices: Tensor, vectors: Tensor
) -> Tensor:
    """A tensor like DDP's bucket with the reduced matrices and vectors where their gradients are."""
    out, at = torch.zeros_like(buffer), [0, 0]
    for parameter, grad in order:
        source, kind, count = (
            (matrices, 0, grad.numel()) if parameter.dim() > 1 else (vectors, 1, grad.numel())
        )
        start = grad.storage_offset() - buffer.storage_offset()
        out[start : start + count].copy_(source[at[kind] : at[kind] + count])
        at[kind] += count
    return out
