//! The form that an answer must have.

use ktx_core::Engine;
use ktx_core::grammar::{Grammar, GrammarConstraint};
use ktx_core::serving::TokenConstraint;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::error::ApiError;

/// The form of an answer.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    r#type: String,
    /// The schema.
    #[serde(default)]
    json_schema: Option<SchemaField>,
}

/// A named schema.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct SchemaField {
    /// Its name.
    #[serde(default)]
    #[allow(
        dead_code,
        reason = "a field that clients must send and that changes no answer"
    )]
    name: Option<String>,
    /// The JSON schema.
    #[serde(default)]
    schema: Option<Value>,
}

impl ResponseFormat {
    /// What the answer is held to; none for plain text.
    pub(crate) fn constraint(&self) -> Result<Option<ConstraintSpec>, ApiError> {
        match self.r#type.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(ConstraintSpec::schema(
                &json!({"type": "object"}),
                "response_format",
            )?)),
            "json_schema" => {
                let schema = self.json_schema.as_ref().and_then(|s| s.schema.as_ref());
                let schema = schema.ok_or_else(|| {
                    ApiError::field("response_format.json_schema.schema", "there is no schema")
                })?;
                let at = "response_format.json_schema.schema";
                Ok(Some(ConstraintSpec::schema(schema, at)?))
            }
            other => Err(ApiError::field(
                "response_format.type",
                format!("`{other}` is no form; there are text, json_object and json_schema"),
            )),
        }
    }
}

/// A grammar, and the text behind which it begins.
#[derive(Debug, Clone)]
pub(crate) struct ConstraintSpec {
    grammar: Grammar,
    after: Option<&'static str>,
}

impl ConstraintSpec {
    /// Of a JSON schema, which the field `at` of a request holds.
    pub(crate) fn schema(schema: &Value, at: &str) -> Result<Self, ApiError> {
        let grammar = Grammar::from_json_schema(schema)
            .map_err(|error| ApiError::field(at, error.to_string()))?;
        Ok(Self {
            grammar,
            after: None,
        })
    }

    /// As this, behind a text: an answer that begins with a thought is free until it ends.
    pub(crate) fn after(self, text: &'static str) -> Self {
        Self {
            after: Some(text),
            ..self
        }
    }

    /// For one answer.
    pub(crate) fn build(&self, engine: &Engine) -> Result<Box<dyn TokenConstraint>, ApiError> {
        let mut constraint = GrammarConstraint::new(engine, self.grammar.clone());
        if let Some(text) = self.after {
            constraint = constraint.after(text);
        }
        Ok(Box::new(constraint))
    }
}
