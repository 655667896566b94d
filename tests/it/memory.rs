//! The estimate of memory is what a process then takes, within 5 %: measured as the peak of resident
//! memory of a process of its own, which loads a model and fills its whole context.

use std::path::{Path, PathBuf};
use std::process::Command;

use ktx_core::gguf::{Array, Gguf, GgufWriter, Value, random_blocks};
use ktx_core::models::{QuantMix, Tying, described};
use ktx_core::{Engine, Outputs, TokenId};

/// Names the model for the process that is measured.
const MODEL: &str = "KTX_MEMORY_TEST_MODEL";
const CONTEXT: usize = 1024;
const TOLERANCE: f64 = 0.05;

/// Loads the model in `KTX_MEMORY_TEST_MODEL`, fills the context, and prints estimate and peak.
#[test]
#[ignore = "is started by the other tests, in a process of its own"]
fn measured_process() {
    let model = std::env::var(MODEL).expect("the test that starts this one names a model");
    let planned = Engine::builder()
        .model(model)
        .context(CONTEXT)
        .threads(2)
        .plan()
        .unwrap();
    let estimate = planned.estimate().unwrap().host();
    touch(planned.gguf());
    let engine = planned.load(&mut |_| true).unwrap();
    // Tokens from all over the vocabulary touch the whole table.
    let vocabulary = engine.description().vocab_size;
    let tokens: Vec<TokenId> = (0..CONTEXT - 8)
        .map(|i| TokenId((i * vocabulary / CONTEXT) as u32))
        .collect();
    let mut session = engine.session();
    session.read(&tokens, Outputs::Last, &mut |_| {}).unwrap();
    for token in tokens.iter().take(4) {
        session.force(*token, &mut |_| {}).unwrap();
    }
    println!("estimate {} {estimate:?}", estimate.total());
    println!("peak {}", peak().unwrap());
}

/// Reads something of every page of the weights: which experts a prompt chooses is left to chance.
fn touch(gguf: &Gguf) {
    let sum: u64 = gguf
        .tensors()
        .filter_map(|info| gguf.tensor(&info.name))
        .flat_map(|t| {
            t.bytes()
                .iter()
                .step_by(4096)
                .map(|b| u64::from(*b))
                .collect::<Vec<_>>()
        })
        .sum();
    std::hint::black_box(sum);
}

/// Most resident memory that this process had, in bytes.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn check(model: &Path) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "memory::measured_process",
            "--ignored",
            "--nocapture",
        ])
        .env(MODEL, model)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    println!("{text}");
    let number = |name: &str| -> f64 {
        let line = text.lines().find(|l| l.contains(name)).unwrap();
        let rest = line.split_once(name).unwrap().1;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    let (estimate, peak) = (number("estimate "), number("peak "));
    let off = estimate / peak - 1.0;
    println!("{}: {:+.1} %", model.display(), off * 100.0);
    assert!(off.abs() <= TOLERANCE, "{:+.1} %\n{text}", off * 100.0);
}

/// Hyper-parameters of a small DeepSeek-V3.
fn metadata() -> Vec<(String, Value)> {
    let mut all: Vec<(String, Value)> =
        vec![("general.architecture".to_owned(), "deepseek2".into())];
    let sizes = [
        ("block_count", 8_u32),
        ("context_length", 4096),
        ("embedding_length", 1024),
        ("feed_forward_length", 2048),
        ("vocab_size", VOCABULARY as u32),
        ("attention.head_count", 16),
        ("attention.q_lora_rank", 512),
        ("attention.kv_lora_rank", 256),
        ("attention.key_length", 96),
        ("attention.value_length", 64),
        ("rope.dimension_count", 32),
        ("leading_dense_block_count", 1),
        ("expert_count", 32),
        ("expert_used_count", 4),
        ("expert_shared_count", 1),
        ("expert_feed_forward_length", 512),
        ("expert_gating_func", 2),
    ];
    let mut add = |key: &str, value: Value| all.push((format!("deepseek2.{key}"), value));
    for (key, size) in sizes {
        add(key, size.into());
    }
    add("attention.layer_norm_rms_epsilon", 1e-6_f32.into());
    add("rope.freq_base", 10000.0_f32.into());
    add("expert_weights_norm", true.into());
    all
}

const VOCABULARY: usize = 8192;

/// Writes a model of about 230 MB with random weights.
fn write_model(path: &Path) {
    let shape = described(
        "a small DeepSeek-V3",
        metadata(),
        Tying::Separate,
        QuantMix::Q4_K_M,
    )
    .unwrap();
    let mut file = GgufWriter::new();
    for (key, value) in metadata() {
        file.kv(&key, value);
    }
    let tokens: Vec<String> = (0..VOCABULARY)
        .map(|i| match u8::try_from(i) {
            Ok(byte) => format!("<0x{byte:02X}>"),
            Err(_) => format!("token{i}"),
        })
        .collect();
    let kinds = |i: usize| if i < 256 { 6_i32 } else { 1 };
    file.kv("tokenizer.ggml.model", "llama")
        .kv("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)))
        .kv("tokenizer.ggml.scores", vec![0.0_f32; VOCABULARY])
        .kv(
            "tokenizer.ggml.token_type",
            (0..VOCABULARY).map(kinds).collect::<Vec<i32>>(),
        );
    for (seed, info) in shape.tensors().enumerate() {
        let elements: usize = info.shape.iter().product();
        let blocks = random_blocks(info.ty, elements / info.ty.block_len(), seed as u64);
        file.tensor(&info.name, info.ty, &info.shape, blocks)
            .unwrap();
    }
    file.write(path).unwrap();
}

/// A file that is gone when the test ends, however it ends.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn the_estimate_is_what_a_mixture_of_experts_takes() {
    let name = format!("ktx-memory-{}.gguf", std::process::id());
    let file = Scratch(std::env::temp_dir().join(name));
    write_model(&file.0);
    check(&file.0);
}

#[test]
#[ignore = "needs dsv3-1b.gguf and qwen3-1b.gguf in the folder KTX_MODELS"]
fn the_estimate_is_what_models_of_a_billion_parameters_take() {
    let folder = std::env::var("KTX_MODELS").expect("KTX_MODELS names the folder with the models");
    for name in ["dsv3-1b.gguf", "qwen3-1b.gguf"] {
        check(&Path::new(&folder).join(name));
    }
}
