//! A server, from its address to its end.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ktx_core::serving::Scheduler;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::app::App;
use crate::error::ServerError;
use crate::plan::PlanView;
use crate::settings::ServerSettings;
use crate::{listen, routes};

/// Threads that serve connections: they wait, mostly, and the engine needs the others.
const THREADS: usize = 2;
/// Time for what the prefix cache writes at the end.
const SAVE_TIME: Duration = Duration::from_secs(30);
/// How often it is looked whether that is done.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Connections that the system holds until they are accepted; of those beyond it clients hear nothing for a second.
const BACKLOG: u32 = 4096;
/// Threads that render templates and encode prompts.
const BLOCKING_THREADS: usize = 16;

/// A server that has its address.
pub struct Server {
    app: App,
    runtime: Runtime,
    listener: TcpListener,
    address: SocketAddr,
    stop: Arc<Notify>,
}

/// Stops a server from elsewhere.
#[derive(Clone)]
pub struct StopHandle(Arc<Notify>);

impl StopHandle {
    /// No more requests are taken; those that are there are answered.
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

impl Server {
    /// Takes an address. Connections wait until it runs.
    ///
    /// # Errors
    /// [`ServerError`] if the address is none, or taken.
    pub fn bind(
        address: &str,
        scheduler: Scheduler,
        settings: ServerSettings,
        plan: PlanView,
    ) -> Result<Self, ServerError> {
        let listen = |source| ServerError::Listen {
            address: address.to_owned(),
            source,
        };
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("ktx-server")
            .enable_all()
            .build()
            .map_err(ServerError::Start)?;
        let listener = {
            let _inside = runtime.enter();
            listen_on(address).map_err(listen)?
        };
        let address = listener.local_addr().map_err(listen)?;
        let plan = plan.with_engine(scheduler.engine(), &settings.model_name);
        Ok(Self {
            app: App::new(scheduler, settings, plan),
            runtime,
            listener,
            address,
            stop: Arc::new(Notify::new()),
        })
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What stops it.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop))
    }

    /// Serves until [`StopHandle::stop`], then answers what was asked by then.
    pub fn run(self) {
        let stop = Arc::clone(&self.stop);
        self.serve(async move { stop.notified().await });
    }

    /// Serves until the process is told to end (Ctrl-C, SIGTERM), then answers what was asked by then.
    ///
    /// # Errors
    /// [`ServerError::Start`] if the signals cannot be watched.
    pub fn run_until_interrupted(self) -> Result<(), ServerError> {
        let _inside = self.runtime.enter();
        #[cfg(unix)]
        let mut terminate = {
            use tokio::signal::unix::{SignalKind, signal};
            signal(SignalKind::terminate()).map_err(ServerError::Start)?
        };
        let stop = Arc::clone(&self.stop);
        drop(_inside);
        self.serve(async move {
            #[cfg(unix)]
            let terminated = terminate.recv();
            #[cfg(not(unix))]
            let terminated = std::future::pending::<()>();
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminated => {}
                () = stop.notified() => {}
            }
        });
        Ok(())
    }

    fn serve(self, stop: impl Future<Output = ()>) {
        let Self {
            app,
            runtime,
            listener,
            ..
        } = self;
        let (router, scheduler) = (routes::router(&app), app.scheduler().clone());
        runtime.block_on(listen::serve(app, router, listener, stop));
        // Connections that did not end by now are closed, and their answers given up.
        runtime.shutdown_background();
        let end = Instant::now() + SAVE_TIME;
        while scheduler.is_alive() && Instant::now() < end {
            thread::sleep(LOOK_AGAIN);
        }
    }
}

/// Listens on the first of a name's addresses that can be had. To be called inside of a runtime.
fn listen_on(address: &str) -> io::Result<TcpListener> {
    let mut error = io::ErrorKind::AddrNotAvailable.into();
    for address in address.to_socket_addrs()? {
        let listen = || {
            let socket = match address {
                SocketAddr::V4(_) => TcpSocket::new_v4()?,
                SocketAddr::V6(_) => TcpSocket::new_v6()?,
            };
            // As the system's own way to listen does: a port is free again at once. Elsewhere it means another thing.
            #[cfg(unix)]
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        match listen() {
            Ok(listener) => return Ok(listener),
            Err(e) => error = e,
        }
    }
    Err(error)
}
