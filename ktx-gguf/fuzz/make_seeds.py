#!/usr/bin/env python3
"""Makes the seed corpus of the fuzz target with the Python package `gguf`: pip install gguf==0.19.0 numpy"""

import pathlib
import shutil

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

SEEDS = pathlib.Path(__file__).parent / "seeds" / "open"
FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures"
# Types that ktx-gguf does not read, and Q8_1, whose size in this table is not ggml's.
OTHERS = {"Q8_1", "NVFP4", "Q1_0"}


def write(name, fill):
    writer = GGUFWriter(SEEDS / name, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def all_types(writer):
    for qtype in GGMLQuantizationType:
        if qtype.name not in OTHERS:
            block = np.zeros((1, GGML_QUANT_SIZES[qtype][1]), dtype=np.uint8)
            writer.add_tensor(qtype.name, block, raw_dtype=qtype)


def tokenizer(writer):
    writer.add_token_list(["<s>", "a", "b", "ab"])
    writer.add_token_scores([0.0, -1.0, -2.0, -3.0])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{{ messages }}")


def split(writer):
    writer.add_key_value("split.no", 0, GGUFValueType.UINT16)
    writer.add_key_value("split.count", 0, GGUFValueType.UINT16)
    writer.add_key_value("split.tensors.count", 2, GGUFValueType.INT32)
    writer.add_tensor("a", np.zeros((2, 2), dtype=np.float32))
    writer.add_tensor("b", np.zeros((1, 2, 3), dtype=np.float16))


if __name__ == "__main__":
    SEEDS.mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / "metadata.gguf", SEEDS / "metadata.gguf")
    write("empty.gguf", lambda writer: None)
    write("all_types.gguf", all_types)
    write("tokenizer.gguf", tokenizer)
    write("split.gguf", split)
    version_2 = bytearray((SEEDS / "tokenizer.gguf").read_bytes())
    version_2[4] = 2
    (SEEDS / "version_2.gguf").write_bytes(version_2)
