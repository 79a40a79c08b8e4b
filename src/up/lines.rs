//! Lines of a process's output, of bounded length: a longer one is cut into
//! pieces, so that a process cannot make its parent hold more than one buffer.

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// How a process marks the one line that says why it ends.
pub const ERROR_MARK: &str = "error: ";
/// The longest piece, in bytes.
const LONGEST: usize = 16 << 10;

/// Reads lines from a pipe.
pub struct Lines<R> {
    pipe: R,
    buffer: Vec<u8>,
    ended: bool,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub fn new(pipe: R) -> Self {
        Self { pipe, buffer: Vec::with_capacity(LONGEST), ended: false }
    }

    /// The next line without its end, or `None` when the pipe is closed. Bytes
    /// that are not UTF-8 are replaced.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line = text(&self.buffer[..end]);
                self.buffer.drain(..=end);
                return Some(line);
            }
            if self.buffer.len() == LONGEST || (self.ended && !self.buffer.is_empty()) {
                let line = text(&self.buffer);
                self.buffer.clear();
                return Some(line);
            }
            if self.ended {
                return None;
            }
            let room = (LONGEST - self.buffer.len()) as u64;
            let read = (&mut self.pipe).take(room).read_buf(&mut self.buffer).await;
            self.ended = !matches!(read, Ok(count) if count > 0);
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\r').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_cut_at_their_ends_and_when_too_long() {
        let long = "x".repeat(LONGEST + 5);
        let written = format!("one\r\n\n{long}\nlast");
        let mut lines = Lines::new(written.as_bytes());
        let mut read = Vec::new();
        while let Some(line) = lines.next().await {
            read.push(line);
        }
        assert_eq!(read[..2], ["one", ""]);
        assert_eq!((read[2].len(), read[3].as_str()), (LONGEST, "xxxxx"));
        assert_eq!(read[4..], ["last"]);
    }
}
