//! `ktx chat` on a terminal, and Ctrl-C.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::{command, folder};

/// Longest wait for a text, on a machine with other work.
const PATIENCE: Duration = Duration::from_secs(60);
/// Slow enough that Ctrl-C comes before the end of the story.
const SLOW: [&str; 7] = [
    "chat",
    "--temperature",
    "0",
    "--precision",
    "f32",
    "--threads",
    "1",
];

/// A program that runs, and what it has printed so far.
struct Conversation {
    child: Child,
    stdin: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Conversation {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let (sender, output) = channel();
        let mut stdout = child.stdout.take().expect("it is piped");
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let stdin = child.stdin.take().expect("it is piped");
        Self {
            child,
            stdin,
            output,
            seen: String::new(),
        }
    }

    fn say(&mut self, text: &str) {
        self.stdin
            .write_all(text.as_bytes())
            .and_then(|()| self.stdin.flush())
            .expect("the program reads");
    }

    /// Waits until a text is printed behind all that was waited for before.
    fn wait_for(&mut self, text: &str) {
        let begin = Instant::now();
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = PATIENCE.saturating_sub(begin.elapsed());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("`{text}` did not come; there is: {}", self.seen),
            }
        }
    }

    fn end(mut self) -> Option<i32> {
        drop(self.stdin);
        self.child.wait().expect("the program ends").code()
    }
}

/// The program on a terminal of its own, which `script` of util-linux makes; nothing where that is missing.
fn on_terminal(arguments: &[&str]) -> Option<Conversation> {
    // `exec`: a shell that waits for the program would get the Ctrl-C too, and some end with it.
    let call = [&["exec", env!("CARGO_BIN_EXE_ktx")], arguments]
        .concat()
        .join(" ");
    let mut script = Command::new("script");
    script
        .args(["-qefc", &call, "/dev/null"])
        .env("TERM", "xterm")
        .env("XDG_STATE_HOME", folder().join("state"));
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("skipped: there is no `script` (util-linux)");
        return None;
    }
    Some(Conversation::start(script))
}

#[cfg(target_os = "linux")]
#[test]
fn on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves() {
    let Some(mut chat) = on_terminal(&SLOW) else {
        return;
    };
    chat.wait_for("Chat: ");
    chat.say("Tell me a long story.\r");
    chat.wait_for("Once");
    chat.say("\x03");
    chat.wait_for("(stopped)");
    chat.wait_for("eval rate:");
    chat.wait_for("Chat: ");
    chat.say("What is 7 + 5?\r");
    chat.wait_for("7 + 5 = 12.");
    chat.wait_for("Chat: ");
    chat.say("\x1b[A");
    chat.wait_for("What is 7 + 5?");
    chat.say("\x03");
    chat.wait_for("Ctrl-D leaves");
    chat.wait_for("Chat: ");
    chat.say("\x04");
    assert_eq!(chat.end(), Some(0));
}

#[test]
fn in_a_script_ctrl_c_stops_the_answer_and_ends_the_program_between_answers() {
    let interrupt = |child: &Child| {
        let killed = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(killed.expect("kill can be called").success());
    };
    let mut chat = Conversation::start(command(&SLOW));
    chat.say("Tell me a long story.\n");
    chat.wait_for("Once");
    interrupt(&chat.child);
    chat.say("What is 7 + 5?\n");
    chat.wait_for("7 + 5 = 12.");
    chat.wait_for("eval rate:");
    chat.wait_for("eval rate:");
    // The prompt's rate and the generation's: the answer is at its end.
    let Conversation {
        mut child,
        stdin: _stdin,
        ..
    } = chat;
    interrupt(&child);
    assert_eq!(child.wait().expect("the program ends").code(), Some(130));
}
