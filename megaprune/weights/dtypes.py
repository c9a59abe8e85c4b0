"""Dtypes by the names that safetensors gives them. Planning and moving bytes need no more, and torch takes a second to
load."""

# safetensors' name: torch's, and bytes of one number
_KNOWN = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
TORCH_NAMES: dict[str, str] = {name: torch_name for name, (torch_name, _) in _KNOWN.items()}
OF_TORCH: dict[str, str] = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
ITEM_BYTES: dict[str, int] = {name: num_bytes for name, (_, num_bytes) in _KNOWN.items()}
# In the order of safetensors' own writer, which puts tensors of later ones first.
STORED_ORDER = ("BOOL", "U8", "F8_E4M3", "F8_E8M0", "F16", "BF16", "I32", "F32", "F64", "I64")
# Dtypes that a model may be stored in; matrices also in FP8, under scales of its blocks.
WEIGHT_DTYPES = ("F32", "F16", "BF16")
FP8 = "F8_E4M3"
SCALE_DTYPES = (*WEIGHT_DTYPES, "F8_E8M0")


def is_float(name: str) -> bool:
    """Return whether its numbers are floating-point numbers."""
    return TORCH_NAMES[name].startswith(("float", "bfloat"))
