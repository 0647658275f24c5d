"""Where adapters touch the blocks: modules whose forward pass looks whether somebody in the batch has an adapter there.

A module is a site for as long as some adapter of this server changes it; all others run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .base import is_linear
from .forms import Bottleneck, LinearForm, LowRank, NormForm, Sparse
from .groups import Group, Members, Product, SparseProducts, TwoProducts, Vectors, add_rows, rank_bucket
from .operators import Order, SideStreams, in_order
from .tokens import TokenMap

SiteForm = TypeVar("SiteForm", LinearForm, Bottleneck, NormForm)


#: Plans that a site keeps: batches of decoding rows with and without a prompt beside them take turns.
MAX_PLANS = 16


class ActiveBatch:
    """What the sites know of the batch that runs; `tokens` is None while none of its rows has an adapter."""

    tokens: TokenMap | None = None
    order: Order = "form"
    streams: SideStreams | None = None


class Site(Generic[SiteForm]):
    """A module with adapters: its forward pass is replaced until `restore`."""

    def __init__(self, module: nn.Module, active: ActiveBatch):
        self._active = active
        self._module = module
        self._forms: dict[Hashable, SiteForm] = {}
        self._groups: dict[Hashable, Group[Any]] = {}
        #: by who is present; void when the members of a pool change
        self._plans: dict[frozenset[Hashable], Plan | None] = {}
        outer = _site_around(module)
        if isinstance(outer, BottleneckSite):  # which reads what this one makes of the module's output
            self._plain: Callable[..., Any] = outer._plain
            outer._plain = self._forward
        else:
            self._plain = module.forward
            module.forward = self._forward  # found before the class's own

    def restore(self) -> None:
        """The module, and another site around it, are as if this one had not been."""
        outer = _site_around(self._module)
        assert outer is not None
        if outer is not self:
            outer._plain = self._plain
            return
        del self._module.forward
        if isinstance(getattr(self._plain, "__self__", None), Site):
            self._module.forward = self._plain

    @property
    def nbytes(self) -> int:
        """Bytes of the pools."""
        return sum(group.nbytes for group in self._groups.values())

    def add(self, adapter: Hashable, form: SiteForm) -> None:
        self._forms[adapter] = form
        self._plans.clear()

    def plan_anew(self) -> None:
        """The order of operations changed."""
        self._plans.clear()

    def forget(self, adapter: Hashable) -> bool:
        """True if nobody is left."""
        self._forms.pop(adapter, None)
        self._groups = {key: group for key, group in self._groups.items() if not group.forget(adapter)}
        self._plans.clear()
        return not self._forms

    def _forward(self, *arguments: Any, **options: Any) -> Any:
        tokens = self._active.tokens
        if tokens is None:
            return self._plain(*arguments, **options)
        try:
            plan = self._plans[tokens.present]
        except KeyError:
            plan = self._plan(tokens.present)
        if plan is None:
            return self._plain(*arguments, **options)
        return self._adapted(tokens, plan, *arguments, **options)

    def _plan(self, present: frozenset[Hashable]) -> Plan | None:
        here = [adapter for adapter in present if adapter in self._forms]
        before, plan = self._num_changes, None
        try:
            if here:
                with torch.inference_mode(False):
                    plan = self._make_plan({adapter: self._forms[adapter] for adapter in here})
        finally:  # one that fails half made has taken slots from those of others, too
            if self._num_changes != before or len(self._plans) >= MAX_PLANS:
                self._plans.clear()
        self._plans[present] = plan
        return plan

    @property
    def _num_changes(self) -> int:
        return sum(group.num_changes for group in self._groups.values())

    def _make_plan(self, forms: Mapping[Hashable, SiteForm]) -> Plan:
        """The operations for these adapters, which are those present."""
        raise NotImplementedError

    def _adapted(self, tokens: TokenMap, plan: Plan, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError

    def _group(self, key: Hashable, forms: Mapping[Hashable, Any], make: Callable[[], Group[Any]]) -> Operation:
        if key not in self._groups:
            self._groups[key] = make()
        return Operation(self._groups[key], self._groups[key].members(forms))

    def _products(self, forms: Mapping[Hashable, LowRank | Bottleneck | Sparse]) -> list[Operation]:
        """One for each form and size, in the order in which forms first appear."""
        by_size: dict[Hashable, dict[Hashable, Any]] = {}
        for adapter, form in forms.items():
            by_size.setdefault(_size_of(form), {})[adapter] = form
        return [
            self._group(size, own, partial(_products_like, next(iter(own.values())))) for size, own in by_size.items()
        ]

    def _vectors(
        self, name: str, forms: Mapping[Hashable, Any], neutral: Callable[[], torch.Tensor]
    ) -> Operation | None:
        own = {adapter: vector for adapter, form in forms.items() if (vector := getattr(form, name)) is not None}
        return self._group(name, own, lambda: Vectors(neutral())) if own else None


def _site_around(module: nn.Module) -> Site[Any] | None:
    """The outermost one."""
    site = getattr(vars(module).get("forward"), "__self__", None)
    return site if isinstance(site, Site) else None


class Operation(NamedTuple):
    """One operation for all members of a group that are in the batch."""

    group: Any
    members: Members


class Plan(NamedTuple):
    """What a site does for those present. vectors: by the name of their field in the form."""

    products: list[Operation]
    vectors: dict[str, Operation]

    def vector(self, name: str, tokens: TokenMap) -> torch.Tensor | None:
        """[tokens, size], or [size] where all tokens have the same; None where nobody has one."""
        if (operation := self.vectors.get(name)) is None:
            return None
        found: torch.Tensor = operation.group.of_tokens(tokens, operation.members)
        return found

    def add_products(self, output: torch.Tensor, input: torch.Tensor, tokens: TokenMap) -> torch.Tensor:
        for group, members in self.products:
            output = group.add_to(output, input, tokens, members)
        return output

    def products_beside(self, input: torch.Tensor, tokens: TokenMap, streams: SideStreams) -> list[Product]:
        """The same products, each operation's on a stream of its own; to be joined before they are used."""
        found: list[Product] = []
        for number, (group, members) in enumerate(self.products):
            found += streams.run(number, input, partial(group.products, input, tokens, members))
        return found


def _size_of(form: LowRank | Bottleneck | Sparse) -> Hashable:
    """Forms with equal ones share a pool."""
    if isinstance(form, Sparse):
        return "sparse"
    return getattr(form, "activation", None), rank_bucket(len(form.down))


def _products_like(example: LowRank | Bottleneck | Sparse) -> Group[Any]:
    return SparseProducts(example) if isinstance(example, Sparse) else TwoProducts(example)


class LinearSite(Site[LinearForm]):
    """`y = scale_out * [W (scale_in * x) + b + B A x + S x] + bias_out`"""

    def _make_plan(self, forms: Mapping[Hashable, LinearForm]) -> Plan:
        products = []
        for name in ("low_rank", "sparse"):
            products += self._products(
                {a: own for a, form in forms.items() if (own := getattr(form, name)) is not None}
            )
        vectors = {
            name: operation
            for name, neutral in (("scale_in", 1.0), ("scale_out", 1.0), ("bias_out", 0.0))
            if (operation := self._vectors(name, forms, partial(_full_like, forms, name, neutral))) is not None
        }
        return Plan(in_order(products, self._active.order, lambda operation: operation.group.work), vectors)

    def _adapted(self, tokens: TokenMap, plan: Plan, *arguments: Any, **options: Any) -> torch.Tensor:
        (input,) = arguments
        rows = _rows_of(input, tokens)
        scale_in = plan.vector("scale_in", tokens)
        streams = None if torch.is_grad_enabled() else self._active.streams
        beside = None if streams is None else plan.products_beside(rows, tokens, streams)
        output: torch.Tensor = self._plain(input if scale_in is None else (rows * scale_in).view(input.shape))
        flat = output.reshape(len(rows), -1)
        if streams is None or beside is None:
            flat = plan.add_products(flat, rows, tokens)
        else:
            streams.join(product for _, product in beside)
            for where, product in beside:
                flat = add_rows(flat, where, product)
        fixed = torch.is_grad_enabled()
        if (scale_out := plan.vector("scale_out", tokens)) is not None:
            flat = flat * scale_out if fixed else flat.mul_(scale_out)
        if (bias_out := plan.vector("bias_out", tokens)) is not None:
            flat = flat + bias_out if fixed else flat.add_(bias_out)
        return flat.view(*input.shape[:-1], -1)


def _full_like(forms: Mapping[Hashable, LinearForm], name: str, value: float) -> torch.Tensor:
    example = next(own for form in forms.values() if (own := getattr(form, name)) is not None)
    return torch.full_like(example, value)


class BottleneckSite(Site[Bottleneck]):
    """`h + up(activation(down h))` behind a module whose output is `h`, alone or first in a tuple."""

    def _make_plan(self, forms: Mapping[Hashable, Bottleneck]) -> Plan:
        return Plan(self._products(forms), {})

    def _adapted(self, tokens: TokenMap, plan: Plan, *arguments: Any, **options: Any) -> Any:
        output = self._plain(*arguments, **options)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        rows = _rows_of(hidden, tokens)
        # Into a copy: what the module returned may be in use elsewhere, and every bottleneck reads just that.
        changed = plan.add_products(rows.clone(), rows, tokens).view(hidden.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class NormSite(Site[NormForm]):
    """A norm with parameters for each token."""

    def _make_plan(self, forms: Mapping[Hashable, NormForm]) -> Plan:
        vectors = {
            name: operation
            for name in ("weight", "bias")
            if (operation := self._vectors(name, forms, partial(getattr, self._module, name))) is not None
        }
        return Plan([], vectors)

    def _adapted(self, tokens: TokenMap, plan: Plan, *arguments: Any, **options: Any) -> torch.Tensor:
        (input,) = arguments
        own: dict[str, torch.Tensor] = {}
        for name in plan.vectors:
            vectors = plan.vector(name, tokens)
            assert vectors is not None
            if vectors.dim() > 1:  # [tokens, size], against [1, tokens, size], and with heads before or behind them
                axis = _axis_of_tokens(input, tokens)
                vectors = vectors.view(-1, *[1] * (input.dim() - 2 - axis), vectors.shape[1])
            own[name] = vectors
        norm = self._module
        if not isinstance(norm, nn.LayerNorm):
            # RMS norms multiply by their weight, whatever they do to it first, so one weight per token fits.
            return _call_with(norm, self._plain, own, input)
        output = F.layer_norm(input, norm.normalized_shape, None, None, norm.eps)
        output = output * own.get("weight", norm.weight)
        bias = own.get("bias", norm.bias)
        return output if bias is None else output + bias


def _call_with(
    module: nn.Module, plain: Callable[..., torch.Tensor], own: Mapping[str, torch.Tensor], input: torch.Tensor
) -> torch.Tensor:
    """The module's output with other parameters for this one call; for one thread."""
    saved = {name: module._parameters[name] for name in own}
    try:
        for name, value in own.items():
            module._parameters[name] = value  # type: ignore[assignment]
        return plain(input)
    finally:
        module._parameters.update(saved)


def _axis_of_tokens(input: torch.Tensor, tokens: TokenMap) -> int:
    """input: [1, tokens, size], or what stands so in memory: [1, tokens, heads, size] or [1, heads, tokens, size]."""
    axis = max(range(input.dim() - 1), key=lambda axis: (input.shape[axis] > 1, input.stride(axis)))
    if input.shape[axis] != tokens.num_tokens:
        raise RuntimeError(f"a norm with adapters sees {list(input.shape)}, not {tokens.num_tokens} tokens")
    return axis


def _rows_of(hidden: torch.Tensor, tokens: TokenMap) -> torch.Tensor:
    """[tokens, features]. Raises RuntimeError where a module does not see all tokens of the batch, in their order."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(rows) != tokens.num_tokens:
        raise RuntimeError(f"a module with adapters sees {len(rows)} of {tokens.num_tokens} tokens")
    return rows


def site_of(module: nn.Module, form: LinearForm | Bottleneck | NormForm, active: ActiveBatch) -> Site[Any]:
    if isinstance(form, Bottleneck):
        return BottleneckSite(module, active)
    return LinearSite(module, active) if is_linear(module) else NormSite(module, active)
