"""The released COCO-LM tokenizer, rule by rule on whole strings: words, then sentencepiece, then ids of dict.txt."""

import re
import unicodedata


def is_punctuation(char):
    """Unicode's punctuation, and every printable ASCII character that is no letter, digit or space."""
    return char in "$+<=>^`|~" or unicodedata.category(char).startswith("P")


def edges(word):
    """A word without its punctuation at both ends, which become words of their own."""
    inside = [i for i, char in enumerate(word) if not is_punctuation(char)]
    if not inside:
        return [word]
    return [part for part in (word[: inside[0]], word[inside[0] : inside[-1] + 1], word[inside[-1] + 1 :]) if part]


def words(text):
    """The words that the text is made of before sentencepiece reads it."""
    text = text.strip().replace("``", '"').replace("''", '"')
    for marks, mark in (("\u2018\u2019\u00b4", "'"), ("\u201c\u201d", '"'), ("\u2013\u2014", "-")):
        text = re.sub(f"[{marks}]", mark, text)
    line = " ".join(part for word in text.split() for part in edges(word))
    # The upper case forms also part from what follows them. One after the other, as each sees what the last one left.
    for ending, space in [
        (r"[smdSMDtT]", ""),
        ("ll", ""),
        ("re", ""),
        ("ve", ""),
        ("LL", " "),
        ("RE", " "),
        ("VE", " "),
    ]:
        line = re.sub(rf"' ({ending})\b", rf"'\1{space}", line)
    return line.split()


def pieces(text, sentencepiece):
    """What sentencepiece makes of the words, less each lone word mark before punctuation or at the end."""
    found = sentencepiece.encode(" ".join(words(text)), out_type=str)
    followers = [*(piece[0] for piece in found[1:]), "."]
    return [piece for piece, char in zip(found, followers, strict=False) if piece != "▁" or not is_punctuation(char)]


def dictionary(lines):
    """Ids of the tokens of a dict.txt."""
    special = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
    tokens = [*list(special)[:4], *(line.rstrip().rsplit(" ", 1)[0] for line in lines), "<mask>"]
    return {token: i for i, token in enumerate(dict.fromkeys(special.get(token, token) for token in tokens))}


def ids(text, sentencepiece, vocabulary):
    """Ids of a text without special tokens."""
    return [vocabulary.get(piece, vocabulary["[UNK]"]) for piece in pieces(text, sentencepiece)]
