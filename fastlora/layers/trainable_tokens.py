"""`TrainableTokensWrapper`: trains some rows of an embedding, separately for each adapter.

If token t is at index i of an adapter's indices, an embedding returns ``delta[i]`` for t, and
``weight[t]`` for every other token. A head that is tied to the embedding multiplies by ``delta[i]``
in column t. Neither copies the weight ``[V, D]``. Rows and columns are replaced in the result.

Method: PEFT 0.21.2, ``tuners/trainable_tokens/layer.py``, which replaces rows in a copy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.layers.module_wrapper import ModuleWrapper, adapter_index_of_rows
from fastlora.ops.execution_mode import execution_mode_of
from fastlora.routing.active import active_routing
from fastlora.routing.routing import Routing
from fastlora.sharding import is_dtensor
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError


def check_token_rows_trainable(module: nn.Module, indices: list[int]) -> None:
    """Check that the given token rows of an embedding or linear layer can be trained.

    Each token has a row in the layer's weight.

    Args:
        module: The base layer, which must be an embedding or a linear layer.
        indices: Indices of the rows.

    Raises:
        UnsupportedLayerError: The module is not an embedding or linear layer with a plain weight.
        AdapterStateError: The weight is sharded.
        ConfigError: An index is out of range.
    """
    weight = module._parameters.get("weight")
    if is_dtensor(weight):
        raise AdapterStateError(
            "trainable_token_indices: the weight is sharded (a DTensor), but the new rows would "
            "not be; add adapters before you call fully_shard()"
        )
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2
    if not isinstance(module, (nn.Embedding, nn.Linear)) or not plain:
        raise UnsupportedLayerError(
            "trainable_token_indices needs an nn.Embedding or nn.Linear with a floating-point "
            f"weight, got {type(module).__name__}"
        )
    beyond = [index for index in indices if index >= module.weight.shape[0]]
    if beyond:
        raise ConfigError(
            f"trainable_token_indices contains {beyond[0]}, but the module has only "
            f"{module.weight.shape[0]} rows"
        )


class TrainableTokensLayer(nn.Module):
    """Layer with trainable embedding rows for selected tokens.

    The layer stores the rows of each adapter, and `TrainableTokensWrapper` uses these rows in its
    forward pass. The base layer may also be a linear layer, such as an output head. The class and
    attribute names follow PEFT.

    Attributes:
        base_layer: An embedding, or a linear layer, which may be tied to an embedding.
        trainable_tokens_delta: Maps an adapter name to its rows, ``[n, D]``.
        token_indices: Maps an adapter name to the indices of the weight's rows that they replace.
        tied_adapter: The owner of the rows if the weight is tied to another module's weight, or
            None.
        active_adapters: Names of the active adapters, as in the wrapper.
        together: All `TrainableTokensLayer` objects that share these rows.
        before: Maps a merged adapter to the weight rows' values before its merge, ``[n, D]``.
        tables: Cached lookup keys of trainable tokens and the row index of each key. The entries
            are keyed by adapter names, the number of weight rows, and the device.
    """

    owned: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta",)
    base_layer: nn.Embedding | nn.Linear
    trainable_tokens_delta: nn.ParameterDict
    token_indices: dict[str, list[int]]
    # A plain list, so that its items are not submodules.
    together: list[TrainableTokensLayer]
    tables: dict[object, tuple[torch.Tensor, torch.Tensor]]

    def __init__(
        self, base_layer: nn.Embedding | nn.Linear, tied_adapter: TrainableTokensLayer | None
    ) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        # The tuple keeps it from becoming a submodule, so that each parameter has a single name.
        self._tied = () if tied_adapter is None else (tied_adapter,)
        self.active_adapters: list[str] = []
        if tied_adapter is None:
            self.trainable_tokens_delta, self.token_indices = nn.ParameterDict(), {}
            self.together, self.tables = [], {}
        else:
            for name in ("trainable_tokens_delta", "token_indices", "together", "tables"):
                setattr(self, name, getattr(tied_adapter, name))
        self.before: dict[str, torch.Tensor] = {}
        self.together.append(self)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters.

        The attribute's name is PEFT's.
        """
        return list(self.active_adapters)

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The `TrainableTokensLayer` that this object is tied to.

        That object owns the rows. If the property is None, this object owns them.
        """
        return self._tied[0] if self._tied else None

    def get_base_layer(self) -> nn.Embedding | nn.Linear:
        """Return the original embedding or linear layer."""
        return self.base_layer


class TrainableTokensWrapper(ModuleWrapper):
    """Module wrapper that gives each adapter trainable weight rows for selected tokens.

    The wrapped module is an embedding or a tied head.

    Args:
        original: An `nn.Embedding` or `nn.Linear` that `check_token_rows_trainable` accepts.
        tied_to: The wrapper of the embedding that this module shares its weight and rows with.
    """

    field: ClassVar[str] = "trainable_token_indices"
    owns: ClassVar[str] = "rows"
    held: ClassVar[str] = "token_adapter"
    token_adapter: TrainableTokensLayer

    def __init__(self, original: nn.Module, tied_to: TrainableTokensWrapper | None = None) -> None:
        super().__init__(original)
        base_layer: Any = original
        self.token_adapter = TrainableTokensLayer(
            base_layer, None if tied_to is None else tied_to.token_adapter
        )
        original.requires_grad_(False)

    @torch.no_grad()
    def add_adapter(self, adapter_name: str, indices: list[int], autocast: bool = True) -> None:
        """Add an adapter that trains the weight rows at the given token indices.

        The rows are initialized from the module's weight as it was before any merge. Nothing is
        added if the module is tied to another module, because that module owns the rows.

        Args:
            adapter_name: A new name.
            indices: Indices of the rows, without duplicates.
            autocast: Whether to store rows of a 16-bit weight in fp32.
        """
        if self.token_adapter.tied_adapter is not None:
            return  # The owner has them.
        weight: Any = self._unmerged_rows(indices)
        wide = autocast and weight.itemsize < torch.float32.itemsize
        rows = nn.Parameter(weight.to(torch.float32 if wide else weight.dtype), requires_grad=False)
        self._trained_modules_or_rows_by_adapter[adapter_name] = rows
        self.token_adapter.token_indices[adapter_name] = list(indices)
        self.token_adapter.tables.clear()

    def _unmerged_rows(self, indices: list[int]) -> torch.Tensor:
        """Return the given weight rows as they were before any merge.

        The result is a copy of the rows, ``[n, D]``.
        """
        weight: Any = self.get_base_layer().weight
        rows = weight.detach()[torch.tensor(indices, device=weight.device)].clone()
        for name, before in reversed(self._rows_before_merge_by_adapter().items()):
            merged = {token: i for i, token in enumerate(self.token_indices[name])}
            for i, token in enumerate(indices):
                if token in merged:
                    rows[i] = before[merged[token]]
        return rows

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Dict that maps each adapter name to the adapter's token indices.

        They are the indices of the weight rows that the adapter trains.
        """
        return self.token_adapter.token_indices

    @property
    def _trained_modules_or_rows_by_adapter(self) -> nn.ParameterDict:
        """The trained modules or rows, keyed by adapter name.

        In this class, each value contains an adapter's trained copies of rows of the weight.
        """
        return self.token_adapter.trainable_tokens_delta

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return the names of an adapter's tensors in the adapter file.

        The result is a dict that maps each name in the adapter file to the name of the same tensor
        in the state dict of this wrapper. The only entry is for the adapter's rows. The dict is
        empty if another module owns the rows, or if this wrapper does not have the adapter.
        """
        if self.is_tied or adapter_name not in self.token_indices:
            return {}
        key = "token_adapter.trainable_tokens_delta"
        return {key: f"{key}.{adapter_name}"}

    @property
    def original_module(self) -> nn.Embedding | nn.Linear:
        """The original embedding or linear layer that this object wraps.

        The property's name is PEFT's.
        """
        return self.token_adapter.base_layer

    @property
    def is_tied(self) -> bool:
        """Whether the module is tied to another module with trainable tokens.

        The other module then owns the rows.
        """
        return self.token_adapter.tied_adapter is not None

    def _activate(
        self, names: list[str], inference_mode: bool = False, keep_merged: bool = False
    ) -> None:
        super()._activate(names, inference_mode, keep_merged)
        self._activate_without_making_trainable(names)

    def _activate_without_making_trainable(self, names: list[str]) -> None:
        """Activate the named adapters without making their rows trainable.

        No parameter's ``requires_grad`` is changed.
        """
        self._active_adapters = list(names)
        self.token_adapter.active_adapters = list(names)

    def _remove_trained_copy(self, adapter_name: str) -> None:
        if not self.is_tied:
            super()._remove_trained_copy(adapter_name)
            del self.token_indices[adapter_name]
        self.token_adapter.tables.clear()

    def get_base_layer(self) -> nn.Module:
        """Return the base layer.

        The base layer is the original embedding or linear layer that this object wraps.
        """
        return self.token_adapter.base_layer

    # ------------------------------------------------------------------------------- forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the base layer with trained weight rows in place of its own.

        The base layer is called first. The embeddings or logits of trainable tokens are then
        replaced.

        Args:
            x: Ids ``[...]`` for an embedding, or ``[..., D]`` for a linear layer.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.

        Returns:
            ``[..., D]`` from an embedding, ``[..., V]`` from a linear layer.
        """
        base, routing = self.get_base_layer(), active_routing(self)
        y: torch.Tensor = base(x, *args, **kwargs)
        if self._disabled:
            return y
        if routing is None:
            name = None if self.merged else self.acting()
            if name is None:
                return y
            return (
                self._replace_embeddings(x, y, [name])
                if _embeds(base)
                else self._replace_columns(x, y, name)
            )
        if routing.whole is not None and execution_mode_of(x, "eager").compiling:
            return self._replace_rows_in_mixed_batch(routing.whole, x, y)
        with self._check_rows_and_pause_tracking(routing, x):
            return self._replace_rows_in_mixed_batch(routing, x, y)

    def _replace_rows_in_mixed_batch(
        self, routing: Routing, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Replace the embeddings or logits of trainable tokens in a mixed batch.

        In the returned tensor, each row's embeddings or logits of trainable tokens are those of the
        row's adapter. Rows without an adapter on this module keep the base layer's output y.
        """
        known = [name for name in routing.names if name in self.token_indices]
        # Every adapter that trains must get a gradient if other processes wait for it.
        every = routing.unused_gradients and torch.is_grad_enabled()
        known = self.adapter_names if every else known
        if not known:
            return y
        embeds = _embeds(self.get_base_layer())
        count = x.numel() if embeds else x.numel() // x.shape[-1]
        own = adapter_index_of_rows(routing.ids, routing.names, known, count, x.device)
        if embeds:
            return self._replace_embeddings(x, y, known, own.view(x.shape))
        flat, y_flat = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        for slot, name in enumerate(known):
            index = (own == slot).nonzero().flatten()
            rows = self._replace_columns(flat[index], y_flat[index], name)
            y_flat = y_flat.index_copy(0, index, rows)
        return y_flat.view(y.shape)

    def _replace_embeddings(
        self, ids: torch.Tensor, y: torch.Tensor, names: list[str], own: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y with the embeddings of trainable tokens replaced by trained rows.

        The shape of y is ``[..., D]``. ``own``, with the shape of ``ids``, is the index of each
        id's adapter in ``names``, or -1.
        """
        base: Any = self.get_base_layer()
        ids, (keys, places) = ids.long(), self._token_lookup_keys_and_row_indices(names, ids.device)
        wanted = ids if own is None else torch.where(own < 0, -1, own * base.weight.shape[0] + ids)
        at = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
        hit = keys[at] == wanted
        deltas = [self._trained_modules_or_rows_by_adapter[name] for name in names]
        rows = (deltas[0] if len(deltas) == 1 else torch.cat(deltas)).to(base.weight.dtype)
        found = places[at]
        # Ids without an adapter's row share one extra row, so that they are not counted.
        if base.scale_grad_by_freq:
            found = torch.where(hit, found, rows.shape[0])
            rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
        if base.max_norm is not None:
            rows = rows.clone()  # F.embedding scales it in place.
        new = F.embedding(found, rows, None, base.max_norm, base.norm_type, base.scale_grad_by_freq)
        if base.padding_idx is not None:  # The padding row has no gradient.
            new = torch.where((ids == base.padding_idx).unsqueeze(-1), new.detach(), new)
        scale: Any = getattr(base, "embed_scale", None)  # Embeddings of Gemma and BART have it.
        if scale is not None:
            new = new * (scale.to(new.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where(hit.unsqueeze(-1), new.to(y.dtype), y)

    def _token_lookup_keys_and_row_indices(
        self, names: list[str], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the lookup keys of the adapters' trainable tokens and the row index of each key.

        The keys are sorted and int64. The key of a token is ``index of name * V + token``.
        """
        base: Any = self.get_base_layer()
        rows: int = base.weight.shape[0]
        key = (*names, rows, device)
        tables = self.token_adapter.tables
        if key not in tables:
            found = [
                place * rows + token
                for place, name in enumerate(names)
                for token in self.token_indices[name]
            ]
            made = torch.tensor(found, device=device).sort()
            if execution_mode_of(base.weight, "eager").compiling:
                return made[0], made[1]
            tables[key] = made[0], made[1]
        return tables[key]

    def _replace_columns(self, x: torch.Tensor, y: torch.Tensor, name: str) -> torch.Tensor:
        """Return y with new values in the columns that belong to an adapter's trainable tokens.

        The result is a new tensor. y ``[..., V]`` is the output of the base layer, such as a head's
        logits, and has one column per token. The new columns are computed from x ``[..., D]`` and
        the adapter's trained rows.
        """
        base: Any = self.get_base_layer()
        index, places = self._token_lookup_keys_and_row_indices([name], x.device)
        delta = self._trained_modules_or_rows_by_adapter[name].to(base.weight.dtype)[places]
        columns = F.linear(x, delta, None if base.bias is None else base.bias[index])
        return y.index_copy(-1, index, columns.to(y.dtype))

    def _index(self, name: str, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.token_indices[name], device=device)

    # ------------------------------------------------------------------------------- merging

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """Check that adapters can be merged into the module, and return the names of the adapters.

        The list contains the adapters that `merge` would merge. The module is not changed.

        Raises:
            AdapterStateError: Two of the adapters train the same row, or ``safe_merge`` found a
                value that is not finite.
        """
        wanted = self._active_adapters if adapter_names is None else adapter_names
        known, merged = self.token_indices, self.merged_adapters
        names = [n for n in dict.fromkeys(wanted) if n in known and n not in merged]
        if not names:
            return []
        taken: set[int] = set()
        for name in (*merged, *names):
            both = taken.intersection(known[name])
            if both:
                # PEFT raises an error with the first part of this message, which its tests compare.
                raise AdapterStateError(
                    f"Token indices of adapter {name!r} are already defined and would result in "
                    f"undefined merging behavior: tokens {sorted(both)[:5]} also belong to another "
                    "adapter; merge only adapters that have no tokens in common"
                )
            taken.update(known[name])
            delta = self._trained_modules_or_rows_by_adapter[name]
            if safe_merge and not bool(torch.isfinite(delta).all()):
                raise AdapterStateError(
                    f"the trained token rows of adapter {name!r} (trainable_token_indices) contain "
                    "non-finite values; the adapter may be corrupted"
                )
        return names

    @torch.no_grad()
    def _merge_without_checks(self, names: list[str], keep_base: bool) -> None:
        """Merge the trained rows of the named adapters into the base weight, without checks.

        The trained rows replace rows of the base weight. The adapters must already have passed
        `check_merge`. Whether ``keep_base`` is set or not, the original rows are kept for
        `unmerge`.
        """
        weight: Any = self.get_base_layer().weight
        rows_before = self._rows_before_merge_by_adapter()
        for name in names:
            if name not in rows_before:
                index = self._index(name, weight.device)
                rows_before[name] = weight.detach()[index].clone()
                weight.index_copy_(
                    0, index, self._trained_modules_or_rows_by_adapter[name].to(weight)
                )
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Unmerge the merged adapters.

        No adapter remains merged. The method restores the rows that `merge` replaced.
        """
        weight: Any = self.get_base_layer().weight
        rows_before = self._rows_before_merge_by_adapter()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            before = rows_before.pop(name, None)
            if before is not None:
                weight.index_copy_(0, self._index(name, weight.device), before.to(weight))

    def _parameters_and_values_before_merge(self) -> list[tuple[object, object]]:
        """Return the base parameters that the merge of adapters has changed.

        The only parameter is the base weight. Its value before the merge is always available. See
        `ModuleWrapper._parameters_and_values_before_merge` for the format.
        """
        weight: Any = self.get_base_layer().weight
        rows_before = self._rows_before_merge_by_adapter()
        if not rows_before:
            return []
        before = weight.detach().clone()
        for name, rows in reversed(rows_before.items()):
            before.index_copy_(0, self._index(name, weight.device), rows.to(weight))
        return [(weight, before)]

    def _rows_before_merge_by_adapter(self) -> dict[str, torch.Tensor]:
        """Return, for each merged adapter, the weight rows that the adapter replaced.

        The result is a dict that is keyed by adapter name. Each entry contains the rows as they
        were just before the adapter was merged, so that `unmerge` can restore the rows. Modules
        that share the weight share the dict.
        """
        own, tied = self.token_adapter, self.token_adapter.tied_adapter
        shares = tied is not None and tied.base_layer.weight is own.base_layer.weight
        return tied.before if tied is not None and shares else own.before

    def __getattr__(self, name: str) -> Any:
        """Look up missing attributes on the base layer.

        ``weight`` includes the active adapter's rows.
        """
        found: Any = super().__getattr__(name)
        acting = self.acting() if name == "weight" and not self.merged else None
        if acting is None:
            return found
        return found.index_copy(
            0,
            self._index(acting, found.device),
            self._trained_modules_or_rows_by_adapter[acting].to(found),
        )


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)
