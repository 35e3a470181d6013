"""Item images turned into embeddings: from a folder or a tar, cached, resumable."""

from __future__ import annotations

import hashlib
import io
import tarfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from plum.embed.cache import encode_cached
from plum.embed.image_features import NAME, VERSION, colors_and_textures
from plum.embed.models import find_encoder, first_line, identity, quiet
from plum.errors import InvalidArgument, InvalidData, MissingDependency, check_int
from plum.files import check_model_json

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class ImageFiles:
    """The images of items in a folder or an uncompressed tar, at any depth: ``<item id>.jpg``."""

    def __init__(self, path: str | Path) -> None:
        """Lists the images.

        Args:
            path: The folder or tar. Files are taken by suffix (jpg, jpeg, png, webp, gif, bmp);
                what is before it is the item id. A symbolic link counts in a folder; in a tar it
                does not, tar -h stores the file itself.

        Raises:
            InvalidData: there is no such folder or tar, it is compressed or damaged, or an item
                has two images.
        """
        self.path = Path(path)
        # Item id to the name within, and in a tar to the place of the bytes.
        self._files: dict[str, tuple[str, int, int]] = {}
        if self.path.is_dir():
            for file in sorted(self.path.rglob("*")):
                if file.is_file():
                    self._add(file.relative_to(self.path).as_posix(), 0, 0)
        elif self.path.is_file():
            try:
                with tarfile.open(self.path, "r:") as archive:
                    stored: dict[str, tarfile.TarInfo] = {}
                    for member in archive:
                        # A file with two names is stored once; the second is a hard link.
                        held = stored.get(member.linkname, member) if member.islnk() else member
                        stored[member.name] = held
                        if held.isfile():
                            self._add(member.name, held.offset_data, held.size)
            except tarfile.TarError as error:
                hint = "images gain nothing from compression; make it with tar -cf"
                raise InvalidData(self.path, "an uncompressed tar", first_line(error), hint) from (
                    None
                )
        else:
            raise InvalidData(self.path, "a folder or a tar of images", "nothing there")

    def _add(self, name: str, offset: int, size: int) -> None:
        file = Path(name)
        # macOS puts "._12.jpg" beside "12.jpg".
        if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
            return
        if file.stem in self._files:
            other = self._files[file.stem][0]
            raise InvalidData(self.path, "one image per item", f"{other} and {name}", "remove one")
        self._files[file.stem] = (name, offset, size)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._files

    def __len__(self) -> int:
        return len(self._files)

    def _file(self, item_id: str) -> tuple[str, int, int]:
        if item_id not in self._files:
            raise InvalidArgument("item_id", f"an item with an image in {self.path}", repr(item_id))
        return self._files[item_id]

    def where(self, item_id: str) -> str:
        """Returns what a message calls the image of an item.

        Raises:
            InvalidArgument: it has none.
        """
        return f"{self.path}/{self._file(item_id)[0]}"

    def read(self, item_id: str) -> bytes:
        """Returns the bytes of an item's image file.

        Raises:
            InvalidArgument: it has none.
            InvalidData: they cannot be read.
        """
        name, offset, size = self._file(item_id)
        try:
            if self.path.is_dir():
                return (self.path / name).read_bytes()
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InvalidData(
                self.where(item_id), "a readable file", error.strerror or error
            ) from (None)
        if len(data) < size:
            raise InvalidData(self.where(item_id), f"{size} bytes", len(data), "copy it again")
        return data

    def open(self, item_id: str) -> Image:
        """Returns an item's image, upright and in RGB, on white where it is transparent.

        Raises:
            InvalidArgument: it has none.
            InvalidData: it is cut off, is no image or is far too large.
            MissingDependency: Pillow is not installed.
        """
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise MissingDependency("pillow", "pipeline", "reading images") from None
        data = self.read(item_id)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image: Image.Image = Image.open(io.BytesIO(data))
                image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # 16 bits of gray, which Pillow would clip to 8.
                values = np.asarray(image)
                gray = (values >> 8).clip(0, 255).astype(np.uint8)
                gray[values == image.info.get("transparency", -1)] = 255
                image = Image.fromarray(gray)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
        # Pillow's decoders raise many kinds of errors on bytes that are not what they should be.
        except Exception as error:
            got = f"{type(error).__name__}: {first_line(error)}"
            raise InvalidData(self.where(item_id), "a whole image", got, _CORRUPT_HINT) from None


_CORRUPT_HINT = (
    'copy it again, or treat such items as without an image (corrupt="missing", of a run '
    "--set embed.corrupt_images=missing)"
)


def encode_images(
    item_ids: Sequence[str],
    *,
    images: str | Path,
    encoder: str,
    cache_dir: Path | None,
    corrupt: Literal["raise", "missing"] = "raise",
    batch_size: int = 64,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes the images of items.

    Each distinct image, by the bytes of its file, is encoded once and cached in shards, with the
    promises of :func:`plum.embed.encode_texts`.

    Args:
        item_ids: ``N`` item ids.
        images: Folder or tar of the images, see :class:`ImageFiles`.
        encoder: ``colors-and-textures``, see :func:`plum.embed.colors_and_textures`, or what
            :func:`find_encoder` takes: a vision model of transformers with its image processor.
            Of a model with a text side (CLIP, SigLIP) it is the projected image features, of
            others the pooled output, or the first token where the model's pooling has no weights
            of its own in the folder.
        cache_dir: Folder of the cache, shared by all encoders; None keeps nothing.
        corrupt: What to do with a file that is no whole image: raise an error that names it, or
            count the item as one without an image and say so once.
        batch_size: Images per forward pass.
        device: torch device; None takes a GPU if there is one.
        progress: Called with (distinct images done, distinct images).

    Returns:
        Embeddings of length 1, float32 ``[N, D]``, zeros where an item has no image, and bool
        ``[N]``, the items that have one.

    Raises:
        InvalidArgument: no items, an option out of range, or an encoder that is not found or
            fails to load.
        InvalidData: no item has an image, a file is corrupt, or an embedding is not finite or is
            zero.
        MissingDependency: Pillow or transformers is not installed.
    """
    if isinstance(item_ids, str) or len(item_ids) == 0:
        raise InvalidArgument("item_ids", "a list of at least one item id", repr(item_ids))
    if corrupt not in ("raise", "missing"):
        raise InvalidArgument("corrupt", "'raise' or 'missing'", repr(corrupt))
    check_int("batch_size", batch_size)
    files = ImageFiles(images)
    compute, cache_name = _encoder(encoder, device)
    keys = {
        item: hashlib.sha256(files.read(item)).digest()
        for item in dict.fromkeys(item_ids)
        if item in files
    }
    if not keys:
        got = f"none of {len(files)} named as an item"
        hint = f"an image is called <item id>.jpg, for example {item_ids[0]}.jpg"
        raise InvalidData(images, "an image of at least one item", got, hint)
    distinct: dict[bytes, str] = {}
    for item, key in keys.items():
        distinct.setdefault(key, item)
    order = list(distinct.values())
    bad: list[str] = []

    def encode(rows: list[int]) -> tuple[list[int], np.ndarray]:
        kept, batches = [], []
        # Never more than a batch of decoded images at once: they may be large.
        for start in range(0, len(rows), batch_size):
            pictures = []
            for row in rows[start : start + batch_size]:
                try:
                    pictures.append(files.open(order[row]))
                    kept.append(row)
                except InvalidData as error:
                    if corrupt == "raise":
                        raise
                    bad.append(str(error).removesuffix(f"; {_CORRUPT_HINT}"))
            if pictures:
                batches.append(compute(pictures))
        vectors = np.concatenate(batches) if batches else np.empty((0, 1), np.float32)
        norms = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(wrong):
            got = "only zeros" if norms[wrong[0]] == 0 else "NaN or infinity"
            where = files.where(order[kept[wrong[0]]])
            raise InvalidData(where, "a finite embedding that is not zero", f"{got} from {encoder}")
        return kept, vectors / norms[:, None]

    cache = None if cache_dir is None else Path(cache_dir) / cache_name
    known = encode_cached(list(distinct), encode, cache, progress)
    if bad:
        warnings.warn(
            f"{len(bad)} of {len(distinct)} images are corrupt and count as missing; the first:"
            f" {bad[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    if not known:
        raise InvalidData(images, "an image of at least one item", "corrupt images only")
    width = len(next(iter(known.values())))
    embeddings = np.zeros((len(item_ids), width), dtype=np.float32)
    present = np.zeros(len(item_ids), dtype=bool)
    for row, item in enumerate(item_ids):
        embedding = known.get(keys[item]) if item in keys else None
        if embedding is not None:
            embeddings[row], present[row] = embedding, True
    return embeddings, present


def _encoder(name: str, device: str | None) -> tuple[Callable[[list[Image]], np.ndarray], str]:
    """Returns what turns images into vectors, and the name of its cache; loads nothing yet."""
    if name == NAME:

        def describe(pictures: list[Image]) -> np.ndarray:
            return np.stack([colors_and_textures(picture) for picture in pictures])

        return describe, f"{NAME}-{VERSION}"
    folder = Path(find_encoder(name))
    loaded: list[Any] = []

    def compute(pictures: list[Image]) -> np.ndarray:
        import torch

        if not loaded:
            loaded.extend(_load(folder, device))
        model, processor, pooled = loaded
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return _features(model, pixels.to(model.device), pooled)

    return compute, f"{identity(folder)[:32]}-image"


def _load(folder: Path, device: str | None) -> tuple[Any, Any, bool]:
    """Returns model, image processor, and whether the model's pooling is in the checkpoint."""
    import torch

    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError:
        raise MissingDependency("transformers", "pipeline", "encoding images") from None
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with quiet():
            # Pillow resizes alike whether torchvision is there or not.
            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, backend="pil"
            )
            model, info = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:
        check_model_json(folder)
        raise InvalidArgument(
            "encoder",
            "a vision model with an image processor that transformers loads",
            f"{str(folder)!r} ({type(error).__name__}: {first_line(error)})",
        ) from error
    absent = [key for key in info["missing_keys"] if "pooler" not in key]
    if absent:
        raise InvalidArgument(
            "encoder", "a model with all its weights", f"{str(folder)!r} without {absent[0]}"
        )
    return model.to(device).eval(), processor, not info["missing_keys"]


def _features(model: Any, pixels: Any, pooled: bool) -> np.ndarray:
    """Returns ``[B, D]``; random pooling weights, which transformers fills in, are not used."""
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=pixels)
        vectors = output if hasattr(output, "shape") else output.pooler_output
    else:
        output = model(pixel_values=pixels)
        vectors = output.get("pooler_output") if pooled else None
        if vectors is None:
            vectors = output.last_hidden_state[:, 0]
    return vectors.flatten(1).float().cpu().numpy()
