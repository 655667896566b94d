//! Streams of server-sent events.

use axum::response::Response;
use serde::Serialize;

use super::response::UsageField;
use crate::app::{App, now};
use crate::body::{Pieces, streamed};
use crate::error::ApiError;
use crate::generate::Totals;

/// What the pieces of one answer have in common, and the way to its client.
pub(super) struct Events {
    pub(super) app: App,
    pieces: Pieces,
    pub(super) id: String,
    pub(super) created: u64,
}

/// What a stream ends with.
pub(super) struct Ending {
    pub(super) includes_usage: bool,
    pub(super) with_speed: bool,
}

impl Events {
    /// Streams what `write` sends; names of answers begin with `prefix`.
    pub(super) fn respond<W: Future<Output = ()> + Send + 'static>(
        app: App,
        prefix: &str,
        write: impl FnOnce(Self) -> W,
    ) -> Response {
        let (id, created) = (app.new_id(prefix), now());
        streamed("text/event-stream", |pieces| {
            write(Self {
                app,
                pieces,
                id,
                created,
            })
        })
    }

    pub(super) fn model(&self) -> String {
        self.app.settings().model_name.clone()
    }

    /// Sends one; a client that is gone gets none.
    pub(super) async fn send(&self, event: &impl Serialize) {
        if let Ok(json) = serde_json::to_string(event) {
            let _ = self.pieces.send(format!("data: {json}\n\n")).await;
        }
    }

    /// Ends the stream with what went wrong.
    pub(super) async fn fail(&self, error: &ApiError) {
        self.send(&error.body()).await;
    }

    /// Ends the stream; `piece` holds the counts, if they are wanted.
    pub(super) async fn end<P: Serialize>(
        &self,
        totals: &Totals,
        ending: &Ending,
        piece: impl FnOnce(UsageField) -> P,
    ) {
        if ending.includes_usage || ending.with_speed {
            let usage = UsageField::new(totals, ending.with_speed);
            self.send(&piece(usage)).await;
        }
        let _ = self.pieces.send("data: [DONE]\n\n".to_owned()).await;
    }
}
