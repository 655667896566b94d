//! What Dynamo asks for, in the scheduler's words. What would change the answer and is not known here is
//! refused.

use std::hash::{DefaultHasher, Hash, Hasher};

use dynamo_backend_common::{
    BackendError, DynamoError, GuidedDecodingOptions, PreprocessedRequest, SamplingOptions,
    StopConditions,
};
use ktx_core::grammar::{Grammar, GrammarConstraint};
use ktx_core::serving::{EndTokens, Request, TokenConstraint};
use ktx_core::{Engine, SamplingParams, TokenId};

use crate::backend::{Ends, error};

/// A request, and the tokens that end its answer.
pub(crate) struct Translated {
    pub(crate) request: Request,
    pub(crate) ends: Ends,
}

fn refuse(message: impl ToString) -> DynamoError {
    error(BackendError::InvalidArgument, message)
}

/// Translates a request; `id` gives the seed if none is set.
pub(crate) fn translate(
    from: &PreprocessedRequest,
    engine: &Engine,
    id: &str,
) -> Result<Translated, DynamoError> {
    check(from)?;
    let prompt: Vec<TokenId> = from.token_ids.iter().copied().map(TokenId).collect();
    let stop = &from.stop_conditions;
    let context = engine.settings().context;
    let room = context.saturating_sub(prompt.len()).max(1);
    let guided = from.sampling_options.guided_decoding.as_ref();
    let request = Request {
        sampling: sampling(&from.sampling_options, id)?,
        max_new_tokens: stop.max_tokens.map_or(room, |n| n as usize),
        stop: stop.stop.clone().unwrap_or_default(),
        end_tokens: match stop.ignore_eos {
            Some(true) => EndTokens::Ignore,
            _ => EndTokens::Stop,
        },
        log_probabilities: from.output_options.logprobs.map(|n| n as usize),
        constraint: guided.map(|g| constraint(g, engine)).transpose()?.flatten(),
        ..Request::new(prompt)
    };
    Ok(Translated {
        request,
        ends: ends(from),
    })
}

fn check(from: &PreprocessedRequest) -> Result<(), DynamoError> {
    let options = &from.sampling_options;
    let several = |n: Option<u8>| n.is_some_and(|n| n > 1);
    let refusals = [
        (from.prompt_embeds.is_some(), "prompt_embeds"),
        (
            from.multi_modal_data
                .as_ref()
                .is_some_and(|m| !m.is_empty()),
            "multi_modal_data",
        ),
        (from.prefill_result.is_some(), "prefill_result"),
        (from.encoder_result.is_some(), "encoder_result"),
        (several(options.n), "n"),
        (several(options.best_of), "best_of"),
        (options.use_beam_search == Some(true), "use_beam_search"),
        (
            options.include_stop_str_in_output == Some(true),
            "include_stop_str_in_output",
        ),
        (
            from.output_options.prompt_logprobs.is_some(),
            "prompt_logprobs",
        ),
        (
            from.stop_conditions.max_thinking_tokens.is_some(),
            "max_thinking_tokens",
        ),
        (needs_minimum(&from.stop_conditions), "min_tokens"),
    ];
    match refusals.iter().find(|(is_set, _)| *is_set) {
        Some((_, name)) => Err(refuse(format!("`{name}` is not supported by this worker"))),
        None => Ok(()),
    }
}

/// Whether an answer that ends early would be too short.
fn needs_minimum(stop: &StopConditions) -> bool {
    stop.ignore_eos != Some(true) && stop.min_tokens.is_some_and(|n| n > 0)
}

fn sampling(options: &SamplingOptions, id: &str) -> Result<SamplingParams, DynamoError> {
    let defaults = SamplingParams::default();
    let mut hash = DefaultHasher::new();
    id.hash(&mut hash);
    let params = SamplingParams {
        temperature: options.temperature.unwrap_or(defaults.temperature),
        top_p: options.top_p.unwrap_or(defaults.top_p),
        top_k: options.top_k.map_or(defaults.top_k, |k| k.max(0) as usize),
        min_p: options.min_p.unwrap_or(defaults.min_p),
        repeat_penalty: options
            .repetition_penalty
            .unwrap_or(defaults.repeat_penalty),
        presence_penalty: options.presence_penalty.unwrap_or(0.0),
        frequency_penalty: options.frequency_penalty.unwrap_or(0.0),
        seed: options.seed.map_or(hash.finish(), |seed| seed as u64),
        ..defaults
    };
    params.check().map_err(refuse)?;
    Ok(params)
}

fn ends(from: &PreprocessedRequest) -> Ends {
    let stop = &from.stop_conditions;
    if stop.ignore_eos == Some(true) {
        return Ends::default();
    }
    let hidden = [&stop.stop_token_ids, &stop.stop_token_ids_hidden];
    Ends {
        visible: stop
            .stop_token_ids_visible
            .iter()
            .flatten()
            .copied()
            .collect(),
        hidden: hidden
            .into_iter()
            .flatten()
            .flatten()
            .chain(&from.eos_token_ids)
            .copied()
            .collect(),
    }
}

/// What the answer is held to.
fn constraint(
    guided: &GuidedDecodingOptions,
    engine: &Engine,
) -> Result<Option<Box<dyn TokenConstraint>>, DynamoError> {
    if guided.regex.is_some() || guided.grammar.is_some() || guided.structural_tag.is_some() {
        return Err(refuse(
            "guided decoding is by a JSON schema or a list of choices in this worker",
        ));
    }
    let schema = match (&guided.json, &guided.choice) {
        (Some(schema), _) => schema.clone(),
        (None, Some(choices)) => serde_json::json!({ "enum": choices }),
        (None, None) => return Ok(None),
    };
    let grammar = Grammar::from_json_schema(&schema).map_err(refuse)?;
    Ok(Some(Box::new(GrammarConstraint::new(engine, grammar))))
}
