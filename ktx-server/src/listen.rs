//! Connections: accepted up to a limit, with time limits, and drained at the end.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::app::App;
use crate::patience::Patient;

/// How long the server waits when the system gives it no more connections.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of a request's header at most.
const HEADER_BYTES: usize = 64 << 10;
/// How often a draining server looks whether all answers are given.
const DRAIN_STEP: Duration = Duration::from_millis(20);

/// Serves until `stop` is done, then finishes what runs.
pub(crate) async fn serve(
    app: App,
    router: Router,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) {
    let limit = Arc::new(Semaphore::new(app.settings().max_connections));
    let graceful = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let accepted = async {
            let permit = Arc::clone(&limit).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = &mut stop => break,
            accepted = accepted => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Too many open files, mostly: it passes when connections close.
                tracing::warn!("a connection was not accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = graceful.watch(connection(&app, router.clone(), stream));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("connection of {peer}: {error}");
            }
            drop(permit);
        });
    }
    drop(listener);
    drain(&app, graceful).await;
}

fn connection(
    app: &App,
    router: Router,
    stream: TcpStream,
) -> http1::Connection<TokioIo<Patient<TcpStream>>, TowerToHyperService<Router>> {
    // Small pieces of streams are sent at once.
    let _ = stream.set_nodelay(true);
    let stream = Patient::new(stream, app.settings().write_timeout);
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.settings().header_timeout)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
}

/// Takes no more requests and waits for those that run.
async fn drain(app: &App, graceful: GracefulShutdown) {
    app.scheduler().close();
    let all = async {
        while app.scheduler().is_alive() {
            tokio::time::sleep(DRAIN_STEP).await;
        }
        graceful.shutdown().await;
    };
    if tokio::time::timeout(app.settings().drain_timeout, all)
        .await
        .is_err()
    {
        tracing::warn!("shutting down with unfinished answers: they took too long");
    }
}
