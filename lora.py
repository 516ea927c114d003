"""LoRA (Hu et al. 2021): surgery on a built Llama, and the PEFT adapter folder it is kept in.

A projection's W stays as it is; beside it learns a low-rank difference, y = W x + (alpha / r) B A dropout(x),
with A (r, in) random and B (out, r) zero, so that the model begins as its base. W keeps its own name:
the base's part of `state_dict()` is what it was, and the rest is named as PEFT names it.

An adapter folder holds the differences only, and says what they differ from:

    adapter_config.json         PEFT's description; base_model_name_or_path is where the base lies
    adapter_model.safetensors   lora_A and lora_B of every target, by PEFT's names
    base.json                   the base's sha256, and its place seen from here: both may move together
"""

import contextlib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.config import Fraction, NonNegativeInt, PositiveFloat, UserError, did_you_mean, read_object
from model import load_model, load_weights, placed, save_model, weight_files

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name
# keys of PEFT's adapter_config.json for what is more, or something else, than the LoRA of this file
NOT_PLAIN = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "trainable_token_indices"),
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class LoRAConfig:
    """The knobs of an adapter, for whoever trains one."""

    lora_r: NonNegativeInt = (
        16  # rank of the difference that is learned; 0 = train all weights instead
    )
    lora_alpha: PositiveFloat = 32.0  # it is scaled by lora_alpha / lora_r
    lora_dropout: Fraction = 0.0  # on what enters it
    lora_target_modules: tuple[str, ...] = TARGETS  # the projections that get one
    merge: bool = (
        True  # final/ is a whole model, its adapter beside in final/adapter; else the adapter alone
    )

    def __post_init__(self):
        check_targets(self.lora_target_modules)
        if self.lora_r and getattr(self, "optimizer", "adamw") == "muon":
            raise ValueError("optimizer=muon is for whole matrices: use adamw, or lora_r=0")


class LoRALinear(nn.Module):
    """A linear layer with a frozen weight and a learned low-rank difference: x (..., in) -> (..., out)."""

    def __init__(self, linear, r, alpha, dropout):
        super().__init__()
        self.weight = linear.weight
        where = {"device": linear.weight.device}
        self.lora_A = nn.Linear(linear.in_features, r, bias=False, **where)
        self.lora_B = nn.Linear(r, linear.out_features, bias=False, **where)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.r, self.alpha, self.on = nn.Dropout(dropout), r, alpha, True

    def forward(self, x):
        rows = x.flatten(0, -2)
        y = F.linear(rows, self.weight)
        if self.on:  # added in place by the product itself: no pass over y but its own
            small = self.lora_A(self.dropout(rows)) * (self.alpha / self.r)
            y.addmm_(small.to(y.dtype), self.lora_B.weight.T.to(y.dtype))
        return y.unflatten(0, x.shape[:-1])

    def merged(self):
        """Returns the plain linear layer that computes the same without dropout."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        difference = self.lora_B.weight.float() @ self.lora_A.weight.float()
        linear.weight = nn.Parameter(
            self.weight.detach() + self.alpha / self.r * difference.detach()
        )
        return linear


def adapters(model):
    """Returns {name: LoRALinear} of all there are in `model`."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def check_targets(targets):
    """Raises UserError unless `targets` names projections of a Llama block, each once."""
    for name in targets:
        if name not in TARGETS:
            hint = did_you_mean(name, TARGETS) or f"; choose from {', '.join(TARGETS)}"
            raise UserError(f"lora_target_modules: unknown module {name!r}{hint}")
    if not targets or len(set(targets)) < len(targets):
        raise UserError("lora_target_modules: name at least one module, and each only once")


def add_lora(model, r, alpha, dropout=0.0, targets=TARGETS):
    """Puts an adapter beside every projection in `targets` and freezes everything else. Returns `model`."""
    check_targets(targets)
    if adapters(model):
        raise UserError("this model has an adapter already; merge it first")
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in [name for name, _ in part.named_children() if name in targets]:
                setattr(part, name, LoRALinear(getattr(part, name), r, alpha, dropout))
    return model


@contextlib.contextmanager
def lora_off(model):
    """Turns the adapter off: inside, the model computes what its base does."""
    modules = adapters(model).values()
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True


@torch.no_grad()
def merge_lora(model):
    """Adds the adapter into the weights, in float32, and proves it: a probe's logits stay what they were.

    Returns the largest difference between the logits before and after; the model has no adapter any more, and
    all of it may be trained. Raises UserError if there is none, as at a second merge.
    """
    found, training = adapters(model), model.training
    if not found:
        raise UserError("this model has no adapter to merge, or it is merged already")
    assert all(module.weight.dtype == torch.float32 for module in found.values()), (
        "merge, then halve"
    )
    ids = torch.arange(min(32, model.cfg.sequence_length), device=model.lm_head.weight.device)
    probe = (ids * 7919 % model.cfg.vocab_size)[None]  # arbitrary, but spread over the vocabulary
    with torch.compiler.set_stance("force_eager"):
        before = model.eval()(probe)
        for name, module in found.items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.merged())
        after = model(probe)
    difference, size = (after - before).abs().max().item(), before.abs().max().item()
    assert difference <= 1e-4 * max(1.0, size), f"merging changed the logits by {difference}"
    model.requires_grad_(True).train(training)
    return difference


# ---- folders


class Base(NamedTuple):
    """What an adapter belongs to: a folder, and the sha256 of the weights in it."""

    path: Path
    sha256: str


def model_folder(path):
    """Returns `path`, or the final/ in it where that is what it holds; UserError if it can't be a model."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such folder; give a training's output_dir, or a folder fetched with `hf download`"
        )
    if path.is_file():
        raise UserError(f"{path}: a file, and not a model folder, which holds a config.json")
    if any((path / name).is_file() for name in ("config.json", CONFIG, WEIGHTS)):
        return path
    if not (path / "final").is_dir():
        files = [
            f"{folder}/{name}" for folder in ("*", "*/final") for name in ("config.json", CONFIG)
        ]
        homes = {file.parent for pattern in files for file in path.glob(pattern)}
        below = sorted(str(home.parent if home.name == "final" else home) for home in homes)
        hint = f"; there is one in {below[-1]}" if below else ""
        raise UserError(f"{path}: not a model folder (no config.json){hint}")
    return path / "final"


def identify(folder):
    """Returns the Base that `folder` is, by the sha256 of its weights (an adapter folder's own weights)."""
    folder = model_folder(folder)
    own = folder / WEIGHTS
    files, digest = (
        [own] if own.is_file() else weight_files(folder / "model.safetensors"),
        hashlib.sha256(),
    )
    for path in files:
        if not path.is_file():
            raise UserError(
                f"{folder}: not a model folder, or a part of one (neither {path.name} nor {WEIGHTS})"
            )
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return Base(folder, digest.hexdigest())


def save_adapter(model, folder, base):
    """Writes the adapter of `model` into `folder`, which must exist, as PEFT would; `base` is its Base."""
    folder, found = Path(folder), adapters(model)
    first = next(iter(found.values()))
    named = {name.rpartition(".")[2] for name in found}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path.resolve()),  # PEFT looks from where it runs
        "r": first.r,
        "lora_alpha": int(first.alpha) if first.alpha == int(first.alpha) else first.alpha,
        "lora_dropout": first.dropout.p,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [name for name in TARGETS if name in named],
        "use_rslora": False,
        "use_dora": False,
    }
    home = {"relative_path": _relative(base.path, folder), "sha256": base.sha256}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "base.json").write_text(json.dumps(home, indent=2) + "\n", encoding="utf-8")
    tensors = {
        PREFIX + name: tensor.detach().contiguous() for name, tensor in _tensors(model).items()
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _relative(path, folder):
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return None


def _tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def load_adapter(model, folder, base=None):
    """Reads an adapter folder into `model`, adding the adapter if there is none yet. Returns `model`.

    `base` is the Base that `model` was loaded from. Raises UserError if the adapter belongs to another one or
    is something else than the plain LoRA that this file computes.
    """
    folder = Path(folder)
    config, home = _read_config(folder), _read_home(folder)
    wanted = home.get("sha256")
    if base and wanted and wanted != base.sha256:
        raise UserError(_other_base(folder, wanted, base))
    if not adapters(model):
        add_lora(
            model,
            config["r"],
            config["lora_alpha"],
            config["lora_dropout"],
            config["target_modules"],
        )
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as problem:
        raise UserError(f"{folder / WEIGHTS}: not readable as safetensors ({problem})") from None
    tensors, own = (
        {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
        _tensors(model),
    )
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong = wrong or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise UserError(
            f"{folder}: does not fit this model: {wrong[0]} is missing, foreign or of another shape"
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{folder / WEIGHTS}: holds NaN or infinity")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model


def _other_base(folder, wanted, base):
    return (
        f"{folder}: this adapter was trained on a base with sha256 {wanted[:12]}.., but {base.path} has "
        f"{base.sha256[:12]}..; they do not belong together"
    )


def _read_home(folder):
    """Returns base.json's dict, empty in a folder of PEFT's own."""
    return read_object(folder / "base.json") if (folder / "base.json").is_file() else {}


def _read_config(folder):
    """Returns adapter_config.json's dict; UserError where it describes what this file does not compute."""
    config = read_object(folder / CONFIG)
    plain = {"peft_type": "LORA", "bias": "none"}
    odd = [key for key, value in plain.items() if config.get(key, value) != value]
    odd += [key for key in NOT_PLAIN if config.get(key)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        odd.append("init_lora_weights")  # the others, as PiSSA, change the base as well
    if odd:
        raise UserError(
            f"{folder / CONFIG}: {odd[0]} is {json.dumps(config[odd[0]])}; only plain LoRA loads"
        )
    shape = {"r": int, "lora_alpha": (int, float), "target_modules": list}
    for key, kind in shape.items():
        if not isinstance(config.get(key), kind) or not config[key]:
            raise UserError(
                f"{folder / CONFIG}: {key} is {json.dumps(config.get(key))}; expected a LoRA's"
            )
    # PEFT writes full names where it chose the modules itself; a layer without one is found missing later
    targets = dict.fromkeys(str(name).rpartition(".")[2] for name in config["target_modules"])
    config["target_modules"] = list(targets)
    check_targets(config["target_modules"])
    return {"lora_dropout": 0.0} | config


def save_trained(model, folder, base, stop_ids, merge=False):
    """Writes what was trained on top of `base`: the adapter, or the whole model if there is none.

    With `merge` it is the whole model in any case, and an adapter goes into folder/adapter beside it; `model`
    is merged then.
    """
    if adapters(model) and not merge:
        save_adapter(model, folder, base)
        return
    if adapters(model):
        (Path(folder) / "adapter").mkdir()
        save_adapter(model, Path(folder) / "adapter", base)
        merge_lora(model)
    save_model(model, folder, stop_ids)


def load_trained(model, folder, base):
    """Reads what `save_trained` wrote, without `merge`, into the same `model`."""
    if adapters(model):
        load_adapter(model, folder, base)
    else:
        load_weights(model, Path(folder) / "model.safetensors")


def find_base(folder):
    """Returns the Base of an adapter folder: looked for beside it first, then where it once was."""
    home, named = _read_home(folder), _read_config(folder).get("base_model_name_or_path")
    places = [folder / home["relative_path"]] if home.get("relative_path") else []
    places += [Path(named), folder / named] if named else []
    there = [identify(place) for place in places if place.exists()]
    for base in there:
        if home.get("sha256") in (None, base.sha256):
            return base
    if there:
        raise UserError(_other_base(folder, home["sha256"], there[0]))
    raise UserError(
        f"{folder}: its base model {named} is not there; put it back, or mend base_model_name_or_path in "
        f"{CONFIG}"
    )


def open_model_folder(folder, device="cpu", dtype=torch.float32):
    """Returns the Llama of any folder in evaluation mode: a model's, or an adapter's with its base.

    `folder` may also be the folder of a whole training: its final/ is meant. An adapter's base may be an
    adapter folder again. Raises UserError where something is missing or does not belong together.
    """
    folder = model_folder(folder)
    if not (folder / CONFIG).is_file():
        return load_model(folder, device, dtype)
    base = find_base(folder)
    if base.path.resolve() == folder.resolve():
        raise UserError(f"{folder / CONFIG}: names its own folder as the base")
    model = load_adapter(open_model_folder(base.path), folder, base)
    merge_lora(model)
    return placed(model, device, dtype)
