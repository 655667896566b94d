//! Ctrl-C: the first one stops the running answer, one that finds none ends the program.

use std::sync::{Arc, Mutex, PoisonError};

use ktx_core::CancelHandle;

use crate::error::CliError;

/// Exit code of a program that Ctrl-C ended, as shells have it: 128 and the signal's number.
const INTERRUPTED: i32 = 130;

/// What Ctrl-C stops.
#[derive(Clone, Default)]
pub(crate) struct Interrupt {
    running: Arc<Mutex<Option<CancelHandle>>>,
}

impl Interrupt {
    /// Takes over the signal.
    pub(crate) fn install() -> Result<Self, CliError> {
        let interrupt = Self::default();
        let running = Arc::clone(&interrupt.running);
        ctrlc::set_handler(move || {
            let answer = running
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            match answer {
                Some(answer) => answer.cancel(),
                None => std::process::exit(INTERRUPTED),
            }
        })?;
        Ok(interrupt)
    }

    /// Until the result is dropped, the next Ctrl-C stops this; a second one ends the program.
    pub(crate) fn stops(&self, answer: CancelHandle) -> Running<'_> {
        self.set(Some(answer));
        Running(self)
    }

    fn set(&self, answer: Option<CancelHandle>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = answer;
    }
}

/// An answer that Ctrl-C stops.
pub(crate) struct Running<'a>(&'a Interrupt);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}
