//! Events from the scheduler's thread to one that waits for them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::{Event, TokenSink};

#[derive(Default)]
struct State {
    events: VecDeque<Event>,
    sender_gone: bool,
    receiver_gone: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn with<T>(&self, body: impl FnOnce(&mut State) -> T) -> T {
        let result = body(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
        result
    }
}

/// The end of a stream that the scheduler writes.
pub struct StreamSink(Arc<Shared>);

/// The events of one request, as they come; the thread waits for each. Dropped, it gives the request up.
pub struct EventStream(Arc<Shared>);

/// A stream of events, for callers that wait on a thread.
pub fn stream() -> (StreamSink, EventStream) {
    let shared = Arc::new(Shared::default());
    (StreamSink(Arc::clone(&shared)), EventStream(shared))
}

impl TokenSink for StreamSink {
    fn send(&mut self, event: Event) -> bool {
        self.0.with(|state| {
            state.events.push_back(event);
            !state.receiver_gone
        })
    }

    fn is_closed(&self) -> bool {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.receiver_gone
    }
}

impl Drop for StreamSink {
    fn drop(&mut self) {
        self.0.with(|state| state.sender_gone = true);
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.0.with(|state| state.receiver_gone = true);
    }
}

impl Iterator for EventStream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            if state.sender_gone {
                return None;
            }
            state = self
                .0
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
