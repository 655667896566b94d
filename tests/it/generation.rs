//! Sessions: conversations, cancelling, limits, several at once.

use ktx_core::kernels::linear::Precision;
use ktx_core::{
    Engine, EngineError, FinishReason, GenerateOptions, Rules, SamplingParams, Thinking,
};

use crate::run::{engine, load, pip};

pub fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_new_tokens,
        ..GenerateOptions::default()
    }
}

fn small() -> Engine {
    engine(&pip(), Precision::Int8)
}

#[test]
fn engines_and_sessions_can_be_sent_to_threads() {
    fn sendable<T: Send>() {}
    sendable::<Engine>();
    sendable::<ktx_core::Session>();
}

#[test]
fn a_second_turn_reads_only_its_new_tokens() {
    let engine = small();
    let mut session = engine.session();
    session
        .chat("My name is Anna.", &greedy(40))
        .unwrap()
        .text()
        .unwrap();
    let cached = session.tokens().len();
    let mut generation = session.chat("What is my name?", &greedy(40)).unwrap();
    let answer: String = generation.by_ref().map(|p| p.unwrap().text).collect();
    let statistics = generation.statistics();
    assert!(answer.contains("Anna"), "{answer}");
    assert_eq!(statistics.cached_tokens, cached);
    // The end of the answer, the new question and the marks around it.
    assert!(statistics.prompt_tokens < 12, "{statistics:?}");
    drop(generation);
    assert_eq!(session.messages().len(), 4);
}

#[test]
fn a_conversation_in_one_session_equals_the_same_text_read_anew() {
    let engine = small();
    let mut kept = engine.session();
    for turn in ["My name is Anna.", "What is 7 + 5?"] {
        kept.chat(turn, &greedy(40)).unwrap().text().unwrap();
    }
    let again = kept
        .chat("What is my name?", &greedy(40))
        .unwrap()
        .text()
        .unwrap();
    let template = engine.template().unwrap();
    let options = ktx_core::chat::RenderOptions::for_answer();
    let text = template.render(&kept.messages()[..5], &options).unwrap();
    let encoding = ktx_core::tokenizer::EncodeOptions::rendered_chat();
    let ids = engine.tokenizer().encode(&text, &encoding);
    let anew = engine
        .session()
        .generate(&ids, &greedy(40))
        .unwrap()
        .text()
        .unwrap();
    assert_eq!(again, anew);
}

#[test]
fn a_cancelled_answer_leaves_the_session_usable() {
    let engine = small();
    let mut session = engine.session();
    let cancel = session.cancel_handle();
    let mut generation = session
        .chat("Tell me a story about a cat.", &greedy(200))
        .unwrap();
    for _ in 0..5 {
        generation.next().unwrap().unwrap();
    }
    cancel.cancel();
    generation.by_ref().for_each(|p| drop(p.unwrap()));
    assert_eq!(generation.finish_reason(), Some(FinishReason::Cancelled));
    drop(generation);
    let answer = session
        .chat("What is 7 + 5?", &greedy(40))
        .unwrap()
        .text()
        .unwrap();
    assert_eq!(answer, "7 + 5 = 12.");
}

#[test]
fn an_answer_that_is_dropped_in_the_middle_leaves_the_session_usable() {
    let engine = small();
    let mut session = engine.session();
    session
        .chat("Tell me a story about a cat.", &greedy(200))
        .unwrap()
        .take(3)
        .for_each(|p| drop(p.unwrap()));
    let answer = session
        .chat("What is 7 + 5?", &greedy(40))
        .unwrap()
        .text()
        .unwrap();
    assert_eq!(answer, "7 + 5 = 12.");
    drop(
        session
            .chat("What is the opposite of hot?", &greedy(40))
            .unwrap(),
    );
    let answer = session
        .chat("What is 7 + 5?", &greedy(40))
        .unwrap()
        .text()
        .unwrap();
    assert_eq!(answer, "7 + 5 = 12.");
}

#[test]
fn the_end_of_the_context_is_a_clear_stop() {
    let engine = load(Engine::builder().gguf(pip()).context(40).sessions(1));
    let mut session = engine.session();
    let mut generation = session
        .chat("Tell me a story about a cat.", &greedy(500))
        .unwrap();
    generation.by_ref().for_each(|p| drop(p.unwrap()));
    assert_eq!(generation.finish_reason(), Some(FinishReason::Context));
    drop(generation);
    assert_eq!(session.tokens().len(), 40);
    let error = session
        .chat("And then?", &greedy(10))
        .map(drop)
        .expect_err("it does not fit");
    assert!(
        matches!(
            error,
            EngineError::ContextFull {
                cached: 40,
                context: 40,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("--context"), "{error}");
    session.clear();
    assert_eq!(
        session
            .chat("What is 7 + 5?", &greedy(20))
            .unwrap()
            .text()
            .unwrap(),
        "7 + 5 = 12."
    );
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_before_it_is_read() {
    let engine = load(Engine::builder().gguf(pip()).context(16));
    let mut session = engine.session();
    let error = session
        .complete(&"word ".repeat(40), &greedy(4))
        .map(drop)
        .expect_err("it does not fit");
    assert!(matches!(error, EngineError::ContextFull { .. }), "{error}");
    assert!(session.tokens().is_empty());
}

#[test]
fn pages_return_when_sessions_end() {
    let engine = load(Engine::builder().gguf(pip()).context(64).sessions(1));
    for _ in 0..5 {
        let mut session = engine.session();
        session
            .chat("What is 7 + 5?", &greedy(20))
            .unwrap()
            .text()
            .unwrap();
        let mut second = engine.session();
        let error = second
            .complete("Hello", &greedy(2))
            .unwrap()
            .next()
            .unwrap()
            .map(drop)
            .expect_err("no page is left");
        assert!(matches!(error, EngineError::CacheFull), "{error}");
    }
}

#[test]
fn sessions_that_take_turns_do_not_disturb_each_other() {
    let engine = small();
    let alone = |question: &str| {
        engine
            .session()
            .chat(question, &greedy(30))
            .unwrap()
            .text()
            .unwrap()
    };
    let questions = [
        "What is the opposite of hot?",
        "Tell me a story about a cat.",
    ];
    let expected = questions.map(alone);
    let mut sessions = [engine.session(), engine.session()];
    let [first, second] = &mut sessions;
    let options = greedy(30);
    let mut a = first.chat(questions[0], &options).unwrap();
    let mut b = second.chat(questions[1], &options).unwrap();
    let mut found = [String::new(), String::new()];
    loop {
        let (x, y) = (a.next(), b.next());
        if x.is_none() && y.is_none() {
            break;
        }
        found[0].extend(x.map(|p| p.unwrap().text));
        found[1].extend(y.map(|p| p.unwrap().text));
    }
    assert_eq!(found, expected);
}

#[test]
fn a_seed_decides_the_answer_at_any_number_of_threads() {
    let options = |seed| GenerateOptions {
        sampling: SamplingParams {
            temperature: 1.5,
            top_p: 1.0,
            seed,
            ..SamplingParams::default()
        },
        max_new_tokens: 40,
        ..GenerateOptions::default()
    };
    let say = |threads, seed| {
        let engine = load(Engine::builder().gguf(pip()).threads(threads));
        engine
            .session()
            .chat("Tell me a story about a dog.", &options(seed))
            .unwrap()
            .text()
            .unwrap()
    };
    let first = say(1, 11);
    assert_eq!(first, say(2, 11));
    assert_eq!(first, say(3, 11));
    assert_ne!(first, say(2, 12));
}

#[test]
fn a_forced_thought_begins_the_answer() {
    let engine = small();
    let mut session = engine.session();
    let options = GenerateOptions {
        thinking: Thinking::Forced,
        ..greedy(5)
    };
    let text = session
        .chat("What is 7 + 5?", &options)
        .unwrap()
        .text()
        .unwrap();
    assert!(text.starts_with("<think>\n"), "{text}");
}

#[test]
fn no_new_tokens_is_an_empty_answer_and_an_empty_prompt_is_refused() {
    let engine = small();
    let mut session = engine.session();
    assert_eq!(
        session
            .complete("Hello", &greedy(0))
            .unwrap()
            .text()
            .unwrap(),
        ""
    );
    let error = session
        .generate(&[], &greedy(1))
        .map(drop)
        .expect_err("there is nothing to read");
    assert!(matches!(error, EngineError::EmptyPrompt), "{error}");
}

#[test]
fn too_little_memory_is_refused_before_anything_is_loaded() {
    let engine = Engine::builder()
        .gguf(pip())
        .context(16_000_000)
        .sessions(1);
    let Err(error) = engine.load() else {
        panic!("a context of 16 million tokens takes more than this machine has")
    };
    let text = error.to_string();
    assert!(
        text.contains("not enough memory") && text.contains("--context"),
        "{text}"
    );
}

#[test]
fn layers_on_two_host_devices_compute_what_one_does() {
    let rules = |device: &str| Rules::Text {
        name: device.to_owned(),
        text: format!(
            "- match: {{name: '^model\\.layers\\.[2-4]'}}\n  replace:\n    class: default\n    \
             kwargs: {{generate_device: '{device}', prefill_device: '{device}'}}\n"
        ),
    };
    let answer = |device| {
        let engine = load(Engine::builder().gguf(pip()).rules(rules(device)));
        engine
            .session()
            .chat("Tell me a story about a cat.", &greedy(40))
            .unwrap()
            .text()
            .unwrap()
    };
    assert_eq!(answer("cpu:1"), answer("cpu"));
}
