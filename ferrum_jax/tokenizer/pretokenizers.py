"""How each `tokenizer.ggml.pre` cuts text into the words that byte-level BPE merges inside.

A pre-tokenizer is a list of regular expressions applied one after the other: each cuts every piece that the previous ones left,
and both its matches and the gaps between them become pieces. The expressions are those that the models were trained with, as
llama.cpp applies them. Where llama.cpp deviates from the literal meaning (whitespace inside a range of characters, digits
counted from the right, case only for ASCII letters), the expression here includes the deviation, so that the ids are equal. The
syntax is Oniguruma's.
"""

from dataclasses import dataclass

from ferrum_jax.errors import UnsupportedModelError


@dataclass(frozen=True)
class PreTokenizer:
    """`patterns` in order; `ignore_merges`: a word that is a token is not split; `add_bos`: the key's default.

    `glue_first`: a match of the first pattern stays in one piece with the text before it.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    glue_first: bool = False
    add_bos: bool = False


_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_DIGIT, _DIGITS3, _DIGITS = r"\p{N}", r"\p{N}{1,3}", r"\p{N}+"
_NEWLINES = r"|\s*[\r\n]+"
_SPACES = r"|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _words(
    digits: str,
    suffix: str = _SUFFIX + "|",
    letters: str = r"\p{L}+",
    symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    spaces: str = _SPACES,
) -> str:
    """The Llama 3 family: contractions, words with one leading sign, digits, signs, line ends, spaces."""
    return rf"{suffix}[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}|{symbols}{_NEWLINES}{spaces}"


def _cased(upper: str, lower: str, digits: str, suffix: str = _SUFFIX + "?") -> str:
    """The GPT-4o family: a word is capitals followed by small letters, including its contraction."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    symbols = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    words = f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
    return f"{words}|{digits}|{symbols}{_NEWLINES}{_SPACES}"


def _uncased(letters: str, digits: str, symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*") -> str:
    """As `_cased`, but for letter classes of llama.cpp without case: one run of letters, then its contraction."""
    return rf"[^\r\n\p{{L}}\p{{N}}]?{letters}+{_SUFFIX}?|{digits}|{symbols}{_NEWLINES}{_SPACES}"


_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_UPPER_MARKS, _LOWER_MARKS = r"[[\p{L}\p{M}]&&[^a-z]]", r"[[\p{L}\p{M}]&&[^A-Z]]"
_LETTERS_MARKS = r"[\p{L}\p{M}]"

# Digits in groups of three from the right: first the rest of a run, then groups of three.
_GROUPED_DIGITS = r"(?<!\p{N})\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))|(?<=\p{N})\p{N}{3}"

_POROUS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_ASCII_SIGN_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_DEEPSEEK = _ASCII_SIGN_WORD + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = _DEEPSEEK + r"[\r\n]*" + _NEWLINES + _SPACES
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = r"[[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]&&[^\s]]+"
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943]+"
)
_DEEPSEEK_SIGNS = "\\s?[[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]&&[^\\s]]+"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c"
    "\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
    "\u1100-\u11ff]+"
)
_LONG_SPACES = "|" + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"

_GPT2_LIKE = PreTokenizer((_GPT2,))
_DIGIT_GPT2 = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3 = PreTokenizer((_words(_DIGITS3),), ignore_merges=True, add_bos=True)
_LLAMA3_MERGED = PreTokenizer((_words(_DIGITS3),))
_QWEN2 = PreTokenizer((_words(_DIGIT),))
_GPT4O = PreTokenizer((_cased(_UPPER, _LOWER, _DIGITS3),))
_BLOOM = PreTokenizer((_POROUS,))
_DEEPSEEK_V3 = PreTokenizer((_DIGITS3, _KANA_HAN, _DEEPSEEK3))
_AYA = PreTokenizer((_GROUPED_DIGITS, _uncased(_LETTERS_MARKS, _DIGITS3)), glue_first=True)


def _named(names: str, pre: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _DIGITS, r"[0-9][0-9][0-9]"))),
    **_named("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    **_named("gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert", _GPT2_LIKE),
    **_named("roberta-bpe jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es", _GPT2_LIKE),
    **_named("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _DIGIT_GPT2),
    **_named("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral lfm2 midm-2.0 jina-v5-nano", _LLAMA3),
    **_named("dbrx smaug-bpe chatglm-bpe", _LLAMA3_MERGED),
    **_named("glm4", PreTokenizer((_words(_DIGITS3),), ignore_merges=True)),  # GLM-4.5's tokenizer.json says so
    **_named("jais-2", PreTokenizer((_words(_DIGITS3, spaces=_LONG_SPACES),))),
    **_named("minicpm5", PreTokenizer((_DIGITS3, _words(_DIGITS3)), ignore_merges=True)),
    **_named("qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez solar-open kormo f2llmv2", _QWEN2),
    **_named("bailingmoe bailingmoe2 llada-moe grok-2", _QWEN2),
    **_named("ufakzeka", PreTokenizer((_words(_DIGIT, suffix=""),))),
    **_named("laguna", PreTokenizer((r"\n+", _words(_DIGIT)))),
    **_named("qwen35", PreTokenizer((_words(_DIGIT, letters=r"[\p{L}\p{M}]+", symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),))),
    **_named("seed-coder", PreTokenizer((_words(_DIGIT, symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    **_named(
        "exaone-moe",
        PreTokenizer(
            (_words(_DIGIT, letters=r"\p{L}[\p{L}\p{M}]*(?: \p{L}[\p{L}\p{M}]*)*", symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]?"),)
        ),
    ),
    **_named("bloom gpt3-finnish poro-chat", _BLOOM),
    **_named("viking", PreTokenizer((_POROUS, _DIGIT))),
    **_named("tekken", PreTokenizer((_cased(_UPPER, _LOWER, _DIGIT, suffix=""),), ignore_merges=True, add_bos=True)),
    **_named("gpt-4o llama4 kanana2 minimax-m2 talkie", _GPT4O),
    **_named("granite-embed-multi-97m", PreTokenizer((_cased(_UPPER_MARKS, _LOWER_MARKS, _DIGITS3),), ignore_merges=True)),
    **_named(
        "kimi-k2",
        PreTokenizer((_uncased(r"[\p{L}&&[^\p{Han}]]", _DIGITS3, r" ?[^\s\p{L}\p{N}]+[\r\n]*"),)),
    ),
    **_named("youtu", PreTokenizer((_YOUTU_SCRIPTS, _uncased(_LETTERS_MARKS, _DIGIT)), ignore_merges=True)),
    **_named("tiny_aya cohere2moe", _AYA),
    **_named("superbpe", PreTokenizer((_DIGITS, r"(?=(?:[0-9]{3})+(?![0-9]))"))),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK_V3),
    **_named("afmoe", PreTokenizer((_GROUPED_DIGITS, _AFMOE_SCRIPTS, _DEEPSEEK3), glue_first=True)),
    **_named("spark2_5", PreTokenizer((_DIGIT, _KANA_HAN, _DEEPSEEK + r"|[\r\n]" + _SPACES))),
    **_named("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, _DIGIT))),
    **_named("deepseek-llm", PreTokenizer((r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SIGNS, r"\s+\z", _HAN_HANGUL, _DIGITS))),
    **_named(
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                _DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
}


def pre_tokenizer(name: str, source: str = "") -> PreTokenizer:
    """The pre-tokenizer of that name.

    Raises:
        UnsupportedModelError: the name is unknown; the message lists the known ones.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(
            f"{source or 'model'}: tokenizer.ggml.pre = {name!r}: no such pre-tokenizer here; known: {known}"
        ) from None
