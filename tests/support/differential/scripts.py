"""Scripts of the differential test: a base model, and operations on its adapters in order."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from tests.support.differential.bases import BASES, SAMPLES, Base

MOST = 12  # operations of a script
# PEFT freezes a new sum by looking for its name in the names of all parameters.
ADAPTERS = ("default", "ash", "birch", "cedar", "oak")
COMBINATIONS = ("svd", "linear", "cat", "ties", "ties_svd", "magnitude_prune")


class Operation(NamedTuple):
    """The name of a method of `Side`, and its arguments."""

    name: str
    arguments: dict[str, Any] = {}  # noqa: B006  # nobody writes to it

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name}({arguments})"


class Script(NamedTuple):
    """What one seed runs.

    Attributes:
        base: Name of a base model.
        operations: In order; the first one is ``wrap``.
        patched: Compare PEFT's model under `fastlora.patch` instead of fastlora's own.
        training: Put the models into training mode before a forward.
        embedded: Pass ``inputs_embeds`` instead of ids.
    """

    base: str
    operations: tuple[Operation, ...]
    patched: bool = False
    training: bool = False
    embedded: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("patched", "training", "embedded") if getattr(self, name)]
        lines = [f"{number}. {operation}" for number, operation in enumerate(self.operations, 1)]
        return "\n".join([" ".join([self.base, *flags]), *lines])


def draw(seed: int) -> Script:
    """The script of a seed."""
    return _Writer(seed).script()


class _Writer:
    """Draws a script and keeps track of the adapters that it adds."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.name = list(BASES)[seed % len(BASES)]
        self.base: Base = BASES[self.name]
        self.configs: dict[str, dict[str, Any]] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.disabled = False
        self.drops = False
        # One for all: in PEFT the first adapter's says which class the model has.
        self.task = self.random.choice(self.base.task_types)

    def script(self) -> Script:
        patched, embedded = self.maybe(0.25), self.maybe(0.5)
        config = self.config()
        self.configs["default"], self.active = config, ["default"]
        operations = [Operation("wrap", {"adapter_name": "default", "config": config})]
        length = self.random.randint(4, MOST)
        ends = self.maybe(0.35)
        while len(operations) < length - ends:
            operations.append(self.operation())
        if ends:
            options: dict[str, Any] = {}
            if not self.merged and self.maybe(0.4):
                operations[-1] = self.merge()
            if self.maybe(0.2):
                options["adapter_names"] = self.some(1, 2)
            name = "merge_and_unload" if options or self.maybe(0.5) else "unload"
            operations.append(Operation(name, options))
        training = self.maybe(0.5) and not self.drops
        return Script(self.name, tuple(operations), patched, training, embedded)

    def maybe(self, probability: float) -> bool:
        return self.random.random() < probability

    def any_name(self) -> str:
        """The name of an adapter, now and then of none."""
        if self.maybe(0.03) or not self.configs:
            return "unknown"
        return self.random.choice(list(self.configs))

    def some(self, least: int, most: int) -> list[str]:
        names = list(self.configs) or ["unknown"]
        return self.random.sample(names, min(len(names), self.random.randint(least, most)))

    def new_name(self) -> str:
        """A name that is free, now and then one that is taken."""
        free = [name for name in ADAPTERS if name not in self.configs]
        return self.random.choice(free) if free and not self.maybe(0.04) else self.any_name()

    def operation(self) -> Operation:
        """An operation that the models can take in their state, or at times cannot."""
        apart = 0.1 if self.merged else 1.0  # PEFT unmerges then, or raises
        weights = {
            self.add: (3 if len(self.configs) < 4 else 0.2) * apart,
            self.set: 2,
            self.set_several: 1.5 if len(self.configs) > 1 else 0,
            self.require: 0.6,
            self.within_disabled: 1,
            self.toggle: 0.6 if not self.disabled else 3,
            self.merge: 0.1 if self.disabled else 1.5 if not self.merged else 0.4,
            self.unmerge: 0.1 if not self.merged else 2,
            self.weighted: 1.3 * apart,
            self.delete: 0.8 if len(self.configs) > 1 else 0.05,
            self.load: 1.2 * apart,
            self.reload: 0.6,
            self.mixed: 1.6 * apart,
            self.step: 2,
            self.copy: 0.8,
            self.cast: 0.5 if not self.merged else 0.05,
        }
        (chosen,) = self.random.choices(list(weights), list(weights.values()))
        return chosen()

    def add(self) -> Operation:
        name, config = self.new_name(), self.config()
        self.configs.setdefault(name, config)
        return Operation("add", {"adapter_name": name, "config": config})

    def set(self) -> Operation:
        name = self.any_name()
        self.active, self.merged = [name], []
        options: dict[str, Any] = {"adapter_name": name}
        if self.maybe(0.15):
            options["inference_mode"] = True
        return Operation("set", options)

    def set_several(self) -> Operation:
        self.active, self.merged = self.some(1, 3), []
        return Operation("set", {"adapter_name": list(self.active)})

    def require(self) -> Operation:
        options = {"adapter_names": self.any_name(), "requires_grad": self.maybe(0.5)}
        return Operation("require", options)

    def within_disabled(self) -> Operation:
        return Operation("within_disabled")

    def toggle(self) -> Operation:
        self.disabled = not self.disabled
        return Operation("disable" if self.disabled else "enable")

    def merge(self) -> Operation:
        options: dict[str, Any] = {}
        if self.maybe(0.4):
            options["adapter_names"] = self.some(1, 2)
        if self.maybe(0.3):
            options["safe_merge"] = True
        self.merged = options.get("adapter_names", self.active)
        return Operation("merge", options)

    def unmerge(self) -> Operation:
        self.merged = []
        return Operation("unmerge")

    def weighted(self) -> Operation:
        adapters = self.some(1, 3)
        if not self.maybe(0.1):  # else there is hardly a sum
            fit = [name for name in self.configs if self.adds_up(name)]
            adapters = [name for name in adapters if name in fit] or fit[:1] or adapters
        if self.maybe(0.25):
            adapters = [*adapters, self.random.choice(adapters)]
        if self.maybe(0.03):
            adapters[0] = "unknown"
        kind = self.random.choice(COMBINATIONS)
        name = self.new_name()
        options: dict[str, Any] = {
            "adapters": adapters,
            "weights": [self.random.choice((-1.0, 0.25, 0.5, 1.0, 2.0)) for _ in adapters],
            "adapter_name": name,
            "combination_type": kind,
        }
        if kind.startswith(("ties", "magnitude")) and not self.maybe(0.05):
            options["density"] = self.random.choice((0.3, 0.5, 0.8, 1.0))
        if kind.startswith("ties") and self.maybe(0.3):
            options["majority_sign_method"] = "frequency"
        if kind.endswith("svd") and self.maybe(0.3):
            options["svd_rank"] = self.random.randint(1, 3)
        self.configs.setdefault(name, self.configs.get(adapters[0], {}))
        return Operation("weighted", options)

    def adds_up(self, name: str) -> bool:
        """Whether both libraries add an adapter to others."""
        config = self.configs[name]
        fields = (
            "bias",
            "use_dora",
            "trainable_token_indices",
            "use_rslora",
            "rank_pattern",
            "modules_to_save",
        )
        return not any(field in config for field in fields)

    def delete(self) -> Operation:
        name = self.any_name()
        self.configs.pop(name, None)
        self.active = [n for n in self.active if n != name] or list(self.configs)[:1]
        return Operation("delete", {"adapter_name": name})

    def load(self) -> Operation:
        saved = self.any_name()
        name = saved if self.maybe(0.25) else self.new_name()
        self.configs.setdefault(name, self.configs.get(saved, {}))
        options = {"saved": saved, "adapter_name": name, "is_trainable": self.maybe(0.4)}
        return Operation("load", options)

    def reload(self) -> Operation:
        self.active, self.merged, self.disabled = list(self.configs)[:1], [], False
        return Operation("reload", {"is_trainable": self.maybe(0.6)})

    def mixed(self) -> Operation:
        names = [*self.configs, "__base__"]
        chosen = [self.random.choice(names) for _ in range(SAMPLES)]
        if self.maybe(0.03):
            chosen[0] = "unknown"
        return Operation("mixed", {"adapter_names": chosen})

    def step(self) -> Operation:
        return Operation("step")

    def copy(self) -> Operation:
        return Operation("copy")

    def cast(self) -> Operation:
        return Operation("cast")

    def config(self) -> dict[str, Any]:
        """The fields of a LoraConfig that are not at their default."""
        base, config = self.base, {"r": self.random.randint(1, 4), "target_modules": self.targets()}
        config["lora_alpha"] = self.random.randint(1, 8)
        if self.task is not None:
            config["task_type"] = self.task
        if self.maybe(0.2):
            config["use_rslora"] = True
        if self.maybe(0.2):
            config["use_dora"] = True
        elif self.maybe(0.15):
            config["lora_bias"] = True
        others = [other for other in self.configs.values() if "bias" in other]
        if self.maybe(0.02 if others else 0.25):  # both libraries take one such adapter
            config["bias"] = self.random.choice(("all", "lora_only"))
        if self.maybe(0.2):
            config["modules_to_save"] = [self.random.choice(base.saved)]
        if base.tokens and self.maybe(0.15):
            rows = self.random.sample(range(12), self.random.randint(1, 4))
            named = self.maybe(0.5)
            config["trainable_token_indices"] = (
                {self.random.choice(base.tokens): rows} if named else rows
            )
        listed = isinstance(config["target_modules"], list)
        if listed and self.maybe(0.15):
            layer = self.random.randrange(base.layers)
            config["layers_to_transform"] = [layer] if self.maybe(0.5) else layer
        for field, values in (("rank_pattern", (1, 5)), ("alpha_pattern", (2, 12))):
            if self.maybe(0.15):
                pattern = self.random.choice(base.targets[: base.linears])
                config[field] = {pattern: self.random.randint(*values)}
        if self.maybe(0.12):
            config["exclude_modules"] = (
                [self.random.choice(base.targets)]
                if self.maybe(0.6)
                else self.random.choice(base.regexes)
            )
        if self.maybe(0.45):
            kind = self.random.choice(("gaussian", False, "orthogonal"))
            config["init_lora_weights"] = kind
            if kind == "orthogonal" and not self.maybe(0.1):
                config["r"] = self.random.choice((2, 4))
                config.pop("rank_pattern", None)
        if self.maybe(0.1):
            config["lora_dropout"] = 0.5
            self.drops = True
        if self.name == "GPT-2" and self.maybe(0.7) or self.maybe(0.03):
            config["fan_in_fan_out"] = True
        return config

    def targets(self) -> Any:
        base, kind = self.base, self.random.random()
        if kind < 0.15:
            return "all-linear"
        if kind < 0.3:
            return self.random.choice(base.regexes)
        if kind < 0.36:
            return None
        linears = base.targets[: base.linears]
        chosen = self.random.sample(linears, self.random.randint(1, min(3, len(linears))))
        others = base.targets[base.linears :]
        if others and self.maybe(0.3):
            chosen.append(self.random.choice(others))
        if self.maybe(0.04):
            chosen.append("no_such_module")
        return chosen
