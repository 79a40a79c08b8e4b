//! Shows that a mesh works: one completion, asked for over HTTP like any other
//! and written to standard output as it arrives.

use std::io::{IsTerminal as _, Write as _};

use crate::client::ClientError;
use crate::client::http::Server;
use crate::client::openai::{Ask, Prompt, Summary, complete, first_model};

const PROMPT: &str = "Once upon a time";
const TOKENS: u32 = 80;

/// Why the text could not be shown.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] std::io::Error),
}

/// Streams one completion.
pub async fn show(server: &Server) -> Result<(), ShowError> {
    let ask = Ask {
        model: first_model(server).await?,
        prompt: Prompt::Text(PROMPT.to_owned()),
        max_tokens: TOKENS,
        temperature: Some(0.7),
        // The same text every time: sampling depends on seed and position only.
        seed: Some(1),
        ignore_eos: false,
        count_each: false,
    };
    let (bold, plain) =
        if std::io::stdout().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    write(&format!("\n  {bold}{PROMPT}{plain}"))?;
    let summary = complete(server, &ask, write).await?;
    write(&format!("\n\n  [{}]\n", speed(&summary)))
}

/// Writes text to standard output at once.
pub fn write(text: &str) -> Result<(), ShowError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// One line on how fast a completion came.
pub fn speed(summary: &Summary) -> String {
    let tokens = summary.completion_tokens;
    let first = summary.first.as_secs_f64() * 1e3;
    match summary.rate() {
        Some(rate) => {
            format!("{tokens} tokens, {rate:.1} tokens/s, the first after {first:.0} ms")
        }
        None => format!("{tokens} tokens, the first after {first:.0} ms"),
    }
}
