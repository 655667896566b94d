"""Writes rules_python.json: what Python's `re` and PyYAML's FullLoader make of patterns and values.

Run with Python 3.11 and PyYAML 6: python3 rules_python.py > rules_python.json
"""
import json
import math
import random
import re
import warnings

import yaml

warnings.simplefilter("ignore")
random.seed(7)

SUBJECTS = [
    "", "model", "model.norm", "lm_head", "model.embed_tokens", "model.layers", "model.layers.0", "model.layers.7.mlp",
    "model.layers.10.self_attn", "model.layers.10.self_attn.kv_b_proj", "model.layers.3.mlp.experts",
    "model.layers.3.mlp.experts.12.up_proj", "model.layers.29.mlp.gate", "model.layers.60.mlp.shared_expert_gate",
    "Model.LAYERS.5", "a", "b", "ab", "aab", "abab", "aabb", "a-b", "a b", "a]b", "a{2}", "a{,3}b", "-", "^", "x#y",
    "Straße", "café.1", "日本.2", "a\tb", "ba", "0", "aaa", "_", "abc",
]

PATTERNS = [
    "", ".*", "^", "$", "^$", "a*", "^model$", "^lm_head", r"^model\.layers\.(?!.*self_attn\.kv_b_proj).*$",
    r"^model\.layers\.([012])\.", r"^model\.layers\.([12][0-9]|[3-9])\.", r"(^model\.norm)", r"\.mlp\.experts$",
    r"^model\.layers\.(0|[1-9]|1[0-9])\.(?!self_attn\.kv_b_proj).*$", r"(?P<n>a)(?P=n)", r"(a)(b)\2", r"(a)\1", r"\Aa\Z",
    r"(?i)MODEL", r"(?i:MODEL)\.norm", r"(?i)m(?-i:o)del", r"(?x) m o d e l  # comment", "(?x)\\ # only a space\n",
    r"(?s).", r"(?m)^a$", r"(?a)\w+$", r"\w+é", r"(?u)\d", r"(?a)\bb", r"(?a)a\B", r"\bb", r"a\B", r"\B", r"(?ai)STRASSE",
    r"(?<=a)b", r"(?<!a)b", r"(?<=ab|ba)a", r"(?<=a|bc)b", r"(?<=a*)b", r"(?<=(a))b", r"(?<=a{2})b", r"(?<=^)a",
    r"(?>a+)b", r"(?>a+)ab", r"a++b", r"a++a", r"a*+", r"a?+a", r"a{1,2}+a", r"a{2}", r"a{,3}", r"a{,}", r"a{2,}", r"a{2,1}",
    r"a{", r"a{x", r"a{}", r"a{1,x}", r"a{2", r"{", r"}", r"]", r"a]b", r"[]]", r"[]", r"[^]]", r"[^]", r"[a", r"[a-", r"[a-]",
    r"[-a]", r"[z-a]", r"[\w-a]", r"[a-\w]", r"[\d.]", r"[^\W]", r"[\]]", r"[[]", r"[\b]", r"[a\-b]", r"[\x41-\x7a]", r"[^\s\S]",
    r"[a&&b]", r"[a~~b]", r"[a||b]", r"[a--b]", r"[&-.]", r"\x61", r"\u0061", r"\U00000061", r"\x6", r"\141", r"\0", r"\08", r"\400",
    r"\8", r"\9", r"(a)\10", r"\q", r"\_", r"\-", r"\.", r"\ ", r"\#", r"\<", r"\>", r"\/", "\\", r"a\Z", r"\z", r"\G", r"\K", r"\R",
    r"\h", r"\e", r"\p{L}", r"\k<n>", r"\X", r"a**", r"a+*", r"a?*", r"*", r"+a", r"?", r"^*", r"$+", r"\b*", r"(?:^)*a", r"(?=a)*b",
    r"(", r")", r"(a", r"a)", r"(?", r"(?a", r"(?P", r"(?P<", r"(?P<n", r"(?P<n>", r"(?P<1>a)", r"(?P<n>a)(?P<n>b)", r"(?P=n)",
    r"(?P>n)", r"(?<n>a)", r"(?'n'a)", r"(?&n)", r"(?R)", r"(?|a|b)", r"(?#comment)a", r"(?#comment", r"(?:a|b)+$", r"(?:)", r"()",
    r"(?:)*", r"()\1", r"(a|)\1b", r"(a\1)", r"(a)(?(1)b|c)", r"(a)?(?(1)b|c)", r"(?P<x>a)?(?(x)b|c)$", r"(?(1)a|b)(c)", r"(?(2)a)(b)",
    r"(a)(?(1)b|c|d)", r"(a)?(?(1)b)", r"(?(0)a)", r"a(?i)b", r"(?i)(?x) A", r"(?L)a", r"(?z)a", r"(?-i)a", r"(?-u:a)", r"(?i-:a)",
    r"(?ia:É)", r"a|", r"|a", r"a||b", r"(|a)+", r"(a*)*", r"(a*)+b", r"(?:a|ab)(?:c|bcd)?", r"a.?b", r"a..b", r"..", r"\d+", r"\D",
    r"\s", r"\S+$", r"[^.]+\.[^.]+$", r"^(?:model|lm_head)", r"(?=.*mlp)(?!.*experts)", r"a{1}{2}", r"(?:a{1}){2}", r"x#y", r"^[a-z_.]+$",
    r"日.\.", r"[日本]+", r"(?i)STRASSE", r"(?i)straße", "a{0}b", "a{0,0}", "(a){0}b", "a{4294967296}", r"(?P<é>a)(?P=é)",
]

PARTS = [
    "a", "b", "ab", ".", "^", "$", r"\.", "model", "layers", r"\d", r"\w", "[ab]", "[^a]", "[0-9]", "(a)", "(?:a|b)", "(?=a)", "(?!b)",
    "(?<=a)", "(?<!b)", "|", "(", ")", "*", "+", "?", "{2}", "{1,}", r"\1", r"\2", "(?P<n>b)", "(?P=n)", "(?>a)", "(?i:A)", r"\b", r"\B",
    "*?", "+?", "??", "++", "{1,2}?", r"\A", r"\Z", "(?(1)a|b)", "[", "]", "-", "(b|)",
]
PATTERNS += ["".join(random.choices(PARTS, k=random.randint(1, 7))) for _ in range(3000)]

SCALARS = """
~ null Null NULL nULL yes Yes YES yEs no No NO on On ON off OFF Off true TRUE True false FALSE False y n Y N
0 1 -1 +1 010 0o10 08 0x1F 0X1F -0x1f 0b101 0b12 1_000 1__0 _1 1_ 0_ 1e3 1.0e+3 1.0e3 1.e+3 1.5E-3 .5 -.5 +.5 5. -5. 1.2.3
1_0.5_0 1_0._ ._5 . .. - -- + .inf -.inf +.inf .INF .nan .NaN -.nan inf nan 1:30 1:60 01:30 1:30:45 -1:30 1:30.5 1:3:5.25 0:30 190:20:30
9223372036854775807 9223372036854775808 18446744073709551615 -9223372036854775808 0.1 100.0 1.0e+10 1.0e-7 123456789.125 00 -0 +0 0.0 -0.0
cuda cuda:0 cuda:1 cpu KLinearMarlin a.b.C 'yes' "no" '010' "0x10" '' "" ' a ' "a\\tb" "\\x41" "\\u00e9" 'it''s' 0x 0b 1,000 1e-3 1.5e3
!!str 5 !!int 5 !!float 5 !!float 5.5 !!str yes !!bool yes !!null ~ !!str ~ 12e03 1.e5 1.e-5 0.1_e+5 --- ... 1._5 1:2_3 685_230.15
""".split()
SCALARS = [s for s in SCALARS if s not in ("!!str", "!!int", "!!float", "!!bool", "!!null", "---", "...")]
SCALARS += ["!!str 5", "!!int 5", "!!float 5.5", "!!str yes", "!!bool yes", "!!null ''", "!!str", "! 5", "a b", "a  b", "a #c", "a#c",
            "[1, 2.5, null, yes]", "[]", "{}", "[a, [b, [c]]]", "{a: 1, b: [2]}", "{2: a, yes: b, ~: c, 1.5: d, 010: e}", "{a: 1, a: 2}",
            "{a: , b: }", "{a, b: 1}", "[a: 1]", "{'a': 1, \"b\": 2}", "{<<: {a: 1, b: 2}, b: 3}", "{b: 3, <<: {a: 1, b: 2}}",
            "{<<: [{a: 1}, {a: 2, b: 2}], c: 3}", "{'<<': 1}", "{<<: {<<: {a: 1}, b: 2}}", "[&x {a: 1}, *x, {<<: *x, b: 2}]",
            "[&x 5, *x]", "{? a : 1}", "|\n        a\n        b\n", ">\n        a\n        b\n", "|-\n        a\n", ">+\n        a\n\n",
            "a\n        b", "'a\n        b'", "\"a\\\n        b\"", "{a: 1,\n        b: 2}", "\n        - a\n        - b",
            "\n        a: 1\n        b:\n        - c\n        - d", "\n        3: cuda:1\n        30: cuda:2", "{a: 1, <<: {c: 1}, <<: {d: 2}}"]
for _ in range(1500):
    SCALARS.append("".join(random.choices("0123456789_.:-+eExboaf", k=random.randint(1, 7))))


def plain(value):
    """Values as JSON has them; infinities as text."""
    if isinstance(value, dict):
        return {json.dumps(plain(k)) if not isinstance(k, str) else k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(value)
    return value


def loaded(text):
    try:
        return {"value": plain(yaml.load(f"root:\n    value: {text}\n", yaml.FullLoader)["root"]["value"])}
    except Exception as error:  # the type is all that counts
        return {"error": type(error).__name__}


def searched(pattern):
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return {"error": str(error)}
    return {"hits": "".join("1" if compiled.search(s) else "0" for s in SUBJECTS)}


rows = {
    "subjects": SUBJECTS,
    "patterns": [{"pattern": p, **searched(p)} for p in dict.fromkeys(PATTERNS)],
    "values": [{"text": t, **loaded(t)} for t in dict.fromkeys(SCALARS)],
}
print("{")
for i, (name, items) in enumerate(rows.items()):
    body = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    print(f'"{name}": [\n{body}\n]' + ("," if i < len(rows) - 1 else ""))
print("}")
