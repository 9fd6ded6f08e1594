"""COCO-LM tokenizer: the released pre-tokenisation, sentencepiece model and dictionary as one fast tokenizer.

"Authors' code" is `tokenization_cocolm.py` of github.com/microsoft/COCO-LM: it splits a text into words by rules of its
own, joins them with spaces, has sentencepiece cut them into pieces, drops some of these and looks the others up in a
fairseq dictionary. Everything is expressed here with components of the `tokenizers` library, so it is saved in
tokenizer.json and runs without sentencepiece and without this file.
"""

import heapq
import re
import struct
import unicodedata
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# In the order of their ids, 0 to 3, with fairseq's names; [MASK] comes last where dict.txt has none.
SPECIAL_TOKENS = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
# sentencepiece marks where a word begins with this character.
MARK = "▁"
# Character classes. Space: what Python's str.split splits at. Punctuation: Unicode's and every printable ASCII
# character that is no letter, digit or space. Word: what \w is to Python, which differs from \w of `tokenizers`.
SPACE = r"[\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
PUNCTUATION = r"[\p{P}$+<=>^`|~]"
NEITHER = r"[^\p{P}$+<=>^`|~ ]"
WORD = r"[\p{L}\p{N}_]"
# Types of sentencepiece models and of their pieces, in numbers of its file format.
UNIGRAM, BPE, CHAR = 1, 2, 4
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
# Our choice: the most states of its automaton that `lone_mark_pattern` follows.
MAX_STATES = 300
# What the states of `lone_mark_pattern` lead to besides other states.
DROP, KEEP = -1, -2


class CocoLMTokenizer(PreTrainedTokenizerFast):
    r"""Fast COCO-LM tokenizer; the same tokens as the authors' code.

    `CocoLMTokenizer.from_pretrained(folder)` reads `tokenizer.json` or else the released `sp.model` and `dict.txt`, and
    `save_pretrained` writes `tokenizer.json`. A text becomes `[CLS] A [SEP]`, a pair `[CLS] A [SEP] [SEP] B [SEP]`;
    [CLS] is also the bos token and [SEP] the eos token. Offsets refer to the given text and leave out the space before
    a word.

    A special token written in a text, such as `[MASK]`, stands for itself. The authors' code has no such tokens; with
    `split_special_tokens=True` there are none here either.

    Truncation is that of every fast tokenizer: where both texts of a pair are cut and the room is odd, the authors'
    code may leave the odd token to the other one.

    Args:
        vocab_file: Path of a sentencepiece model (unigram, BPE or character).
        dict_file: Path of a fairseq dictionary: a token and its count a line, in the order of the ids from 4 on.
        tokenizer_file: Path of a tokenizer.json, instead of both.
        tokenizer_object: A `tokenizers.Tokenizer`, instead of all files.
        kwargs: See `PreTrainedTokenizerFast`. `model_max_length` is 512 by default.

    Raises:
        ValueError: If a file is missing, damaged or of another kind, or the files are not of one model.

    Example:

    ```python
    >>> tokenizer = CocoLMTokenizer.from_pretrained("microsoft/cocolm-base")
    >>> batch = tokenizer(["The first text.", "Another one."], padding=True, truncation=True, return_tensors="pt")
    ```
    """

    vocab_files_names = {"vocab_file": "sp.model", "dict_file": "dict.txt", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file=None, dict_file=None, tokenizer_file=None, tokenizer_object=None, **kwargs):
        if tokenizer_object is None and tokenizer_file is None:
            if vocab_file is None or dict_file is None:
                raise ValueError(
                    "A COCO-LM tokenizer is made of tokenizer.json, or of both sp.model and dict.txt, but got "
                    f"vocab_file={vocab_file!r} and dict_file={dict_file!r}. Put what is missing into the folder."
                )
            tokenizer_object = build_tokenizer(vocab_file, dict_file)
        cls, pad, sep, unk, mask = SPECIAL_TOKENS.values()
        defaults = {"bos_token": cls, "cls_token": cls, "eos_token": sep, "sep_token": sep, "pad_token": pad}
        defaults |= {"unk_token": unk, "mask_token": mask_token(mask), "model_max_length": 512}
        defaults |= {"padding_side": "right", "clean_up_tokenization_spaces": False}
        super().__init__(tokenizer_file=tokenizer_file, tokenizer_object=tokenizer_object, **defaults | kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """Hands the files to `__init__` as they are, where the base class would take sp.model apart by itself."""
        return kwargs

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        """The tokens of a text, or of a pair one after the other; an unknown one reads as the text it stands for."""
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens, **kwargs)
        parts = (self._unknown(part) for part in (text, pair) if part is not None)
        # Added tokens that are looked for in the normalised text may hide some.
        unknown = chain(*parts, repeat(self.unk_token))
        return [next(unknown) if i == self.unk_token_id else self.convert_ids_to_tokens(i) for i in ids]

    def _encode_plus(self, text, text_pair=None, return_tensors=None, return_overflowing_tokens=False, **kwargs):
        # The base class takes a pair with an empty second text for a single text, unless it is in a batch.
        alone = isinstance(text, str) and text_pair == ""
        texts = ([text], [text_pair]) if alone else (text, text_pair)
        kwargs |= {"return_tensors": return_tensors, "return_overflowing_tokens": return_overflowing_tokens}
        encoded = super()._encode_plus(*texts, **kwargs)
        if alone and return_tensors is None and not return_overflowing_tokens:
            values = {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in encoded.items()}
            return BatchEncoding(values, encoded.encodings)
        return encoded

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        # As they are written: the normalisation would take a token like `<new>` apart, and then not find it in a word.
        new_tokens = [AddedToken(t, normalized=False) if isinstance(t, str) else t for t in new_tokens]
        return super()._add_tokens(new_tokens, special_tokens)

    def _unknown(self, text: str) -> Iterator[str]:
        """Parts of a text that are unknown tokens, in their order, after normalisation."""
        added, backend = self.get_added_vocab(), self.backend_tokenizer
        for part in re.split(f"({'|'.join(map(re.escape, added))})", text):
            if part in added:
                yield from [part] if part == self.unk_token else []
                continue
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(part)):
                for token in backend.model.tokenize(word):
                    if token.id == self.unk_token_id:
                        yield word.encode()[slice(*token.offsets)].decode()


def build_tokenizer(vocab_file: str, dict_file: str) -> Tokenizer:
    """Makes the `tokenizers` form of a sentencepiece model, a fairseq dictionary and the authors' pre-tokenisation.

    Args:
        vocab_file: Path of sp.model.
        dict_file: Path of dict.txt.

    Raises:
        ValueError: As `read_sentencepiece` and `read_dictionary`, or if the two have no piece in common.
    """
    sentencepiece = read_sentencepiece(vocab_file)
    vocabulary = {token: i for i, token in enumerate(read_dictionary(dict_file))}
    pieces = [entry for entry in sentencepiece["pieces"] if entry[2] not in (UNKNOWN, CONTROL)]
    missing = [piece for piece, _, _ in pieces if piece not in vocabulary]
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL and piece in vocabulary}
    if not scores:
        raise ValueError(f"{dict_file} has none of the pieces of {vocab_file}, so they are not of one model.")
    if missing:
        logger.warning(
            f"{len(missing)} of {len(pieces)} pieces of {vocab_file} are not in {dict_file}, such as {missing[:5]}. "
            "Words are cut without them; the authors' code reads each as [UNK]."
        )
    lowest = min(scores.values())
    # Symbols that the user of sentencepiece chose, which are never cut.
    whole = [piece for piece, _, kind in pieces if kind == USER_DEFINED and piece in vocabulary]
    whole = [piece for piece in whole if piece not in SPECIAL_TOKENS.values()]
    byte_fallback = sentencepiece["byte_fallback"]
    cls, pad, sep, unk, mask = SPECIAL_TOKENS.values()
    splits = []
    if sentencepiece["model_type"] == UNIGRAM:
        # The score that sentencepiece gives them.
        scores |= dict.fromkeys(whole, -0.1)
        # The other tokens of the dictionary occur in no text: the special ones, and what fairseq pads it with.
        weighted = [(token, scores.get(token, lowest)) for token in vocabulary]
        model = models.Unigram(weighted, unk_id=vocabulary[unk], byte_fallback=byte_fallback)
        pattern = lone_mark_pattern(scores, lowest - 10)
    else:
        # Every way to make a piece of two others; sentencepiece looks at what comes out, not at what goes in.
        ranked = sorted(scores, key=scores.get, reverse=True) if sentencepiece["model_type"] == BPE else []
        pairs = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
        merges = [(left, right) for left, right in pairs if left in scores and right in scores]
        options = {"unk_token": unk, "fuse_unk": True, "byte_fallback": byte_fallback}
        model = models.BPE(vocabulary, merges, **options)
        pattern = lone_mark_pattern(scores, lowest - 10, lambda text: [token.value for token in model.tokenize(text)])
        if whole:
            model = models.BPE(vocabulary, merges, ignore_merges=True, **options)
            longest_first = sorted(whole, key=len, reverse=True)
            splits = [pre_tokenizers.Split(Regex("|".join(map(escape, longest_first))), "isolated")]
    if byte_fallback:
        # Bytes are pieces like "<0xE2>", hence punctuation to the authors' code.
        known = "".join(escape(piece) for piece in scores if len(piece) == 1)
        pattern += rf"|\A{MARK}(?=[^{known}])"
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [*word_rules(), *character_rules(sentencepiece["charsmap"]), *mark_rules()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(pattern), "removed"),
            *splits,
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} {sep} $B {sep}",
        special_tokens=[(token, vocabulary[token]) for token in (cls, sep)],
    )
    from_bytes = [decoders.ByteFallback()] if byte_fallback else []
    tokenizer.decoder = decoders.Sequence(
        [*from_bytes, decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(token, normalized=False, special=True) for token in (cls, pad, sep, unk)]
    tokenizer.add_special_tokens([*special, mask_token(mask)])
    return tokenizer


def mask_token(content: str) -> AddedToken:
    """[MASK], which takes in the space before it as the token that it stands for would."""
    return AddedToken(content, lstrip=True, normalized=False, special=True)


def word_rules() -> list[normalizers.Normalizer]:
    """The authors' pre-tokenisation: what comes out are the words with one space between them."""
    replace = normalizers.Replace
    return [
        replace(Regex(rf"{SPACE}{{2,}}|(?! ){SPACE}"), " "),
        replace("``", '"'),
        replace("''", '"'),
        replace(Regex(r"[\x{2018}\x{2019}\x{b4}]"), "'"),
        replace(Regex(r"[\x{201c}\x{201d}]"), '"'),
        replace(Regex(r"[\x{2013}\x{2014}]"), "-"),
        # Punctuation at either end of a word becomes a word.
        replace(Regex(rf"(?<![^ ]){PUNCTUATION}+\K(?={NEITHER})"), " "),
        replace(Regex(rf"(?<={NEITHER})(?={PUNCTUATION}+(?![^ ]))"), " "),
        # 's, 'll and the like are words again; the forms in upper case also part from what follows them.
        replace(Regex(rf"(?<=' (?:LL|RE|VE))(?!{WORD})"), " "),
        replace(Regex(rf"(?<=') (?=(?:[smdtSMDT]|ll|re|ve|LL|RE|VE)(?!{WORD}))"), ""),
    ]


def character_rules(charsmap: bytes) -> list[normalizers.Normalizer]:
    """sentencepiece's normalisation of characters, such as NFKC, which it holds as a table of replacements.

    `Precompiled` looks up single characters as sentencepiece does, but may lose or leave alone the marks of a character
    that is written in several. So where the table composes characters, those that it composes are composed before, and
    the others are held apart for as long as that and the look-up take.

    Args:
        charsmap: The table; empty for none.
    """
    if not charsmap:
        return []
    lookup = normalizers.Precompiled(charsmap)
    if lookup.normalize_str("e\u0301") != "\u00e9":
        return [lookup]
    bases: dict[str, str] = {}
    for code in chain(range(0xC0, 0xAC00), range(0xF900, 0x30000)):
        base, *marks = unicodedata.normalize("NFD", chr(code))
        if marks:
            bases["".join(marks)] = bases.get("".join(marks), "") + base
    longest_first = sorted(bases, key=len, reverse=True)
    composed = "|".join(f"[{escape(bases[marks])}]{escape(marks)}" for marks in longest_first)
    korean = r"[\x{1100}-\x{1112}][\x{1161}-\x{1175}][\x{11a8}-\x{11c2}]?"
    mark = r"[\p{M}\x{1160}-\x{11ff}\x{200c}\x{200d}]"
    # From left to right: a sequence that is composed, another character, or a mark right behind the last match.
    unit = rf"(?>(?=.{mark})(?:{composed}|{korean})|(?!{mark}).|\G.)"
    # A code point that is no character, now or ever.
    apart = "\ufdd0"
    hold_apart = normalizers.Replace(Regex(rf"{unit}\K(?={mark})"), apart)
    return [hold_apart, normalizers.NFC(), lookup, normalizers.Replace(apart, "")]


def mark_rules() -> list[normalizers.Normalizer]:
    """A word mark that a text itself contains begins a word; at the end of the text it is dropped."""
    return [
        normalizers.Replace(Regex(rf"(?<![^ ])(?={MARK})"), MARK),
        normalizers.Replace(MARK, f" {MARK}"),
        normalizers.Replace(Regex(rf"[ {MARK}]+\z"), ""),
    ]


def lone_mark_pattern(
    scores: dict[str, float], unknown: float, tokenize: Callable[[str], list[str]] | None = None
) -> str:
    r"""Regular expression for the word marks to drop: those that are a piece of their own, followed by punctuation.

    Whether a word is cut into `"▁("` or `"▁", "("` depends on the pieces and maybe on what follows, so all ways to cut
    the word are followed character by character until those that can still win agree on the mark. For a unigram model
    (Viterbi) only the best one that ends at a character can win. For BPE a cut is right if each two neighbours, put
    together, are cut into the same two. What has been read up to a character is thus a state of a finite automaton.

    After punctuation come punctuation or, after an apostrophe, the endings that `word_rules` joins to it. Cuts that
    only differ behind other characters are decided as if the word ended there, and so are those beyond `MAX_STATES`
    states, which unigram models with much punctuation in their pieces have.

    Args:
        scores: Log probability of each piece.
        unknown: Log probability of a character that is no piece.
        tokenize: Cuts a text with a BPE model; None for a unigram model.

    Returns:
        Expression that matches the mark that a word begins with.
    """
    extensions: dict[str, set[str]] = {}
    for piece in scores:
        for i in range(1, len(piece)):
            extensions.setdefault(piece[:i], set()).add(piece[i])

    def read(cuts: dict, char: str) -> dict:
        """(last piece, begun piece) -> (score, whether the mark is alone), after one more character."""
        longer: dict[tuple[str, str], tuple[float, bool]] = {}
        # The longest begun piece first: of equal scores it wins.
        for (last, begun), (score, alone) in sorted(cuts.items(), key=lambda cut: -len(cut[0][1])):
            text = begun + char
            reached = [(last, text, score)] if text in extensions else []
            if text in scores or text == char:
                known = [piece for piece in (last, text) if piece in scores]
                if tokenize is None:
                    reached.append(("", "", score + scores.get(text, unknown)))
                elif text not in scores or tokenize("".join(known)) == known:
                    reached.append((text, "", score))
            for last_piece, begun_piece, total in reached:
                if total > longer.get((last_piece, begun_piece), (float("-inf"),))[0]:
                    longer[last_piece, begun_piece] = (total, alone)
        best = max(score for score, _ in longer.values())
        return {cut: (round(score - best, 6), alone) for cut, (score, alone) in longer.items()}

    def is_dropped(cuts: dict) -> bool:
        """Whether the mark is alone if the word ends here."""
        return any(alone for (_, begun), (_, alone) in cuts.items() if not begun)

    first = {cut: (score, not cut[1]) for cut, (score, _) in read({("", ""): (0.0, False)}, MARK).items()}
    numbers = {(frozenset(first.items()), ""): 0}
    # The states of the likeliest words come first.
    queue, automaton = [(0.0, 0, first, "")], {}
    while queue and len(automaton) < MAX_STATES:
        cost, number, cuts, context = heapq.heappop(queue)
        followers = {}
        for char in sorted(set(chain.from_iterable(extensions[begun] for _, begun in cuts if begun))):
            next_context = _context(context, char)
            if next_context is None:
                continue
            reached, next_number = read(cuts, char), None
            if len({alone for _, alone in reached.values()}) > 1:
                state = (frozenset(reached.items()), next_context)
                if state not in numbers:
                    numbers[state] = len(numbers)
                    next_cost = cost - scores.get(char, unknown)
                    heapq.heappush(queue, (next_cost, numbers[state], reached, next_context))
                next_number = numbers[state]
            followers[char] = (next_number, is_dropped(reached))
        automaton[number] = (is_dropped(cuts), followers)
    return rf"\A{MARK}(?={PUNCTUATION})(?={_expression(automaton)})"


def _expression(automaton: dict[int, tuple[bool, dict[str, tuple[int | None, bool]]]]) -> str:
    """The regular expression for all ways from state 0 to `DROP`, found by taking out one state after another.

    Args:
        automaton: For each state whether the mark is dropped if another character or none comes, and for each character
            the state that it leads to, None if all is decided there, and whether the mark is dropped at that point.
    """
    ways: dict[int, dict[int, str]] = {}
    for state, (is_dropped, followers) in automaton.items():
        chars: dict[int, str] = {}
        for char, (following, is_dropped_there) in followers.items():
            target = following if following in automaton else DROP if is_dropped_there else KEEP
            chars[target] = chars.get(target, "") + escape(char)
        ways[state] = {target: f"[{characters}]" for target, characters in chars.items()}
        if is_dropped:
            others = f"(?![{escape(''.join(followers))}])" if followers else ""
            ways[state][DROP] = f"(?:{ways[state][DROP]}|{others})" if DROP in chars else others

    def sources(state: int) -> list[int]:
        return [source for source in ways if source != state and state in ways[source]]

    while len(ways) > 1:
        state = min(ways.keys() - {0}, key=lambda state: len(sources(state)) * sum(map(len, ways[state].values())))
        before, after = sources(state), ways.pop(state)
        again = f"(?:{after.pop(state)})*" if state in after else ""
        for source in before:
            there = ways[source].pop(state) + again
            for target in after.keys() - {KEEP}:
                through = there + after[target]
                ways[source][target] = f"(?:{ways[source][target]}|{through})" if target in ways[source] else through
    again = f"(?:{ways[0][0]})*" if 0 in ways[0] else ""
    return again + ways[0].get(DROP, "(?!)")


def _context(before: str, char: str) -> str | None:
    """What matters of the characters up to `char` for which may follow it; None if `char` does not follow `before`."""
    if not char.isalnum():
        return None if char == MARK else "'" if char == "'" else "."
    if before == "'" and char in "smdtSMDTlrvLRV":
        return char
    return "." if before + char in ("ll", "re", "ve", "LL", "RE", "VE") else None


def escape(text: str) -> str:
    """A text as regular expression, in a character class or not."""
    return "".join(rf"\x{{{ord(char):x}}}" for char in text)


def read_dictionary(file: str) -> list[str]:
    """The tokens of a fairseq dictionary in the order of their ids.

    Args:
        file: Path of a text file with a token and its count a line. The tokens of fairseq that stand before them, and
            [MASK] where no line has it behind them, are added; fairseq's names for special tokens are replaced.

    Raises:
        ValueError: If the file is missing or no such text.
    """
    tokens = list(SPECIAL_TOKENS)[:4]
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as the dictionary of a COCO-LM tokenizer: {error}.") from error
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        token, _, count = line.rstrip().rpartition(" ")
        if not token or not count.isdecimal():
            raise ValueError(f"Line {number} of {file} must be a token, a space and its count, but is {line[:80]!r}.")
        tokens.append(token)
    return list(dict.fromkeys(SPECIAL_TOKENS.get(token, token) for token in [*tokens, "<mask>"]))


def read_sentencepiece(file: str) -> dict:
    """What is needed of a sentencepiece model, read from its protocol buffer.

    Args:
        file: Path of a sentencepiece model.

    Returns:
        `pieces`: list of (piece, log probability or minus rank, kind), `model_type`, `byte_fallback` and `charsmap`,
        the compiled normalisation of characters, empty for none.

    Raises:
        ValueError: If the file is missing, cut off, no sentencepiece model or one with an option that no released
            COCO-LM tokenizer has.
    """
    try:
        message = list(_fields(Path(file).read_bytes()))
        specs = dict(message)
        trainer, normalizer = dict(_fields(specs[2])), dict(_fields(specs[3]))
        entries = [dict(_fields(value)) for number, value in message if number == 1]
        pieces = [(e[1].decode(), struct.unpack("<f", e.get(2, bytes(4)))[0], e.get(3, NORMAL)) for e in entries]
    except OSError as error:
        raise ValueError(f"{file} cannot be read as a sentencepiece model: {error}.") from error
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(
            f"{file} is no sentencepiece model, or only a part of one. Copy it again, as a whole: where files are kept "
            "with Git LFS, a copy may be a few lines of text that only name the file."
        ) from error
    model_type = trainer.get(3, UNIGRAM)
    if model_type not in (UNIGRAM, BPE, CHAR):
        raise ValueError(
            f"{file} must be a unigram, BPE or character model (type 1, 2 or 4), but is of type {model_type}."
        )
    options = {
        "treat_whitespace_as_suffix": bool(trainer.get(24, False)),
        "add_dummy_prefix": bool(normalizer.get(3, True)),
        "remove_extra_whitespaces": bool(normalizer.get(4, True)),
        "escape_whitespaces": bool(normalizer.get(5, True)),
    }
    for (name, value), default in zip(options.items(), (False, True, True, True), strict=True):
        if value != default:
            raise ValueError(f"{name} of {file} must be {default}, as in every sentencepiece model of COCO-LM.")
    return {
        "pieces": pieces,
        "model_type": model_type,
        "byte_fallback": bool(trainer.get(35, False)),
        "charsmap": normalizer.get(2, b""),
    }


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(Number, value) of the fields of a protocol buffer message; strings, messages and floats as bytes.

    Raises:
        IndexError, ValueError: If the data is cut off or no such message.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[wire_type]
        size = varint() if size is None else size
        if position + size > len(data):
            raise IndexError("cut off")
        yield number, data[position : position + size]
        position += size


__all__ = ["CocoLMTokenizer"]
