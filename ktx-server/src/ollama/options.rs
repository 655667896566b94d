//! Options of a request, and what they mean to the engine.

use ktx_core::SamplingParams;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::app::App;
use crate::constraint::ConstraintSpec;
use crate::error::ApiError;

/// How an answer is generated. Options that say how a model is loaded are ignored: it is loaded.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct Options {
    /// Spread of the choice of tokens; 0 takes the best one always.
    #[serde(default)]
    temperature: Option<f32>,
    /// Choose among the best tokens whose probabilities reach this sum.
    #[serde(default)]
    top_p: Option<f32>,
    /// Choose among this many of the best tokens.
    #[serde(default)]
    top_k: Option<i64>,
    /// Choose among tokens of at least this fraction of the best one's probability.
    #[serde(default)]
    min_p: Option<f32>,
    /// The same seed gives the same answer.
    #[serde(default)]
    seed: Option<i64>,
    /// Tokens of the answer at most; -1 is no limit.
    #[serde(default)]
    num_predict: Option<i64>,
    /// Texts that end the answer.
    #[serde(default)]
    stop: Option<Vec<String>>,
    /// Makes the last tokens less likely by this factor.
    #[serde(default)]
    repeat_penalty: Option<f32>,
    /// How many of the last tokens.
    #[serde(default)]
    repeat_last_n: Option<i64>,
    /// Makes tokens less likely each time they were generated.
    #[serde(default)]
    frequency_penalty: Option<f32>,
    /// Makes tokens that were generated less likely.
    #[serde(default)]
    presence_penalty: Option<f32>,
    /// Options of the loading of models, and others.
    #[serde(flatten)]
    #[schema(ignore)]
    other: Map<String, Value>,
}

/// Options that would change the answer and are not known here.
const UNSUPPORTED: [&str; 5] = [
    "mirostat",
    "mirostat_eta",
    "mirostat_tau",
    "tfs_z",
    "typical_p",
];

impl Options {
    pub(crate) fn sampling(&self, app: &App) -> Result<SamplingParams, ApiError> {
        for name in UNSUPPORTED {
            if self.other.get(name).is_some_and(|v| *v != 0 && *v != 1.0) {
                return Err(ApiError::unsupported(
                    name,
                    format!("`{name}` is not supported here"),
                ));
            }
        }
        let mut params = app.settings().defaults.sampling.clone();
        params.seed = self.seed.map_or_else(|| app.new_seed(), |seed| seed as u64);
        params.temperature = self.temperature.unwrap_or(params.temperature);
        params.top_p = self.top_p.unwrap_or(params.top_p);
        params.min_p = self.min_p.unwrap_or(params.min_p);
        params.repeat_penalty = self.repeat_penalty.unwrap_or(params.repeat_penalty);
        params.frequency_penalty = self.frequency_penalty.unwrap_or(0.0);
        params.presence_penalty = self.presence_penalty.unwrap_or(0.0);
        if let Some(k) = self.top_k {
            params.top_k = k.max(0) as usize;
        }
        match self.repeat_last_n {
            Some(n @ 0..) => params.repeat_last_n = n as usize,
            Some(_) => params.repeat_last_n = app.engine().settings().context,
            None => {}
        }
        params
            .check()
            .map_err(|error| ApiError::field(error.name, error.to_string()))?;
        Ok(params)
    }

    /// Tokens of an answer at most.
    pub(crate) fn max_new_tokens(&self, app: &App) -> usize {
        match self.num_predict {
            Some(n @ 0..) => n as usize,
            // Until the answer ends or the context is full.
            Some(_) => usize::MAX,
            None => app.settings().defaults.max_new_tokens,
        }
    }

    pub(crate) fn stops(&self) -> Vec<String> {
        self.stop.clone().unwrap_or_default()
    }
}

/// The form of an answer: `json`, or a schema.
pub(crate) fn constraint(format: Option<&Value>) -> Result<Option<ConstraintSpec>, ApiError> {
    match format {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) if text == "json" => Ok(Some(ConstraintSpec::schema(
            &serde_json::json!({"type": "object"}),
            "format",
        )?)),
        Some(schema @ Value::Object(_)) => Ok(Some(ConstraintSpec::schema(schema, "format")?)),
        Some(_) => Err(ApiError::field(
            "format",
            "format is `json` or a JSON schema",
        )),
    }
}
