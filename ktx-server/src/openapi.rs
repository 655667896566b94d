//! `/openapi.json`.

use axum::Json;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use crate::{health, metrics, ollama, openai, plan};

/// What the server understands.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "ktx",
        description = "OpenAI's and Ollama's APIs on one model. If the server has API keys, all but /health wants \
                       `Authorization: Bearer KEY`."
    ),
    paths(
        openai::chat::chat,
        openai::completions::complete,
        openai::models::list,
        openai::models::one,
        openai::models::embeddings,
        ollama::chat::chat,
        ollama::generate::generate,
        ollama::models::tags,
        ollama::models::show,
        ollama::models::version,
        plan::plan,
        plan::experts,
        health::health,
        metrics::metrics,
    ),
    modifiers(&Keys),
    security((), ("key" = []))
)]
pub(crate) struct Document;

struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", scheme);
    }
}

/// The description of this API.
pub(crate) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}
