"""Byte-pair merges for a small closed vocabulary."""


def merge_words(words: list[list[str]]) -> tuple[list[str], list[tuple[str, str]]]:
    """Symbols and merges with which BPE turns each word, given as its letters, into one symbol.

    Every word is first split by the merges so far; only what remains apart is merged anew, so later merges
    never break an earlier word.
    """
    symbols = sorted({s for w in words for s in w})
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = list(word)
        for pair in merges:
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == pair:
                    pieces[i:i + 2] = ["".join(pair)]
                i += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            if pieces[0] not in symbols:
                symbols.append(pieces[0])
    return symbols, merges
