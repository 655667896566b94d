//! `ktx run`: exactly the answer on standard output.

use ktx_core::tokenizer::{SpecialText, TokenId, Tokenizer};

use super::{file, ktx, ktx_reading};

const QUESTION: [&str; 4] = ["run", "--temperature", "0", "--prompt"];

fn ask(question: &str, flags: &[&str]) -> String {
    let arguments: Vec<&str> = QUESTION
        .iter()
        .copied()
        .chain([question])
        .chain(flags.iter().copied())
        .collect();
    ktx(&arguments).ok()
}

#[test]
fn the_built_in_model_answers_and_nothing_else_is_printed() {
    assert_eq!(ask("What is 7 + 5?", &[]), "7 + 5 = 12.\n");
}

#[test]
fn a_model_that_is_named_is_used() {
    assert_eq!(
        ask("What is 7 + 5?", &["--model", "models/pip-17m.gguf"]),
        "7 + 5 = 12.\n"
    );
    let gguf_path = ask("What is 7 + 5?", &["--gguf_path", "models"]);
    assert_eq!(
        gguf_path, "7 + 5 = 12.\n",
        "a directory that holds one model"
    );
}

#[test]
fn ids_spell_the_answer() {
    let ids = ask("What is 7 + 5?", &["--ids"]);
    let ids: Vec<TokenId> = ids
        .split_whitespace()
        .map(|id| TokenId(id.parse().unwrap()))
        .collect();
    let model = ktx_cli::builtin_model().unwrap();
    let tokenizer = Tokenizer::from_metadata(model.metadata()).unwrap();
    assert_eq!(tokenizer.decode(&ids, SpecialText::Keep), "7 + 5 = 12.");
}

#[test]
fn raw_text_is_continued_without_the_template() {
    let text = ask("Once upon", &["--raw", "-n", "8"]);
    assert!(text.starts_with(" a time"), "{text}");
}

#[test]
fn prompts_come_from_files_and_from_standard_input() {
    let path = file("question.txt", "What is 7 + 5?");
    let flags = ["run", "--temperature", "0", "--prompt-file"];
    assert_eq!(ktx(&[&flags[..], &[&path]].concat()).ok(), "7 + 5 = 12.\n");
    assert_eq!(
        ktx_reading("What is 7 + 5?", &[&flags[..], &["-"]].concat()).ok(),
        "7 + 5 = 12.\n"
    );
}

#[test]
fn a_seed_decides_the_answer_at_any_thread_count() {
    let story = |seed, threads| {
        let flags = [
            "--temperature",
            "2",
            "--top-p",
            "1",
            "-n",
            "24",
            "--seed",
            seed,
            "--threads",
            threads,
        ];
        ktx(&[&["run", "--prompt", "Tell me a story."][..], &flags].concat()).ok()
    };
    assert_eq!(story("7", "1"), story("7", "2"));
    assert_ne!(story("7", "1"), story("8", "1"));
}

#[test]
fn the_number_of_tokens_is_limited() {
    let ids = ask("Tell me a story.", &["--ids", "--max_new_tokens", "5"]);
    assert_eq!(ids.split_whitespace().count(), 5);
}

#[test]
fn an_answer_that_fills_the_context_stops_and_says_so() {
    let call = ktx(&[
        "run",
        "--prompt",
        "Tell me a story.",
        "--temperature",
        "0",
        "--context",
        "24",
    ]);
    assert!(
        call.stderr.contains("the context of 24 tokens is full"),
        "{}",
        call.stderr
    );
    assert!(!call.ok().is_empty());
}

#[test]
fn statistics_go_to_standard_error() {
    let call = ktx(&[
        "run",
        "--prompt",
        "What is 7 + 5?",
        "--temperature",
        "0",
        "--stats",
    ]);
    assert!(
        call.stderr.contains("prompt eval count:    11 token(s)\n"),
        "{}",
        call.stderr
    );
    assert_eq!(call.ok(), "7 + 5 = 12.\n");
}

#[test]
fn exact_activations_give_the_same_answer() {
    assert_eq!(
        ask("What is 7 + 5?", &["--precision", "f32"]),
        "7 + 5 = 12.\n"
    );
}
