"""A text in words: what stands between spaces, and an end of each line."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"


def split(text: str) -> list[str]:
    """The words of a text, `END_OF_LINE` after those of each line, an empty one too."""
    if not text:
        return []
    lines = text.removesuffix("\n").split("\n")
    return [word for line in lines for word in (*line.split(), END_OF_LINE)]


def join(words: Sequence[str]) -> str:
    """The text of which `split` makes the same words."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word == END_OF_LINE:
            lines.append([])
        else:
            lines[-1].append(word)
    return "\n".join(" ".join(line) for line in lines)


def vocabulary(words: Sequence[str], min_count: int) -> list[str]:
    """Every word that occurs at least `min_count` times, the most frequent first, after `UNKNOWN` and `END_OF_LINE`."""
    counts = Counter(words)
    often = [word for word, count in counts.items() if count >= min_count and word not in (UNKNOWN, END_OF_LINE)]
    return [UNKNOWN, END_OF_LINE, *sorted(often, key=lambda word: (-counts[word], word))]


def indices(words: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    """int64 (words,): the place of each word in the vocabulary, that of `UNKNOWN` for one that is not there."""
    places = {word: place for place, word in enumerate(vocabulary)}
    unknown = places[UNKNOWN]
    return torch.tensor([places.get(word, unknown) for word in words])
