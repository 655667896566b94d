//! Bodies of requests, read with limits, and bodies of responses that come piece by piece.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use http_body::Frame;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::app::App;
use crate::error::ApiError;

/// Pieces of a streamed response that wait for a slow client before its producer waits too.
const STREAM_BUFFER: usize = 64;

/// Reads a body up to the server's limits.
pub(crate) async fn read(app: &App, body: Body) -> Result<Vec<u8>, ApiError> {
    let limit = app.settings().max_body_bytes;
    let declared = body.size_hint().lower();
    if declared > limit as u64 {
        return Err(ApiError::body_too_large(limit));
    }
    let reading = collect(body, limit);
    match tokio::time::timeout(app.settings().body_timeout, reading).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::body_too_slow()),
    }
}

async fn collect(mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    loop {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        let Some(frame) = frame else { return Ok(bytes) };
        let frame = frame.map_err(|_| ApiError::invalid("the request's body broke off"))?;
        if let Ok(data) = frame.into_data() {
            if bytes.len() + data.len() > limit {
                return Err(ApiError::body_too_large(limit));
            }
            bytes.extend_from_slice(&data);
        }
    }
}

/// Reads a body as JSON of a type; errors name the field.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        ApiError::invalid(format!(
            "the request's body is not UTF-8: byte {} belongs to no character",
            e.valid_up_to()
        ))
    })?;
    let mut json = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let message = format!("the request's JSON is not as expected: {}", error.inner());
        match path.as_str() {
            "." | "?" => ApiError::invalid(message),
            _ => ApiError::field(path, message),
        }
    })?;
    json.end()
        .map_err(|e| ApiError::invalid(format!("behind the request's JSON: {e}")))?;
    Ok(value)
}

/// The producing end of a streamed response.
pub(crate) type Pieces = mpsc::Sender<String>;

struct Stream(mpsc::Receiver<String>);

impl HttpBody for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.0.poll_recv(cx);
        piece.map(|piece| piece.map(|text| Ok(Frame::data(Bytes::from(text)))))
    }
}

/// A response whose body is what `write` sends. A client that goes away ends `write`, and what it waits for is
/// given up.
pub(crate) fn streamed<W: Future<Output = ()> + Send + 'static>(
    content_type: &'static str,
    write: impl FnOnce(Pieces) -> W,
) -> Response {
    let (pieces, receiver) = mpsc::channel(STREAM_BUFFER);
    let write = write(pieces.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = pieces.closed() => {}
            () = write => {}
        }
    });
    let mut response = Response::new(Body::new(Stream(receiver)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // For nginx: it would keep the stream back otherwise.
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}
