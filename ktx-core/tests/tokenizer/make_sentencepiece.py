#!/usr/bin/env python3
"""Makes sentencepiece.json: two small vocabularies trained by SentencePiece and its encodings of generated strings.

    pip install sentencepiece==0.2.3 protobuf
    python3 make_sentencepiece.py > sentencepiece.json

The training text is written below; nothing is fetched. `bpe` is set up as Llama's tokenizer (byte fallback, no
normalisation, a space in front), `unigram` as T5's (own normalisation rules, extra spaces removed, an unknown token).
"""
import base64
import io
import json
import random
import sys
import tempfile

import sentencepiece as spm

TEXT = """
A language model reads text as tokens and gives the probability of the next one.
The experts of a mixture stay in main memory, the attention runs on the graphics card.
Quantised weights are read once per token, so the bandwidth of the memory decides the speed.
What is the capital of France? The capital of France is Paris. What is seven plus five? It is twelve.
She said that the weather would change tomorrow, and it did. They walked home in the rain, talking about trains.
let total = values.iter().map(|value| value * 2).sum::<u32>(); // add them up
def encode(text): return [vocabulary[piece] for piece in split(text)]
Die Straße führt über den Fluss. Où est la gare ? El niño mañana. Привет, мир! 你好，世界。 こんにちは世界
1 2 3 10 20 30 100 200 300 1000 2024 3.14 1,000,000 50% $5 #1
"""

RULES = [("\ufb01", "fi"), ("\u00a0", " "), ("\u3000", " "), ("\t", " "), ("\n", " "), ("\uff21", "A"), ("e\u0301", "é"),
         ("\u00bd", "1/2"), ("\u200b", "")]

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "    ", ".,;:!?'\"()[]{}<>=+-*/_#%$&|",
    "äöüßéèñ", "абвгдежзийклмноп", "你好世界天地", "こんにちはカタカナ", "🚀🦙👩", "\t\n\u00a0\u3000\u2003",
    "\ufb01\uff21e\u0301\u00bd\u200b",
]


def strings(count, rng):
    words = TEXT.split()
    yield from ["", " ", "  ", "a", " a", "a ", "a  b", "Hello world", "\n", "▁", "▁▁a▁", " ▁ "]
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 9)):
            kind = rng.random()
            if kind < 0.45:
                parts.append(rng.choice(words))
            elif kind < 0.65:
                parts.append(" " * rng.randrange(1, 4))
            elif kind < 0.95:
                alphabet = rng.choice(ALPHABETS)
                parts.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 7))))
            else:
                parts.append(chr(rng.choice([0x10000, 0x1F000, 0x20000, 0xE0100, 0x100000]) + rng.randrange(0x400)))
            if rng.random() < 0.5:
                parts.append(" ")
        yield "".join(parts)


def rules_file():
    lines = []
    for source, target in RULES:
        codes = [" ".join(f"{ord(c):X}" for c in text) for text in (source, target)]
        lines.append("\t".join(codes))
    file = tempfile.NamedTemporaryFile("w", suffix=".tsv", delete=False)
    file.write("\n".join(lines) + "\n")
    file.close()
    return file.name


def train(**options):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXT.strip().split("\n")) * 3), model_writer=model, minloglevel=2, num_threads=1,
        hard_vocab_limit=False, **options)
    return spm.SentencePieceProcessor(model_proto=model.getvalue()), model.getvalue()


def charsmap(proto):
    from sentencepiece import sentencepiece_model_pb2 as pb
    model = pb.ModelProto()
    model.ParseFromString(proto)
    return model.normalizer_spec.precompiled_charsmap


def vocabulary(processor):
    def kind(i):
        if processor.is_unknown(i):
            return 2
        if processor.is_control(i):
            return 3
        return 6 if processor.is_byte(i) else 5 if processor.is_unused(i) else 1
    ids = range(processor.get_piece_size())
    return {"tokens": [processor.id_to_piece(i) for i in ids], "scores": [processor.get_score(i) for i in ids],
            "types": [kind(i) for i in ids]}


def cases(processor, count, seed):
    return [[text, processor.encode(text)] for text in strings(count, random.Random(seed))]


def main():
    bpe, _ = train(model_type="bpe", vocab_size=900, byte_fallback=True, normalization_rule_name="identity",
                   remove_extra_whitespaces=False, character_coverage=0.98, split_digits=True,
                   allow_whitespace_only_pieces=True)
    unigram, proto = train(model_type="unigram", vocab_size=420, normalization_rule_tsv=rules_file(),
                           character_coverage=0.98)
    result = {
        "sentencepiece": spm.__version__,
        "bpe": vocabulary(bpe) | {"cases": cases(bpe, 600, 1)},
        "unigram": vocabulary(unigram) | {"charsmap": base64.b64encode(charsmap(proto)).decode(),
                                          "cases": cases(unigram, 600, 2)},
    }
    json.dump(result, sys.stdout, ensure_ascii=False, separators=(",", ":"))
    print()


main()
