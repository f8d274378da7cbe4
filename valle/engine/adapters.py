"""Fine-tuning with low-rank adapters: W + alpha / rank · B A, of which A and B alone are trained.

`peft` puts them beside the attention's and the feed-forward networks' weights of the decoders that a stage trains.
Checkpoints hold the sum under the usual names, so that generation needs neither `peft` nor a flag, and under `lora`
what going on exactly needs: A and B, and the weights they stand beside, which a rounded sum does not give back.
Source: LoRA (arXiv 2106.09685, section 4.1).
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from valle.modules.transformer import TransformerLayer
from valle.utils.errors import UserError
from valle.utils.files import atomic_path

ADAPTER = "default"  # peft's name of the one adapter
NAMES = {"lora_A": f"lora_A.{ADAPTER}.weight", "lora_B": f"lora_B.{ADAPTER}.weight"}
OWN = tuple(NAMES.values())
State = dict[str, Tensor]


class Adapters:
    """Adapters beside the weights that a stage trains. Making one changes the model.

    A is drawn from torch's random numbers, B is 0: the model's outputs are at first what they were.

    Args:
        model: with `stage_parameters` and `TransformerLayer`s.
        stage: of the training.
        rank: rows of A.
        alpha: strength, relative to the rank.

    Raises:
        UserError: `peft` is not installed, or the stage trains no transformer.
    """

    def __init__(self, model: Any, stage: int, rank: int, alpha: float) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError("--lora-rank needs peft; run: pip install 'valle[lora]'") from error
        self.rank, self.alpha = rank, alpha
        trained = {name for name, _ in model.stage_parameters(stage)}
        matrices = [
            f"{name}.{part}"
            for name, module in model.named_modules()
            if isinstance(module, TransformerLayer)
            for part in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
            if f"{name}.{part}" in trained
        ]  # fmt: skip
        if not matrices:
            raise UserError(f"--lora-rank: stage {stage} trains no transformer that adapters could stand in")
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a scale; whole numbers are only usual
            target_modules=[name.removesuffix(".weight") for name in matrices if name.endswith(".weight")],
            target_parameters=[name for name in matrices if not name.endswith(".weight")],
        )
        inject_adapter_in_model(settings, model)
        # The weight's plain name -> where peft keeps it, and where A and B.
        self.places: dict[str, dict[str, str]] = {}
        state = model.state_dict()
        self.names = list(state)
        for name in self.names:
            if name.endswith(NAMES["lora_A"]):
                module = name.removesuffix(NAMES["lora_A"])
                base = next(f"{module}base_layer.{w}" for w in ("weight", "in_proj_weight")
                            if f"{module}base_layer.{w}" in state)  # fmt: skip
                self.places[_plain(base)] = {"base": base} | {k: module + v for k, v in NAMES.items()}
        if set(self.places) != set(matrices):
            raise RuntimeError(f"peft has adapted {sorted(self.places)}, expected {sorted(matrices)}")

    def trained(self, named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
        """Of a stage's parameters, the adapters."""
        return ((name, parameter) for name, parameter in named if name.endswith(OWN))

    def merged(self, state: State) -> State:
        """The adapted model's state dict as the plain model would have it, adapters added to the weights."""
        plain = {_plain(name): value for name, value in state.items() if not name.endswith(OWN)}
        for name, place in self.places.items():
            plain[name] = _add(
                state[place["base"]], state[place["lora_A"]], state[place["lora_B"]], self.alpha
            )
        return plain

    def state_dict(self, state: State) -> dict[str, Any]:
        """What a checkpoint keeps under `lora`, of the adapted model's state dict."""
        kept: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha}
        for part in ("base", "lora_A", "lora_B"):
            kept[part] = {name: state[place[part]] for name, place in self.places.items()}
        return kept

    def resumed(self, contents: dict[str, Any], path: Path) -> State:
        """The adapted model's state dict, from a checkpoint of this training.

        Raises:
            UserError: it has no adapters, or others.
        """
        kept = contents.get("lora") or {"rank": 0, "alpha": None}
        if (kept["rank"], kept["alpha"]) != (self.rank, self.alpha):
            raise UserError(
                f"checkpoint '{path}' was trained with --lora-rank {kept['rank']} --lora-alpha {kept['alpha']}, not "
                f"{self.rank} and {self.alpha}; use the same flags, or another --exp-dir"
            )
        adapters = {place[part]: kept[part][name] for name, place in self.places.items() for part in NAMES}
        return self._state(contents["model"] | kept["base"], adapters)

    def begun(self, plain: State, current: State) -> State:
        """The adapted model's state dict with the weights of a plain one and the adapters it has now."""
        return self._state(plain, current)

    def _state(self, plain: State, adapters: State) -> State:
        state = {name: adapters[name] for name in self.names if name.endswith(OWN)}
        others = {_plain(name): name for name in self.names if not name.endswith(OWN)}
        # What the model does not know keeps its name: loading is strict, and says so.
        return state | {others.get(name, name): value for name, value in plain.items()}

    def export(self, path: Path, state: State) -> None:
        """A and B alone, some MB, as `<weight's name>.lora_A` and `.lora_B`; for `apply_adapter`."""
        tensors = {
            f"{name}.{part}": state[place[part]].detach().cpu().contiguous()
            for name, place in self.places.items()
            for part in NAMES
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"lora": json.dumps({"rank": self.rank, "alpha": self.alpha})})


def merged_copy(model: nn.Module) -> Any:
    """A plain copy of an adapted model, for what looks into its modules, such as generation."""
    from peft.tuners.lora.layer import LoraLayer

    def replace(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()  # type: ignore[operator]
                child = child.get_base_layer()
                setattr(module, name, child)
            replace(child)

    twin = copy.deepcopy(model)
    replace(twin)
    return twin


def apply_adapter(state: State, path: Path) -> State:
    """A plain state dict with an exported adapter added.

    Raises:
        UserError: not an adapter, or of another architecture.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["lora"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"'{path}' is not an adapter of trainer_audiolm.py ({error})") from error
    adapted = dict(state)
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        low, high = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        if name not in state or state[name].shape != (high.shape[0], low.shape[1]):
            raise UserError(
                f"adapter '{path}': '{name}' of shape {(high.shape[0], low.shape[1])} is not in the checkpoint; it "
                "belongs to a model of another architecture"
            )
        adapted[name] = _add(state[name], low, high, about["alpha"])
    return adapted


def _plain(name: str) -> str:
    return re.sub(r"\bbase_layer\.", "", name)


def _add(weight: Tensor, low: Tensor, high: Tensor, alpha: float) -> Tensor:
    """W + alpha / rank · B A."""
    return torch.addmm(weight.detach(), high.detach(), low.detach(), alpha=alpha / low.shape[0])
