//! `/v1/models` and what this server cannot do.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, ErrorBody};

/// The models of the server: one.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`
    object: &'static str,
    data: Vec<ModelField>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelField {
    id: String,
    /// `model`
    object: &'static str,
    /// When it was loaded, in seconds since 1970.
    created: u64,
    owned_by: &'static str,
    /// As `id`; KTransformers' clients read it.
    name: String,
    /// Tokens that a conversation holds.
    max_model_len: usize,
}

fn model(app: &App) -> ModelField {
    let name = app.settings().model_name.clone();
    ModelField {
        id: name.clone(),
        object: "model",
        created: app.created(),
        owned_by: "ktx",
        name,
        max_model_len: app.engine().settings().context,
    }
}

/// The models of the server.
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, body = ModelList)))]
pub(crate) async fn list(State(app): State<App>) -> Json<ModelList> {
    Json(ModelList {
        object: "list",
        data: vec![model(&app)],
    })
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "openai", params(("model" = String, Path,)),
    responses((status = 200, body = ModelField), (status = 404, body = ErrorBody)))]
pub(crate) async fn one(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<ModelField>, ApiError> {
    app.check_model(&name)?;
    Ok(Json(model(&app)))
}

/// Not supported: the models that this server runs generate text.
#[utoipa::path(post, path = "/v1/embeddings", tag = "openai", responses((status = 501, body = ErrorBody)))]
pub(crate) async fn embeddings() -> ApiError {
    ApiError::not_implemented(
        "this model generates text and makes no embeddings; ask a server with an embedding model",
    )
}
