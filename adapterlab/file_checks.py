"""What a preflight compares of an adapter's files: the tensors, by their header, and the vocabulary."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.methods import is_drawn
from adapterlab.preflight import Preflight
from adapterlab.quantization import packed_as
from adapterlab.vocabulary import differences, read_vocabulary
from adapterlab.weights import header_kinds, header_shapes, read_tensor

if TYPE_CHECKING:
    from adapterlab.hub import AdapterFiles

Shapes = Mapping[str, tuple[int, ...]]
_LISTED = 4  # how many keys a sentence names before it counts the rest


def read_shapes(flight: Preflight, files: AdapterFiles) -> Shapes | None:
    """Shape by key of what the file holds; None if it can't be read, which is told. So are tensors that hold no floats."""
    try:
        shapes = header_shapes(files.weights_file)
        odd = header_kinds(files.weights_file) if files.weights_file.suffix == ".safetensors" else {}
        if odd:
            listed_ = listed(f"{key} is {kind}" for key, kind in odd.items())
            flight.tell(
                f"{len(odd)} of its {len(shapes)} tensors hold no floats ({listed_}), and PEFT would take them as if.",
                [("tensors", key, kind, "floats") for key, kind in odd.items()],
                problem=True,
            )
        return shapes
    except AdapterLabError as error:
        flight.tell(str(error), [("tensors", files.weights_file.name, "not readable", "adapter weights")], problem=True)
        return None


def leave_copies(flight: Preflight, model: Any, files: AdapterFiles, expected: Shapes | None, shapes: Shapes) -> Shapes:
    """`shapes` without the base's own embeddings and head, which PEFT copies into the file of an adapter that stands on them
    (`save_embedding_layers`). What is left out equals the base's, and is told; these tensors alone are read."""
    ends = _ends(model)
    found = {key: ends[path] for key in shapes if (path := _base_path(key)) in ends and key not in (expected or ())}
    copies = [key for key, module in found.items() if _equals(files, key, shapes[key], module)]
    if copies:
        flight.left_out += copies
        flight.tell(f"its copy of the base's own tensors is left out: {listed(copies)}.", [], problem=False)
    others = [key for key in found if key not in copies]
    if others:
        flight.tell(
            f"it brings {'tensors' if len(others) > 1 else 'a tensor'} of the base itself with other values than this base's: "
            f"{listed(others)}. Base must stay base: open the lab with the base that it was trained on, or have it saved "
            "without them, by save_pretrained(folder, save_embedding_layers=False).",
            [("tensors", key, list(shapes[key]), "as in the base") for key in others],
            problem=True,
        )
    return {key: shape for key, shape in shapes.items() if key not in found}


def _ends(model: Any) -> dict[str, Any]:
    """Path → module, of the input and output embeddings."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    modules = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in modules if any(module is end for end in ends)}


def _base_path(key: str) -> str:
    """The module whose own tensor this is, if it is one: PEFT's layers keep the base's as their base_layer."""
    return key.rpartition(".")[0].removesuffix(".base_layer")


def _equals(files: AdapterFiles, key: str, shape: tuple[int, ...], module: Any) -> bool:
    """Whether the file's tensor is the one that `module` has, in the dtype that it has it in."""
    kept = module._parameters.get(key.rpartition(".")[2])
    if kept is None or kept.is_meta or packed_as(module) is not None or tuple(kept.shape) != shape:
        return False
    return bool((read_tensor(files.weights_file, key).to(kept.device, kept.dtype) == kept).all())


def check_tensors(flight: Preflight, model: Any, config: Any, expected: Shapes | None, shapes: Shapes) -> None:
    """What the file holds against what the model's layers would take.

    A key that no layer of this config owns is a problem, not a curiosity: PEFT would write it into the base. Where nothing
    is known of these layers, the keys are held against the model's modules alone.
    """
    if expected is None:
        _check_places(flight, model, shapes)
        return
    flight.expected = len(expected)
    foreign = [key for key in shapes if key not in expected]
    matched = [key for key in shapes if key in expected]
    flight.tensors = len(matched)
    flight.parameters = sum(math.prod(shapes[key]) for key in matched)
    if foreign:
        flight.tell(
            f"{len(foreign)} of its {len(shapes)} tensors belong to no layer of its own config and would land in the "
            f"base or nowhere: {listed(foreign)}.",
            [("tensors", key, list(shapes[key]), "no such tensor") for key in foreign],
            problem=True,
        )
    wrong = [key for key in matched if shapes[key] != expected[key]]
    _tell_shapes(flight, [(key, shapes[key], list(expected[key])) for key in wrong])
    if not matched:
        flight.tell("none of its tensors matches a layer of this model.", [], problem=True)
    gone = [key for key in expected if key not in shapes]
    if gone:
        # A missing LoRA pair starts as zero and adds nothing, unless the config asks for random numbers.
        random = is_drawn(config) or not matched
        told = [("tensors", key, "missing", list(expected[key])) for key in gone]
        said = f"{len(matched)} of {len(expected)} tensors loaded; missing from the file: {listed(gone)}."
        flight.tell(said, told, problem=random)


def _tell_shapes(flight: Preflight, wrong: list[tuple[str, tuple[int, ...], Any]]) -> None:
    if wrong:
        details = [f"{key} is {list(found)}, the model needs {wanted}" for key, found, wanted in wrong]
        flight.tell(
            f"{len(wrong)} tensors have another shape ({listed(details)}): it was made for another base.",
            [("shapes", key, list(found), wanted) for key, found, wanted in wrong],
            problem=True,
        )


def _check_places(flight: Preflight, model: Any, shapes: Shapes) -> None:
    modules = dict(model.named_modules())
    lost, wrong = [], []
    for key, shape in shapes.items():
        path, kind = _split(key, modules)
        if path is None:
            lost.append(key)
            continue
        wanted = _side(modules[path], kind, shape)
        if wanted is not None:
            wrong.append((key, shape, wanted))
    if lost:
        flight.tell(
            f"{len(lost)} of its {len(shapes)} tensors are for modules that this model has not: {listed(lost)}.",
            [("tensors", key, list(shapes[key]), "no such module") for key in lost],
            problem=True,
        )
    _tell_shapes(flight, wrong)


def _split(key: str, modules: Mapping[str, Any]) -> tuple[str | None, str]:
    """The module that a tensor is for, None if this model has it not, and what of the adapter it is: `lora_A`."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        if re.match(r"(lora|ia3|hada|lokr|oft|boft|vera|vblora|randlora|miss|hra)_", part):
            path = ".".join(parts[:place])
            return (path if path in modules else None), part
    path = key.rpartition(".")[0]
    return (path if path in modules else None), ""


def _side(module: Any, kind: str, shape: tuple[int, ...]) -> str | None:
    """What the model's side of a LoRA factor must be, in words, where `shape` has another; None where it fits."""
    weight = getattr(module, "weight", None)
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if sizes[0] is None and weight is not None and weight.dim() == 2:  # Conv1D and embeddings lie transposed
        sizes = tuple(weight.shape)
    if not all(isinstance(size, int) for size in sizes) or len(shape) != 2:
        return None
    if kind in ("lora_A", "lora_embedding_A") and shape[1] != sizes[0]:
        return f"[r, {sizes[0]}]"
    if kind in ("lora_B", "lora_embedding_B") and shape[0] != sizes[1]:
        return f"[{sizes[1]}, r]"
    return None


def check_vocabulary(
    flight: Preflight, model: Any, raw: Mapping[str, Any], shapes: Shapes, files: AdapterFiles, tokenizer: Any
) -> None:
    """Tables of embeddings in the file, trained tokens, and a tokenizer beside it, against the model's rows and the lab's
    tokenizer."""
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None) or (len(embeddings.weight) if embeddings is not None else 0)
    if not rows:
        return
    _check_tables(flight, model, rows, shapes)
    beyond = [index for index in _indices(raw) if index >= rows]
    if beyond:
        flight.tell(
            f"It trains tokens {listed(map(str, beyond))}, and this model has {rows} rows of embeddings. "
            + _resize(max(beyond) + 1),
            [("vocabulary", f"token {index}", index, f"below {rows}") for index in beyond],
            problem=True,
        )
    theirs = read_vocabulary(files.folder)
    if theirs.tokens > rows:
        flight.tell(
            f"The tokenizer beside it knows {theirs.tokens} tokens, this model has {rows} rows of embeddings. If it was "
            f"trained with them: {_resize(theirs.tokens)}",
            [("vocabulary", "tokenizer", theirs.tokens, f"at most {rows}")],
            problem=False,
        )
    unknown, roles = differences(theirs, tokenizer)
    if unknown or roles:
        texts = [f"{text!r} is unknown" for text in unknown]
        texts += [f"{role} is {theirs.roles[role]!r} there and {mine!r} here" for role, mine in roles.items()]
        told = [("vocabulary", text, "a special token", "not in the lab's tokenizer") for text in unknown]
        told += [("vocabulary", role, theirs.roles[role], mine) for role, mine in roles.items()]
        flight.tell(
            f"The tokenizer beside it has other special tokens than the lab's ({listed(texts)}): if it was trained with "
            f"them, open the lab with tokenizer={str(files.source)!r}.",
            told,
            problem=False,
        )
    if theirs.unread:
        told = [("vocabulary", each.partition(":")[0], each, "JSON that can be read") for each in theirs.unread]
        flight.tell(f"Its tokenizer was not compared: {listed(theirs.unread)}.", told, problem=False)


def _check_tables(flight: Preflight, model: Any, rows: int, shapes: Shapes) -> None:
    """Tensors of the embeddings and of the head whose vocabulary is of another size than the model's."""
    paths = _ends(model)
    head = {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
    other: dict[str, int] = {}
    for key, shape in shapes.items():
        path, kind = _split(key.replace(".base_layer.", "."), paths)
        if path is None or len(shape) == 0:
            continue
        whole = kind == "" and key.endswith(("weight", "bias"))
        size = shape[0] if whole or (kind == "lora_B" and path in head) else None
        size = shape[-1] if kind == "lora_embedding_A" else size
        if size is not None and size != rows:
            other[key] = size
    if other:
        size = max(other.values())
        flight.tell(
            f"It was trained with a vocabulary of {size} tokens, this model has {rows} rows ({listed(other)}). {_resize(size)}",
            [("vocabulary", key, size, rows) for key, size in other.items()],
            problem=True,
        )


def _resize(tokens: int) -> str:
    return f"Load the base with transformers, call model.resize_token_embeddings({tokens}), and open AdapterLab(model) on it."


def _indices(raw: Mapping[str, Any]) -> list[int]:
    """Token ids that the config trains."""
    found: list[int] = []
    for field in ("trainable_token_indices", "token_indices"):
        value = raw.get(field)
        for each in value.values() if isinstance(value, dict) else [value]:
            found += [i for i in each if isinstance(i, int)] if isinstance(each, list) else []
    return found


def listed(items: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    items = [item if len(item) <= 160 else f"{item[:159]}…" for item in items]
    rest = len(items) - _LISTED
    return "; ".join(items[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
