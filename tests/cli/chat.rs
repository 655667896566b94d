//! `ktx chat` with a script as its input.

use super::{Call, file, ktx_reading};

fn chat(script: &str, flags: &[&str]) -> Call {
    ktx_reading(script, &[&["chat", "--temperature", "0"], flags].concat())
}

/// The numbers of a statistics line, in order.
fn counts(stdout: &str, label: &str) -> Vec<usize> {
    let lines = stdout.lines().filter_map(|line| line.strip_prefix(label));
    lines
        .map(|rest| {
            rest.trim()
                .strip_suffix(" token(s)")
                .expect("a count")
                .parse()
                .unwrap()
        })
        .collect()
}

#[test]
fn two_turns_are_answered_with_statistics_after_each() {
    let stdout = chat("What is 7 + 5?\nWhat is the opposite of hot?\n", &[]).ok();
    let text: Vec<&str> = stdout.lines().collect();
    assert_eq!(text[0], "7 + 5 = 12.");
    assert_eq!(text[1], "");
    let labels = [
        "prompt eval count: ",
        "prompt eval duration: ",
        "prompt eval rate: ",
    ];
    let labels = labels
        .into_iter()
        .chain(["eval count: ", "eval duration: ", "eval rate: "]);
    for (line, label) in text[2..8].iter().zip(labels) {
        assert!(line.starts_with(label), "{line}");
    }
    assert_eq!(text[8], "The opposite of hot is cold.");
    assert!(
        !stdout.contains('\x1b') && !stdout.contains("Chat:"),
        "{stdout}"
    );
}

#[test]
fn a_turn_reads_only_its_new_tokens() {
    let question = "What is the opposite of hot?\n";
    let stdout = chat(&question.repeat(4), &[]).ok();
    let read = counts(&stdout, "prompt eval count:");
    let generated = counts(&stdout, "eval count:");
    assert_eq!(read.len(), 4);
    // The question, and the mark that ended the answer before it; never the whole conversation.
    assert!(read[1..].iter().all(|n| *n <= read[0] + 1), "{read:?}");
    assert_eq!((read[1], read[2]), (read[2], read[3]));
    assert!(generated.iter().all(|n| *n > 0));
}

#[test]
fn the_start_names_model_and_rules() {
    let call = chat("", &["--threads", "1"]);
    assert!(
        call.stderr
            .contains("rules: preset deepseek2; 1 threads, context 1024"),
        "{}",
        call.stderr
    );
    assert_eq!(call.ok(), "");
}

#[test]
fn several_lines_are_one_input() {
    let stdout = chat("\"\"\"What is\n7 + 5?\"\"\"\n", &[]).ok();
    assert_eq!(counts(&stdout, "prompt eval count:").len(), 1, "{stdout}");
}

#[test]
fn the_path_of_a_file_and_an_empty_line_send_texts() {
    let path = file("hot.txt", "What is the opposite of hot?");
    let stdout = chat(&format!("{path}\n"), &[]).ok();
    assert!(
        stdout.starts_with("The opposite of hot is cold.\n"),
        "{stdout}"
    );
    let stdout = chat("\n", &["--prompt_file", &path]).ok();
    assert!(
        stdout.starts_with("The opposite of hot is cold.\n"),
        "{stdout}"
    );
}

#[test]
fn clear_forgets_and_quit_leaves() {
    let call = chat(
        "What is 7 + 5?\n/stats\n/clear\n/stats\n/quit\nWhat is 7 + 5?\n",
        &[],
    );
    assert!(
        call.stderr
            .contains("\n0 of 1024 tokens of context are used"),
        "{}",
        call.stderr
    );
    assert_eq!(counts(&call.ok(), "eval count:").len(), 1);
}

#[test]
fn a_full_context_stops_the_answer_and_clear_goes_on() {
    let script =
        "Tell me a story.\nWhat is the opposite of hot?\n/clear\nWhat is the opposite of hot?\n";
    let call = chat(script, &["--context", "32"]);
    assert!(
        call.stderr
            .contains("(stopped: the context of 32 tokens is full; /clear"),
        "{}",
        call.stderr
    );
    assert!(
        call.stderr
            .contains("/clear starts a new conversation here"),
        "{}",
        call.stderr
    );
    assert!(
        call.stdout.contains("\nThe opposite of hot is cold.\n"),
        "{}",
        call.stdout
    );
    assert_eq!(call.code, Some(1), "a script is told that a turn failed");
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_and_the_chat_goes_on() {
    let call = chat(
        &format!("{}\nWhat is the opposite of hot?\n", "word ".repeat(100)),
        &["--context", "40"],
    );
    assert!(
        call.stderr.contains("the context holds 40"),
        "{}",
        call.stderr
    );
    assert!(
        call.stdout.starts_with("The opposite of hot is cold.\n"),
        "{}",
        call.stdout
    );
}

#[test]
fn spellings_of_ktransformers_are_accepted() {
    let flags = [
        "--model_path",
        "deepseek-ai/DeepSeek-V3",
        "--gguf_path",
        "models",
        "--optimize_config_path",
        "deepseek2",
        "--cpu_infer",
        "1",
        "--max_new_tokens",
        "20",
        "--chunk_size",
        "4",
        "--mode",
        "normal",
        "--use_cuda_graph",
        "False",
        "--force_think",
        "False",
        "--device",
        "cpu",
    ];
    let stdout = chat("What is 7 + 5?\n", &flags).ok();
    assert!(stdout.starts_with("7 + 5 = 12.\n"), "{stdout}");
    let stdout = chat(
        "What is 7 + 5?\n",
        &["--chunk_prefill_size", "8", "--nouse_cuda_graph"],
    )
    .ok();
    assert!(stdout.starts_with("7 + 5 = 12.\n"), "{stdout}");
}

#[test]
fn forced_thinking_begins_the_answer() {
    for flag in [
        &["--force-think"][..],
        &["--force_think", "True"],
        &["--force_think=True"],
    ] {
        let stdout = chat("What is 7 + 5?\n", flag).ok();
        assert!(stdout.starts_with("<think>\n"), "{flag:?}: {stdout}");
    }
}

#[test]
fn invalid_text_in_a_script_is_named_and_the_chat_goes_on() {
    let path = file("latin1.txt", b"caf\xe9");
    let call = chat(&format!("{path}\nWhat is 7 + 5?\n"), &[]);
    assert!(
        call.stderr.contains("latin1.txt is not UTF-8 text: byte 3"),
        "{}",
        call.stderr
    );
    assert!(call.stdout.starts_with("7 + 5 = 12.\n"), "{}", call.stdout);
}
