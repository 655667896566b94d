//! Which address is answered by what.

use axum::Router;
use axum::http::{HeaderValue, Method, header};
use axum::middleware;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::app::App;
use crate::auth::require_key;
use crate::error::ApiError;
use crate::{health, metrics, ollama, openai, openapi, page, plan};

/// All routes.
pub(crate) fn router(app: &App) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(openai::chat::chat))
        .route("/v1/completions", post(openai::completions::complete))
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{model}", get(openai::models::one))
        .route("/v1/embeddings", post(openai::models::embeddings))
        .route("/api/chat", post(ollama::chat::chat))
        .route("/api/generate", post(ollama::generate::generate))
        .route("/api/tags", get(ollama::models::tags))
        .route("/api/show", post(ollama::models::show))
        .route("/api/version", get(ollama::models::version))
        .route("/api/ktx/plan", get(plan::plan))
        .route("/api/ktx/experts", get(plan::experts))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::document))
        .fallback(async || ApiError::not_found())
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(middleware::from_fn_with_state(app.clone(), require_key));
    let router = Router::new()
        .route("/", get(page::index))
        .route("/web/{file}", get(page::file))
        .route("/health", get(health::health))
        .merge(guarded)
        .with_state(app.clone())
        .layer(CatchPanicLayer::custom(|_| {
            let error = ApiError::internal("a handler panicked");
            axum::response::IntoResponse::into_response(error)
        }));
    match cors(&app.settings().cors_origins) {
        Some(layer) => router.layer(layer),
        None => router,
    }
}

/// Lets pages of these origins use the server.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|o| HeaderValue::from_str(o).ok())),
    };
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST])
            .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE]),
    )
}
