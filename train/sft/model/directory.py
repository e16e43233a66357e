"""A model directory, opened once: its configuration, its tensors by their headers, whose code computes it, which
tensors stay fp32, and its files.

Loading, saving, merging and chatting use this one object. Refused (exit code 2): a directory that is not there, has no
configuration or weights, is quantised, or lacks a file of its own code; tensors that are missing, unexpected or
misshapen: they would be trained from random values, or lost when saving.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sft.messages import Refused, first_few, read_json
from sft.model.files import OF_A_TOKENIZER, apply_umask, code_files, files_of_a_model, is_adapter, write_json
from sft.model.generations import LEGACY, why_not_native
from sft.model.weight_files import DTYPES, Stored, build_on_meta, names_in_model, open_tensors, read_headers

# Unexpected, and no harm: a tied head may stand in the file as well (ZeRO-2 writes it), and old files hold the rotary
# frequencies, which are computed.
HARMLESS = (r"^lm_head\.weight$", r"rotary_emb\.inv_freq$")
# The router's correction of Hy3 and Hy4, by both its names: fp32 in any directory.
CORRECTION_BIAS = ("e_score_correction_bias", "expert_bias")
KEPT_IN_FP32 = "kept_in_fp32.json"  # of a directory that is all fp32: what stays so in half precision


@dataclass(eq=False)
class ModelDirectory:
    """A directory, and the tokenizer's that goes with it. What it holds is read when it is asked for, once."""

    path: Any  # of the model; None: a model built from flags, which has a tokenizer's files alone
    tokenizer_path: Any = None  # the tokenizer's directory; None: the model's
    trusted: bool = True  # whether the model's code may run
    tokenizer_trusted: bool = True
    model_code: str = "auto"  # auto, native or remote, as `--model_code`
    name: str = ""  # what messages call it; default: the path
    hub_id: str | None = None  # what it was called before its files were fetched
    examine: Callable[[Any], object] = lambda model: None  # called with the model before its weights are read
    added: dict[str, bytes] = field(default_factory=dict)  # files that saved directories get beside its own

    def __post_init__(self):
        self.path = None if self.path is None else Path(self.path)
        self.tokenizer_path = self.path if self.tokenizer_path is None else Path(self.tokenizer_path)
        self.name = self.name or str(self.path)

    def check(self) -> None:
        """Refuse a directory that cannot be loaded, before anything is."""
        if self.path is None:
            return
        if not self.path.is_dir():
            raise Refused(f"{self.name}: no such directory (looked in {Path.cwd()})")
        if is_adapter(self.path):
            raise Refused(f"{self.name}: is an adapter and not a model; of a hub id: hf download it, and give DIR")
        if not (self.path / "config.json").is_file():
            raise Refused(f"{self.name}: has no config.json")
        if not self.tensors and not any(self.path.glob("pytorch_model*.bin")):
            raise Refused(f"{self.name}: holds no weights (*.safetensors)")
        if self.config.get("quantization_config"):
            raise Refused(f"{self.name}: is quantised (quantization_config in config.json): use its base")
        if self.brings_old_code and self.trusted:
            for file in code_files(self.path, self.auto_map):
                if not (self.path / file).is_file():
                    raise Refused(f"{self.path}: its code needs {file}, which is not there")
        _ = self.runs_own_code

    @property
    def base_name(self) -> str:
        """What an adapter's files call it: a hub id, or its path from any directory."""
        return self.hub_id or str(self.path.resolve())

    # ------------------------------------------------------------------------------------------ what it holds

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; {} of a model built from flags."""
        return read_json(self.path / "config.json") if self.path else {}

    @cached_property
    def headers(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """(model.safetensors.index.json or {}, {name: Stored} file by file); two {} where the weights are in files of
        another kind."""
        return read_headers(self.path) if self.path and any(self.path.glob("*.safetensors")) else ({}, {})

    @property
    def tensors(self) -> dict[str, Stored]:
        """{name: Stored}; {} where the weights are in files of another kind."""
        return self.headers[1]

    def values(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The directory's own values of the named tensors."""
        return {name: self.opened[self.tensors[name].file].get_tensor(name) for name in names}

    @cached_property
    def opened(self) -> dict[str, Any]:
        """{file: opened} of the weights. Their content can be read even after the files are deleted."""
        return {file: open_tensors(self.path / file) for file in {t.file for t in self.tensors.values()}}

    # ------------------------------------------------------------------------------------------ whose code runs

    @property
    def auto_map(self) -> dict[str, Any]:
        """Which of its Python files hold which class."""
        return self.config.get("auto_map") or {}

    @property
    def brings_old_code(self) -> bool:
        """Whether it brings code of transformers 4.41. A13B is published as `hunyuan` and as transformers'
        `hunyuan_v1_moe`, both times with that code beside it."""
        kinds = (LEGACY, "hunyuan_v1_moe", "hunyuan_v1_dense")
        return "AutoModelForCausalLM" in self.auto_map and self.config.get("model_type") in kinds

    @property
    def runs_own_code(self) -> bool:
        """Whether the code that it brings computes the model, and not transformers' class. Refuses a model that only
        that code computes, where it may not run."""
        own = self.model_code != "native" and "AutoModelForCausalLM" in self.auto_map
        if self.brings_old_code:
            why = why_not_native(self.config)
            if self.model_code == "native" and why:
                raise Refused(f"--model_code native: transformers' classes do not compute this model: it has {why}")
            own = self.model_code == "remote" or why is not None
        if self.model_code == "remote" and self.path and not own:
            raise Refused(f"{self.name}: brings no code that computes it (--model_code remote, or its adapter)")
        if own and not self.trusted and (self.model_code == "remote" or self.brings_old_code):
            raise Refused(f"{self.name}: is computed by code that it brings: allow that (--trust_remote_code)")
        return own and self.trusted

    def check_tensors(self, cls: type, config: Any) -> None:
        """Refuse tensors that are not those of the class, under every ZeRO stage alike and before they are read: under
        ZeRO-3 from_pretrained does not tell of what is unexpected, and of shapes on one rank only."""
        if not self.tensors:
            return
        model = build_on_meta(cls, config)
        self.examine(model)
        files = names_in_model(model, self.tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        ignored = re.compile("|".join([*HARMLESS, *(model._keys_to_ignore_on_load_unexpected or ())]))
        missing = sorted(shapes.keys() - files.keys() - set(model.all_tied_weights_keys))
        unexpected = [name for key in sorted(files.keys() - shapes.keys()) for name in files[key]]
        unexpected = [name for name in unexpected if not ignored.search(name)]
        mismatched = []
        for key in sorted(shapes.keys() & files.keys()):
            stored = [self.tensors[name].shape for name in files[key]]
            fills = sum(map(math.prod, stored)) == math.prod(shapes[key])
            stacked = fills and len(stored) > 1 and len(set(stored)) == 1  # experts
            if stored != [shapes[key]] and not stacked:
                mismatched.append(key)
        self.refuse_weights(missing=missing, unexpected=unexpected, mismatched=mismatched)

    def refuse_weights(self, **kinds: list[str]) -> None:
        """Refuse weights that are missing, unexpected or mismatched, if there are any."""
        for kind, names in kinds.items():
            if names:
                raise Refused(f"{self.name}: {len(names)} weights are {kind}: {first_few(names)}")

    # ------------------------------------------------------------------------------------------ in which dtype

    @cached_property
    def dtype(self) -> str:
        """The dtype of most numbers in the directory, as headers spell it."""

        def numbers(dtype: str) -> int:
            return sum(math.prod(tensor.shape) for tensor in self.tensors.values() if tensor.dtype == dtype)

        return max(DTYPES, key=numbers)

    @cached_property
    def fp32_names(self) -> set[str]:
        """The tensors that stay fp32 when the directory is saved in half precision: what it keeps so beside weights in
        half precision (a router), and the correction bias of Hy3 and Hy4."""
        if self.path and (self.path / KEPT_IN_FP32).is_file():
            return set(read_json(self.path / KEPT_IN_FP32)["tensors"])
        names = {name for name in self.tensors if name.endswith(CORRECTION_BIAS)}
        if self.dtype != "F32":
            names |= {name for name, tensor in self.tensors.items() if tensor.dtype == "F32"}
        return names

    @cached_property
    def unused(self) -> set[str]:
        """The tensors of next-token-prediction layers, which transformers' classes do not have."""
        layers = self.config.get("num_hidden_layers") or math.inf

        def is_beyond(name: str) -> bool:
            number = re.match(r"model\.layers\.(\d+)\.", name)
            return name.startswith("model.mtp_layers.") or bool(number and int(number[1]) >= layers)

        return {name for name in self.tensors if is_beyond(name)}

    def cast(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors to save, on the CPU: floating-point ones in `dtype`, `fp32_names` in fp32, `unused` as they are."""
        cast = {}
        for name, value in state.items():
            if value.is_floating_point() and name not in self.unused:
                in_fp32 = name in self.fp32_names or name.endswith(CORRECTION_BIAS)
                value = value.to("cpu", torch.float32 if in_fp32 else dtype)
            cast[name] = value
        return cast

    # ------------------------------------------------------------------------------------------ its files

    @cached_property
    def contents(self) -> dict[str, bytes]:
        """{name: content} of what belongs to the model beside weights and config.json. Of the two directories' files
        that make a tokenizer, a chat template among them, the tokenizer's alone. Prints what else is there."""
        found = files_of_a_model(self.tokenizer_path) if self.tokenizer_path else {}
        if self.path and not self.path.samefile(self.tokenizer_path):
            auto_map = {key: value for key, value in self.auto_map.items() if key != "AutoTokenizer"}
            code = code_files(self.path, auto_map)
            for name, path in files_of_a_model(self.path).items():
                if name in code or not (name.endswith(".py") or OF_A_TOKENIZER.fullmatch(name)):
                    found[name] = path
        return {name: path.read_bytes() for name, path in found.items()}

    def hold(self) -> None:
        """Read and open now all that saved directories will get: this directory may be a checkpoint that is rotated
        away before the run ends."""
        _ = self.contents, self.opened, self.fp32_names

    def write(self, directory: Path, dtype: torch.dtype | None, masters: bool = False) -> None:
        """Put the files beside saved weights of `dtype`; None: an adapter, which has no config.json.

        Args:
            masters: the weights are fp32 although the directory's own are not.
        """
        apply_umask(directory)
        for name, content in (self.contents | self.added).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        if masters and self.fp32_names:
            write_json(directory / KEPT_IN_FP32, {"tensors": sorted(self.fp32_names)})
        if dtype is not None:
            file = directory / "config.json"
            config = self.config or (read_json(file) | {"use_cache": True})  # which is off in the Trainer
            keys = {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}
            write_json(file, config | dict.fromkeys(keys, str(dtype).removeprefix("torch.")))
