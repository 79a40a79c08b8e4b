//! The load: requests that are the same in every run, in a closed loop (every
//! stream asks again when its answer is complete) or an open one (requests arrive
//! when they arrive), and when each piece of an answer came.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use parking_lot::Mutex;
use tokio::task::JoinSet;

use crate::bench::stats::{Random, Times, arrivals};
use crate::client::ClientError;
use crate::client::http::Server;
use crate::client::openai::{Ask, Prompt, Summary, complete_counted};

/// How often what streams have written is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A server, and how it is asked.
#[derive(Debug)]
pub struct Target {
    server: Server,
    model: String,
    /// Prompts are made of token ids below this.
    vocab: u32,
    asking: Asking,
}

/// What of the API a server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asking {
    /// Prompts as text, not as token ids.
    text: bool,
    /// Tokens counted in every event.
    count_each: bool,
}

/// How long prompts and answers are, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub prompt: Length,
    pub answer: Length,
}

/// A number of tokens, or a range of them with even chances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    least: usize,
    most: usize,
}

impl Length {
    pub const fn exactly(tokens: usize) -> Self {
        Self { least: tokens, most: tokens }
    }

    pub fn most(self) -> usize {
        self.most
    }

    fn draw(self, random: &mut Random) -> usize {
        self.least + random.below((self.most - self.least) as u64 + 1) as usize
    }
}

impl std::fmt::Display for Length {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.least == self.most {
            true => write!(f, "{}", self.most),
            false => write!(f, "{}..{}", self.least, self.most),
        }
    }
}

impl std::str::FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse::<usize>().ok().filter(|&number| number > 0);
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        match (number(least), number(most)) {
            (Some(least), Some(most)) if least <= most => Ok(Self { least, most }),
            _ => Err(format!("`{text}` is neither a number of tokens nor a range such as 32..512")),
        }
    }
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub summary: Summary,
    pub pieces: Vec<Piece>,
}

/// A piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// When it came.
    pub at: Instant,
    /// Tokens that came with it.
    pub tokens: u64,
}

impl Target {
    /// Asks once, which pays for pages and connections that later requests find ready,
    /// and finds out what the server takes.
    pub async fn open(server: Server, model: String, vocab: u32) -> Result<Self, ClientError> {
        let asking = Asking { text: false, count_each: true };
        let mut target = Self { server, model, vocab: vocab.max(2), asking };
        let shape = Shape { prompt: Length::exactly(16), answer: Length::exactly(8) };
        let last = Asking { text: true, count_each: false };
        for asking in [asking, Asking { count_each: false, ..asking }, last] {
            target.asking = asking;
            match target.ask(0, shape).await {
                Err(ClientError::Refused { .. }) if asking != last => {}
                done => return done.map(|_| target),
            }
        }
        Ok(target)
    }

    pub fn model(&self) -> &str {
        &self.model
    }

    pub fn takes_ids(&self) -> bool {
        !self.asking.text
    }

    /// Asks request number `key`.
    pub async fn ask(&self, key: u64, shape: Shape) -> Result<Answer, ClientError> {
        let mut pieces = Vec::new();
        let summary = self.follow(key, shape, |piece| pieces.push(piece)).await?;
        Ok(Answer { summary, pieces })
    }

    /// Asks request number `key` and tells of each piece as it comes.
    pub async fn follow(
        &self,
        key: u64,
        shape: Shape,
        mut heard: impl FnMut(Piece),
    ) -> Result<Summary, ClientError> {
        let mut before = 0;
        complete_counted::<ClientError>(&self.server, &self.request(key, shape), |_, tokens| {
            heard(Piece { at: Instant::now(), tokens: tokens.saturating_sub(before) });
            before = tokens;
            Ok(())
        })
        .await
    }

    fn request(&self, key: u64, shape: Shape) -> Ask {
        let mut random = Random::new(key);
        let ids = |random: &mut Random, count| -> Vec<u32> {
            (0..count).map(|_| random.below(u64::from(self.vocab)) as u32).collect()
        };
        let length = shape.prompt.draw(&mut random);
        let prompt = ids(&mut random, length);
        let prompt = match self.asking.text {
            true => Prompt::Text(words(&prompt)),
            false => Prompt::Tokens(prompt),
        };
        Ask {
            model: self.model.clone(),
            prompt,
            max_tokens: shape.answer.draw(&mut random) as u32,
            temperature: Some(0.0),
            seed: None,
            ignore_eos: true,
            count_each: self.asking.count_each,
        }
    }
}

/// About as many tokens of text as there are ids. The server's own count decides.
fn words(ids: &[u32]) -> String {
    let letter = |n: u32| char::from(b'a' + (n % 26) as u8);
    ids.iter().map(|&id| format!(" {}{}", letter(id), letter(id / 26))).collect()
}

impl Answer {
    /// Times between one piece and the next.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.pieces.windows(2).map(|pair| pair[1].at - pair[0].at)
    }
}

/// What a load came to.
#[derive(Debug)]
pub struct Done {
    pub answers: Vec<Answer>,
    pub wall: Duration,
}

impl Done {
    pub fn tokens(&self) -> u64 {
        self.answers.iter().map(|answer| answer.summary.completion_tokens).sum()
    }

    pub fn prompt_tokens(&self) -> u64 {
        self.answers.iter().map(|answer| answer.summary.prompt_tokens).sum()
    }

    pub fn ttft(&self) -> Times {
        Times::new(self.answers.iter().map(|answer| answer.summary.first))
    }

    pub fn tpot(&self) -> Times {
        Times::new(self.answers.iter().filter_map(|answer| answer.summary.per_token()))
    }

    pub fn itl(&self) -> Times {
        Times::new(self.answers.iter().flat_map(Answer::gaps))
    }
}

/// `streams` streams of `requests` requests each, numbered from `first` on.
pub async fn closed(
    target: Arc<Target>,
    first: u64,
    streams: usize,
    requests: usize,
    shape: Shape,
) -> anyhow::Result<Done> {
    let began = Instant::now();
    let mut running = JoinSet::new();
    for stream in 0..streams {
        let target = target.clone();
        running.spawn(async move {
            let mut answers = Vec::with_capacity(requests);
            for request in 0..requests {
                let key = first + (stream * requests + request) as u64;
                answers.push(target.ask(key, shape).await?);
            }
            Ok(answers)
        });
    }
    let answers = finished(running).await?.into_iter().flatten().collect();
    Ok(Done { answers, wall: began.elapsed() })
}

/// `requests` requests, numbered from `first` on, that arrive at `rate` a second
/// whatever has been answered.
pub async fn open(
    target: Arc<Target>,
    first: u64,
    rate: f64,
    requests: usize,
    shape: Shape,
    seed: u64,
) -> anyhow::Result<Done> {
    let began = Instant::now();
    let mut running = JoinSet::new();
    for (key, at) in (first..).zip(arrivals(rate, requests, seed)) {
        tokio::time::sleep_until((began + at).into()).await;
        let target = target.clone();
        running.spawn(async move { target.ask(key, shape).await });
    }
    let answers = finished(running).await?;
    Ok(Done { answers, wall: began.elapsed() })
}

/// Streams that run until they are dropped, and what has been heard of them.
pub struct Streams {
    running: JoinSet<Result<Summary, ClientError>>,
    heard: Vec<Arc<Mutex<Vec<Piece>>>>,
}

impl Streams {
    /// `count` requests, numbered from `first` on.
    pub fn start(target: &Arc<Target>, first: u64, count: usize, shape: Shape) -> Self {
        let heard: Vec<Arc<Mutex<Vec<Piece>>>> = (0..count).map(|_| Arc::default()).collect();
        let mut running = JoinSet::new();
        for (key, heard) in (first..).zip(&heard) {
            let (target, heard) = (target.clone(), heard.clone());
            running.spawn(async move {
                target.follow(key, shape, |piece| heard.lock().push(piece)).await
            });
        }
        Self { running, heard }
    }

    pub fn heard(&self) -> Vec<Vec<Piece>> {
        self.heard.iter().map(|heard| heard.lock().clone()).collect()
    }

    /// Waits until `enough` of what has been heard. False if a stream ended before.
    pub async fn until(&mut self, enough: impl Fn(&[Vec<Piece>]) -> bool) -> anyhow::Result<bool> {
        loop {
            if enough(&self.heard()) {
                return Ok(true);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                done = self.running.join_next() => {
                    done.context("there is no stream")?.context("a stream failed")??;
                    return Ok(enough(&self.heard()));
                }
            }
        }
    }
}

/// Tokens a second of `streams` streams while all of them run, each `tokens` long
/// or so, prompts left out.
pub async fn decode(
    target: &Arc<Target>,
    first: u64,
    streams: usize,
    prompt: Length,
    tokens: usize,
) -> anyhow::Result<f64> {
    let shape = Shape { prompt, answer: Length::exactly(answer_for(tokens)) };
    let mut running = Streams::start(target, first, streams, shape);
    let wanted = (streams * tokens) as u64;
    running.until(|heard| together(heard).is_some_and(|(count, _)| count >= wanted)).await?;
    match together(&running.heard()) {
        // An end that came too soon leaves chance.
        Some((count, seconds)) if count * 2 >= wanted => Ok(count as f64 / seconds),
        _ => bail!("the streams did not run together long enough: raise --decode-tokens"),
    }
}

/// Tokens that a stream asks for to be there for `tokens` tokens' time with all
/// the others, however late they begin.
pub const fn answer_for(tokens: usize) -> usize {
    2 * tokens + 64
}

/// Tokens, and the seconds that they took, from when the last stream began to now,
/// or to when the first one ended.
fn together(heard: &[Vec<Piece>]) -> Option<(u64, f64)> {
    let begun = heard.iter().map(|pieces| pieces.first().map(|piece| piece.at)).max()??;
    let ended = heard.iter().filter_map(|pieces| pieces.last()).map(|piece| piece.at).min()?;
    let seconds = ended.checked_duration_since(begun)?.as_secs_f64();
    let within = heard.iter().flatten().filter(|piece| piece.at > begun && piece.at <= ended);
    let begun_all = heard.iter().all(|pieces| !pieces.is_empty());
    (begun_all && seconds > 0.0).then(|| (within.map(|piece| piece.tokens).sum(), seconds))
}

async fn finished<T: 'static>(
    mut running: JoinSet<Result<T, ClientError>>,
) -> anyhow::Result<Vec<T>> {
    let mut all = Vec::new();
    while let Some(done) = running.join_next().await {
        all.push(done.context("a stream of the benchmark failed")??);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: bool) -> Target {
        let server = Server::from_url("http://127.0.0.1:1", None).unwrap();
        let asking = Asking { text, count_each: false };
        Target { server, model: "m".to_owned(), vocab: 300, asking }
    }

    #[test]
    fn requests_differ_from_each_other_and_not_between_runs() {
        let shape = Shape { prompt: "4..64".parse().unwrap(), answer: Length::exactly(5) };
        let prompt = |key| match target(false).request(key, shape).prompt {
            Prompt::Tokens(ids) => ids,
            other => panic!("{other:?}"),
        };
        assert_eq!(prompt(1), prompt(1));
        assert_ne!(prompt(1)[..4], prompt(2)[..4]);
        let lengths: Vec<usize> = (0..200).map(|key| prompt(key).len()).collect();
        assert!(lengths.iter().all(|length| (4..=64).contains(length)));
        assert!(lengths.iter().min() < Some(&10) && lengths.iter().max() > Some(&58));
        assert!(prompt(3).iter().all(|&id| id < 300));
        assert!(matches!(target(true).request(1, shape).prompt, Prompt::Text(_)));
        assert_eq!(target(false).request(1, shape).max_tokens, 5);
    }

    #[test]
    fn lengths_are_numbers_or_ranges() {
        for text in ["7", "7..9"] {
            assert_eq!(text.parse::<Length>().unwrap().to_string(), text);
        }
        for text in ["", "0", "9..7", "a..b", "-1"] {
            assert!(text.parse::<Length>().unwrap_err().contains(&format!("`{text}`")));
        }
    }

    #[test]
    fn streams_are_counted_while_all_of_them_run() {
        let start = Instant::now();
        let pieces = |from: u64, to: u64, tokens| -> Vec<Piece> {
            let at = |ms| start + Duration::from_millis(10 * ms);
            (from..=to).map(|ms| Piece { at: at(ms), tokens }).collect()
        };
        // Both run from 20 ms to 100 ms: eight pieces each, the one's of two tokens.
        let (count, seconds) = together(&[pieces(0, 10, 1), pieces(2, 12, 2)]).unwrap();
        assert!(count == 24 && (seconds - 0.08).abs() < 1e-9, "{count} {seconds}");
        assert_eq!(together(&[pieces(0, 10, 1)]).unwrap().0, 10);
        assert_eq!(together(&[pieces(0, 3, 1), pieces(5, 9, 1)]), None, "one after the other");
        assert_eq!(together(&[pieces(0, 3, 1), Vec::new()]), None, "one has not begun");
        assert_eq!(together(&[]), None);
    }
}
