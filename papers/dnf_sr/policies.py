"""The two policies of stage 2 (Algorithm 1): adapters on one frozen transformer, and stage 1's policy in reserve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.adapters import add_lora, load_adapter_state, set_adapter
from common.denoisers.flux import FLUX_TARGETS
from common.parameters import Row

OLD, THETA = "old", "theta"


class Policies:
    """`theta`, which is trained, and `old`, which makes the restorations and follows theta. Both start as `reference`.

    `theta` is active, except within `use` and `stage_one`. `old` is held in buffers, which no optimiser, clipping or
    gradient bucket takes up.

    Args:
        transformer: The frozen base, which gets both adapters.
        rank: Rank of the adapters.
        alpha: Their alpha.
        seed: Seed of their weights, where there is no reference.
        reference: Stage 1's policy, v_ref, as `load_adapter_state` takes it; empty where it is not there.

    Attributes:
        active: Name of the active policy.
        reference: v_ref; empty where it is not there.
    """

    def __init__(
        self, transformer: nn.Module, rank: int, alpha: float, seed: int, reference: dict[str, Tensor]
    ) -> None:
        for name in (OLD, THETA):
            add_lora(transformer, rank, alpha, FLUX_TARGETS, name, seed=seed)
            if reference:
                load_adapter_state(transformer, reference, name)
        _make_buffers(transformer, OLD)
        set_adapter(transformer, THETA)
        self._transformer, self.active, self.reference = transformer, THETA, reference

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """A context in which the transformer is the policy of that name; outside it is theta.

        A backward pass belongs outside: gradient checkpointing recomputes with the adapter that is active then.
        """
        before = self.active
        set_adapter(self._transformer, name)  # leaves requires_grad alone, which peft's own would not
        self.active = name
        try:
            yield
        finally:
            set_adapter(self._transformer, before)
            self.active = before

    def check_backward(self) -> None:
        """Refuse a backward pass under another policy than theta.

        Raises:
            RuntimeError: Another one is active.
        """
        if self.active != THETA:
            raise RuntimeError(
                f"the policy {self.active!r} is active; leave its context before a backward pass, which needs theta"
            )

    @contextmanager
    def stage_one(self) -> Iterator[None]:
        """A context in which the transformer is v_ref, stage 1's policy: its weights and `old`'s change places."""
        self._exchange_reference()
        try:
            with self.use(OLD):
                yield
        finally:
            self._exchange_reference()

    def _exchange_reference(self) -> None:
        """Swap the storages of `old` and v_ref; nothing is copied once v_ref is on the device."""
        for key, old in self._transformer.named_buffers():
            if is_of(key, OLD):
                name = key.replace(f".{OLD}.", ".")
                reference = self.reference[name].to(old)
                self.reference[name], old.data = old.data, reference

    def old(self) -> list[Tensor]:
        """Weights of the old policy, in the order of theta's."""
        return [weight for key, weight in self._transformer.named_buffers() if is_of(key, OLD)]

    def parameter_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of `isr parameters` with the adapter's as theta's, and `old` after it."""
        found: list[Row] = []
        for row in rows:
            if row.name.startswith("transformer LoRA"):
                theta = replace(row, name=row.name.replace("LoRA", f"LoRA {THETA}"))
                total = sum(weight.numel() for weight in self.old())
                old = replace(theta, name=theta.name.replace(THETA, OLD), kind="copy", total=total, trainable=0)
                found += [theta, old]
            else:
                found.append(row)
        return found

    @torch.no_grad()
    def follow(self, theta: Sequence[Tensor], eta: float) -> None:
        """Line 24: old <- eta old + (1 - eta) theta."""
        for old, new in zip(self.old(), theta, strict=True):
            old.copy_(new if eta == 0 else eta * old + (1 - eta) * new)


def is_of(key: str, adapter: str) -> bool:
    """True if a dotted name is that of an adapter's weight."""
    return f".lora_A.{adapter}." in key or f".lora_B.{adapter}." in key


def _make_buffers(module: nn.Module, name: str) -> None:
    """Turn an adapter's weights into buffers."""
    for key, _ in [(key, p) for key, p in module.named_parameters() if is_of(key, name)]:
        place, _, leaf = key.rpartition(".")
        layer = module.get_submodule(place)
        weight = getattr(layer, leaf).detach()
        delattr(layer, leaf)
        layer.register_buffer(leaf, weight)
