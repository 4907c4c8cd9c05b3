"""How well a tokenizer compresses different kinds of text, next to GPT-2's and GPT-4's.

More bytes per token means shorter sequences for the same text, so more text per context and per FLOP. It says
nothing about quality: only bits per byte of a trained model does.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tiktoken

from nanochat.tokenizer.tokenizer import Tokenizer, parse_ranks


@dataclass(frozen=True)
class PeerTokenizer:
    """A published tokenizer whose ranks tiktoken may have on disk: origin, checksum and split pattern."""

    name: str
    url: str
    sha256: str
    pattern: str


# Addresses, checksums and patterns are those of openai/tiktoken, tiktoken_ext/openai_public.py; GPT-2's
# vocabulary is called r50k_base there.
PEERS = (
    PeerTokenizer(
        "GPT-2 (r50k_base)",
        "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    ),
    PeerTokenizer(
        "GPT-4 (cl100k_base)",
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ),
)

# Written for this file. A tokenizer's figures on them are comparable between machines and years.
SAMPLES = {
    "English prose": (
        "The ferry was late again, so we sat on the harbour wall and counted gulls. Nobody minded. My aunt "
        "had brought bread, two kinds of cheese and the story of how she once repaired a lighthouse "
        "lamp with a hairpin, which grew a little every time she told it. By the time the boat's horn "
        "answered from behind the island, the lamp had been seen from three countries, and we'd eaten "
        "everything but the paper."
    ),
    "Python code": (
        "def moving_average(values: list[float], width: int) -> list[float]:\n"
        '    """Mean of every window of `width` neighbours, in one pass."""\n'
        "    if width < 1:\n"
        '        raise ValueError(f"width must be positive, not {width}")\n'
        "    total = sum(values[:width])\n"
        "    means = [total / width]\n"
        "    for entering, leaving in zip(values[width:], values):\n"
        "        total += entering - leaving\n"
        "        means.append(total / width)\n"
        "    return means\n"
    ),
    "mathematics": (
        r"Let $f(x) = \frac{1}{1 + e^{-x}}$. Then $f'(x) = f(x)\,(1 - f(x))$, so $0 < f'(x) \le "
        r"\tfrac{1}{4}$ for all $x \in \mathbb{R}$, and $\int_{-a}^{a} f(x)\,dx = a$ because $f(x) + f(-x) = "
        r"1$. For $x = 2.5$ we get $f(x) \approx 0.9241$, $f'(x) \approx 0.0701$. \begin{equation} "
        r"\sum_{k=1}^n k^3 = \left(\frac{n(n+1)}{2}\right)^2 \end{equation}"
    ),
    "numbers": (
        "year,depth_m,temperature_c,oxygen\n1998,120,11.37,5.802\n1999,120,11.41,5.779\n2004,250,8.96,5.114\n"
        "2011,1480,3.02,4.667\n2023,2750,1.85,4.913\ntotal 48,516 samples; 17 of 1,024 stations silent\n"
    ),
    "European languages": (
        "Früh am Morgen roch die Straße nach Brötchen, und über den Dächern zogen Schwalben. Le garçon a "
        "caché la clé sous un pot de géraniums, près de la fenêtre. La niña aprendió a nadar en un río. "
        "Zimą żółte światła tramwajów odbijały się w śniegu. Вечером дети пускали бумажные корабли по ручью. "
        "Κάθε Σάββατο έφτιαχνε ζεστό ψωμί."
    ),
    "Chinese, Japanese, Korean": (
        "下雨的晚上图书馆里只有两个人。一个在读地图。一个在听雨声。猫はこたつの中で丸くなり、祖母はみかんをむいていた。"
        "할머니는 마당에 앉아 콩을 고르고, 아이들은 골목에서 연을 날렸다."
    ),
    "Arabic and Hindi": (
        "جلس الصياد على الشاطئ ينتظر عودة ابنه، وكان البحر هادئا كأنه ينام. "
        "सुबह की पहली बस खाली थी, और चालक धीरे-धीरे एक पुराना गीत गा रहा था।"
    ),
    "emoji and whitespace": (
        "🙂🙃 well\t\tdone 👩\u200d👩\u200d👧\u200d👦!!   \r\n\r\n      • one\n      • two ✅\n"
        "🇮🇸🇧🇹   …and 🏳\ufe0f\u200d🌈  \n"
    ),
}


@dataclass(frozen=True)
class CompressionRow:
    """Bytes per token of one kind of text, by tokenizer; None where that tokenizer is not on this disk."""

    sample: str
    num_bytes: int
    bytes_per_token: dict[str, float | None]


def evaluate_tokenizer(
    tokenizer: Tokenizer, samples: Mapping[str, str], encodings: Path | None = None
) -> list[CompressionRow]:
    """Measure bytes per token for each sample, next to GPT-2 and GPT-4 where they are on disk.

    Nothing is ever downloaded. `nanochat stage encodings` brings them; what tiktoken itself has cached is used too.

    Args:
        samples: kind of text to text; `SAMPLES` holds built-in ones. Empty texts are left out.
        encodings: the folder of staged vocabularies.
    """
    cache = tiktoken_cache()
    peers = {peer.name: load_peer(peer, encodings) or load_peer(peer, cache) for peer in PEERS}
    rows = []
    for name, text in samples.items():
        if not text:
            continue
        ids = tokenizer.encode(text)
        num_bytes = len(tokenizer.decode_bytes(ids))
        bytes_per_token: dict[str, float | None] = {"nanochat": num_bytes / len(ids)}
        for peer_name, peer in peers.items():
            bytes_per_token[peer_name] = num_bytes / len(peer.encode_ordinary(text)) if peer else None
        rows.append(CompressionRow(name, num_bytes, bytes_per_token))
    return rows


def render(rows: list[CompressionRow]) -> str:
    """The rows as a Markdown table that is also aligned in a terminal."""
    names = list(rows[0].bytes_per_token) if rows else []
    table = [["bytes per token", "bytes", *names]]
    for row in rows:
        values = [row.bytes_per_token[name] for name in names]
        cells = ["not on disk" if value is None else f"{value:.2f}" for value in values]
        table.append([row.sample, f"{row.num_bytes:,}", *cells])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in table
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def as_json(rows: list[CompressionRow]) -> list[dict[str, Any]]:
    """The rows as JSON-able values."""
    return [asdict(row) for row in rows]


def tiktoken_cache() -> Path | None:
    """The folder in which tiktoken keeps downloaded ranks; None where an empty variable turns its cache off.

    The rule is tiktoken's own (tiktoken/load.py).
    """
    default = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) if folder else None


def peer_path(peer: PeerTokenizer, folder: Path) -> Path:
    """Where a folder laid out as tiktoken's cache has a peer's ranks (tiktoken/load.py)."""
    return folder / hashlib.sha1(peer.url.encode()).hexdigest()


def load_peer(peer: PeerTokenizer, cache: Path | None) -> tiktoken.Encoding | None:
    """Read a peer's ranks from a folder laid out as tiktoken's cache; None if what was published is not there.

    tiktoken's own loader is not used, because it downloads what is missing and deletes what does not match.
    """
    if cache is None:
        return None
    try:
        content = peer_path(peer, cache).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() != peer.sha256:
        return None
    ranks = {token: rank for rank, token in enumerate(parse_ranks(content))}
    return tiktoken.Encoding(peer.name, pat_str=peer.pattern, mergeable_ranks=ranks, special_tokens={})
