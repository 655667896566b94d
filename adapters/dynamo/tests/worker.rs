//! The worker in this process: Dynamo's own conformance suite, and answers against the engine's.

use std::time::Duration;

use dynamo_backend_common::testing::{mock_context, run_conformance};
use dynamo_backend_common::{
    FinishReason, GenerateContext, GuidedDecodingOptions, LLMEngine, LLMEngineOutput,
    OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions,
};
use futures::StreamExt;
use ktx_core::serving::SchedulerSettings;
use ktx_core::tokenizer::EncodeOptions;
use ktx_core::{Engine, EngineBuilder, GenerateOptions, SamplingParams, TokenId};
use ktx_dynamo::{KtxBackend, WorkerSettings};

fn builder() -> EngineBuilder {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pip-17m.gguf");
    Engine::builder().model(model).threads(2).context(512)
}

fn worker() -> KtxBackend {
    KtxBackend::new(WorkerSettings {
        engine: builder(),
        model_name: "pip".to_owned(),
        scheduler: SchedulerSettings::default(),
    })
}

fn request(prompt: &[TokenId], stop: StopConditions) -> PreprocessedRequest {
    let sampling = SamplingOptions {
        temperature: Some(0.0),
        ..SamplingOptions::default()
    };
    PreprocessedRequest::builder()
        .model("pip".to_owned())
        .token_ids(prompt.iter().map(|t| t.0).collect::<Vec<_>>())
        .stop_conditions(stop)
        .sampling_options(sampling)
        .output_options(OutputOptions::default())
        .build()
        .expect("a request")
}

async fn answer(worker: &KtxBackend, request: PreprocessedRequest) -> Vec<LLMEngineOutput> {
    let ctx = GenerateContext::new(mock_context(), None);
    let stream = worker.generate(request, ctx).await.expect("it begins");
    stream.map(|item| item.expect("a piece")).collect().await
}

fn tokens(pieces: &[LLMEngineOutput]) -> Vec<u32> {
    pieces.iter().flat_map(|p| p.token_ids.clone()).collect()
}

/// A question as the chat template writes it, and the greedy answer of a session.
fn question() -> (Vec<TokenId>, Vec<u32>) {
    let engine = builder().load().expect("the model loads");
    let messages = [ktx_core::Message::user("What is 7 + 5?")];
    let options = ktx_core::chat::RenderOptions::for_answer();
    let template = engine.template().expect("the model has one");
    let text = template
        .render(&messages, &options)
        .expect("it is rendered");
    let prompt = engine
        .tokenizer()
        .encode(&text, &EncodeOptions::rendered_chat());
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        ..GenerateOptions::default()
    };
    let mut session = engine.session();
    let mut generation = session.generate(&prompt, &options).expect("it fits");
    generation
        .by_ref()
        .for_each(|piece| drop(piece.expect("a piece")));
    let answer = generation.generated().iter().map(|t| t.0).collect();
    (prompt, answer)
}

#[tokio::test]
async fn the_worker_keeps_dynamos_contract() {
    run_conformance(worker).await.expect("it conforms");
}

#[tokio::test]
async fn answers_are_the_engines() {
    let (prompt, wanted) = question();
    let worker = worker();
    let config = worker.start(1).await.expect("it starts");
    let llm = config.llm.expect("it is registered");
    assert_eq!(
        (llm.context_length, llm.kv_cache_block_size),
        (Some(512), Some(64))
    );
    let pieces = answer(&worker, request(&prompt, StopConditions::default())).await;
    assert_eq!(tokens(&pieces), wanted);
    let last = pieces.last().expect("an end");
    assert!(matches!(last.finish_reason, Some(FinishReason::Stop)));
    let usage = last.completion_usage.as_ref().expect("counts");
    assert_eq!(usage.completion_tokens as usize, wanted.len());
    let stop = StopConditions {
        stop_token_ids_hidden: Some(vec![wanted[2]]),
        ..StopConditions::default()
    };
    let pieces = answer(&worker, request(&prompt, stop)).await;
    assert_eq!(tokens(&pieces), wanted[..2]);
    let stop = StopConditions {
        stop_token_ids_visible: Some(vec![wanted[2]]),
        ..StopConditions::default()
    };
    let pieces = answer(&worker, request(&prompt, stop)).await;
    assert_eq!(tokens(&pieces), wanted[..3]);
    let mut with_probabilities = request(&prompt, StopConditions::default());
    with_probabilities.output_options.logprobs = Some(2);
    let pieces = answer(&worker, with_probabilities).await;
    let top = pieces[0].top_logprobs.as_ref().expect("probabilities");
    assert_eq!((top[0].len(), top[0][0].token_id), (2, wanted[0]));
    let mut guided = request(&prompt, StopConditions::default());
    guided.sampling_options.guided_decoding = Some(GuidedDecodingOptions {
        choice: Some(vec!["red".to_owned(), "green".to_owned()]),
        ..GuidedDecodingOptions::default()
    });
    let pieces = answer(&worker, guided).await;
    let engine = worker.scheduler().expect("it runs").engine().clone();
    let bytes: Vec<u8> = tokens(&pieces)
        .iter()
        .flat_map(|t| engine.tokenizer().token_bytes(TokenId(*t)).to_vec())
        .collect();
    let text = String::from_utf8(bytes).expect("a text");
    assert!(["\"red\"", "\"green\""].contains(&text.as_str()), "{text}");
    worker.cleanup().await.expect("it ends");
}

#[tokio::test]
async fn an_answer_that_is_cancelled_or_dropped_frees_its_place() {
    let (prompt, _) = question();
    let worker = worker();
    worker.start(1).await.expect("it starts");
    let endless = || {
        let stop = StopConditions {
            ignore_eos: Some(true),
            max_tokens: Some(10_000),
            ..StopConditions::default()
        };
        request(&prompt, stop)
    };
    let ctx = mock_context();
    let cancelled = GenerateContext::new(ctx.clone(), None);
    let mut stream = worker
        .generate(endless(), cancelled)
        .await
        .expect("it begins");
    stream.next().await.expect("a token").expect("a token");
    ctx.stop_generating();
    let rest: Vec<_> = stream.map(|item| item.expect("a piece")).collect().await;
    let end = rest.last().expect("an end");
    assert!(matches!(end.finish_reason, Some(FinishReason::Cancelled)));
    let dropped = GenerateContext::new(mock_context(), None);
    let mut stream = worker
        .generate(endless(), dropped)
        .await
        .expect("it begins");
    stream.next().await.expect("a token").expect("a token");
    drop(stream);
    let scheduler = worker.scheduler().expect("it runs");
    let idle = async {
        while !scheduler.is_idle() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), idle)
        .await
        .expect("it becomes idle");
    assert_eq!(scheduler.metrics().cancelled, 2);
    worker.cleanup().await.expect("it ends");
    assert!(!scheduler.is_alive());
    let ctx = GenerateContext::new(mock_context(), None);
    assert!(worker.generate(endless(), ctx).await.is_err(), "it is over");
}

#[tokio::test]
async fn what_would_change_the_answer_is_refused() {
    let (prompt, _) = question();
    let worker = worker();
    worker.start(1).await.expect("it starts");
    let mut several = request(&prompt, StopConditions::default());
    several.sampling_options.n = Some(2);
    let mut beams = request(&prompt, StopConditions::default());
    beams.sampling_options.use_beam_search = Some(true);
    let mut hot = request(&prompt, StopConditions::default());
    hot.sampling_options.temperature = Some(f32::NAN);
    let mut regex = request(&prompt, StopConditions::default());
    regex.sampling_options.guided_decoding = Some(GuidedDecodingOptions {
        regex: Some("a+".to_owned()),
        ..GuidedDecodingOptions::default()
    });
    let empty = request(&[], StopConditions::default());
    let long = request(&[TokenId(300); 600], StopConditions::default());
    let unknown = request(&[TokenId(9_999_999)], StopConditions::default());
    for (name, request) in [
        ("n", several),
        ("beams", beams),
        ("temperature", hot),
        ("regex", regex),
        ("empty", empty),
        ("long", long),
        ("unknown", unknown),
    ] {
        let ctx = GenerateContext::new(mock_context(), None);
        let refused = worker.generate(request, ctx).await.err();
        let message = format!("{:?}", refused.expect(name));
        assert!(message.contains("InvalidArgument"), "{name}: {message}");
    }
    worker.cleanup().await.expect("it ends");
}
