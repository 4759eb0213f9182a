"""Products with matrices of 4 or 8 bits, by ONNX Runtime's operator MatMulNBits, which has kernels for every CPU kind.

    x (M, in) float32, codes (out, groups, bytes), scale (out, groups)  -->  (M, out) float32

A weight is its code, less 8 or 128, times the scale of its group of consecutive inputs. The operator rounds activations
to 8 bits, with one scale per row and group, and adds up integers. It has kernels for AVX2, AVX-512, VNNI and ARM. The
package is optional: `pip install onnxruntime`.

A session computes all of its outputs at once, so it holds the matrices that multiply the same input. The model that
describes it is an ONNX file of a few nodes. It is written here, byte by byte: that is shorter than it would be with the
package `onnx`. While a session is built, the runtime packs its own copy of the matrices, with three floats for each
group. It does not copy the codes and scales that it is given, so if they are mapped from a file, the system can drop
them from memory.

Sources: MatMulNBits in onnxruntime's ContribOperators.md; onnx.proto for the numbers of the fields.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUND_TO_8_BITS = 4  # MatMulNBits' accuracy_level: what activations are rounded to
FLOAT, UINT8 = 1, 2  # onnx.proto's TensorProto.DataType


@functools.cache
def is_installed() -> bool:
    """Whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


@functools.cache
def start_threads() -> None:
    """Starts the threads that all sessions share, as many as PyTorch has. Pools of their own would compete."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


class Matrix(NamedTuple):
    """A matrix in compact form."""

    codes: Tensor  # (out, groups, bytes) uint8; of two codes of 4 bits in a byte, the first is in the lower half
    scale: Tensor  # (out, groups) float32
    bits: int  # 4 or 8


def multiplier(matrices: Sequence[Matrix], in_features: int) -> Callable[[Tensor], list[Tensor]]:
    """A function that multiplies rows by matrices, on the CPU: (M, in) float32 -> for each matrix (M, out) float32.

    `in_features` is the width of the matrices; codes that pad the last group are ignored.
    """
    import onnxruntime

    start_threads()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads, options.enable_cpu_mem_arena = False, False
    options.log_severity_level = 3  # errors only
    stored = {f"codes{i}": matrix.codes for i, matrix in enumerate(matrices)}
    stored |= {f"scale{i}": matrix.scale.float().flatten() for i, matrix in enumerate(matrices)}
    values = [onnxruntime.OrtValue.from_dlpack(tensor.detach()) for tensor in stored.values()]
    options.add_external_initializers([*stored], values)
    model = onnx_model(matrices, in_features)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    widths = [len(matrix.codes) for matrix in matrices]

    def multiply(x: Tensor) -> list[Tensor]:
        """(M, in) -> (M, out) for each matrix. The binding hands over addresses, so nothing is copied."""
        x, results = x.contiguous(), [torch.empty(len(x), width, dtype=torch.float32) for width in widths]
        if len(x):
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, "float32", x.shape, x.data_ptr())
            for i, result in enumerate(results):
                binding.bind_output(f"y{i}", "cpu", 0, "float32", result.shape, result.data_ptr())
            session.run_with_iobinding(binding)
        return results

    return multiply


def onnx_model(matrices: Sequence[Matrix], in_features: int) -> bytes:
    """y0 = MatMulNBits(x, codes0, scale0), and so on; codes and scales come from outside."""
    parts = [field(2, "products"), field(11, floats("x", in_features))]
    for i, (codes, _, bits) in enumerate(matrices):
        out_features, groups, size = codes.shape
        settings = {"K": in_features, "N": out_features, "bits": bits, "block_size": size * 8 // bits}
        settings["accuracy_level"] = ROUND_TO_8_BITS
        attributes = [field(5, field(1, name), field(3, value), field(20, 2)) for name, value in settings.items()]
        names = [field(1, name) for name in ("x", f"codes{i}", f"scale{i}")]
        operator = [field(4, "MatMulNBits"), field(7, "com.microsoft")]
        parts.append(field(1, *names, field(2, f"y{i}"), *operator, *attributes))
        parts += [outside(f"codes{i}", UINT8, codes.shape), outside(f"scale{i}", FLOAT, [out_features * groups])]
        parts.append(field(12, floats(f"y{i}", out_features)))
    versions = [field(8, field(1, domain), field(2, version)) for domain, version in (("", 21), ("com.microsoft", 1))]
    return b"".join([field(1, 10), field(7, *parts), *versions])


def outside(name: str, dtype: int, shape: Sequence[int]) -> bytes:
    """A stored tensor whose content is not in the model."""
    location = [field(13, field(1, "location"), field(2, "weights")), field(14, 1)]
    return field(5, *[field(1, size) for size in shape], field(2, dtype), field(8, name), *location)


def floats(name: str, width: int) -> bytes:
    """An input or output (M, width), float32."""
    shape = [field(1, field(2, "M")), field(1, field(1, width))]
    return field(1, name) + field(2, field(1, field(1, FLOAT), field(2, *shape)))


def field(number: int, *content: int | str | bytes) -> bytes:
    """A field of a protocol buffer: an integer, or a string or message, whose parts are joined."""
    if isinstance(content[0], int):
        return varint(number << 3) + varint(content[0])
    message = b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in content)
    return varint(number << 3 | 2) + varint(len(message)) + message


def varint(number: int) -> bytes:
    """An integer in groups of 7 bits, the lowest first; the highest bit of a byte says that another follows."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])
