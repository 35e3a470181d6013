"""The configuration of a run: pydantic models, presets, YAML files and ``a.b=c`` settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from plum.errors import InvalidConfig
from plum.files import read_json

# Whole, for a run may be gone on with from another folder.
_Place = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


def _whole_if_folder(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


# A folder, or a name that stands for itself, such as one on the hub.
_Model = Annotated[str, AfterValidator(_whole_if_folder)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Which catalog and log to read."""

    dataset: str = "synthetic"
    data_dir: _Place | None = None
    items: _Place | None = None
    interactions: _Place | None = None
    num_items: int = Field(default=1200, ge=1, description="of the synthetic catalog")
    num_users: int = Field(default=3000, ge=1, description="of the synthetic log")
    min_user_interactions: int = Field(default=5, ge=1)
    min_item_interactions: int = Field(default=5, ge=0)


class EmbedConfig(_Section):
    """How the text and the image of an item become vectors."""

    encoder: _Model = "sentence-transformers/all-MiniLM-L6-v2"
    layer: int | None = Field(default=None, ge=0, description="inner layer of the text encoder")
    template: str | None = Field(
        default=None, description="columns in braces, or naive, enriched, plots or abstracts"
    )
    image: _Model | None = Field(default=None, description="image encoder; none without it")
    images: _Place | None = Field(
        default=None, description="folder or tar of <item id>.jpg; the data set's own without it"
    )
    corrupt_images: Literal["raise", "missing"] = "raise"
    behavior: int | None = Field(
        default=None,
        ge=1,
        description="most features of vectors of the log; none without it",
    )
    batch_size: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _images_have_an_encoder(self) -> EmbedConfig:
        if self.images is not None and self.image is None:
            raise ValueError("images needs image, an encoder such as colors-and-textures")
        return self


class TokenizeConfig(_Section):
    """How a vector becomes a SID; see :func:`plum.quantize.fit_tokenizer`."""

    kind: Literal["rq-vae", "rq-kmeans", "r-vq"] = "rq-kmeans"
    codebook_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(256, 256, 256), min_length=1
    )
    latent_dim: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=100, ge=1, description="of rq-vae and r-vq")
    patience: int | None = Field(default=None, ge=1, description="of rq-vae")
    whiten: bool = Field(default=False, description="each modality, of rq-vae and rq-kmeans")
    progressive_masking: bool = Field(default=False, description="of rq-vae")
    co_occurrence_weight: float = Field(default=0.0, ge=0, description="of rq-vae; 0 for none")
    co_occurrence_window: int = Field(default=5, ge=1, description="in positions of a history")
    collisions: Literal["accept", "suffix", "nearest_free", "balanced"] = "accept"

    @model_validator(mode="after")
    def _only_of_rq_vae(self) -> TokenizeConfig:
        for name in ("patience", "progressive_masking", "co_occurrence_weight"):
            if getattr(self, name) and self.kind != "rq-vae":
                raise ValueError(f"{name} needs the kind rq-vae, not {self.kind}")
        if self.whiten and self.kind == "r-vq":
            raise ValueError("whiten needs the kind rq-vae or rq-kmeans, not r-vq")
        return self


class PretrainConfig(_Section):
    """Continued pre-training; see :class:`plum.lm.PretrainConfig`. Off while ``steps`` is 0."""

    base: _Model | None = Field(
        default=None, description="folder or hub name of a language model that reads text"
    )
    steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    behavior_share: float = Field(default=0.5, ge=0, le=1, description="of the tokens")
    max_items: int = Field(default=50, ge=1)
    columns: tuple[str, ...] | None = Field(
        default=None, description="what is told of an item; every column without it"
    )
    attributes: tuple[str, ...] | None = Field(
        default=None,
        description="columns that stand in a history; genres or categories without it",
    )
    held_out_items: float = Field(default=0.05, ge=0, lt=1)
    general_text: _Place | None = Field(
        default=None, description="a text whose loss is watched; it is not trained on"
    )
    eval_every_steps: int | None = Field(default=None, ge=1)
    save_every_steps: int = Field(default=200, ge=1)
    bf16: bool | None = None
    lora_rank: int = Field(default=0, ge=0, description="0 trains all weights")

    @model_validator(mode="after")
    def _has_a_base(self) -> PretrainConfig:
        if self.steps and self.base is None:
            raise ValueError("steps above 0 need a base, a folder or hub name")
        return self


class FinetuneConfig(_Section):
    """How the generator is trained; see :class:`plum.lm.FinetuneConfig`."""

    base: _Model = "scratch:small"
    epochs: float = Field(default=8, gt=0)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_items: int = Field(default=50, ge=1)
    dropout: float = Field(default=0.3, ge=0, lt=1, description="of the bases scratch:depth-*")
    patience: int | None = Field(default=None, ge=1)
    save_every_steps: int = Field(
        default=200,
        ge=1,
        description="of bases that write tokens; scratch:depth-* saves every 5 epochs",
    )
    bf16: bool | None = None
    lora_rank: int = Field(default=0, ge=0, description="0 trains all weights")


class EvaluateConfig(_Section):
    """How the recommendations of the test users are made and scored."""

    num_beams: int = Field(default=50, ge=1)
    batch_size: int = Field(default=64, ge=1)
    score: Literal["full", "valid"] = Field(
        default="full", description="of bases that write tokens; scratch:depth-* does not use it"
    )
    filter_seen: bool = Field(
        default=False, description="leave out items of the history; the baselines do the same"
    )
    sasrec: bool = Field(
        default=False, description="also train SASRec with full softmax and rank by it"
    )
    tiger: bool = Field(
        default=False,
        description="also train an encoder-decoder on the SIDs; scratch:t5-tiny without a GPU",
    )


class RecommendConfig(_Section):
    """The sample recommendations of the report."""

    num_users: int = Field(default=8, ge=1)
    num_items: int = Field(default=10, ge=1)
    filter_seen: bool = Field(
        default=True, description="leave out items of the history; `plum recommend` does the same"
    )


class Config(_Section):
    """A whole run; every stage reads its own section and ``seed``."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    data: DataConfig = DataConfig()
    embed: EmbedConfig = EmbedConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recommend: RecommendConfig = RecommendConfig()


# What differs from the defaults above, by preset and then by data set.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "tokenize": {"kind": "rq-vae", "codebook_sizes": (128, 128, 128)},
        "finetune": {"base": "scratch:tiny", "epochs": 20, "max_items": 20, "learning_rate": 5e-3},
    },
    "cpu": {
        "embed": {"behavior": 64},
        "tokenize": {"collisions": "balanced"},
        "finetune": {
            "base": "scratch:depth-tiny",
            "epochs": 40,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "max_items": 200,
            "dropout": 0.2,
        },
    },
    "gpu": {
        "embed": {"behavior": 64},
        "tokenize": {"collisions": "balanced"},
        "finetune": {
            "base": "scratch:depth-base",
            "epochs": 60,
            "batch_size": 128,
            "learning_rate": 1e-3,
            "max_items": 200,
        },
        "evaluate": {"batch_size": 256, "sasrec": True},
    },
}
DATASETS: dict[str, dict[str, Any]] = {
    "tables": {"min_user_interactions": 1, "min_item_interactions": 0},
    "synthetic": {"min_user_interactions": 1, "min_item_interactions": 0},
}


def resolve_config(
    *,
    preset: str | None = None,
    dataset: str | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Merges defaults, preset, data set, YAML file and settings, later ones winning.

    Args:
        preset: ``demo``, ``cpu`` or ``gpu``; None for that of ``base``, or else ``cpu``.
        dataset: Name of a data set, see :func:`plum.data.load_dataset`; file and settings may name
            another. None for that of ``base``, or else ``synthetic``.
        file: YAML file with any part of the configuration.
        settings: ``section.key=value`` pairs; values are read as YAML.
        base: A whole configuration to start from. With a preset only its data and seed are kept,
            with another data set nothing of its data.

    Raises:
        InvalidConfig: a preset, key or value is not known; the message names it.
    """
    if preset is not None and preset not in PRESETS:
        raise InvalidConfig(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    wanted: dict[str, Any] = {"data": {"dataset": dataset}} if dataset is not None else {}
    if file is not None:
        _merge(wanted, _read_yaml(file))
    for setting in settings:
        _merge(wanted, _read_setting(setting))
    merged = dict(base or {})
    if base is None or preset is not None:
        merged = {key: merged[key] for key in ("seed", "data") if key in merged}
        _merge(merged, PRESETS[preset or "cpu"])
    before = _name_of_data(merged)
    name = _name_of_data(wanted) or before or "synthetic"
    if name != before:
        merged["data"] = {"dataset": name, **DATASETS.get(name, {})}
    _merge(merged, wanted)
    return _validated(merged)


def load_config(path: Path) -> Config:
    """Reads the configuration that a run saved as JSON."""
    return _validated(read_json(path))


def _read_yaml(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidConfig(f"{file}: expected a YAML file, got no such file") from None
    except OSError as error:
        raise InvalidConfig(f"{file}: expected a YAML file, got: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidConfig(f"{file}: expected a YAML mapping, got: {reason}") from None
    if values is not None and not isinstance(values, Mapping):
        raise InvalidConfig(f"{file}: expected a YAML mapping, got a {type(values).__name__}")
    return values or {}


def _read_setting(setting: str) -> Mapping[str, Any]:
    import yaml

    path, equals, value = setting.partition("=")
    if not equals or not path:
        raise InvalidConfig(f"--set: expected section.key=value, got {setting!r}")
    try:
        nested: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidConfig(f"--set {path}: {' '.join(str(error).split())}") from None
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return nested


def _name_of_data(values: Mapping[str, Any]) -> str | None:
    data = values.get("data")
    name = data.get("dataset") if isinstance(data, Mapping) else None
    return name if isinstance(name, str) else None


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping):
            old = into.get(key)
            into[key] = dict(old) if isinstance(old, Mapping) else {}
            _merge(into[key], value)
        else:
            into[key] = value


def _validated(values: Mapping[str, Any]) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "configuration"
        if first["type"] == "extra_forbidden":
            section: Any = Config
            for part in first["loc"][:-1]:
                section = section.model_fields[part].annotation
            known = ", ".join(section.model_fields)
            raise InvalidConfig(f"{where}: unknown key; the keys here are: {known}") from None
        if first["type"] == "value_error":  # Of a validator above, which says it all.
            raise InvalidConfig(f"{where}: {first['ctx']['error']}") from None
        message = f"{where}: {first['msg']}, got {first['input']!r}"
        if first["type"] == "tuple_type":
            message += f"; a list stands in brackets: --set '{where}=[a,b]'"
        if first["type"] == "string_type" and isinstance(first["input"], Mapping):
            message += f"; braces are a mapping in YAML: --set '{where}=\"{{...}}\"'"
        raise InvalidConfig(message) from None
    base = config.finetune.base
    if config.pretrain.steps and base.startswith("scratch:depth"):
        expected = "scratch:small, which gives way to what pretrain trains"
        raise InvalidConfig(f"finetune.base: with pretrain.steps expected {expected}, got {base}")
    return config
