//! `/api/tags`, `/api/show`, `/api/version`.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::app::App;
use crate::body;
use crate::error::ApiError;
use crate::time::rfc3339;

/// The version of the program.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    version: &'static str,
}

/// Which model is asked about.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ShowRequest {
    /// The model's name.
    #[serde(default)]
    model: Option<String>,
    /// As `model`; older clients write it.
    #[serde(default)]
    name: Option<String>,
}

fn details(app: &App) -> Value {
    let family = &app.engine().description().architecture;
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    })
}

/// The models of the server: one.
#[utoipa::path(get, path = "/api/tags", tag = "ollama", responses((status = 200, body = Value)))]
pub(crate) async fn tags(State(app): State<App>) -> Json<Value> {
    let name = &app.settings().model_name;
    Json(json!({"models": [{
        "name": name,
        "model": name,
        "modified_at": rfc3339(app.created()),
        "size": app.plan().bytes(),
        "digest": "",
        "details": details(&app),
    }]}))
}

/// What a model is.
#[utoipa::path(post, path = "/api/show", tag = "ollama", request_body = ShowRequest,
    responses((status = 200, body = Value), (status = 400, body = Value), (status = 404, body = Value)))]
pub(crate) async fn show(State(app): State<App>, body: Body) -> Response {
    match described(&app, body).await {
        Ok(value) => Json(value).into_response(),
        Err(error) => error.into_ollama(),
    }
}

async fn described(app: &App, body: Body) -> Result<Value, ApiError> {
    let request: ShowRequest = body::parse(&body::read(app, body).await?)?;
    let name = request.model.or(request.name);
    let name = name.ok_or_else(|| ApiError::field("model", "name a model"))?;
    app.check_model(&name)?;
    let description = app.engine().description();
    let template = app.engine().template().map_or("", |t| t.source());
    let architecture = &description.architecture;
    let mut capabilities = vec!["completion"];
    if app.format().template_knows_tools {
        capabilities.push("tools");
    }
    Ok(json!({
        "modelfile": "",
        "parameters": "",
        "template": template,
        "modified_at": rfc3339(app.created()),
        "details": details(app),
        "model_info": {
            "general.architecture": architecture,
            "general.name": description.name,
            format!("{architecture}.context_length"): description.context_length,
            format!("{architecture}.embedding_length"): description.hidden_size,
            format!("{architecture}.block_count"): description.num_layers,
            format!("{architecture}.vocab_size"): description.vocab_size,
        },
        "capabilities": capabilities,
    }))
}

/// The version of the program.
#[utoipa::path(get, path = "/api/version", tag = "ollama", responses((status = 200, body = Version)))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION"),
    })
}
