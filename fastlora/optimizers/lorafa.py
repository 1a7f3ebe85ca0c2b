"""LoRA-FA: lora_A is frozen, and lora_B is trained with a projection of the weight's gradient.

The gradient of lora_B is ``g_B = s * g_W @ A.T``, where ``g_W`` is the gradient of the weight and
``s`` is the scaling. With A frozen, the step in B whose change of the weight is closest to ``g_W``
is ``g_B @ inverse(A @ A.T) / s ** 2``. AdamW uses this step as the gradient of lora_B.

The method is from https://arxiv.org/abs/2308.03303. The formula and AdamW are those of PEFT 0.21.2,
``optimizers/lorafa.py``, with two differences. First, products are computed in fp32, whereas PEFT
rounds the projection to bf16. Second, other trained parameters of an adapter (the bias of lora_B, a
DoRA magnitude) are not treated as half of a factor pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastlora.layers.adapted_parameters import ParameterLoraLayer
from fastlora.sharding import local_shard
from fastlora.user_warnings import warn
from fastlora.validation import ConfigError, check_rank
from fastlora.weights_version import TensorStamp, stamp_tensors

# The parts of a parameter's name that identify lora_A and the matching lora_B.
_PAIRS = ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B."))
_RIDGE = 1e-8


class LoraFAOptimizer(Optimizer):
    """An optimizer that implements LoRA-FA, in which lora_A is frozen and lora_B is trained.

    The optimizer is AdamW with the LoRA-FA gradient for lora_B. The matching lora_A never changes,
    even if it has a gradient. All other parameters that have a gradient are updated by plain AdamW.

    Args:
        params: Parameter groups. Each group is a dict with ``params``, their ``names`` in the
            model, and their ``scaling_factors``: a number for each lora_B, and None for other
            parameters. Each lora_A must be included, in the same group or another one.
        lr: Learning rate.
        betas: Decay rates of the running averages of the gradient and its square.
        eps: Term added to the denominator for numerical stability.
        weight_decay: Decoupled weight decay coefficient, applied after each step.
        correct_bias: Whether to correct the running averages for their initialization to zero.

    Raises:
        ConfigError: A number is out of range, or a group has no names or scaling factors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        # The first dict maps each lora_B to its lora_A. The second dict maps each lora_A to a tuple
        # (stamp of lora_A, inverse of ``lora_A @ lora_A.T``).
        self._partners: dict[nn.Parameter, nn.Parameter] = {}
        self._inverses: dict[nn.Parameter, tuple[TensorStamp | None, torch.Tensor]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        _check_numbers(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the optimizer.

        The method checks the group, and pairs each lora_B weight with the matching lora_A weight.

        Args:
            param_group: A dict as for `torch.optim.Optimizer`, with the additional keys ``names``
                and ``scaling_factors``.

        Raises:
            ConfigError: The group does not have a name and a scaling factor for each parameter, or
                a number is out of range.
        """
        names = list(param_group.get("names", ()))
        group = {**param_group, "params": list(param_group["params"]), "names": names}
        if "scaling_factors" not in group and "scaling_factor" in group:  # as in older PEFT
            group["scaling_factors"] = [group["scaling_factor"]] * len(group["params"])
        factors = group.get("scaling_factors", ())
        if not len(names) == len(factors) == len(group["params"]):
            raise ConfigError(
                "Expected the param group to have one entry in `names` and one in "
                f"`scaling_factors` for each of its {len(group['params'])} parameters, got "
                f"{len(names)} names and {len(factors)} scaling factors"
            )
        _check_numbers({**self.defaults, **group})
        super().add_param_group(group)
        self._pair_factors()

    def _pair_factors(self) -> None:
        """Pair each lora_B weight with the matching lora_A weight.

        The lora_A may be in another parameter group, but one in the same group takes precedence.
        """
        groups = [dict(zip(g["names"], g["params"], strict=True)) for g in self.param_groups]
        everywhere = {name: parameter for group in groups for name, parameter in group.items()}
        for group in groups:
            for name, parameter in group.items():
                lora_a = _paired_lora_a_name(name) or ""
                partner = group.get(lora_a, everywhere.get(lora_a))
                if partner is not None:
                    self._partners[parameter] = partner

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled optimizer, which consists of its groups and its state.

        `load_state_dict` also calls this method. It does not change the parameters.
        """
        super().__setstate__(state)
        if "_partners" not in vars(self):
            self._partners, self._inverses = {}, {}
            self._pair_factors()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: Function that reevaluates the model, computes the gradients, and returns the
                loss, or None.

        Returns:
            The loss that the closure returned, or None if there is no closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = set(self._partners.values())  # may have gradients from before the freeze
        for group in self.param_groups:
            for parameter, factor in zip(group["params"], group["scaling_factors"], strict=True):
                if parameter.grad is None or parameter in frozen:
                    continue
                partner = self._partners.get(parameter)
                if partner is None:
                    self._adamw(parameter, parameter.grad, group, "")
                else:
                    gradient = parameter.grad @ self._inverse_gram_matrix(partner).to(
                        parameter.grad.dtype
                    )
                    self._adamw(parameter, gradient / factor**2, group, "_B")
        return loss

    def _inverse_gram_matrix(self, lora_a: nn.Parameter) -> torch.Tensor:
        """Return the inverse of the Gram matrix ``lora_a @ lora_a.T``.

        To regularize the inverse, a small multiple of the identity is added to the Gram matrix
        before the inversion. The inverse is ``[R, R]``, and is cached until lora_a changes.
        Training does not change a frozen lora_a.
        """
        watched = (local_shard(lora_a),), (lora_a._version,)
        known = self._inverses.get(lora_a)
        if known is None or known[0] is None or not known[0].matches(*watched):
            stamp = stamp_tensors(*watched)
            wide = lora_a.detach().to(torch.promote_types(lora_a.dtype, torch.float32))
            square = wide @ wide.t()
            ridge = _RIDGE * torch.eye(len(square), dtype=square.dtype, device=square.device)
            known = self._inverses[lora_a] = stamp, torch.linalg.pinv(square + ridge)
        return known[1]

    def _adamw(
        self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any], suffix: str
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state[f"exp_avg{suffix}"] = torch.zeros_like(parameter)
            state[f"exp_avg_sq{suffix}"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean, square = state[f"exp_avg{suffix}"], state[f"exp_avg_sq{suffix}"]
        beta1, beta2 = group["betas"]
        mean.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size = size * math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Create a LoRA-FA optimizer for a model's adapters.

    This function also freezes the adapters' lora_A factors.

    Args:
        model: A model with adapters. The optimizer updates its trainable parameters.
        r, lora_alpha: Accepted for compatibility with PEFT, but not used: the optimizer uses the
            scaling of each layer instead. ``r`` must still be positive.
        lr: Learning rate.
        weight_decay: Decoupled weight decay coefficient of AdamW.
        use_rslora: Deprecated, as in PEFT. If not None, it must equal the value in the configs of
            all active adapters.

    Raises:
        ConfigError: A number is out of range, ``use_rslora`` differs from the value in a config, no
            lora_B is trainable, or an adapter is on a parameter (``target_parameters``). The model
            is unchanged.
    """
    check_rank(r)
    configs: Any = getattr(model, "peft_config", {})
    active: Any = getattr(model, "active_adapters", ())
    chosen = {name: bool(configs[name].use_rslora) for name in active if name in configs}
    if use_rslora is not None:
        wrong = [name for name, value in chosen.items() if value != use_rslora]
        if wrong:
            raise ConfigError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the config "
                f"of {wrong} has use_rslora={not use_rslora}; omit the argument"
            )
        warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated: the config already specifies "
            "it",
            FutureWarning,
        )
    named = dict(model.named_parameters())
    partners = {name: _paired_lora_a_name(name) for name in named}
    trains = {name for name, p in named.items() if p.requires_grad}
    lora_b = {name for name, partner in partners.items() if partner in named and name in trains}
    if not lora_b:
        raise ConfigError("no lora_B is trainable; call set_adapter() or train_adapters() first")
    for name, module in model.named_modules():
        if isinstance(module, ParameterLoraLayer) and any(b.startswith(f"{name}.") for b in lora_b):
            raise ConfigError(
                f"LoRA-FA does not support adapters on parameters (target_parameters), such as "
                f"{name!r}; use another optimizer, or omit target_parameters"
            )
    lora_a = {partners[name] for name in lora_b}
    selected = [name for name in named if name in lora_a or name in trains]
    rslora = all(chosen.values()) if chosen else False
    optimizer = LoraFAOptimizer(
        [
            {
                "params": [named[name] for name in selected],
                "names": selected,
                "scaling_factors": [_scaling_for_factor(model, name) for name in selected],
                "scaling_factor": lora_alpha / (math.sqrt(r) if rslora else r),
                "lr": lr,
                "weight_decay": weight_decay,
            }
        ]
    )
    for name in lora_a:
        named[str(name)].requires_grad_(False)
    return optimizer


def _check_numbers(group: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a number of a parameter group is out of range."""
    lr, betas, eps, decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    if lr < 0.0:
        raise ConfigError(f"Invalid learning rate: {lr}; expected a value >= 0.0")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"Invalid beta parameters: {betas}; expected values in [0.0, 1.0)")
    if eps < 0.0:
        raise ConfigError(f"Invalid epsilon value: {eps}; expected a value >= 0.0")
    if decay < 0.0:
        raise ConfigError(f"Invalid weight decay: {decay}; expected a value >= 0.0")


def _paired_lora_a_name(name: str) -> str | None:
    """Return the name of the lora_A weight that is paired with the given lora_B weight.

    Returns None if ``name`` is not the name of a lora_B weight.
    """
    for own, other in _PAIRS:
        layer, found, rest = name.rpartition(other)
        if found and not rest.endswith(".bias"):
            return f"{layer}{own}{rest}"
    return None


def _scaling_for_factor(model: nn.Module, factor_name: str) -> float | None:
    """Return the scaling for the factor with the given name.

    It is the scaling of the factor's adapter in the factor's layer. Returns None if ``factor_name``
    does not name a parameter of lora_A or lora_B.
    """
    for pair in _PAIRS:
        for place in pair:
            layer, found, rest = factor_name.rpartition(place)
            if found:
                scalings: Any = model.get_submodule(layer).scaling
                return float(scalings[rest.split(".")[0]])
    return None
