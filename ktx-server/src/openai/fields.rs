//! The fields that requests have in common, and what they mean to the engine.

use std::collections::BTreeMap;

use ktx_core::SamplingParams;
use ktx_core::serving::EndTokens;
use ktx_core::tokenizer::TokenId;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::events::Ending;
use crate::app::App;
use crate::error::ApiError;

/// Stop texts of a request at most, and bytes of one.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Probabilities of how many tokens can be asked for.
const MAX_LOG_PROBABILITIES: usize = 20;

/// One stop text or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// What a stream holds besides its pieces.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Whether a last piece holds the counts of tokens.
    pub(crate) include_usage: Option<bool>,
    /// Whether pieces are padded to hide their length; they never are here.
    #[allow(
        dead_code,
        reason = "a field that clients send and that changes no answer"
    )]
    pub(crate) include_obfuscation: Option<bool>,
}

/// The fields that requests for chats and for completions have in common.
#[derive(Debug, Clone, Default)]
pub(crate) struct Common {
    pub(crate) model: Option<String>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) n: Option<u32>,
    pub(crate) stop: Option<Stop>,
    pub(crate) seed: Option<i64>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repeat_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) logit_bias: Option<BTreeMap<String, f32>>,
    pub(crate) ignore_eos: Option<bool>,
    pub(crate) return_speed: Option<bool>,
}

/// A request with fields of its own, those that all have in common, and those that nobody knows.
macro_rules! request {
    ($(#[$about:meta])* struct $name:ident { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Debug, serde::Deserialize, utoipa::ToSchema)]
        pub(crate) struct $name {
            $($own)*
            /// The model's name.
            #[serde(default)]
            model: Option<String>,
            /// Whether the answer comes piece by piece.
            #[serde(default)]
            stream: Option<bool>,
            /// What a stream holds besides.
            #[serde(default)]
            stream_options: Option<$crate::openai::fields::StreamOptions>,
            /// How many answers.
            #[serde(default)]
            #[schema(minimum = 1)]
            n: Option<u32>,
            /// Texts that end an answer.
            #[serde(default)]
            stop: Option<$crate::openai::fields::Stop>,
            /// The same seed gives the same answer.
            #[serde(default)]
            seed: Option<i64>,
            /// Spread of the choice of tokens; 0 takes the best one always.
            #[serde(default)]
            #[schema(minimum = 0, maximum = 2)]
            temperature: Option<f32>,
            /// Choose among the best tokens whose probabilities reach this sum.
            #[serde(default)]
            #[schema(exclusive_minimum = 0, maximum = 1)]
            top_p: Option<f32>,
            /// Choose among this many of the best tokens.
            #[serde(default)]
            top_k: Option<i64>,
            /// Choose among tokens of at least this fraction of the best one's probability.
            #[serde(default)]
            #[schema(minimum = 0, maximum = 1)]
            min_p: Option<f32>,
            /// Makes the last tokens less likely by this factor.
            #[serde(default, alias = "repeat_penalty")]
            repetition_penalty: Option<f32>,
            /// Makes tokens less likely each time they were generated.
            #[serde(default)]
            #[schema(minimum = -2, maximum = 2)]
            frequency_penalty: Option<f32>,
            /// Makes tokens that were generated less likely.
            #[serde(default)]
            #[schema(minimum = -2, maximum = 2)]
            presence_penalty: Option<f32>,
            /// Added to the logits of tokens, by their numbers.
            #[serde(default)]
            logit_bias: Option<std::collections::BTreeMap<String, f32>>,
            /// Whether the model's own end of an answer is ignored; for measurements.
            #[serde(default)]
            ignore_eos: Option<bool>,
            /// Whether the usage tells times.
            #[serde(default)]
            return_speed: Option<bool>,
            /// Fields that this server does not know.
            #[serde(flatten)]
            #[schema(ignore)]
            unknown: serde_json::Map<String, serde_json::Value>,
        }

        impl $name {
            /// Takes the common fields out.
            fn common(&mut self) -> $crate::openai::Common {
                $crate::openai::Common {
                    model: self.model.take(),
                    stream: self.stream,
                    stream_options: self.stream_options.take(),
                    n: self.n,
                    stop: self.stop.take(),
                    seed: self.seed,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repeat_penalty: self.repetition_penalty,
                    frequency_penalty: self.frequency_penalty,
                    presence_penalty: self.presence_penalty,
                    logit_bias: self.logit_bias.take(),
                    ignore_eos: self.ignore_eos,
                    return_speed: self.return_speed,
                }
            }
        }
    };
}
pub(super) use request;

impl Common {
    /// Checks all ranges, as OpenAI's API has them.
    pub(crate) fn check(&self, app: &App) -> Result<(), ApiError> {
        if let Some(model) = &self.model {
            app.check_model(model)?;
        }
        if self.stream_options.is_some() && !self.is_stream() {
            return Err(ApiError::field(
                "stream_options",
                "stream_options are for streams: set `stream` to true",
            ));
        }
        in_range("temperature", self.temperature, 0.0, 2.0)?;
        in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        in_range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        in_range("min_p", self.min_p, 0.0, 1.0)?;
        in_range(
            "repetition_penalty",
            self.repeat_penalty,
            f32::MIN_POSITIVE,
            10.0,
        )?;
        let (n, most) = (self.choices(), app.settings().max_choices);
        if n == 0 || n > most {
            return Err(ApiError::field(
                "n",
                format!("n is {n}; 1 to {most} are allowed"),
            ));
        }
        Ok(())
    }

    pub(crate) fn is_stream(&self) -> bool {
        self.stream == Some(true)
    }

    /// What a stream ends with.
    pub(super) fn ending(&self) -> Ending {
        let options = self.stream_options.as_ref();
        Ending {
            includes_usage: options.is_some_and(|o| o.include_usage == Some(true)),
            with_speed: self.return_speed == Some(true),
        }
    }

    pub(crate) fn choices(&self) -> usize {
        self.n.unwrap_or(1) as usize
    }

    pub(crate) fn end_tokens(&self) -> EndTokens {
        match self.ignore_eos {
            Some(true) => EndTokens::Ignore,
            _ => EndTokens::Stop,
        }
    }

    /// How tokens are chosen: what the server was started with, but for what the request says.
    pub(crate) fn sampling(&self, app: &App) -> Result<SamplingParams, ApiError> {
        let mut params = app.settings().defaults.sampling.clone();
        params.seed = self.seed.map_or_else(|| app.new_seed(), |seed| seed as u64);
        set(&mut params.temperature, self.temperature);
        set(&mut params.top_p, self.top_p);
        set(&mut params.min_p, self.min_p);
        set(&mut params.repeat_penalty, self.repeat_penalty);
        set(&mut params.frequency_penalty, self.frequency_penalty);
        set(&mut params.presence_penalty, self.presence_penalty);
        // Some servers write -1 for all tokens.
        set(&mut params.top_k, self.top_k.map(|k| k.max(0) as usize));
        params.logit_bias = self.biases(app)?;
        Ok(params)
    }

    fn biases(&self, app: &App) -> Result<Vec<(TokenId, f32)>, ApiError> {
        let vocabulary = app.engine().tokenizer().vocab_size();
        let entries = self.logit_bias.iter().flatten();
        entries
            .map(|(id, bias)| {
                let token = id.parse().ok().filter(|id| (*id as usize) < vocabulary);
                let token: u32 = token.ok_or_else(|| {
                    ApiError::field(
                        "logit_bias",
                        format!("`{id}` is no token: the vocabulary has {vocabulary}"),
                    )
                })?;
                in_range("logit_bias", Some(*bias), -100.0, 100.0)?;
                Ok((TokenId(token), *bias))
            })
            .collect()
    }

    /// Texts that end an answer.
    pub(crate) fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Many(stops)) => stops.clone(),
        };
        if stops.len() > MAX_STOPS || stops.iter().any(|s| s.len() > MAX_STOP_BYTES) {
            let message =
                format!("at most {MAX_STOPS} stop texts of {MAX_STOP_BYTES} bytes are allowed");
            return Err(ApiError::field("stop", message));
        }
        Ok(stops)
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

/// Tokens of an answer at most: what the request says, or else what the server was started with.
pub(crate) fn max_new_tokens(app: &App, wanted: Option<u64>) -> usize {
    wanted.map_or(app.settings().defaults.max_new_tokens, |wanted| {
        usize::try_from(wanted).unwrap_or(usize::MAX)
    })
}

/// How many tokens' probabilities are wanted.
pub(crate) fn log_probabilities(
    field: &'static str,
    wanted: Option<u32>,
) -> Result<Option<usize>, ApiError> {
    match wanted.map(|n| n as usize) {
        Some(n) if n > MAX_LOG_PROBABILITIES => Err(ApiError::field(
            field,
            format!("{field} is {n}; 0 to {MAX_LOG_PROBABILITIES} are allowed"),
        )),
        n => Ok(n),
    }
}

fn in_range(name: &'static str, value: Option<f32>, from: f32, to: f32) -> Result<(), ApiError> {
    match value {
        Some(value) if !(from..=to).contains(&value) => Err(ApiError::field(
            name,
            match from == f32::MIN_POSITIVE {
                true => format!("{name} is {value}; more than 0 and at most {to} is allowed"),
                false => format!("{name} is {value}; {from} to {to} is allowed"),
            },
        )),
        _ => Ok(()),
    }
}

/// Refuses fields that this server does not know, but for those that change no answer.
pub(crate) fn refuse_unknown(
    unknown: &Map<String, Value>,
    harmless: &[&str],
) -> Result<(), ApiError> {
    let set = unknown.iter().filter(|(_, value)| !value.is_null());
    for (name, _) in set {
        if !harmless.contains(&name.as_str()) {
            return Err(ApiError::unsupported(
                name,
                format!(
                    "`{name}` is not supported here, and leaving it out would change the answer"
                ),
            ));
        }
    }
    Ok(())
}
