//! Keys that requests must show.

use std::fmt;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::error::ApiError;

/// The keys of a server. Never printed.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<String>);

impl ApiKeys {
    /// These keys; empty ones are left out.
    pub fn new(keys: impl IntoIterator<Item = String>) -> Self {
        Self(keys.into_iter().filter(|key| !key.is_empty()).collect())
    }

    /// Whether everybody may ask.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this is one of the keys. Takes the same time for all texts of one length.
    pub fn allow(&self, shown: &str) -> bool {
        let found = self.0.iter().fold(Choice::from(0), |found, key| {
            found | key.as_bytes().ct_eq(shown.as_bytes())
        });
        found.into()
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({} of them)", self.0.len())
    }
}

/// Lets requests pass that show a key: `Authorization: Bearer KEY`.
pub(crate) async fn require_key(State(app): State<App>, request: Request, next: Next) -> Response {
    let keys = &app.settings().api_keys;
    let shown = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim());
    match shown {
        _ if keys.is_empty() => next.run(request).await,
        Some(shown) if keys.allow(shown) => next.run(request).await,
        Some(_) => {
            ApiError::unauthorized("the API key is not one of this server's").into_response()
        }
        None => ApiError::unauthorized(
            "this server wants an API key; send it as `Authorization: Bearer KEY`",
        )
        .into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_are_allowed_and_none_is_printed() {
        let keys = ApiKeys::new(["sk-one".to_owned(), String::new(), "sk-two".to_owned()]);
        assert!(keys.allow("sk-one") && keys.allow("sk-two"));
        assert!(!keys.allow("") && !keys.allow("sk-on") && !keys.allow("sk-onee"));
        assert!(!format!("{keys:?}").contains("sk-"));
        assert!(ApiKeys::new([String::new()]).is_empty());
    }

    /// A comparison that stops at the first difference takes a thousandth of the time for a key that
    /// differs at once.
    #[test]
    fn a_key_that_differs_at_once_takes_as_long_as_one_that_differs_at_the_end() {
        const LENGTH: usize = 1 << 16;
        let key = "k".repeat(LENGTH);
        let keys = ApiKeys::new([key.clone()]);
        let early = format!("x{}", &key[1..]);
        let late = format!("{}x", &key[1..]);
        let time = |shown: &str| {
            let once = || {
                let begin = std::time::Instant::now();
                assert!(!keys.allow(std::hint::black_box(shown)));
                begin.elapsed()
            };
            (0..50).map(|_| once()).min().unwrap_or_default()
        };
        let (early, late) = (time(&early), time(&late));
        assert!(early * 4 > late, "{early:?} and {late:?}");
    }
}
