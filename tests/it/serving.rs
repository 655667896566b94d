//! Many requests at once against each of them alone.

use std::time::{Duration, Instant};

use ktx_core::kernels::kv::KvType;
use ktx_core::serving::{
    Batching, EndTokens, Event, EventStream, Finished, PrefixSharing, Request, Scheduler,
    SchedulerSettings, SubmitError, stream,
};
use ktx_core::{Engine, FinishReason, GenerateOptions, SamplingParams, TokenId};

pub(crate) const PAGE: usize = 64;

pub(crate) fn engine(context: usize, sessions: usize, chunk: usize) -> Engine {
    engine_with(context, sessions, chunk, KvType::F16)
}

pub(crate) fn engine_with(
    context: usize,
    sessions: usize,
    chunk: usize,
    kv_type: KvType,
) -> Engine {
    Engine::builder()
        .kv_type(kv_type)
        .model(concat!(env!("CARGO_MANIFEST_DIR"), "/models/pip-17m.gguf"))
        .threads(2)
        .context(context)
        .chunk_size(chunk)
        .sessions(sessions)
        .load()
        .expect("the model loads")
}

pub(crate) fn scheduler(engine: &Engine, settings: SchedulerSettings) -> Scheduler {
    Scheduler::start(engine.clone(), settings).expect("the thread starts")
}

/// A prompt of this many tokens, unlike those of other seeds.
pub(crate) fn prompt(engine: &Engine, seed: u32, tokens: usize) -> Vec<TokenId> {
    let vocabulary = engine.tokenizer().vocab_size() as u32;
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        TokenId(300 + (x >> 8) % (vocabulary - 300))
    };
    (0..tokens).map(|_| next()).collect()
}

fn sampling(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        frequency_penalty: 0.2,
        seed,
        ..SamplingParams::default()
    }
}

/// What a session of its own gives.
fn alone(engine: &Engine, prompt: &[TokenId], seed: u64, tokens: usize) -> Vec<TokenId> {
    let options = GenerateOptions {
        sampling: sampling(seed),
        max_new_tokens: tokens,
        ..GenerateOptions::default()
    };
    let mut session = engine.session();
    let mut generation = session.generate(prompt, &options).expect("it fits");
    generation.by_ref().for_each(|piece| {
        piece.expect("it is generated");
    });
    generation.generated().to_vec()
}

pub(crate) fn ask(
    scheduler: &Scheduler,
    prompt: &[TokenId],
    seed: u64,
    tokens: usize,
) -> EventStream {
    let (sink, events) = stream();
    let request = Request {
        sampling: sampling(seed),
        max_new_tokens: tokens,
        ..Request::new(prompt.to_vec())
    };
    scheduler.submit(request, sink).expect("it is taken");
    events
}

pub(crate) fn answer(events: EventStream) -> (Vec<TokenId>, Finished) {
    let mut tokens = Vec::new();
    for event in events {
        match event {
            Event::Started { .. } => {}
            Event::Token(token) => tokens.push(token.token),
            Event::Finished(finished) => return (tokens, finished),
            Event::Failed(error) => panic!("{error}"),
        }
    }
    panic!("the stream has no end");
}

fn fastest() -> SchedulerSettings {
    SchedulerSettings {
        batching: Batching::Fastest,
        ..SchedulerSettings::default()
    }
}

#[test]
fn a_request_alone_gets_what_a_session_gives() {
    let engine = engine(512, 12, 96);
    let scheduler = scheduler(&engine, fastest());
    for (i, length) in [1, 40, 150, 300].into_iter().enumerate() {
        let prompt = prompt(&engine, i as u32, length);
        let (tokens, _) = answer(ask(&scheduler, &prompt, 7, 30));
        assert_eq!(tokens, alone(&engine, &prompt, 7, 30), "{length} tokens");
    }
}

#[test]
fn many_requests_at_once_get_what_each_gets_alone() {
    let engine = engine(512, 12, 96);
    let prompts: Vec<Vec<TokenId>> = [3, 150, 40, 1, 300, 64, 65, 20, 129, 10, 7, 200]
        .iter()
        .enumerate()
        .map(|(i, n)| prompt(&engine, i as u32, *n))
        .collect();
    let scheduler = scheduler(&engine, SchedulerSettings::default());
    let streams: Vec<EventStream> = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| ask(&scheduler, p, i as u64, 20 + i))
        .collect();
    let together: Vec<_> = streams.into_iter().map(answer).collect();
    assert!(scheduler.metrics().steps < 100, "they shared steps");
    for (i, ((tokens, finished), prompt)) in together.into_iter().zip(&prompts).enumerate() {
        let (alone, _) = answer(ask(&scheduler, prompt, i as u64, 20 + i));
        assert_eq!(tokens, alone, "request {i}");
        assert_eq!(finished.usage.prompt_tokens, prompt.len());
    }
}

#[test]
fn requests_that_give_their_pages_up_go_on_where_they_were() {
    // Pages for two of six requests that grow by a page each.
    let engine = engine(256, 2, 64);
    let scheduler = scheduler(&engine, SchedulerSettings::default());
    let prompts: Vec<_> = (0..6).map(|i| prompt(&engine, i, 60)).collect();
    let ask = |(i, p): (usize, &Vec<TokenId>)| {
        let (sink, events) = stream();
        let request = Request {
            sampling: sampling(i as u64),
            max_new_tokens: 150,
            end_tokens: EndTokens::Ignore,
            ..Request::new(p.clone())
        };
        scheduler.submit(request, sink).expect("it is taken");
        events
    };
    let together: Vec<_> = prompts.iter().enumerate().map(ask).collect();
    let together: Vec<_> = together.into_iter().map(|e| answer(e).0).collect();
    assert!(scheduler.metrics().preemptions > 0);
    for (i, tokens) in together.into_iter().enumerate() {
        assert_eq!(tokens.len(), 150);
        assert_eq!(tokens, answer(ask((i, &prompts[i]))).0, "request {i}");
    }
}

#[test]
fn a_common_beginning_is_read_once_and_changes_nothing() {
    let engine = engine(512, 8, 128);
    let scheduler = scheduler(&engine, SchedulerSettings::default());
    let beginning = prompt(&engine, 77, 3 * PAGE + 10);
    let prompts: Vec<Vec<TokenId>> = (0..4)
        .map(|i| [beginning.clone(), prompt(&engine, i, 5)].concat())
        .collect();
    let streams: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| ask(&scheduler, p, i as u64, 10))
        .collect();
    let together: Vec<_> = streams.into_iter().map(answer).collect();
    let cached: Vec<_> = together
        .iter()
        .map(|(_, finished)| finished.usage.cached_tokens)
        .collect();
    assert_eq!(cached, [0, 3 * PAGE, 3 * PAGE, 3 * PAGE]);
    let settings = SchedulerSettings {
        prefix_cache: PrefixSharing::Off,
        ..SchedulerSettings::default()
    };
    let without = Scheduler::start(engine.clone(), settings).expect("the thread starts");
    for (i, ((tokens, _), prompt)) in together.into_iter().zip(&prompts).enumerate() {
        let (alone, finished) = answer(ask(&without, prompt, i as u64, 10));
        assert_eq!(tokens, alone, "request {i}");
        assert_eq!(finished.usage.cached_tokens, 0);
    }
    assert_eq!(without.metrics().cached_pages, 0);
}

#[test]
fn answers_are_shared_if_results_may_differ_in_their_last_bits() {
    let engine = engine(512, 4, 128);
    let first = prompt(&engine, 3, 100);
    for (settings, shared) in [(SchedulerSettings::default(), PAGE), (fastest(), 2 * PAGE)] {
        let scheduler = scheduler(&engine, settings);
        let (sink, events) = stream();
        let request = Request {
            max_new_tokens: 60,
            end_tokens: EndTokens::Ignore,
            ..Request::new(first.clone())
        };
        scheduler.submit(request, sink).expect("it is taken");
        let next_turn = [first.clone(), answer(events).0].concat();
        let (_, finished) = answer(ask(&scheduler, &next_turn, 0, 5));
        assert_eq!(finished.usage.cached_tokens, shared);
    }
}

#[test]
fn a_long_prompt_does_not_hold_up_a_running_stream() {
    let engine = engine(2048, 2, 512);
    let settings = SchedulerSettings {
        mixed_rows: 32,
        ..SchedulerSettings::default()
    };
    let scheduler = scheduler(&engine, settings);
    let (sink, events) = stream();
    let request = Request {
        max_new_tokens: 200,
        end_tokens: EndTokens::Ignore,
        ..Request::new(prompt(&engine, 5, 4))
    };
    scheduler.submit(request, sink).expect("it is taken");
    let mut running = events.into_iter();
    for _ in 0..5 {
        running.next().expect("it runs");
    }
    let long = ask(&scheduler, &prompt(&engine, 6, 1600), 1, 1);
    let (tokens, _) = answer(long);
    assert_eq!(tokens.len(), 1);
    // The prompt took 50 steps, and each gave the stream a token.
    let at_end = scheduler.metrics();
    assert!(at_end.generated_tokens >= 50, "{at_end:?}");
}

#[test]
fn a_stream_that_nobody_reads_is_given_up() {
    let engine = engine(512, 2, 128);
    let scheduler = scheduler(&engine, SchedulerSettings::default());
    let mut streams: Vec<_> = (0..4)
        .map(|i| ask(&scheduler, &prompt(&engine, i, 100), 1, 400))
        .collect();
    streams[0].next().expect("it starts");
    drop(streams);
    let begin = Instant::now();
    while !scheduler.is_idle() {
        assert!(begin.elapsed() < Duration::from_secs(20), "it goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    let metrics = scheduler.metrics();
    assert_eq!(metrics.used_pages, 0);
    assert!(metrics.cancelled > 0);
}

#[test]
fn requests_beyond_the_limits_are_refused() {
    let engine = engine(256, 1, 64);
    let settings = SchedulerSettings {
        max_running: 1,
        max_waiting: 2,
        ..SchedulerSettings::default()
    };
    let scheduler = scheduler(&engine, settings);
    let submit = |tokens: Vec<TokenId>| {
        let (sink, events) = stream();
        let request = Request {
            end_tokens: EndTokens::Ignore,
            max_new_tokens: 150,
            ..Request::new(tokens)
        };
        scheduler.submit(request, sink).map(|()| events)
    };
    let results: Vec<_> = (0..8).map(|i| submit(prompt(&engine, i, 30))).collect();
    let full = |r: &&Result<EventStream, SubmitError>| {
        matches!(r, Err(SubmitError::QueueFull { waiting: 2 }))
    };
    assert!(results.iter().filter(full).count() >= 5);
    assert!(matches!(submit(Vec::new()), Err(SubmitError::Request(_))));
    assert!(matches!(
        submit(prompt(&engine, 1, 257)),
        Err(SubmitError::Request(_))
    ));
    assert!(matches!(
        submit(vec![TokenId(u32::MAX)]),
        Err(SubmitError::Request(_))
    ));
    scheduler.close();
    assert!(matches!(
        submit(prompt(&engine, 1, 5)),
        Err(SubmitError::Closed)
    ));
    for events in results.into_iter().flatten() {
        let (tokens, finished) = answer(events);
        assert_eq!((tokens.len(), finished.reason), (150, FinishReason::Length));
    }
}

#[test]
fn stop_texts_and_probabilities_are_given() {
    let engine = engine(512, 2, 128);
    let scheduler = scheduler(&engine, SchedulerSettings::default());
    let messages = [ktx_core::Message::user("What is 7 + 5?")];
    let template = engine.template().expect("the model has one");
    let text = template
        .render(&messages, &ktx_core::chat::RenderOptions::for_answer())
        .expect("it is rendered");
    let options = ktx_core::tokenizer::EncodeOptions::rendered_chat();
    let (sink, events) = stream();
    let request = Request {
        sampling: SamplingParams::greedy(),
        stop: vec!["= 1".to_owned()],
        log_probabilities: Some(3),
        ..Request::new(engine.tokenizer().encode(&text, &options))
    };
    scheduler.submit(request, sink).expect("it is taken");
    let mut answer = String::new();
    for event in events {
        match event {
            Event::Started { .. } => {}
            Event::Token(token) => {
                let probabilities = token.log_probabilities.expect("they were asked for");
                assert_eq!(probabilities.top.len(), 3);
                assert_eq!(probabilities.top[0].0, token.token);
                assert_eq!(probabilities.top[0].1, probabilities.chosen);
                assert!(probabilities.chosen <= 0.0);
                answer.push_str(&token.text);
            }
            Event::Finished(finished) => {
                assert_eq!(finished.stop.as_deref(), Some("= 1"));
                assert_eq!(finished.reason, FinishReason::Stop);
                answer.push_str(&finished.text);
            }
            Event::Failed(error) => panic!("{error}"),
        }
    }
    assert_eq!(answer, "7 + 5 ");
}
