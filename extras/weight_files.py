"""Which files of a checkpoint folder hold its weights, and which of them are refused."""

import reprlib
from pathlib import Path

from extras.files import fits, read_json

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those named by the index, else model.safetensors, else all there are.

    A file may be a link only within the folder, or to the blobs of a hub cache: a stranger's folder cannot reach out.
    Raises as `find_tensors` of load.py does.
    """
    index_file = folder / "model.safetensors.index.json"
    weight_map = read_json(index_file, missing={"weight_map": {}}).get("weight_map")
    if not isinstance(weight_map, dict) or not fits(weight_map, dict[str, str]):
        raise ValueError(f"{index_file} has no weight_map from tensor names to file names")
    for name in weight_map.values():
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index_file} names {reprlib.repr(name)}, which is not a safetensors file in its folder")
    files = sorted({folder / name for name in weight_map.values()})
    if not files:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if not pickles:
            raise FileNotFoundError(f"{folder} has no weights in safetensors format, the only one that is loaded")
        raise ValueError(
            f"{folder} stores its weights as pickles ({', '.join(pickles)}). Loading a pickle can run any code that "
            "its author put in, so pickles are refused. Use a safetensors version of the checkpoint or, if you trust "
            "the author, convert it with transformers: from_pretrained, then save_pretrained"
        )
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for file in files:
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise ValueError(f"{file} is a link to {file.resolve()}, outside its folder: put the file itself there")
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {file.name}: finish the download")
    return files
