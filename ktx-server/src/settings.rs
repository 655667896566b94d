//! What a server is started with.

use std::fmt;
use std::time::Duration;

use ktx_core::{GenerateOptions, SamplingParams};

use crate::auth::ApiKeys;

/// Bytes of a request's body at most, if not set.
const DEFAULT_BODY_BYTES: usize = 8 << 20;
/// Connections at once, if not set.
const DEFAULT_CONNECTIONS: usize = 16_384;
/// Answers to one request (`n`) at most, if not set.
const DEFAULT_CHOICES: usize = 16;

/// Limits and names of a server.
#[derive(Clone)]
pub struct ServerSettings {
    /// What clients call the model.
    pub model_name: String,
    /// Keys of which a request must show one; none: everybody may ask.
    pub api_keys: ApiKeys,
    /// How tokens are chosen where a request does not say, and how many.
    pub defaults: GenerateOptions,
    /// Answers to one request at most.
    pub max_choices: usize,
    /// Bytes of a request's body at most.
    pub max_body_bytes: usize,
    /// Connections at once; more wait until one closes.
    pub max_connections: usize,
    /// Time for a request's header, and that a connection may be idle.
    pub header_timeout: Duration,
    /// Time for a request's body.
    pub body_timeout: Duration,
    /// Time that a client may leave what is sent to it untaken.
    pub write_timeout: Duration,
    /// Time for an answer.
    pub request_timeout: Duration,
    /// Time for running answers after the order to shut down.
    pub drain_timeout: Duration,
    /// Web origins whose pages may use the server; `*` stands for all. None: only its own page.
    pub cors_origins: Vec<String>,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            model_name: "ktx".to_owned(),
            api_keys: ApiKeys::default(),
            defaults: GenerateOptions {
                sampling: SamplingParams::default(),
                max_new_tokens: usize::MAX,
                ..GenerateOptions::default()
            },
            max_choices: DEFAULT_CHOICES,
            max_body_bytes: DEFAULT_BODY_BYTES,
            max_connections: DEFAULT_CONNECTIONS,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(60),
            cors_origins: Vec::new(),
        }
    }
}

impl fmt::Debug for ServerSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerSettings")
            .field("model_name", &self.model_name)
            .field("api_keys", &self.api_keys)
            .field("max_body_bytes", &self.max_body_bytes)
            .field("max_connections", &self.max_connections)
            .field("request_timeout", &self.request_timeout)
            .finish_non_exhaustive()
    }
}
