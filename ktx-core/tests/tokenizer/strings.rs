//! A thousand generated strings: all planes of Unicode, white space, digits, contractions, code.

/// SplitMix64 (Steele, Lea and Flood, 2014): the same strings on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn pick<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }
}

const SPACES: &[&str] = &[
    " ",
    "  ",
    "   ",
    "        ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\t\t",
    " \n",
    "\n ",
    "\u{a0}",
    "\u{2003}",
    "\u{3000}",
    "\u{85}",
    "\u{b}",
    "\u{2028}",
    " \t \n\n  \t",
];
const WORDS: &[&str] = &[
    "the",
    "Hello",
    "World",
    "KTransformers",
    "I'm",
    "don't",
    "DON'T",
    "we'll",
    "they've",
    "it's",
    "you'RE",
    "I'D",
    "naïve",
    "über",
    "straße",
    "ſtraße's",
    "'ſ",
    "привет",
    "мир",
    "你好",
    "世界",
    "こんにちは",
    "カタカナ",
    "안녕",
    "مرحبا",
    "שלום",
    "नमस्ते",
    "ไทย",
    "Ελληνικά",
    "ǅ",
    "ﬁn",
    "e\u{301}",
    "a\u{308}o\u{308}",
    "camelCase",
    "HTTPServer",
    "x1y2",
];
const DIGITS: &[&str] = &[
    "7",
    "42",
    "123",
    "1234",
    "1234567890",
    "3.14159",
    "1,000,000",
    "٣٤",
    "Ⅷ",
    "½",
    "²",
    "0x1F",
];
const CODE: &[&str] = &[
    "fn main() {",
    "}",
    "=>",
    "->",
    "::<u8>",
    "if (x != y) return;",
    "#include <stdio.h>",
    "// note",
    "/* c */",
    "\"s\\n\"",
    "'c'",
    "a[i] += b[j];",
    "__init__",
    "<|im_end|>",
    "</s>",
    "{{ x }}",
    "SELECT *",
    "$HOME/.cargo",
    "@user",
];
const MARKS: &[&str] = &[
    "!",
    "...",
    "?!",
    "—",
    "“q”",
    "。",
    "，",
    "～",
    "！？",
    "€",
    "™",
    "🚀",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "\u{0}",
    "\u{7f}",
    "\u{200b}",
    "\u{feff}",
    "\u{fffd}",
    "\u{ad}",
    "▁",
    "Ġ",
];

/// Characters of every plane, assigned or not.
fn any_character(random: &mut Random) -> char {
    let plane = [0, 0, 0, 0, 1, 1, 2, 3, 14, 15, 16][random.below(11)];
    let code = plane * 0x1_0000 + random.below(0x1_0000) as u32;
    char::from_u32(code).unwrap_or('\u{d7ff}')
}

fn piece(random: &mut Random, text: &mut String) {
    match random.below(12) {
        0..=2 => text.push_str(random.pick(SPACES)),
        3..=5 => text.push_str(random.pick(WORDS)),
        6 => text.push_str(random.pick(DIGITS)),
        7 => text.push_str(random.pick(CODE)),
        8 => text.push_str(random.pick(MARKS)),
        9 => text.extend((0..random.below(6)).map(|_| any_character(random))),
        10 => text.extend((0..random.below(8)).map(|_| char::from(b' ' + random.below(95) as u8))),
        _ => text.push(' '),
    }
}

/// The strings, from empty to some hundred characters long.
pub fn generated() -> Vec<String> {
    let mut random = Random(2024);
    let string = |length: usize| {
        let mut text = String::new();
        for _ in 0..length {
            piece(&mut random, &mut text);
        }
        text
    };
    (0..1000).map(|index| index % 25).map(string).collect()
}
