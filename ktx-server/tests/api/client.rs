//! A client of its own, so that the tests see what goes over the wire.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// Sends requests to one server.
#[derive(Clone, Copy)]
pub struct Client {
    address: SocketAddr,
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The JSON of an answer that must be a good one.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The message of an answer that must be an error of this status, in OpenAI's shape.
    pub fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let error = &self.json()["error"];
        assert!(error["type"].is_string(), "{}", self.body);
        let message = error["message"].as_str();
        message.expect("it has a message").to_owned()
    }

    /// The pieces of a stream of server-sent events.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let mut events: Vec<&str> = self
            .body
            .split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").expect("an event has data"))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        let json = |event: &str| serde_json::from_str(event).expect("an event is JSON");
        events.into_iter().map(json).collect()
    }
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the server listens");
        let limit = Some(Duration::from_secs(60));
        stream.set_read_timeout(limit).expect("a limit is set");
        stream
    }

    /// One request on a connection of its own.
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Reply {
        let mut stream = self.connect();
        stream
            .write_all(&request(method, path, headers, body))
            .expect("it is sent");
        read(&mut BufReader::new(stream))
    }
}

/// A request as bytes.
pub fn request(method: &str, path: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    if method == "POST" {
        text += &format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        );
    }
    for header in headers {
        text += header;
        text += "\r\n";
    }
    text += "\r\n";
    [text.as_bytes(), body].concat()
}

/// Reads an answer to its end.
pub fn read(stream: &mut impl BufRead) -> Reply {
    let mut line = String::new();
    stream.read_line(&mut line).expect("an answer comes");
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status: {line:?}"));
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("headers come");
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_lowercase(), value.trim().to_owned());
            }
            None => break,
        }
    }
    let mut body = Vec::new();
    if headers
        .get("transfer-encoding")
        .is_some_and(|e| e == "chunked")
    {
        read_chunks(stream, &mut body);
    } else {
        let length = headers.get("content-length");
        let length = length.and_then(|l| l.parse().ok()).unwrap_or(0);
        body.resize(length, 0);
        stream.read_exact(&mut body).expect("the body comes");
    }
    Reply {
        status,
        headers,
        body: String::from_utf8(body).expect("the body is UTF-8"),
    }
}

fn read_chunks(stream: &mut impl BufRead, body: &mut Vec<u8>) {
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("a chunk comes");
        let length = usize::from_str_radix(line.trim(), 16).expect("a chunk has a length");
        let mut chunk = vec![0; length + 2];
        stream.read_exact(&mut chunk).expect("the chunk comes");
        if length == 0 {
            return;
        }
        body.extend_from_slice(&chunk[..length]);
    }
}
