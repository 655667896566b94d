//! A byte-level BPE vocabulary of 300 tokens, in the metadata of GGUF.

use ktx_gguf::{Array, GgufWriter, Value};

use super::spec::Architecture;

/// Ids 0 to 2.
const SPECIAL: [&str; 3] = ["<|begin|>", "<|end|>", "<|pad|>"];

/// Merges in order of rank; `_` stands for the byte of a space. Each makes a token.
const MERGES: [&str; 41] = [
    "_ t", "_ a", "h e", "i n", "r e", "o n", "_t he", "e r", "_ s", "a t", "_ w", "_ o", "e n",
    "_ c", "i t", "i s", "a n", "o r", "e s", "_ b", "e d", "_ f", "in g", "_ p", "o u", "_a n",
    "a l", "a r", "_t o", "_ m", "_o f", "_ in", "_ d", "_ h", "_an d", "i c", "l e", "_t h",
    "_ I", "o m", "l l",
];

const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";

/// Number of tokens.
pub const VOCABULARY: usize = SPECIAL.len() + 256 + MERGES.len();

/// The character that stands for a byte in GPT-2's vocabulary: itself where it is printable, else the next one
/// from U+0100 on.
fn character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + before).expect("a character below U+0144")
}

fn strings(texts: Vec<String>) -> Value {
    Value::Array(Array::String(texts))
}

pub fn write(file: &mut GgufWriter, architecture: Architecture) {
    let space = character(b' ').to_string();
    let merges: Vec<String> = MERGES.iter().map(|m| m.replace('_', &space)).collect();
    let mut tokens: Vec<String> = SPECIAL.iter().map(|&token| token.to_owned()).collect();
    tokens.extend((0..=255).map(|byte| character(byte).to_string()));
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let kinds = (0..VOCABULARY).map(|id| if id < SPECIAL.len() { 3 } else { 1 });
    let pre_tokenizer = match architecture {
        Architecture::Llama => "llama-bpe",
        Architecture::DeepSeek2 => "deepseek-v3",
        _ => "qwen2",
    };
    file.kv("tokenizer.ggml.model", "gpt2")
        .kv("tokenizer.ggml.pre", pre_tokenizer)
        .kv("tokenizer.ggml.tokens", strings(tokens))
        .kv("tokenizer.ggml.token_type", kinds.collect::<Vec<i32>>())
        .kv("tokenizer.ggml.merges", strings(merges))
        .kv("tokenizer.ggml.bos_token_id", 0_u32)
        .kv("tokenizer.ggml.eos_token_id", 1_u32)
        .kv("tokenizer.ggml.padding_token_id", 2_u32)
        .kv("tokenizer.ggml.add_bos_token", true)
        .kv("tokenizer.chat_template", CHAT_TEMPLATE);
}
