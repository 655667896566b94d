//! What goes wrong, in the shape that OpenAI's clients expect.

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use ktx_core::EngineError;
use ktx_core::serving::SubmitError;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// Why a server could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system refused threads or signals.
    #[error("cannot start: {0}")]
    Start(std::io::Error),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A setting.
    #[error("{0}")]
    Setting(String),
}

/// An error, as OpenAI's API writes it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// What is wrong.
    pub(crate) error: ErrorDetail,
}

/// What is wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ErrorDetail {
    /// In words.
    message: String,
    /// The kind: `invalid_request_error`, `authentication_error`, `rate_limit_error`, `server_error`.
    r#type: &'static str,
    /// The field of the request.
    param: Option<String>,
    /// A word for programs.
    code: Option<&'static str>,
}

/// An error that is answered to a request.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    status: StatusCode,
    detail: ErrorDetail,
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            detail: ErrorDetail {
                message: message.into(),
                r#type: kind,
                param: None,
                code,
            },
            retry_after: None,
        }
    }

    /// The request is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            None,
            message,
        )
    }

    /// A field of the request is wrong.
    pub(crate) fn field(name: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(message);
        error.detail.param = Some(name.into());
        error
    }

    /// A field would change the answer, and this server does not know it.
    pub(crate) fn unsupported(name: &str, message: impl Into<String>) -> Self {
        let mut error = Self::field(name, message);
        error.detail.code = Some("unsupported_parameter");
        error
    }

    pub(crate) fn unauthorized(message: &str) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "authentication_error",
            Some("invalid_api_key"),
            message,
        )
    }

    pub(crate) fn no_model(wanted: &str, name: &str) -> Self {
        let mut error = Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("model_not_found"),
            format!("the model `{wanted}` does not exist here; this server has `{name}`"),
        );
        error.detail.param = Some("model".to_owned());
        error
    }

    pub(crate) fn not_found() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("unknown_url"),
            "there is nothing at this address; /openapi.json lists what there is",
        )
    }

    pub(crate) fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_allowed"),
            "this address does not take this method; /openapi.json lists what there is",
        )
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            Some("body_too_large"),
            format!("the request's body is larger than {limit} bytes"),
        )
    }

    pub(crate) fn body_too_slow() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            Some("request_timeout"),
            "the request's body did not come in time",
        )
    }

    pub(crate) fn took_too_long(seconds: u64) -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "server_error",
            Some("timeout"),
            format!("the answer took longer than {seconds} s; ask for fewer tokens (max_tokens)"),
        )
    }

    pub(crate) fn not_implemented(message: &str) -> Self {
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            "invalid_request_error",
            Some("not_implemented"),
            message,
        )
    }

    /// Something broke here; details go to the log.
    pub(crate) fn internal(what: impl std::fmt::Display) -> Self {
        tracing::error!("a request failed: {what}");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            None,
            "the server could not answer; its log says why",
        )
    }

    fn busy(waiting: usize, seconds: u64) -> Self {
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            Some("queue_full"),
            format!("{waiting} requests wait already; try again in {seconds} s"),
        );
        error.retry_after = Some(seconds);
        error
    }

    fn closing() -> Self {
        let mut error = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            Some("shutting_down"),
            "the server is shutting down and takes no more requests",
        );
        error.retry_after = Some(5);
        error
    }

    /// A request that the scheduler does not take; `seconds` is when a full queue is worth another try.
    pub(crate) fn submit(error: SubmitError, seconds: u64) -> Self {
        match error {
            SubmitError::QueueFull { waiting } => Self::busy(waiting, seconds),
            SubmitError::Closed => Self::closing(),
            SubmitError::Request(error) => Self::engine(&error),
        }
    }

    /// What the engine says of a request.
    pub(crate) fn engine(error: &EngineError) -> Self {
        match error {
            EngineError::ContextFull { .. } => {
                let mut error = Self::field("messages", error.to_string());
                error.detail.code = Some("context_length_exceeded");
                error
            }
            EngineError::EmptyPrompt
            | EngineError::Setting { .. }
            | EngineError::Sampling(_)
            | EngineError::NoTemplate { .. }
            | EngineError::Chat(_)
            | EngineError::NoAdapter { .. } => Self::invalid(error.to_string()),
            other => Self::internal(other),
        }
    }

    /// The body alone, for a stream that has begun.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: self.detail.clone(),
        }
    }

    /// As Ollama writes it: the message alone.
    pub(crate) fn message(&self) -> &str {
        &self.detail.message
    }

    /// As a response of Ollama's API.
    pub(crate) fn into_ollama(self) -> Response {
        let body = serde_json::json!({ "error": self.message() });
        self.with_body(body)
    }

    fn with_body(self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::json!(self.body());
        self.with_body(body)
    }
}
