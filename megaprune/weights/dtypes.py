"""Dtypes by their safetensors names. Planning and copying need no torch, which takes a second to import."""

# safetensors name: torch name, and bytes per element
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
# In the order of safetensors' own writer, which writes tensors of later dtypes first.
STORED_ORDER = ("BOOL", "U8", "F8_E4M3", "F8_E8M0", "F16", "BF16", "I32", "F32", "F64", "I64")
# Dtypes that a model may be stored in. Matrices may also be in FP8, with scales of blocks.
WEIGHT_DTYPES = ("F32", "F16", "BF16")
FP8 = "F8_E4M3"
SCALE_DTYPES = (*WEIGHT_DTYPES, "F8_E8M0")


def is_float(name: str) -> bool:
    """Return whether a dtype is a floating-point type."""
    return TORCH_NAMES[name].startswith(("float", "bfloat"))
