//! `ktx serve` as a process: many connections, and its end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, setrlimit};

use super::command;

/// Files that a process has open beside its connections.
const OTHER_FILES: u64 = 400;

/// A running server; killed with its value.
struct Running {
    process: Child,
    address: String,
    /// Kept open: a program that can say nothing fails.
    _said: BufReader<ChildStderr>,
}

impl Running {
    fn new(arguments: &[&str]) -> Self {
        let all = [&["serve", "--port", "0"], arguments].concat();
        let mut process = command(&all).spawn().expect("the program starts");
        let mut said = BufReader::new(process.stderr.take().expect("it is piped"));
        let address = said
            .by_ref()
            .lines()
            .map_while(Result::ok)
            .find_map(|line| {
                let (_, address) = line.split_once(" is served at http://")?;
                Some(address.to_owned())
            });
        let address = address.expect("it says where it is");
        Self {
            process,
            address,
            _said: said,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("it listens");
        let limit = Some(Duration::from_secs(60));
        stream.set_read_timeout(limit).expect("a limit is set");
        stream
    }

    /// All that is answered to a question.
    fn ask(&self, question: &str) -> String {
        let body = format!(r#"{{"prompt": "{question}", "max_tokens": 8, "temperature": 0}}"#);
        let mut stream = self.connect();
        let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                    Content-Type: application/json\r\nContent-Length:";
        write!(stream, "{head} {}\r\n\r\n{body}", body.len()).expect("it is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        answer
    }

    /// Bytes in memory.
    fn resident(&self) -> u64 {
        let path = format!("/proc/{}/statm", self.process.id());
        let text = std::fs::read_to_string(path).expect("the system tells");
        let pages = text.split(' ').nth(1).and_then(|p| p.parse::<u64>().ok());
        pages.expect("a number") * 4096
    }

    fn terminate(mut self) -> ExitStatus {
        let process = Pid::from_child(&self.process);
        kill_process(process, Signal::TERM).expect("it runs");
        self.process.wait().expect("it ends")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Raises this process's limit of open files as far as it may, and says how many connections fit, up to `wanted`.
fn connections(wanted: u64) -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("up to the maximum is allowed");
    let fit = limit.maximum.map_or(wanted, |most| most - OTHER_FILES);
    if fit < wanted {
        eprintln!("{fit} connections instead of {wanted}: the system allows no more open files");
    }
    fit.min(wanted)
}

#[test]
fn ten_thousand_idle_connections_take_little_and_hold_nobody_up() {
    let server = Running::new(&["--context", "256"]);
    assert!(server.ask("What is").starts_with("HTTP/1.1 200"));
    let (count, before) = (connections(10_000), server.resident());
    let begin = Instant::now();
    let idle: Vec<TcpStream> = (0..count).map(|_| server.connect()).collect();
    assert!(server.ask("What is").starts_with("HTTP/1.1 200"));
    let (took, each) = (
        begin.elapsed(),
        server.resident().saturating_sub(before) / count,
    );
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(each < 32 << 10, "a connection takes {each} bytes");
    let begin = Instant::now();
    assert!(server.terminate().success());
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "idle connections hold its end up"
    );
    drop(idle);
}
